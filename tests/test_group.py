import math

import pytest
import torch

from rlhf_fast import group_advantages

REWARDS = [1.0, 2.0, 3.0, 6.0, 0.0, 0.0, 0.0, 0.0]


def test_grpo(device):
    got = group_advantages(torch.tensor(REWARDS, device=device), 4)
    std = math.sqrt((4 + 1 + 0 + 9) / 3)
    want = [(r - 3) / (std + 1e-6) for r in REWARDS[:4]] + [0.0] * 4
    torch.testing.assert_close(got, torch.tensor(want, device=device), rtol=1e-7, atol=0)


def test_dr_grpo_and_rloo(device):
    rewards = torch.tensor(REWARDS, device=device)
    assert group_advantages(rewards, 4, scale="none").tolist() == [-2, -1, 0, 3, 0, 0, 0, 0]
    rloo = group_advantages(rewards, 4, scale="none", leave_one_out=True)
    want = [1 - 11 / 3, 2 - 10 / 3, 3 - 9 / 3, 6 - 6 / 3]
    torch.testing.assert_close(rloo, torch.tensor(want + [0.0] * 4, device=device), rtol=1e-7, atol=0)


def test_the_batch_std_is_that_of_the_rewards(device):
    rewards = torch.tensor(REWARDS, device=device)
    got = group_advantages(rewards, 4, scale="batch", eps=0.0)
    want = torch.tensor([-2.0, -1, 0, 3, 0, 0, 0, 0], device=device) / rewards.std()
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [3, 8, 2500])
@pytest.mark.parametrize("value", [0.1, 1e6 + 0.1, -3e-30])
def test_equal_rewards_give_exactly_zero(size, value, device):
    # The mean of three float32 0.1 is not 0.1; divided by eps the rounding error becomes an advantage.
    rewards = torch.full((2 * size,), value, device=device)
    for scale in ("std", "none", "batch"):
        for eps in (0.0, 1e-6):
            for leave_one_out in (False, True):
                got = group_advantages(rewards, size, scale=scale, eps=eps, leave_one_out=leave_one_out)
                assert torch.all(got == 0)


@pytest.mark.parametrize("size", [5, 3000])
def test_a_group_does_not_see_the_others(size, device):
    rewards = torch.randn(3 * size, generator=torch.Generator().manual_seed(0)).to(device)
    whole = group_advantages(rewards, size)
    assert torch.equal(whole[size : 2 * size], group_advantages(rewards[size : 2 * size], size))
    broken = rewards.clone()
    broken[0] = math.nan
    got = group_advantages(broken, size)
    assert got[:size].isnan().all() and torch.equal(got[size:], whole[size:])


@pytest.mark.parametrize("size", [6, 2055])
def test_an_outlier_in_front_does_not_cost_the_others_their_precision(size, device):
    rewards = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(device)
    rewards[0] = 1e6
    got = group_advantages(rewards, size).double().cpu()
    x = rewards.double().cpu()
    torch.testing.assert_close(got, (x - x.mean()) / (x.std() + 1e-6), rtol=1e-7, atol=0)


@pytest.mark.parametrize("scale", ["std", "none", "batch"])
@pytest.mark.parametrize("size", [4, 2100])
def test_gradients_in_double_precision(scale, size, device):
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(2 * size, generator=generator, dtype=torch.float64).to(device).requires_grad_()
    upstream = torch.randn(2 * size, generator=generator, dtype=torch.float64).to(device)
    (got,) = torch.autograd.grad(group_advantages(rewards, size, scale=scale), rewards, upstream)
    groups = rewards.view(2, size)
    std = {"std": groups.std(-1, keepdim=True) + 1e-6, "none": 1.0, "batch": rewards.std() + 1e-6}[scale]
    (want,) = torch.autograd.grad(((groups - groups.mean(-1, keepdim=True)) / std).flatten(), rewards, upstream)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


def test_no_groups(device):
    nothing = torch.zeros(0, device=device).requires_grad_()
    for scale in ("std", "none", "batch"):
        out = group_advantages(nothing, 4, scale=scale)
        assert out.shape == (0,)
        out.sum().backward()
