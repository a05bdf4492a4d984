"""Policy and value loss with their statistics, forward and backward, beside the same in eager PyTorch."""

import torch

from bench.common import Case, backward, rows, run
from rlhf_fast import ppo_policy_loss, ppo_value_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def eager_policy(logprobs, old_logprobs, advantages, mask):
    """As verl's compute_policy_loss_vanilla without the dual clip, statistics included (kept on the device)."""
    log_ratio = (logprobs - old_logprobs).clamp(-20, 20)
    ratio = log_ratio.exp()
    free, clipped = -advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)
    count = mask.sum()
    loss = (torch.max(free, clipped) * mask).sum() / count
    stats = {
        "clip_fraction": ((clipped > free) * mask).sum() / count,
        "ppo_kl": (-log_ratio * mask).sum() / count,
        "ratio_mean": (ratio * mask).sum() / count,
    }
    return loss, stats


def eager_value(values, old_values, returns, mask):
    clipped = values.clamp(old_values - 0.2, old_values + 0.2)
    free_square, clipped_square = (values - returns) ** 2, (clipped - returns) ** 2
    count = mask.sum()
    loss = 0.5 * (torch.max(free_square, clipped_square) * mask).sum() / count
    return loss, {"clip_fraction": ((clipped_square > free_square) * mask).sum() / count}


def case(name, ours, eager, b, t):
    def inputs(generator):
        old = -torch.rand(b, t, generator=generator) * 3
        new = old + torch.randn(b, t, generator=generator) * 0.1
        mask = torch.rand(b, t, generator=generator) < 0.8
        return tuple(x.to(DEVICE) for x in (new, old, torch.randn(b, t, generator=generator), mask))

    contenders = {"rlhf_fast": backward(ours), "eager": backward(eager)}
    return Case(f"{name}, forward + backward", f"{b}x{t}", inputs, contenders, 1e-5, 30 * b * t)


LOSSES = [("policy loss", ppo_policy_loss, eager_policy), ("value loss", ppo_value_loss, eager_value)]


@rows([case(*loss, b, t) for loss in LOSSES for b, t in ((4, 16), (64, 1024), (512, 1024))])
def bench_ppo_loss(benchmark, case, who):
    run(benchmark, case, who)
