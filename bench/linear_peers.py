"""Log-probs from hidden states, forward and backward, beside peers: python -m bench.linear_peers [--vocab 32000 151936]

hidden [T, H], weight [V, H] and a different upstream gradient for each token, as PPO has it; gradients of hidden and weight. One
thread, each contender in a process of its own. Peak memory is what the first call adds to the inputs, the two gradients included.
Errors are against the same formula in float64, tile by tile, of the same rounded inputs, relative to the largest entry.

Needs `make peers`. Writes bench/results/linear-peers.json and .md. A contender that fails, for want of memory too, is in both.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import sys
from pathlib import Path

from bench import contenders

PEER = "trl-1.16"
OURS, REFERENCE = "rlhf_fast.linear_logprobs", "float64 reference"
SETTINGS = {"tokens": 2048, "hidden": 256, "threads": 1, "warm_up": 1}
# What TRL's trainers pass (trl/trainer/utils.py, _CHUNKED_LOGPROB_CHUNK_SIZE).
TRL_CHUNK = 32_768


# ------------------------------------------------------------------------------------------------------ contenders


def ours():
    import rlhf_fast

    return rlhf_fast.linear_logprobs


def whole():
    """The logits as a whole, then one pass over them."""
    import torch

    from rlhf_fast import gather_logprobs

    def run(hidden, weight, labels):
        return gather_logprobs(torch.nn.functional.linear(hidden, weight), labels, inplace_backward=True)

    return run


def eager():
    import torch

    def run(hidden, weight, labels):
        log_p = torch.nn.functional.linear(hidden, weight).log_softmax(-1)
        return log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)

    return run


def torch_chunked(rows: int | None):
    """torch.nn.functional.linear_cross_entropy, its own choice of rows a chunk or `rows`."""
    from torch.nn import LinearCrossEntropyOptions
    from torch.nn.functional import linear_cross_entropy

    options = LinearCrossEntropyOptions() if rows is None else LinearCrossEntropyOptions(batch_chunk_size=rows)

    def run(hidden, weight, labels):
        return -linear_cross_entropy(hidden, weight, labels, reduction="none", options=options)

    return run


def trl():
    """The way of TRL's fused language-model head; without a GPU its tiles are folded in torch instead of Triton."""
    from trl.kernels import ChunkedLogProbFunction

    def run(hidden, weight, labels):
        return ChunkedLogProbFunction.apply(hidden, weight, None, labels, 1.0, TRL_CHUNK, None, 1.0, ("log_probs",))[0]

    return run


CONTENDERS = {
    OURS: ours,
    "rlhf_fast.gather_logprobs of F.linear": whole,
    "eager": eager,
    "torch linear_cross_entropy": lambda: torch_chunked(None),
    "torch linear_cross_entropy, 256 rows a chunk": lambda: torch_chunked(256),
    PEER: trl,
}


def inputs(s: dict) -> tuple:
    import torch

    draw = torch.Generator().manual_seed(0)
    dtype, tokens, hidden, vocab = getattr(torch, s["dtype"]), s["tokens"], s["hidden"], s["vocab"]
    x = torch.randn(tokens, hidden, generator=draw).to(dtype)
    weight = torch.randn(vocab, hidden, generator=draw).mul_(3 / math.sqrt(hidden)).to(dtype)
    labels = torch.randint(0, vocab, (tokens,), generator=draw)
    return x.requires_grad_(), weight.requires_grad_(), labels, torch.randn(tokens, generator=draw)


def reference_file(s: dict) -> Path:
    return contenders.KEPT / f"linear-{s['tokens']}-{s['hidden']}-{s['vocab']}-{s['dtype']}.pt"


def refer(s: dict) -> contenders.Result:
    """Log-probs, the gradient of hidden, and that of some rows of the weight, among them those of the labels."""
    import torch

    hidden, weight, labels, upstream = (x.detach().double() if x.is_floating_point() else x for x in inputs(s))
    logprobs, hidden_grad = torch.empty_like(upstream), torch.empty_like(hidden)
    rows = torch.cat([labels[:256], torch.arange(0, s["vocab"], s["vocab"] // 256)]).unique()
    weight_grad = torch.zeros(len(rows), s["hidden"], dtype=torch.float64)
    for part in torch.arange(s["tokens"]).split(128):
        log_p = (hidden[part] @ weight.T).log_softmax(-1)
        place = labels[part].unsqueeze(1)
        logprobs[part] = log_p.gather(1, place).squeeze(1)
        slope = log_p.exp_().neg_().scatter_add_(1, place, torch.ones_like(place, dtype=torch.float64))
        slope *= upstream[part].unsqueeze(1)
        hidden_grad[part] = slope @ weight
        weight_grad += slope[:, rows].T @ hidden[part]
    torch.save({"logprobs": logprobs, "hidden": hidden_grad, "weight": weight_grad, "rows": rows}, reference_file(s))
    return {"versions": {"torch": importlib.metadata.version("torch")}}


def contend(name: str, s: dict) -> contenders.Result:
    import torch

    torch.set_num_threads(s["threads"])
    if name == REFERENCE:
        return refer(s)
    function = CONTENDERS[name]()

    def call(hidden, weight, labels, upstream):
        logprobs = function(hidden, weight, labels)
        return logprobs.detach(), *torch.autograd.grad(logprobs, (hidden, weight), upstream.to(logprobs.dtype))

    call(*inputs(s | {"tokens": 4, "vocab": 64}))  # whatever is loaded at the first call
    given = inputs(s)
    laps, before = contenders.Laps(), contenders.forget_peak()
    laps.start()
    logprobs, hidden_grad, weight_grad = call(*given)
    laps.lap()
    peak = contenders.memory("VmHWM") - before
    found = {"logprobs": logprobs, "hidden": hidden_grad, "weight": weight_grad}
    expected = torch.load(reference_file(s))
    found["weight"] = weight_grad[expected["rows"]]
    errors = {
        key: float((x.double() - expected[key]).abs().max() / expected[key].abs().max()) for key, x in found.items()
    }
    del logprobs, hidden_grad, weight_grad, found, expected
    laps.start()
    for _ in range(s["rounds"]):
        call(*given)
        laps.lap()
    names = ["torch", *(["trl"] if name == PEER else [])]
    return laps.after(s["warm_up"]) | {
        "added_peak_bytes": peak,
        "errors": errors,
        "versions": {name: importlib.metadata.version(name) for name in names},
    }


# ------------------------------------------------------------------------------------------------------- the table


def render(result: contenders.Result) -> str:
    s = result["settings"]
    lines = [
        f"{result['machine']}, {s['threads']} thread, {contenders.versions(result['cases'])}",
        f"commit {result['commit']}",
        "",
        f"Forward and backward, T = {s['tokens']}, H = {s['hidden']}. Median CPU-seconds of the calls after {s['warm_up']} for "
        "warm-up, least and most in brackets; MB are what the first call adds to the peak, of which the gradients of hidden "
        "and weight are in brackets; errors of log-probs, gradient of hidden and of weight relative to the largest entry.",
        "",
    ]
    rows = []
    for case in result["cases"]:
        ours = case["contenders"][OURS].get("cpu_seconds")
        gradients = (case["vocab"] + s["tokens"]) * s["hidden"] * (4 if case["dtype"] == "float32" else 2)
        for name, one in case["contenders"].items():
            start = [f"{case['vocab']:,}", case["dtype"], name]
            if "failed" in one:
                rows.append([*start, f"{one['failed']} (limit {one['memory_gib']} GiB)", *["-"] * 4])
                continue
            cpu = contenders.median(one["cpu_seconds"])
            rows.append(
                [
                    *start,
                    f"{cpu:.2f} ({contenders.spread(one['cpu_seconds'])})",
                    f"{contenders.median(one['wall_seconds']):.2f}",
                    f"{cpu / contenders.median(ours):.2f}x" if ours else "-",
                    f"{one['added_peak_bytes'] / contenders.MB:.0f} ({gradients / contenders.MB:.0f})",
                    ", ".join(f"{error:.0e}" for error in one["errors"].values()),
                ]
            )
    columns = ["V", "dtype", "contender", "CPU-s", "wall s", "its / ours", "MB", "errors"]
    return "\n".join([*lines, contenders.table(columns, rows)])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.linear_peers", description=__doc__.splitlines()[0])
    parser.add_argument("--contender", nargs=3, metavar=("NAME", "SETTINGS", "FILE"), help=argparse.SUPPRESS)
    parser.add_argument("--vocab", type=int, nargs="+", default=[32_000, 151_936], help="vocabularies (default: both)")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=("float32", "bfloat16"))
    parser.add_argument("--tokens", type=int, default=SETTINGS["tokens"], help="T (default: 2048)")
    parser.add_argument("--rounds", type=int, default=5, help="calls measured; 3 at most from V = 100,000 on")
    parser.add_argument("--memory-gib", type=float, default=18.0, help="limit for each process (default: 18)")
    parser.add_argument("--name", default="linear-peers", help="of the files in bench/results (default: linear-peers)")
    options = parser.parse_args()
    if options.contender:
        name, settings, file = options.contender
        Path(file).write_text(json.dumps(contend(name, json.loads(settings))))
        return
    pythons = dict.fromkeys((REFERENCE, *CONTENDERS), sys.executable) | {PEER: contenders.peer_python(PEER)}
    shared, cases = SETTINGS | {"tokens": options.tokens}, []
    for vocab in sorted(options.vocab):
        for dtype in options.dtype:
            rounds = min(options.rounds, 3) if vocab >= 100_000 else options.rounds
            settings = shared | {"vocab": vocab, "dtype": dtype, "rounds": rounds}
            found = {
                name: contenders.run("bench.linear_peers", name, settings, python=python, memory_gib=options.memory_gib)
                for name, python in pythons.items()
                if name != REFERENCE or not reference_file(settings).exists()
            }
            found.pop(REFERENCE, None)
            cases.append({"vocab": vocab, "dtype": dtype, "contenders": found})
            result = {
                "machine": contenders.machine(),
                "commit": contenders.commit(),
                "settings": shared,
                "cases": cases,
            }
            contenders.write(options.name, result, render(result))  # after each: some take minutes


if __name__ == "__main__":
    main()
