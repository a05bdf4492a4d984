"""Group-relative advantages, beside the same in eager PyTorch and beside verl's loop over groups."""

import torch

from bench.common import Case, rows, run
from rlhf_fast import group_advantages
from rlhf_fast.ops.group import group_advantages_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def loop(rewards, size):
    """One group at a time, as verl's GRPO estimator goes."""
    return torch.cat([(g - g.mean()) / (g.std() + 1e-6) for g in rewards.split(size)])


def eager(rewards, size):
    groups = rewards.view(-1, size)
    return ((groups - groups.mean(-1, keepdim=True)) / (groups.std(-1, keepdim=True) + 1e-6)).flatten()


def case(groups, size):
    def inputs(generator):
        return torch.randn(groups * size, generator=generator).to(DEVICE), size

    contenders = {"rlhf_fast": group_advantages, "eager": eager, "loop": loop}
    return Case("group advantages", f"{groups}x{size}", inputs, contenders, 1e-4, 8 * groups * size)


def batch_case(groups, size):
    def inputs(generator):
        return torch.randn(groups * size, generator=generator).to(DEVICE), size

    contenders = {
        "rlhf_fast": lambda r, size: group_advantages(r, size, scale="batch"),
        "eager": lambda r, size: group_advantages_reference(r, size, scale="batch"),
    }
    return Case("group advantages, batch std", f"{groups}x{size}", inputs, contenders, 1e-4, 8 * groups * size)


@rows([case(16, 8), case(1024, 8), case(256, 64), case(4, 65536), batch_case(1024, 8)])
def bench_group_advantages(benchmark, case, who):
    run(benchmark, case, who)
