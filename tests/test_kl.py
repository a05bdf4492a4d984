import math

import pytest
import torch

from rlhf_fast import kl_penalty, shape_rewards


def test_estimators(device):
    logprobs = torch.tensor([-1.0, -2.0, -0.5], device=device)
    ref = torch.tensor([-1.5, -1.0, -0.5], device=device)
    d = logprobs - ref
    expected = {
        "k1": d,
        "k2": d**2 / 2,
        "k3": torch.exp(-d) - 1 + d,
        "abs": d.abs(),
        "k1+": d,
        "k3+": torch.exp(-d) - 1 + d,
    }
    for estimator, want in expected.items():
        torch.testing.assert_close(kl_penalty(logprobs, ref, estimator=estimator), want, rtol=1e-6, atol=1e-7)


def test_straight_through_has_the_gradient_of_k2(device):
    logprobs = torch.randn(20, device=device).requires_grad_()
    ref = torch.randn(20, device=device)
    for estimator in ("k1+", "k3+"):
        (slope,) = torch.autograd.grad(kl_penalty(logprobs, ref, estimator=estimator, output_clip=0.01).sum(), logprobs)
        torch.testing.assert_close(slope, (logprobs - ref).detach())


def test_clips_stop_the_gradient_where_they_bind(device):
    logprobs = torch.tensor([-1.0, -30.0, -12.0], device=device).requires_grad_()
    ref = torch.tensor([-1.5, -1.0, -1.0], device=device)
    penalty = kl_penalty(logprobs, ref, estimator="k3", log_ratio_clip=20.0, output_clip=10.0)
    assert torch.equal(penalty[1:], torch.full((2,), 10.0, device=device))
    (slope,) = torch.autograd.grad(penalty.sum(), logprobs)
    assert slope[0] != 0 and torch.all(slope[1:] == 0)


def test_k3_of_float16_does_not_overflow(device):
    # exp(12) is infinite in float16.
    penalty = kl_penalty(
        torch.tensor([-12.5]).half().to(device), torch.tensor([-0.5]).half().to(device), estimator="k3"
    )
    torch.testing.assert_close(penalty.cpu(), torch.tensor([math.exp(12) - 1 - 12]), rtol=1e-6, atol=0)


def test_k3_near_zero_keeps_its_digits(device):
    d = torch.tensor([1e-4, -1e-4], dtype=torch.float32, device=device)
    want = torch.expm1(-d.double()) + d.double()
    torch.testing.assert_close(kl_penalty(d, torch.zeros_like(d), estimator="k3").double(), want, rtol=1e-6, atol=0)


def test_the_score_lands_on_the_last_token(device):
    scores = torch.tensor([5.0, -7.0, 3.0], device=device)
    logprobs = torch.tensor([[-1.0, -1.0, -1.0]] * 3, device=device)
    ref = torch.tensor([[-1.5, -1.0, -2.0]] * 3, device=device)
    mask = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 0, 0]], device=device)
    rewards = shape_rewards(scores, logprobs, ref, mask, kl_coef=0.1, score_clip=6.0)
    want = [[-0.05, 5.0, 0.0], [-0.05, 0.0, -6.0 - 0.1], [0.0, 0.0, 0.0]]  # an empty row drops its score
    torch.testing.assert_close(rewards, torch.tensor(want, device=device))


def test_the_score_lands_on_the_last_token_of_long_rows(device):
    mask = torch.zeros(2, 5000, dtype=torch.int64, device=device)
    mask[0, :4097], mask[1, :3] = 1, 1
    zeros = torch.zeros(2, 5000, device=device)
    rewards = shape_rewards(torch.tensor([1.0, 2.0], device=device), zeros, zeros, mask, kl_coef=0.1)
    assert rewards.nonzero().tolist() == [[0, 4096], [1, 2]]


def test_unknown_estimator():
    with pytest.raises(ValueError, match=r"`estimator` must be one of 'k1'.*got 'k4'"):
        kl_penalty(torch.zeros(2), torch.zeros(2), estimator="k4")
