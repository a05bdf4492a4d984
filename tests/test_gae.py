import pytest
import torch

from rlhf_fast import gae, masked_whiten
from tests.cases import assert_close


def loop(rewards, values, gamma, lam):
    """Right-padded, no mask: the recursion of the paper, in float64."""
    rewards, values = rewards.double(), values.double()
    advantage, out = torch.zeros(len(rewards), dtype=torch.float64), []
    for t in reversed(range(rewards.shape[1])):
        following = values[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
        advantage = rewards[:, t] + gamma * following - values[:, t] + gamma * lam * advantage
        out.append(advantage)
    return torch.stack(out[::-1], 1)


def draw(*shape, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator).to(device) for _ in range(2))


def test_the_paper(device):
    rewards, values = draw(4, 50, device=device)
    advantages, returns = gae(rewards, values, gamma=0.99, lam=0.9)
    want = loop(rewards.cpu(), values.cpu(), 0.99, 0.9)
    assert_close("advantages", advantages, want, 0.51)
    assert_close("returns", returns, want + values.double().cpu(), 0.51)


def test_lambda_one_is_the_return_and_lambda_zero_the_td_error(device):
    rewards, values = draw(2, 30, device=device)
    returns = gae(rewards, values, gamma=1.0, lam=1.0)[1]
    torch.testing.assert_close(returns, rewards.flip(1).cumsum(1).flip(1), rtol=1e-5, atol=1e-5)
    following = torch.cat([values[:, 1:], torch.zeros(2, 1, device=device)], 1)
    torch.testing.assert_close(gae(rewards, values, lam=0.0)[0], rewards + following - values, rtol=1e-5, atol=1e-6)


def test_packed_rows_have_the_bits_of_padded_rows(device):
    lengths = [5, 0, 1, 300, 64]
    offsets = torch.tensor([0, 5, 5, 6, 306, 370], dtype=torch.int32, device=device)
    rewards, values = draw(370, device=device)
    packed = gae(rewards, values, cu_seqlens=offsets)
    mask = torch.zeros(5, 310, dtype=torch.bool, device=device)
    padded_rewards, padded_values = torch.full((2, 5, 310), float("nan"), device=device)
    for b, length in enumerate(lengths):
        part = slice(int(offsets[b]), int(offsets[b + 1]))
        mask[b, :length] = True
        padded_rewards[b, :length], padded_values[b, :length] = rewards[part], values[part]
    padded = gae(padded_rewards, padded_values, mask)
    for p, q in zip(packed, padded, strict=True):
        assert torch.equal(p, q[mask])
        assert torch.all(q[~mask] == 0)


@pytest.mark.parametrize("length", [1, 3, 8, 250, 2_061])
def test_alignment_changes_no_bits(length, device):
    rewards, values = draw(1, length, device=device)
    want = gae(rewards, values)
    for before in range(1, 4):  # the row starts `before` elements into a packed batch
        offsets = torch.tensor([0, before, before + length, before + length + 2], device=device)
        packed = [torch.cat([x.new_full((before,), 7.0), x[0], x.new_full((2,), 7.0)]) for x in (rewards, values)]
        got = gae(*packed, cu_seqlens=offsets)
        alone = gae(*(x[-2:].unsqueeze(0) for x in packed))
        for g, w, a in zip(got, want, alone, strict=True):
            assert torch.equal(g[before : before + length], w[0]) and torch.equal(g[-2:], a[0])


def test_carry_passes_over_a_gap_and_decay_goes_through_it(device):
    rewards = torch.tensor([[1.0, 9.0, 2.0]], device=device)
    values = torch.tensor([[0.5, 9.0, 0.25]], device=device)
    mask = torch.tensor([[1, 0, 1]], device=device)
    last = 2.0 - 0.25
    carried = gae(rewards, values, mask, gamma=0.9, lam=0.5)[0]
    first = 1.0 + 0.9 * 0.25 - 0.5 + 0.45 * last  # as if the second token were not there (verl, NeMo-RL)
    torch.testing.assert_close(carried, torch.tensor([[first, 0.0, last]], device=device))
    decayed = gae(rewards, values, mask, gamma=0.9, lam=0.5, gaps="decay")[0]
    through = 0.9 * 0.25 + 0.45 * last  # the second token with reward 0 and value 0 (OpenRLHF)
    first = 1.0 + 0.0 - 0.5 + 0.45 * through
    torch.testing.assert_close(decayed, torch.tensor([[first, 0.0, last]], device=device))


def test_bootstrap_is_the_value_after_the_row(device):
    rewards, values = draw(2, 6, device=device)
    bootstrap = torch.tensor([0.7, -0.3], device=device)
    extended = torch.cat([values, bootstrap.unsqueeze(1)], 1)
    with_column = gae(torch.cat([rewards, torch.zeros(2, 1, device=device)], 1), extended, lam=0.0)[0][:, :-1]
    torch.testing.assert_close(gae(rewards, values, lam=0.0, bootstrap=bootstrap)[0], with_column)


def test_decoupled_lambda(device):
    rewards, values = draw(3, 20, device=device)
    lam = torch.tensor([0.9, 0.5, 1.0], device=device)
    advantages, returns = gae(rewards, values, lam=lam, returns_lam=1.0)
    for b in range(3):
        row = slice(b, b + 1)
        assert torch.equal(advantages[row], gae(rewards[row], values[row], lam=float(lam[b]))[0])
    assert torch.equal(returns, gae(rewards, values, lam=1.0)[1])


def test_whiten_is_masked_whiten_of_the_advantages(device):
    rewards, values = draw(4, 20, device=device)
    mask = torch.rand(4, 20, generator=torch.Generator().manual_seed(1)).to(device) < 0.8
    plain = gae(rewards, values, mask)
    white = gae(rewards, values, mask, whiten=True)
    assert torch.equal(white[0], masked_whiten(plain[0], mask)) and torch.equal(white[1], plain[1])


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_empty(shape, device):
    rewards, values = draw(*shape, device=device)
    assert all(out.shape == shape for out in gae(rewards, values))


@pytest.mark.parametrize(
    ("offsets", "why"),
    [([1, 4], "start at 0"), ([0, 3, 2, 4], "must not decrease, got 3 then 2"), ([0, 3], "end at N = 4, got 3")],
)
def test_broken_offsets_are_refused(offsets, why):
    rewards, values = draw(4)
    with pytest.raises(ValueError, match=why):
        gae(rewards, values, cu_seqlens=torch.tensor(offsets))
