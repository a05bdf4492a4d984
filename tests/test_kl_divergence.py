import math

import pytest
import torch

from rlhf_fast import kl_divergence
from rlhf_fast.ops.kl_divergence import kl_divergence_reference


def eager(logits, ref_logits):
    log_p, log_q = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    return torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def draw(*batch, vocab=50, apart=1.0, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*batch, vocab, generator=generator) * 3
    other = logits + apart * torch.randn(*batch, vocab, generator=generator)
    return logits.to(dtype).to(device), other.to(dtype).to(device)


def value_and_gradient(logits, ref_logits, **kwargs):
    x = logits.detach().requires_grad_()
    kl = kl_divergence(x, ref_logits, **kwargs)
    return kl.detach(), torch.autograd.grad(kl, x, torch.ones_like(kl))[0]


def exact(logits, ref_logits, **kwargs):
    x = logits.detach().cpu().double().requires_grad_()
    kl = kl_divergence_reference(x, ref_logits.cpu().double(), **kwargs)
    return kl.detach(), torch.autograd.grad(kl.sum(), x)[0]


def test_replaces_two_log_softmaxes_and_kl_div(device):
    logits, ref_logits = draw(2, 5, device=device)
    torch.testing.assert_close(kl_divergence(logits, ref_logits), eager(logits, ref_logits), rtol=2e-6, atol=2e-6)
    assert kl_divergence(logits, logits).abs().max() == 0


def test_gradient_by_hand(device):
    logits, ref_logits = draw(4, device=device)
    kl, gradient = value_and_gradient(logits, ref_logits, temperature=0.7)
    log_p, log_q = ((t.double() / 0.7).log_softmax(-1) for t in (logits, ref_logits))
    want = log_p.exp() * (log_p - log_q - kl.double().unsqueeze(-1)) / 0.7
    torch.testing.assert_close(gradient.double(), want, rtol=0, atol=4e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_small_divergences_keep_their_digits(dtype, device):
    """The two differ by 1e-3 a logit, so that KL is about 5e-7, a million times less than its terms."""
    logits, ref_logits = draw(8, vocab=3000, dtype=dtype, device=device)
    near = (logits.float() + 1e-3 * (ref_logits.float() - logits.float())).contiguous()
    got, want = kl_divergence(logits, near).cpu().double(), exact(logits, near)[0]
    assert want.max() < 2e-6 and (got - want).abs().max() < 1e-7


def test_a_row_has_the_same_bits_alone_and_in_any_batch(device):
    logits, ref_logits = draw(3, 7, vocab=2_503, device=device)
    batch = value_and_gradient(logits, ref_logits)
    for b, t in ((0, 0), (2, 6), (1, 3)):
        row, ref_row = (
            torch.cat([x.new_zeros(1), x[b, t]])[1:] for x in (logits, ref_logits)
        )  # off 16-byte alignment, too
        alone = value_and_gradient(row, ref_row)
        assert all(torch.equal(a, whole[b, t]) for a, whole in zip(alone, batch, strict=True))


@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16), (torch.float16, torch.float32)]
)
@pytest.mark.parametrize("vocab", [1, 7, 9, 17, 130, 2_050])
def test_alignment_changes_no_bits(vocab, dtypes, device):
    logits, ref_logits = (x.to(dtype) for x, dtype in zip(draw(2, vocab=vocab, device=device), dtypes, strict=True))
    results = []
    for offset in range(8):
        moved = []
        for x, by in ((logits, offset), (ref_logits, 3 * offset % 8)):  # rows of two alignments
            storage = torch.full((2 * vocab + by + 3,), math.nan, dtype=x.dtype, device=device)
            moved.append(storage.as_strided((2, vocab), (vocab + 1, 1), storage_offset=by).copy_(x))
        results.append(value_and_gradient(*moved))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    for got, want in zip(results[0], exact(logits, ref_logits), strict=True):
        torch.testing.assert_close(got.cpu().double(), want, rtol=0, atol={2: 1e-2, 4: 1e-6}[got.dtype.itemsize])


def test_dtypes_that_are_read_as_they_are_agree_with_their_copies(device):
    """bfloat16 fits in float32: the same numbers, whichever of the two is the wider."""
    logits, ref_logits = draw(3, vocab=2_100, dtype=torch.bfloat16, device=device)
    both, _ = exact(logits, ref_logits)
    for x in (logits, logits.float(), logits.double()):
        for y in (ref_logits, ref_logits.float(), ref_logits.double()):
            kl = kl_divergence(x, y)
            assert kl.dtype == (torch.float64 if torch.float64 in (x.dtype, y.dtype) else torch.float32)
            torch.testing.assert_close(kl.cpu().double(), both, rtol=2e-6, atol=0)
    assert kl_divergence(logits.half(), ref_logits).dtype == torch.float32


def test_no_copy_of_views(device):
    logits, ref_logits = draw(2, 6, vocab=257, dtype=torch.bfloat16, device=device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        kl, gradient = value_and_gradient(logits[:, :-1], ref_logits[:, 1:])
    assert not {e.key for e in profile.key_averages()} & {"aten::clone", "aten::contiguous", "aten::copy_"}
    want = value_and_gradient(logits[:, :-1].contiguous(), ref_logits[:, 1:].contiguous())
    assert torch.equal(kl, want[0]) and torch.equal(gradient, want[1])


def test_what_the_policy_cannot_give_adds_nothing(device):
    for first in (2_100, 1, 0):  # the whole first block of every reader
        logits, ref_logits = draw(2, vocab=3_000, device=device)
        logits[0, :first] = ref_logits[0, :first] = -math.inf
        logits[1, first::2] = -math.inf
        kl, gradient = value_and_gradient(logits, ref_logits)
        want, want_gradient = exact(logits, ref_logits)
        assert torch.isfinite(kl).all() and (gradient[logits == -math.inf] == 0).all()
        torch.testing.assert_close(kl.cpu().double(), want, rtol=4e-7, atol=0)
        torch.testing.assert_close(gradient.cpu().double(), want_gradient, rtol=0, atol=4e-7)


@pytest.mark.parametrize("vocab", [5, 2_500])
def test_what_the_reference_cannot_give_is_infinitely_far(vocab, device):
    """However unlikely: exp(-1000) is 0 in float64 too, and the token is possible all the same."""
    logits, ref_logits = draw(3, vocab=vocab, device=device)
    untouched = value_and_gradient(logits, ref_logits)
    ref_logits[0, 3] = ref_logits[1, vocab - 1] = -math.inf
    logits[1, vocab - 1] = -1000.0
    kl, gradient = value_and_gradient(logits, ref_logits)
    assert kl[0] == math.inf and kl[1] == math.inf and (gradient[:2] == 0).all()
    assert torch.equal(kl[2], untouched[0][2]) and torch.equal(gradient[2], untouched[1][2])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("column", [0, 5, 2_449])
def test_nan_stays_in_its_row(value, column, device):
    for side in (0, 1):
        pair = draw(3, vocab=2_450, device=device)
        want = value_and_gradient(*pair)
        pair[side][1, column] = value
        kl, gradient = value_and_gradient(*pair)
        assert kl[1].isnan() and gradient[1].isnan().all()
        for row in (0, 2):
            assert torch.equal(kl[row], want[0][row]) and torch.equal(gradient[row], want[1][row])
    for side in (0, 1):  # no distribution at all
        pair = draw(2, vocab=50, device=device)
        pair[side][0] = -math.inf
        kl, gradient = value_and_gradient(*pair)
        assert kl[0].isnan() and gradient[0].isnan().all() and torch.isfinite(kl[1])


def test_rows_far_from_zero_and_from_each_other(device):
    for offset, ref_offset in ((3e4, 3e4), (-3e4, 3e4), (200.0, -3e4), (0.0, 1e3)):
        logits, ref_logits = draw(3, vocab=2_500, device=device)
        logits, ref_logits = logits + offset, ref_logits + ref_offset
        got, want = value_and_gradient(logits, ref_logits), exact(logits, ref_logits)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.cpu().double(), b, rtol=4e-7, atol=4e-7)
    for value in (-3e38, 3e38):  # two uniform distributions
        logits = torch.full((2, 100), value, device=device)
        assert (kl_divergence(logits, logits * torch.tensor([[1.0], [-1.0]], device=device)) == 0).all()


def test_equal_logits_but_one_round_alike(device):
    """No rounding averages out: every difference is the same, and every exponent of -16 is off by the same 7e-7."""
    logits, ref_logits = (torch.full((2, 50_000), x, device=device) for x in (0.1, 0.3))
    logits[:, 7], ref_logits[0, 7], ref_logits[1, 7] = 11.3, 10.7, 40.9
    got, want = value_and_gradient(logits, ref_logits), exact(logits, ref_logits)
    assert (got[0].cpu().double() - want[0]).abs().max() <= 4 * 2.0**-23 * want[0].max().clamp(min=1)
    torch.testing.assert_close(got[1].cpu().double(), want[1], rtol=2e-6, atol=4e-7)


def test_masked_rows_are_not_read_and_weights_multiply(device):
    logits, ref_logits = draw(3, 4, device=device)
    plain, slope = value_and_gradient(logits, ref_logits)
    mask = torch.ones(3, 4, device=device)
    mask[0], mask[1, 1] = 0, 0.5
    logits[0], ref_logits[0] = math.nan, math.inf
    kl, gradient = value_and_gradient(logits, ref_logits, mask=mask)
    assert (kl[0] == 0).all() and (gradient[0] == 0).all()
    assert torch.equal(kl[1:], mask[1:] * plain[1:])
    torch.testing.assert_close(gradient[1:], mask[1:].unsqueeze(-1) * slope[1:])


def test_a_temperature_a_token(device):
    logits, ref_logits = draw(3, 4, device=device)
    temperature = torch.linspace(0.5, 2.0, 12, device=device).view(3, 4)
    each = kl_divergence(logits, ref_logits, temperature=temperature)
    for b, t in ((0, 0), (2, 3)):
        assert each[b, t] == kl_divergence(logits[b, t], ref_logits[b, t], temperature=temperature[b, t].item())


def test_threads_do_not_change_the_bits():
    logits, ref_logits = draw(64, vocab=5003)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(value_and_gradient(logits, ref_logits))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_gradient_of_the_reference_is_refused():
    logits, ref_logits = draw(2)
    with pytest.raises(ValueError, match=r"`ref_logits` requires grad, .* pass ref_logits.detach\(\)"):
        kl_divergence(logits, ref_logits.requires_grad_())


@pytest.mark.parametrize("function", [kl_divergence, kl_divergence_reference])
def test_a_masked_row_gets_no_gradient_whatever_it_holds(function):
    logits = torch.tensor([[-math.inf, 1.0, 2.0], [0.0, 1.0, 2.0]], requires_grad=True)
    ref_logits = torch.tensor([[-math.inf] * 3, [2.0, 1.0, 0.0]])
    function(logits, ref_logits, mask=torch.tensor([0, 1])).sum().backward()
    assert (logits.grad[0] == 0).all() and (logits.grad[1] != 0).any()
