import math

import pytest
import torch
import torch.nn.functional as F

from rlhf_fast import dpo_loss, reward_pair_loss


def test_bradley_terry(device):
    chosen, rejected = torch.randn(2, 9, generator=torch.Generator().manual_seed(0)).to(device)
    margin = torch.rand(9, generator=torch.Generator().manual_seed(1)).to(device)
    loss, stats = reward_pair_loss(chosen, rejected, margin=margin, center_coef=0.01)
    want = (-F.logsigmoid(chosen - rejected - margin)).mean() + 0.01 * ((chosen + rejected) ** 2).mean()
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(stats["accuracy"], (chosen > rejected).float().mean())
    torch.testing.assert_close(stats["margin"], (chosen - rejected).mean())
    torch.testing.assert_close(stats["reward_max"], torch.cat([chosen, rejected]).max())


def test_a_tie_is_half_right(device):
    same = torch.zeros(4, device=device)
    loss, stats = reward_pair_loss(same, same)
    torch.testing.assert_close(loss.cpu(), torch.tensor(2.0).log())
    assert stats["accuracy"] == 0.5


def test_far_apart_pairs_neither_overflow_nor_vanish(device):
    # OpenRLHF's log(1 + exp(x)) is infinite at 1000.
    chosen = torch.tensor([-1000.0, 1000.0], device=device).requires_grad_()
    rejected = torch.zeros(2, device=device)
    loss, _ = reward_pair_loss(chosen, rejected)
    loss.backward()
    assert loss == 500 and torch.equal(chosen.grad, torch.tensor([-0.5, 0.0], device=device))


def test_no_pairs(device):
    nothing = torch.zeros(0, device=device).requires_grad_()
    loss, stats = reward_pair_loss(nothing, nothing)
    assert loss == 0 and all(v == 0 for v in stats.values())
    loss.backward()


def test_softplus_and_sigmoid_over_their_whole_range(device):
    # With a rejected reward of 0 and no centering, one pair's loss is softplus(-chosen) and its gradient -sigmoid(-chosen).
    for x in (0.0, 1e-20, -1e-9, 0.3, -0.8814, 2.5, -36.0, 40.0, 700.0, -700.0, 1e300, -1e300):
        chosen = torch.tensor([x], dtype=torch.float64, device=device).requires_grad_()
        loss, _ = reward_pair_loss(chosen, torch.zeros_like(chosen))
        loss.backward()
        e = math.exp(-abs(x))
        assert loss.item() == pytest.approx(max(-x, 0.0) + math.log1p(e), rel=7e-16, abs=0)
        assert chosen.grad.item() == pytest.approx(-(1.0 if x < 0 else e) / (1 + e), rel=7e-16, abs=0)


def test_what_is_not_a_number_stays_one(device):
    nan = torch.tensor([math.nan, 1.0], device=device)
    assert reward_pair_loss(nan, torch.zeros(2, device=device))[0].isnan()
    for loss_type in ("sigmoid", "robust", "hinge", "ipo"):
        assert dpo_loss(nan, nan * 0, nan * 0, nan * 0, loss_type=loss_type)[0].isnan()


def draw_logprobs(device="cpu", n=9, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [(-5 * torch.rand(n, generator=generator, dtype=dtype)).to(device) for _ in range(4)]


def test_dpo_is_the_papers_equation(device):
    chosen, rejected, ref_chosen, ref_rejected = draw_logprobs(device)
    loss, stats = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.3)
    h = (chosen - ref_chosen) - (rejected - ref_rejected)
    torch.testing.assert_close(loss, -F.logsigmoid(0.3 * h).mean())
    torch.testing.assert_close(stats["accuracy"], (h > 0).float().mean())
    torch.testing.assert_close(stats["margin"], 0.3 * h.mean())
    torch.testing.assert_close(stats["chosen_reward"], 0.3 * (chosen - ref_chosen).mean())
    torch.testing.assert_close(stats["margin_min"], 0.3 * h.min())


def test_label_smoothing_conservative_and_unbiased(device):
    logprobs = draw_logprobs(device)
    flipped = [logprobs[i] for i in (1, 0, 3, 2)]
    right, wrong = dpo_loss(*logprobs)[0], dpo_loss(*flipped)[0]
    conservative = dpo_loss(*logprobs, label_smoothing=0.2)[0]
    torch.testing.assert_close(conservative, 0.8 * right + 0.2 * wrong)
    # The expectation of the robust loss under labels that are wrong one time in five is the loss of the right labels.
    robust, robust_flipped = (dpo_loss(*x, label_smoothing=0.2, loss_type="robust")[0] for x in (logprobs, flipped))
    torch.testing.assert_close(0.8 * robust + 0.2 * robust_flipped, right)


def test_hinge_and_ipo_at_their_corners(device):
    zeros = torch.zeros(3, device=device)
    chosen = torch.tensor([9.0, 10.0, 11.0], device=device).requires_grad_()  # beta * h = 0.9, 1, 1.1
    loss, _ = dpo_loss(chosen, zeros, zeros, zeros, loss_type="hinge")
    loss.backward()
    torch.testing.assert_close(loss.detach(), torch.tensor(0.1 / 3, device=device), rtol=0, atol=1e-6)
    assert chosen.grad[0] < 0 and torch.equal(chosen.grad[1:], zeros[1:])  # relu'(0) = 0
    met = torch.full((3,), 5.0, device=device)  # 1 / (2 beta)
    assert dpo_loss(met, zeros, zeros, zeros, loss_type="ipo")[0] == 0


def test_large_log_probs_keep_the_sign_of_their_difference(device):
    # In float32 both models' differences between the replies are rounded to 4096.0625, and h to 0.
    chosen, rejected = torch.tensor([-0.03125], device=device), torch.tensor([-4096.09375], device=device)
    ref_chosen, ref_rejected = torch.tensor([-0.0311], device=device), torch.tensor([-4096.09375], device=device)
    _, stats = dpo_loss(chosen, rejected, ref_chosen, ref_rejected)
    assert ((chosen - rejected) - (ref_chosen - ref_rejected)).item() == 0
    assert stats["accuracy"] == 0 and stats["margin"] < 0


def test_dpo_gradients_reach_whoever_asks(device):
    logprobs = draw_logprobs(device, dtype=torch.float64)
    for wanted in ((0, 1), (0, 1, 2, 3), (2,)):
        leaves = [x.clone().requires_grad_(i in wanted) for i, x in enumerate(logprobs)]
        dpo_loss(*leaves)[0].backward()
        signs = (1, -1, -1, 1)
        pull = next(s * x.grad for s, x in zip(signs, leaves, strict=True) if x.grad is not None)
        assert torch.all(pull < 0)
        for i, (sign, leaf) in enumerate(zip(signs, leaves, strict=True)):
            assert (leaf.grad is None) if i not in wanted else torch.equal(sign * leaf.grad, pull)


def test_no_pairs_to_prefer(device):
    nothing = torch.zeros(0, device=device).requires_grad_()
    loss, stats = dpo_loss(nothing, nothing, nothing, nothing)
    assert loss == 0 and all(v == 0 for v in stats.values())
    loss.backward()
