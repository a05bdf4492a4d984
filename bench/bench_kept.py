"""Log-probs over a kept set of tokens, beside the masked log_softmax over all of V that training code runs instead."""

import math

import torch

from bench.common import Case, backward, rows, run, wide
from rlhf_fast import gather_logprobs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = (
    [(4, 16, 1000, 20), (1, 256, 50_257, 64), (1, 256, 151_936, 512)]
    if DEVICE == "cpu"
    else [(4, 16, 1000, 20), (1, 8192, 50_257, 64), (1, 8192, 151_936, 512)]
)


def ours(logits, labels, kept):
    return gather_logprobs(logits, labels, kept=kept)


def eager(logits, labels, kept):
    keep = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device).scatter(-1, kept, True)
    log_p = wide(logits).masked_fill(~keep, -math.inf).log_softmax(-1)
    return log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def case(name, size, dtype, contenders, dense_passes):
    b, t, v, k = size

    def inputs(generator):
        logits = (torch.randn(b, t, v, generator=generator) * 3).to(dtype).to(DEVICE)
        kept = logits.float().topk(k).indices
        return logits, kept.gather(-1, torch.randint(0, k, (b, t, 1), generator=generator).to(DEVICE)).squeeze(-1), kept

    moved = b * t * (k * (8 + dtype.itemsize) + dense_passes * v * dtype.itemsize)
    return Case(f"{name} {str(dtype)[6:]}", f"{b}x{t}x{v}, {k} kept", inputs, contenders, 1e-3, moved)


CASES = []
for size in SIZES:
    for dtype in (torch.float32, torch.bfloat16):
        CASES += [
            case("kept log-probs", size, dtype, {"rlhf_fast": ours, "eager": eager}, 0),
            case(
                "kept log-probs, forward + backward",
                size,
                dtype,
                {"rlhf_fast": backward(ours), "eager": backward(eager)},
                1,
            ),
        ]


@rows(CASES)
def bench_kept_logprobs(benchmark, case, who):
    run(benchmark, case, who)
