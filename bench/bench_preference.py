"""Losses on pairs of replies, forward and backward, beside the same in eager PyTorch."""

import torch

from bench.common import Case, backward, rows, run
from rlhf_fast import dpo_loss, reward_pair_loss
from rlhf_fast.ops.preference import dpo_loss_reference, reward_pair_loss_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def case(name, ours, eager, arguments, n):
    def inputs(generator):
        return tuple(torch.randn(n, generator=generator).to(DEVICE) for _ in range(arguments))

    contenders = {"rlhf_fast": backward(ours), "eager": backward(eager)}
    return Case(f"{name}, forward + backward", str(n), inputs, contenders, 1e-5, 4 * n * (2 * arguments))


@rows(
    [
        case(name, ours, eager, arguments, n)
        for name, ours, eager, arguments in (
            ("pair loss", reward_pair_loss, reward_pair_loss_reference, 2),
            ("DPO loss", dpo_loss, dpo_loss_reference, 4),
        )
        for n in (64, 8192)
    ]
)
def bench_pair_losses(benchmark, case, who):
    run(benchmark, case, who)
