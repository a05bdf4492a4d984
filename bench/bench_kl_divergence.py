"""Exact KL over the vocabulary, beside eager PyTorch and torch.nn.functional.kl_div."""

import torch

from bench.common import Case, backward, rows, run, wide
from rlhf_fast import kl_divergence

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [(4, 16, 82), (1, 1024, 50_257)] if DEVICE == "cpu" else [(4, 16, 82), (1, 8192, 50_257), (1, 8192, 151_936)]


def eager(logits, ref_logits):
    log_p, log_q = wide(logits).log_softmax(-1), wide(ref_logits).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def kl_div(logits, ref_logits):
    log_p, log_q = wide(logits).log_softmax(-1), wide(ref_logits).log_softmax(-1)
    return torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def case(name, size, dtype, contenders, passes):
    b, t, v = size

    def inputs(generator):
        logits = torch.randn(b, t, v, generator=generator) * 3
        ref_logits = logits + torch.randn(b, t, v, generator=generator)
        return logits.to(dtype).to(DEVICE), ref_logits.to(dtype).to(DEVICE)

    kind = str(dtype)[6:]
    moved = passes * b * t * v * dtype.itemsize
    return Case(f"{name} {kind}", f"{b}x{t}x{v}", inputs, contenders, 2e-2 if dtype == torch.bfloat16 else 1e-4, moved)


FORWARD = {"rlhf_fast": kl_divergence, "eager": eager, "kl_div": kl_div}
BACKWARD = {who: backward(function) for who, function in FORWARD.items()}


@rows(
    [
        case(name, size, dtype, contenders, passes)
        for size in SIZES
        for dtype in (torch.float32, torch.bfloat16)
        for name, contenders, passes in (
            ("exact KL", FORWARD, 2),
            ("exact KL, forward + backward", BACKWARD, 5),
        )
    ]
)
def bench_kl_divergence(benchmark, case, who):
    run(benchmark, case, who)
