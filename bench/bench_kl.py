"""KL penalty and reward shaping, beside the same in eager PyTorch."""

import torch

from bench.common import Case, rows, run
from rlhf_fast import kl_penalty, shape_rewards
from rlhf_fast.ops.kl import kl_penalty_reference, shape_rewards_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def case(name, contenders, b, t):
    def inputs(generator):
        logprobs = -torch.rand(b, t, generator=generator) * 3
        ref = logprobs + torch.randn(b, t, generator=generator) * 0.1
        mask = torch.arange(t) < torch.randint(1, t + 1, (b, 1), generator=generator)
        return tuple(x.to(DEVICE) for x in (torch.randn(b, generator=generator), logprobs, ref, mask))

    return Case(name, f"{b}x{t}", inputs, contenders, 1e-5, 13 * b * t)


PENALTY = {
    "rlhf_fast": lambda scores, a, b, mask: kl_penalty(a, b, estimator="k3", mask=mask),
    "eager": lambda scores, a, b, mask: kl_penalty_reference(a, b, estimator="k3", mask=mask),
}
SHAPE = {
    "rlhf_fast": lambda scores, a, b, mask: shape_rewards(scores, a, b, mask, kl_coef=0.05),
    "eager": lambda scores, a, b, mask: shape_rewards_reference(scores, a, b, mask, kl_coef=0.05),
}
SIZES = ((4, 16), (512, 1024))


@rows(
    [case(name, who, b, t) for name, who in (("KL penalty k3", PENALTY), ("shaped rewards", SHAPE)) for b, t in SIZES]
)
def bench_kl(benchmark, case, who):
    run(benchmark, case, who)
