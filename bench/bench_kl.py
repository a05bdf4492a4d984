"""KL penalty and reward shaping, beside the same in eager PyTorch."""

import torch

from bench.common import DEVICE, Case, backward, rows, run
from rlhf_fast import kl_penalty, shape_rewards
from rlhf_fast.ops.kl import kl_penalty_reference, shape_rewards_reference


def case(name, contenders, bytes_a_token, b, t):
    def inputs(generator):
        logprobs = -torch.rand(b, t, generator=generator) * 3
        ref = logprobs + torch.randn(b, t, generator=generator) * 0.1
        mask = torch.arange(t) < torch.randint(1, t + 1, (b, 1), generator=generator)
        return tuple(x.to(DEVICE) for x in (torch.randn(b, generator=generator), logprobs, ref, mask))

    return Case(name, f"{b}x{t}", inputs, contenders, 1e-5, bytes_a_token * b * t)


PENALTY = {
    "rlhf_fast": lambda scores, a, b, mask: kl_penalty(a, b, estimator="k3", mask=mask),
    "eager": lambda scores, a, b, mask: kl_penalty_reference(a, b, estimator="k3", mask=mask),
}
SHAPE = {
    "rlhf_fast": lambda scores, a, b, mask: shape_rewards(scores, a, b, mask, kl_coef=0.05),
    "eager": lambda scores, a, b, mask: shape_rewards_reference(scores, a, b, mask, kl_coef=0.05),
}
# As trainers write it, in float32: a difference, and nothing said of what stands off the mask.
K1 = {
    "rlhf_fast": backward(lambda a, b: kl_penalty(a, b)),
    "eager": backward(lambda a, b: a - b),
}
K3 = {
    "rlhf_fast": backward(lambda a, b: kl_penalty(a, b, estimator="k3", log_ratio_clip=20)),
    "eager": backward(lambda a, b: estimate_k3((a - b).clamp(-20, 20))),
}


def estimate_k3(d):
    return torch.exp(-d) - 1 + d


def of_logprobs(contenders):
    return {who: lambda scores, a, b, mask, f=f: f(a, b) for who, f in contenders.items()}


CASES = {  # contenders, bytes a token
    "KL penalty k3": (PENALTY, 13),
    "KL penalty k1, forward + backward": (of_logprobs(K1), 20),
    "KL penalty k3, forward + backward": (of_logprobs(K3), 28),
    "shaped rewards": (SHAPE, 13),
}
SIZES = ((4, 16), (64, 1024), (512, 1024))


@rows([case(name, *what, b, t) for name, what in CASES.items() for b, t in SIZES])
def bench_kl(benchmark, case, who):
    run(benchmark, case, who)
