"""Policy and value loss with their statistics, forward and backward, beside the same in eager PyTorch; padded and packed."""

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


def eager_gspo(logprobs, old_logprobs, advantages, mask):
    """As verl's compute_policy_loss_gspo: the sequence's ratio, its gradient passed straight to each token."""
    count = mask.sum(-1, keepdim=True).clamp(min=1)
    mean = ((logprobs - old_logprobs) * mask).sum(-1, keepdim=True) / count
    ratio = (logprobs - logprobs.detach() + mean.detach()).clamp(max=10.0).exp()
    free, clipped = -advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)
    loss = ((torch.max(free, clipped) * mask).sum(-1, keepdim=True) / count).mean()
    tokens = mask.sum()
    stats = {
        "clip_fraction": ((clipped > free) * mask).sum() / tokens,
        "ppo_kl": ((old_logprobs - logprobs) * mask).sum() / tokens,
    }
    return loss, stats


def gspo(logprobs, old_logprobs, advantages, mask):
    options = {"importance_sampling_level": "sequence", "aggregate": "seq-mean-token-mean"}
    return ppo_policy_loss(logprobs, old_logprobs, advantages, mask, **options)


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
    if name == "policy loss" and t == 1024:
        contenders["torch.compile"] = backward(torch.compile(eager))
    return Case(f"{name}, forward + backward", f"{b}x{t}", inputs, contenders, 1e-5, 25 * b * t)


def packed_policy(logprobs, old_logprobs, advantages, cu_seqlens, mask):
    """Without the mask of the padded form: there is no padding."""
    return ppo_policy_loss(logprobs, old_logprobs, advantages, cu_seqlens=cu_seqlens)


def eager_packed(logprobs, old_logprobs, advantages, cu_seqlens, mask):
    """What a trainer without packed losses does: scatter into [B, T], the padded loss."""

    def padded(x):
        return torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_scatter(mask, x)

    return eager_policy(padded(logprobs), padded(old_logprobs), padded(advantages), mask)


def packed_case(b, t):
    """Sequences of 1 to t tokens."""

    def inputs(generator):
        lengths = torch.randint(1, t + 1, (b,), generator=generator)
        lengths[0] = t
        n = int(lengths.sum())
        old = -torch.rand(n, generator=generator) * 3
        new, advantages = old + torch.randn(n, generator=generator) * 0.1, torch.randn(n, generator=generator)
        cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32)
        mask = torch.arange(t) < lengths.unsqueeze(1)
        return tuple(x.to(DEVICE) for x in (new, old, advantages, cu_seqlens, mask))

    contenders = {"rlhf_fast": backward(packed_policy), "eager, padded": backward(eager_packed)}
    return Case("packed policy loss, forward + backward", f"{b}x1..{t}", inputs, contenders, 1e-5, 12 * b * t)


LOSSES = [
    ("policy loss", ppo_policy_loss, eager_policy),
    ("GSPO loss", gspo, eager_gspo),
    ("value loss", ppo_value_loss, eager_value),
]
SIZES = ((4, 16), (64, 1024), (512, 1024))


@rows([*(case(*loss, b, t) for loss in LOSSES for b, t in SIZES), *(packed_case(b, t) for b, t in SIZES)])
def bench_ppo_loss(benchmark, case, who):
    run(benchmark, case, who)
