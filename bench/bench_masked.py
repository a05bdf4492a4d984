"""Masked mean and whitening, beside the same in eager PyTorch."""

import torch

from bench.common import Case, rows, run
from rlhf_fast import masked_mean, masked_whiten
from rlhf_fast.ops.masked import masked_mean_reference, masked_whiten_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def case(name, contenders, b, t):
    def inputs(generator):
        return tuple(
            x.to(DEVICE) for x in (torch.randn(b, t, generator=generator), torch.rand(b, t, generator=generator) < 0.8)
        )

    return Case(name, f"{b}x{t}", inputs, contenders, 1e-4, 5 * b * t)


MEAN = {"rlhf_fast": masked_mean, "eager": masked_mean_reference}
WHITEN = {"rlhf_fast": masked_whiten, "eager": masked_whiten_reference}


@rows(
    [
        case(name, who, b, t)
        for name, who in (("masked mean", MEAN), ("masked whiten", WHITEN))
        for b, t in ((4, 16), (512, 1024))
    ]
)
def bench_masked(benchmark, case, who):
    run(benchmark, case, who)
