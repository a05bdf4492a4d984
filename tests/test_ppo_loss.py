import math

import torch

from rlhf_fast import ppo_policy_loss, ppo_value_loss
from rlhf_fast.ops.ppo_loss import POLICY_STATS, VALUE_STATS


def draw(*shape, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(shape, generator=generator) * 3
    new = old + torch.randn(shape, generator=generator) * 0.3
    return new.to(device), old.to(device), torch.randn(shape, generator=generator).to(device)


def test_first_minibatch_has_ratio_one(device):
    logprobs, _, advantages = draw(3, 8, device=device)
    x = logprobs.clone().requires_grad_()
    loss, stats = ppo_policy_loss(x, logprobs, advantages)
    torch.testing.assert_close(loss, -advantages.mean())
    assert (
        stats["ratio_mean"] == 1 and stats["ratio_var"] == 0 and stats["clip_fraction"] == 0 and stats["approx_kl"] == 0
    )
    loss.backward()
    torch.testing.assert_close(x.grad, -advantages / advantages.numel())


def test_clipping_stops_the_gradient(device):
    old = torch.zeros(1, 4, device=device)
    new = torch.tensor([[0.5, -0.5, 0.5, -0.5]], device=device).requires_grad_()
    advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0]], device=device)
    loss, stats = ppo_policy_loss(new, old, advantages)
    loss.backward()
    assert (new.grad != 0).tolist() == [[False, True, True, False]]
    assert stats["clip_fraction"] == 0.5


def test_dual_clip_bounds_the_loss_of_bad_tokens(device):
    old = torch.zeros(1, 1, device=device)
    new = torch.tensor([[2.0]], device=device).requires_grad_()
    advantages = torch.tensor([[-1.0]], device=device)
    loss, stats = ppo_policy_loss(new, old, advantages, dual_clip=3.0)
    loss.backward()
    assert loss == 3.0 and stats["clip_fraction_low"] == 1 and new.grad == 0
    assert ppo_policy_loss(new, old, advantages)[0] > 7


def test_asymmetric_clip(device):
    old = torch.zeros(1, 2, device=device)
    new = torch.tensor([[math.log(1.25), math.log(0.75)]], device=device)
    advantages = torch.tensor([[1.0, -1.0]], device=device)
    assert ppo_policy_loss(new, old, advantages, clip_high=0.28)[1]["clip_fraction"] == 0.5


def test_padding_changes_nothing(device):
    new, old, advantages = draw(3, 6, device=device)
    mask = torch.ones(3, 6, dtype=torch.bool, device=device)
    loss, stats = ppo_policy_loss(new, old, advantages, mask)
    wide = [torch.nn.functional.pad(t, (0, 5), value=float("nan")) for t in (new, old, advantages)]
    padded, padded_stats = ppo_policy_loss(*wide, torch.nn.functional.pad(mask, (0, 5)))
    assert torch.equal(loss, padded)
    assert all(torch.equal(stats[k], padded_stats[k]) for k in POLICY_STATS)


def test_one_advantage_a_sequence(device):
    new, old, advantages = draw(3, 5, device=device)
    wide = advantages[:, :1].expand(3, 5)
    want = ppo_policy_loss(new, old, wide)[0]
    assert torch.equal(ppo_policy_loss(new, old, advantages[:, 0])[0], want)
    assert torch.equal(ppo_policy_loss(new, old, advantages[:, :1])[0], want)


def test_gspo(device):
    """The sequence ratio with one advantage a sequence: the paper's loss and its gradient."""
    new, old, _ = draw(4, 7, device=device)
    new = (old + (new - old) * 0.1).requires_grad_()
    advantages = torch.tensor([1.0, -2.0, 0.5, -0.1], device=device)
    mask = torch.arange(7, device=device) < torch.tensor([[7], [3], [1], [5]], device=device)
    options = {"importance_sampling_level": "sequence", "aggregate": "seq-mean-token-mean"}
    loss, stats = ppo_policy_loss(new, old, advantages, mask, clip_low=0.02, clip_high=0.02, **options)
    got = torch.autograd.grad(loss, new)[0]
    ratio = (((new - old) * mask).sum(1) / mask.sum(1)).exp()
    want = -torch.min(ratio * advantages, ratio.clamp(0.98, 1.02) * advantages).mean()
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(got, torch.autograd.grad(want, new)[0])
    assert (got == 0).any(1).any() and (got != 0).any()
    torch.testing.assert_close(stats["ratio_mean"], ((ratio.unsqueeze(1) * mask).sum() / mask.sum()).detach())


def test_cispo(device):
    old = torch.zeros(1, 3, device=device)
    new = torch.tensor([[0.5, -0.5, 0.1]], device=device).requires_grad_()
    advantages = torch.tensor([[1.0, 1.0, -2.0]], device=device)
    loss, stats = ppo_policy_loss(new, old, advantages, loss_type="cispo", clip_low=1.0, aggregate="token-sum")
    weight = new.detach().exp().clamp(max=1.2)  # clip_low = 1: no lower bound
    torch.testing.assert_close(loss, -(weight * advantages * new).sum())
    loss.backward()
    torch.testing.assert_close(new.grad, -weight * advantages)  # a clipped token keeps its gradient
    torch.testing.assert_close(stats["clip_fraction"], torch.tensor(1 / 3, device=device))


def test_what_is_detached_gives_the_old_policy_no_gradient(device):
    new, old, advantages = draw(2, 5, device=device)
    for options in ({"importance_sampling_level": "sequence"}, {"loss_type": "cispo"}):
        old.requires_grad_()
        loss, _ = ppo_policy_loss(new, old, advantages, **options)
        assert loss.requires_grad
        assert torch.equal(torch.autograd.grad(loss, old)[0], torch.zeros_like(old))


def test_a_nan_off_the_mask_or_in_another_sequence_stays_there(device):
    new, old, _ = draw(3, 5, device=device)
    mask = torch.tensor([[1, 1, 0, 1, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], device=device)
    dirty = [torch.where(mask != 0, t, math.nan).requires_grad_() for t in (new, old)]
    one_a_row = torch.tensor([1.0, math.nan, -1.0], device=device)  # of a sequence without a token
    for level in ("token", "sequence"):
        for loss_type in ("ppo", "cispo"):
            options = {"importance_sampling_level": level, "loss_type": loss_type}
            loss, stats = ppo_policy_loss(*dirty, one_a_row, mask, **options)
            assert torch.isfinite(loss) and all(torch.isfinite(v) for v in stats.values())
            gradients = torch.autograd.grad(loss, dirty)
            assert all(torch.isfinite(g).all() and torch.all(g[mask == 0] == 0) for g in gradients)


def test_backward_twice_repeats(device):
    new, old, advantages = draw(2, 5, device=device)
    loss, _ = ppo_policy_loss(new.requires_grad_(), old, advantages)
    first = torch.autograd.grad(loss, new, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, new, torch.tensor(2.0, device=device))[0] / 2)


def test_value_loss(device):
    values, old, returns = draw(2, 7, device=device)
    clipped = old + (values - old).clamp(-0.2, 0.2)
    want = 0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2).mean()
    loss, stats = ppo_value_loss(values, old, returns)
    torch.testing.assert_close(loss, want)
    variance = 1 - (returns - values).var(unbiased=False) / returns.var(unbiased=False)
    torch.testing.assert_close(stats["explained_variance"], variance)
    torch.testing.assert_close(
        ppo_value_loss(values, old, returns, clip=None)[0], 0.5 * ((values - returns) ** 2).mean()
    )


def test_stats_are_views_of_one_tensor_and_carry_no_graph(device):
    new, old, advantages = draw(2, 3, device=device)
    for (_, stats), names in (
        (ppo_policy_loss(new.requires_grad_(), old, advantages), POLICY_STATS),
        (ppo_value_loss(new, old, advantages), VALUE_STATS),
    ):
        assert tuple(stats) == names
        storages = {v.untyped_storage().data_ptr() for v in stats.values()}
        assert len(storages) == 1 and not any(v.requires_grad for v in stats.values())


def test_the_stats_do_not_depend_on_threads():
    new, old, advantages = draw(64, 3000)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            loss, stats = ppo_policy_loss(new, old, advantages)
            results.append([loss, *stats.values()])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_what_does_not_vary_has_no_variance_whatever_its_weights(device):
    # A mean square less a squared mean leaves rounding, and a quotient of two roundings is anything.
    weight = torch.tensor([[0.3, 0.7, 0.0, 0.1]], device=device)
    constant = torch.full((1, 4), 1.1, device=device)
    stats = ppo_value_loss(torch.randn(1, 4, device=device), constant, constant, weight)[1]
    assert stats["explained_variance"] == 0
    stats = ppo_policy_loss(constant + 11, constant, constant, weight)[1]  # a ratio of 60,000
    assert stats["ratio_var"] == 0 and stats["ratio_max"] > 5e4
