import pytest
import torch

from rlhf_fast import masked_mean, masked_whiten


def test_mean(device):
    x = torch.tensor([[1.0, 2.0, 30.0], [4.0, 50.0, 60.0]], device=device)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]], device=device)
    assert masked_mean(x, mask) == 7.0 / 3
    assert torch.equal(masked_mean(x, mask, dim=1), torch.tensor([1.5, 4.0], device=device))
    assert torch.equal(masked_mean(x, mask, dim=0), torch.tensor([2.5, 2.0, 0.0], device=device))
    assert masked_mean(x, torch.tensor([[0.5, 0.0, 0.0], [1.5, 0.0, 0.0]], device=device)) == (0.5 + 6.0) / 2


def test_whitening_as_trl_and_as_openai(device):
    x = torch.randn(5, 7, device=device) * 3 + 2
    mask = torch.rand(5, 7, generator=torch.Generator().manual_seed(0)).to(device) < 0.7
    kept = x[mask].double()
    for unbiased in (True, False):
        want = (kept - kept.mean()) * torch.rsqrt(kept.var(unbiased=unbiased) + 1e-8)
        torch.testing.assert_close(masked_whiten(x, mask, unbiased=unbiased)[mask].double(), want, rtol=1e-6, atol=1e-6)
        got = masked_whiten(x, mask, unbiased=unbiased, shift_mean=False)[mask].double()
        torch.testing.assert_close(got, want + kept.mean(), rtol=1e-6, atol=1e-6)


def test_a_large_mean_does_not_swallow_the_variance(device):
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0)).to(device) + 4096
    white = masked_whiten(x, torch.ones(10_000, device=device)).double()
    assert abs(white.mean()) < 1e-6 and abs(white.var() - 1) < 1e-5


def test_one_token(device):
    # verl's masked_var raises here, after a host synchronisation.
    assert torch.equal(
        masked_whiten(torch.tensor([3.0, 4.0], device=device), torch.tensor([1, 0], device=device)),
        torch.zeros(2, device=device),
    )


def test_dim_out_of_range():
    with pytest.raises(ValueError, match=r"`dim` must be in \[-2, 2\).*got 2"):
        masked_mean(torch.zeros(2, 3), torch.ones(2, 3), dim=2)
