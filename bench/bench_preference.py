"""The reward model's pair loss, forward and backward, beside the same in eager PyTorch."""

import torch

from bench.common import Case, backward, rows, run
from rlhf_fast import reward_pair_loss
from rlhf_fast.ops.preference import reward_pair_loss_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def case(n):
    def inputs(generator):
        return tuple(torch.randn(n, generator=generator).to(DEVICE) for _ in range(2))

    contenders = {"rlhf_fast": backward(reward_pair_loss), "eager": backward(reward_pair_loss_reference)}
    return Case("pair loss, forward + backward", str(n), inputs, contenders, 1e-5, 16 * n)


@rows([case(64), case(8192)])
def bench_reward_pair_loss(benchmark, case, who):
    run(benchmark, case, who)
