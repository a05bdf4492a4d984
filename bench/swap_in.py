"""What rlhf_fast.patch puts into verl, OpenRLHF and NeMo-RL beside what stood there: python -m bench.swap_in [ENVIRONMENT ...]

Each function, forward and backward where it has a gradient, on one input, one thread, with and without the patch in processes of
their own: CPU-seconds a call, and the peak of memory above what was resident before the first. Needs the environments of
`make parity`. Writes bench/results/swap-in.json and .md.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import sys
from collections.abc import Callable
from pathlib import Path

from bench import contenders

SETTINGS = {"threads": 1, "vocab": 32_000, "rows": 8, "tokens": 128, "hidden": 256, "batch": 64, "length": 1024}
SETTINGS |= {"warm_up": 2, "rounds": 7}
FUNCTIONS = {
    "verl-0.9": [
        "logprobs_from_logits",
        "entropy_from_logits",
        "FusedLinearForPPO.forward",
        "compute_gae_advantage_return",
        "compute_policy_loss_vanilla",
        "compute_value_loss",
        "kl_penalty",
    ],
    "openrlhf-0.11": [
        "log_probs_from_logits",
        "Actor.forward",
        "get_advantages_and_returns",
        "PolicyLoss.forward",
        "ValueLoss.forward",
        "compute_approx_kl",
    ],
    "nemo-rl": ["get_next_token_logprobs_from_logits", "_compute_gae", "MseValueLossFn.__call__", "calculate_kl"],
}


def contend(name: str, s: dict) -> contenders.Result:
    import torch

    import rlhf_fast
    from tests.adapters.parity import ENVIRONMENTS
    from tests.adapters.stubs import stub

    environment, way = name.split()
    library = ENVIRONMENTS[environment]
    torch.set_num_threads(s["threads"])
    stub(library)
    adapter = importlib.import_module(f"rlhf_fast.adapters.{library}")
    calls = {"verl": verl, "openrlhf": openrlhf, "nemo_rl": nemo_rl}[library](torch, s)
    if way == "patched":
        rlhf_fast.patch(library)
    measured = {}
    for function, prepare in calls.items():
        torch.manual_seed(0)
        call = prepare()
        start, laps = contenders.forget_peak(), contenders.Laps()
        laps.start()
        for _ in range(s["warm_up"] + s["rounds"]):
            call()
            laps.lap()
        peak = contenders.memory("VmHWM") - start
        measured[function] = laps.after(s["warm_up"]) | {"peak_bytes": peak}
        del call
    return {"functions": measured, "version": importlib.metadata.version(adapter.LIBRARY)}


def from_a_head(torch, logits) -> Callable:
    """Logits as a linear layer makes them, new each time, whose backward pass does not read them; it costs next to nothing."""

    class Head(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return logits.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient[..., :1].sum().float()

    x = torch.zeros((), requires_grad=True)
    return lambda: Head.apply(x)


def backward(*results) -> None:
    sum(x.sum() for x in results).backward()


def rows(torch, s: dict, count: int) -> list:
    """`count` tensors [B, T], the first requiring grad, and a mask of rows of any length."""
    shape = s["batch"], s["length"]
    given = [torch.randn(shape) * 0.1 for _ in range(count)]
    mask = torch.arange(s["length"]) < torch.randint(s["length"] // 2, s["length"] + 1, (s["batch"], 1))
    return [given[0].requires_grad_(), *given[1:], mask]


def logits_and_labels(torch, s: dict) -> tuple:
    shape = s["rows"], s["tokens"]
    return torch.randn(*shape, s["vocab"]).bfloat16(), torch.randint(s["vocab"], shape)


def verl(torch, s: dict) -> dict[str, Callable]:
    functional = importlib.import_module("verl.utils.torch_functional")
    algos = importlib.import_module("verl.trainer.ppo.core_algos")
    fused = importlib.import_module("verl.utils.experimental.torch_functional")
    config = importlib.import_module("verl.workers.config").ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1
    )

    def log_probs():
        logits, labels = logits_and_labels(torch, s)
        head = from_a_head(torch, logits)
        return lambda: backward(functional.logprobs_from_logits(head(), labels))

    def entropy():
        head = from_a_head(torch, logits_and_labels(torch, s)[0])
        return lambda: backward(functional.entropy_from_logits(head()))

    def fused_head():
        hidden, weight = (torch.randn(n, s["hidden"]).bfloat16().requires_grad_() for n in (1024, s["vocab"]))
        labels, module = torch.randint(s["vocab"], (1024,)), fused.FusedLinearForPPO()
        return lambda: backward(*module(hidden, weight, labels))

    def gae():
        _, rewards, values, mask = rows(torch, s, 3)
        return lambda: algos.compute_gae_advantage_return(rewards, values, mask.float(), 1.0, 0.95)

    def policy():
        new, old, advantages, mask = rows(torch, s, 3)
        return lambda: backward(
            algos.get_policy_loss_fn("vanilla")(old, new, advantages, mask, "token-mean", config)[0]
        )

    def value():
        values, returns, old, mask = rows(torch, s, 3)
        return lambda: backward(algos.compute_value_loss(values, returns, old, mask, 0.5)[0])

    def kl():
        new, reference, _ = rows(torch, s, 2)
        return lambda: backward(algos.kl_penalty(new, reference, "low_var_kl"))

    return dict(zip(FUNCTIONS["verl-0.9"], (log_probs, entropy, fused_head, gae, policy, value, kl), strict=True))


def openrlhf(torch, s: dict) -> dict[str, Callable]:
    utils, losses = importlib.import_module("openrlhf.models.utils"), importlib.import_module("openrlhf.models.loss")
    actors = importlib.import_module("openrlhf.models.actor")
    maker = importlib.import_module("openrlhf.trainer.ppo_utils.experience_maker").RemoteExperienceMaker
    outputs = importlib.import_module("transformers.modeling_outputs")

    def log_probs():
        logits, labels = logits_and_labels(torch, s)
        head = from_a_head(torch, logits)
        return lambda: backward(utils.log_probs_from_logits(head(), labels))

    def actor():
        logits, tokens = logits_and_labels(torch, s)
        head = from_a_head(torch, logits)

        class Model(torch.nn.Module):
            def forward(self, tokens, **_):
                return outputs.CausalLMOutputWithPast(logits=head())

        model, mask = actors.Actor(Model(), temperature=0.7), torch.ones(s["rows"], s["tokens"] - 1)
        model.packing_samples = False
        return lambda: backward(model(tokens, mask, attention_mask=torch.ones_like(tokens)))

    def gae():
        _, rewards, values, mask = rows(torch, s, 3)
        return lambda: maker.get_advantages_and_returns(None, values, rewards, mask.float(), 1.0, 0.95)

    def policy():
        loss, (new, old, advantages, mask) = losses.PolicyLoss(), rows(torch, s, 3)
        return lambda: backward(loss(new, old, advantages, mask)[0])

    def value():
        loss, (values, old, returns, mask) = losses.ValueLoss(0.2), rows(torch, s, 3)
        return lambda: backward(loss(values, old, returns, mask))

    def kl():
        new, base, _ = rows(torch, s, 2)
        return lambda: backward(utils.compute_approx_kl(new, base, None, "k3"))

    return dict(zip(FUNCTIONS["openrlhf-0.11"], (log_probs, actor, gae, policy, value, kl), strict=True))


def nemo_rl(torch, s: dict) -> dict[str, Callable]:
    model, utils = (importlib.import_module(f"nemo_rl.{n}") for n in ("distributed.model_utils", "algorithms.utils"))
    losses = importlib.import_module("nemo_rl.algorithms.loss.loss_functions")
    estimators = importlib.import_module("nemo_rl.algorithms.advantage_estimator").GeneralizedAdvantageEstimator
    torch.Tensor.cuda = lambda x: x  # where NeMo-RL sends the ids

    def log_probs():
        logits, labels = logits_and_labels(torch, s)
        head = from_a_head(torch, logits)
        return lambda: backward(model.get_next_token_logprobs_from_logits(labels, head()))

    def gae():
        _, rewards, values, mask = rows(torch, s, 3)
        own = estimators.__new__(estimators)
        own.gae_lambda, own.gae_gamma = 0.95, 1.0
        return lambda: own._compute_gae(rewards, values, mask.float())

    def value():
        values, returns, old, mask = rows(torch, s, 3)
        loss, samples = losses.MseValueLossFn(losses.MseValueLossConfig(cliprange=0.2)), torch.ones(s["batch"])
        data = {"token_mask": mask.float(), "sample_mask": samples, "returns": returns, "values": old}
        counts = samples.sum(), mask.sum()
        return lambda: backward(loss(values, data, *counts)[0])

    def kl():
        new, reference, _ = rows(torch, s, 2)
        return lambda: backward(utils.calculate_kl(new, reference))

    return dict(zip(FUNCTIONS["nemo-rl"], (log_probs, gae, value, kl), strict=True))


def render(result: contenders.Result) -> str:
    s = result["settings"]
    lines = [
        f"{result['machine']}, {s['threads']} thread; commit {result['commit']}",
        "",
        f"Logits bf16, [{s['rows']}, {s['tokens']}, {s['vocab']}] (the fused head: 1024 hidden states of {s['hidden']}), the "
        f"rest float32 [{s['batch']}, {s['length']}]. Forward and backward. CPU-ms a call: median of {s['rounds']} after "
        f"{s['warm_up']}, least and most in brackets. Peak: above the inputs; it holds the logits themselves.",
        "",
    ]
    table = []
    for environment, both in result["pairs"].items():
        for function in FUNCTIONS[environment]:
            pair = [one["functions"][function] for one in both]
            plain, patched = ([1e3 * x for x in one["cpu_seconds"]] for one in pair)
            times = [f"{contenders.median(x):.3g} ({contenders.spread(x)})" for x in (plain, patched)]
            peaks = [f"{one['peak_bytes'] / contenders.MB:.0f}" for one in pair]
            ratio = contenders.median(plain) / contenders.median(patched)
            name = f"{'nemo-rl' if environment == 'nemo-rl' else environment.partition('-')[0]} {both[0]['version']}"
            table.append([name, f"`{function}`", *times, f"{ratio:.2g}", *peaks])
    columns = ["library", "function", "its own, CPU-ms", "ours", "its own / ours", "its peak, MB", "ours"]
    return "\n".join([*lines, contenders.table(columns, table)])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.swap_in", description=__doc__.splitlines()[0])
    parser.add_argument("environments", nargs="*", choices=[*FUNCTIONS, []], help="default: all")
    parser.add_argument("--contender", nargs=3, metavar=("NAME", "SETTINGS", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        name, settings, file = options.contender
        Path(file).write_text(json.dumps(contend(name, json.loads(settings))))
        return
    pairs = {}
    for environment in options.environments or FUNCTIONS:
        python = contenders.peer_python(environment)
        pair = [
            contenders.run("bench.swap_in", f"{environment} {way}", SETTINGS, python=python, memory_gib=18.0)
            for way in ("plain", "patched")
        ]
        if any("failed" in one for one in pair):
            sys.exit("a contender failed: see above")
        pairs[environment] = pair
    result = {"machine": contenders.machine(), "commit": contenders.commit(), "settings": SETTINGS, "pairs": pairs}
    contenders.write("swap-in", result, render(result))


if __name__ == "__main__":
    main()
