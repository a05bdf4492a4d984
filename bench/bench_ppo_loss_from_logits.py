"""The policy loss from logits with an entropy bonus, forward and backward: one pass beside our own two and eager code."""

import torch

from bench.bench_logprob import DEVICE, SIZES, eager_entropy
from bench.bench_ppo_loss import eager_policy
from bench.common import Case, backward, rows, run
from rlhf_fast import gather_logprobs, ppo_loss_from_logits, ppo_policy_loss

ENTROPY_COEF = 0.01


def one_pass(logits, labels, old_logprobs, advantages, mask, inplace=True):
    return ppo_loss_from_logits(
        logits, labels, old_logprobs, advantages, mask, entropy_coef=ENTROPY_COEF, inplace=inplace
    )


def one_pass_beside(*inputs):
    return one_pass(*inputs, inplace=False)


def two_passes(logits, labels, old_logprobs, advantages, mask):
    logprobs, entropy = gather_logprobs(logits, labels, mask=mask, with_entropy=True, inplace_backward=True)
    loss, stats = ppo_policy_loss(logprobs, old_logprobs, advantages, mask)
    return loss - ENTROPY_COEF * entropy.sum() / mask.sum(), stats


def eager(logits, labels, old_logprobs, advantages, mask):
    logprobs, entropy = eager_entropy(logits, labels)
    loss, stats = eager_policy(logprobs, old_logprobs, advantages, mask)
    return loss - ENTROPY_COEF * (entropy * mask).sum() / mask.sum(), stats


def case(name, size, dtype, contenders):
    b, t, v = size

    def inputs(generator):
        logits = (torch.randn(b, t, v, generator=generator) * 3).to(dtype)
        labels = torch.randint(0, v, (b, t), generator=generator)
        new = gather_logprobs(logits, labels)
        old = new + 0.1 * torch.randn(b, t, generator=generator)
        given = logits, labels, old, torch.randn(b, t, generator=generator), torch.ones(b, t, dtype=torch.bool)
        return tuple(x.to(DEVICE) for x in given)

    moved = 2 * b * t * v * dtype.itemsize
    tolerance = 0.01 if dtype == torch.bfloat16 else 1e-5
    return Case(f"{name} {str(dtype)[6:]}", f"{b}x{t}x{v}", inputs, contenders, tolerance, moved)


CASES = []
for size in SIZES:
    for dtype in (torch.float32, torch.bfloat16):
        peers = {"our two passes": backward(two_passes, copy=True), "eager": backward(eager)}
        inplace = {"rlhf_fast": backward(one_pass, copy=True), **peers}
        beside = {"rlhf_fast": backward(one_pass_beside), **peers}
        CASES += [
            case("policy loss from logits, in place", size, dtype, inplace),
            case("policy loss from logits", size, dtype, beside),
        ]


@rows(CASES)
def bench_ppo_loss_from_logits(benchmark, case, who):
    run(benchmark, case, who)
