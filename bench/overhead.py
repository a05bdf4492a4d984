"""What is beside the arithmetic of gather_logprobs on one CPU thread: python -m bench.overhead

Of few rows: what torch and Python take for a call. A Function that only hands out a tensor made before is the least that a
gradient formula written in Python costs, and there is no other way to add one to a library that loads beside several versions of
torch. Of many: what the memory takes, beside passes that compute next to nothing. The operating system hands out the memory of a
new gradient page by page, zeroed, on first use; NumPy asks for huge pages as we do, and torch does not.

Writes bench/results/overhead.json and .md.
"""

import argparse
import resource
import time
from collections.abc import Callable

import numpy as np
import torch

from bench import contenders
from bench.bench_logprob import eager, inplace
from rlhf_fast import gather_logprobs

FEW, MANY = (4, 16, 82), (1, 1024, 50_257)
ROUNDS, CALLS, LARGE_CALLS = 41, 500, 9
Runs = dict[str, list[float]]


class Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, made):
        ctx.made = made
        return made[0].detach()

    @staticmethod
    def backward(ctx, gradient):
        return ctx.made[1], None


def few_rows() -> dict[str, Runs]:
    """Microseconds a call, the contenders taking turns."""
    logits, labels = torch.randn(FEW) * 3, torch.randint(0, FEW[-1], FEW[:-1])
    leaf, upstream = logits.clone().requires_grad_(), torch.ones(FEW[:-1])
    made = (eager(logits, labels), torch.zeros(FEW))
    functions = {
        "rlhf_fast": lambda x: gather_logprobs(x, labels),
        "eager": lambda x: eager(x, labels),
        "a Function that does nothing": lambda x: Nothing.apply(x, made),
    }

    def both(function: Callable) -> None:
        function(leaf).backward(upstream)
        leaf.grad = None

    found: dict[str, Runs] = {name: {} for name in functions}
    for _ in range(ROUNDS):
        for name, function in functions.items():
            for what, call in (
                ("forward", lambda f=function: f(logits)),
                ("forward, for a gradient", lambda f=function: f(leaf)),
                ("forward + backward", lambda f=function: both(f)),
            ):
                call()
                start = time.process_time()
                for _ in range(CALLS):
                    call()
                found[name].setdefault(what, []).append((time.process_time() - start) / CALLS * 1e6)
    return found


def many_rows() -> tuple[Runs, dict[str, Runs]]:
    """Milliseconds of the forward pass; of the backward pass, those that the operating system took of them, and page faults."""
    logits, labels = torch.randn(MANY) * 3, torch.randint(0, MANY[-1], MANY[:-1])
    upstream = torch.full(MANY[:-1], 1e-3)

    def gradient(function: Callable) -> Callable:
        leaf = logits.clone().requires_grad_()
        out = function(leaf.view_as(leaf), labels)
        return lambda: out.backward(upstream)

    copy = logits.clone().numpy()
    backward = {
        "rlhf_fast, in place": lambda: gradient(inplace),
        "NumPy, twice the logits, in place": lambda: lambda: np.multiply(copy, 2, out=copy),
        "rlhf_fast": lambda: gradient(gather_logprobs),
        "NumPy, twice the logits": lambda: lambda: np.multiply(copy, 2),
        "eager": lambda: gradient(eager),
    }
    forward = {
        "rlhf_fast": lambda: gather_logprobs(logits, labels),
        "torch, sum of the logits": logits.sum,
        "eager": lambda: eager(logits, labels),
    }
    forward_runs: Runs = {name: [] for name in forward}
    backward_runs: dict[str, Runs] = {name: {"time": [], "system": [], "faults": []} for name in backward}
    for _ in range(LARGE_CALLS):
        for name, call in forward.items():
            start = time.process_time()
            call()
            forward_runs[name].append((time.process_time() - start) * 1e3)
        for name, prepare in backward.items():
            call, runs = prepare(), backward_runs[name]
            before, start = resource.getrusage(resource.RUSAGE_SELF), time.process_time()
            made = call()
            runs["time"].append((time.process_time() - start) * 1e3)
            after = resource.getrusage(resource.RUSAGE_SELF)
            runs["system"].append((after.ru_stime - before.ru_stime) * 1e3)
            runs["faults"].append(float(after.ru_minflt - before.ru_minflt))
            del call, made
    return forward_runs, backward_runs


def main() -> None:
    argparse.ArgumentParser(prog="python -m bench.overhead", description=__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(1)
    few, (forward, many) = few_rows(), many_rows()

    def relative(values: list[float], unit: float) -> str:
        return f"{contenders.median(values) / unit:.2f} ({contenders.spread([v / unit for v in values])})"

    unit = contenders.median(few["eager"]["forward + backward"])
    least = contenders.median(many["rlhf_fast, in place"]["time"])
    text = "\n".join(
        [
            f"{contenders.machine()}, 1 thread, torch {torch.__version__}; commit {contenders.commit()}",
            "",
            f"{FEW[0]}x{FEW[1]} rows of {FEW[2]}, in parts of eager's forward + backward: median of {ROUNDS}, least and most.",
            "",
            contenders.table(
                ["what", *few["eager"]],
                [[name, *(relative(values, unit) for values in runs.values())] for name, runs in few.items()],
            ),
            "",
            f"The forward pass of {MANY[0]}x{MANY[1]}x{MANY[2]} float32, in parts of ours: median of {LARGE_CALLS}, "
            "least and most.",
            "",
            contenders.table(
                ["what", "time"],
                [[name, relative(runs, contenders.median(forward["rlhf_fast"]))] for name, runs in forward.items()],
            ),
            "",
            f"The backward pass of {MANY[0]}x{MANY[1]}x{MANY[2]} float32, in parts of ours in place: median of {LARGE_CALLS}, "
            "least and most.",
            "",
            contenders.table(
                ["what", "time", "of that the operating system's", "page faults"],
                [
                    [
                        name,
                        relative(r["time"], least),
                        relative(r["system"], least),
                        f"{contenders.median(r['faults']):,.0f}",
                    ]
                    for name, r in many.items()
                ],
            ),
        ]
    )
    result = {
        "machine": contenders.machine(),
        "commit": contenders.commit(),
        "few, us": few,
        "forward, ms": forward,
        "backward, ms": many,
    }
    contenders.write("overhead", result, text)


if __name__ == "__main__":
    main()
