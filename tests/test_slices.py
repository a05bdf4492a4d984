"""Slices of the vocabulary: their statistics, combined, and their gradients are those of the whole."""

import itertools
import math
import random

import pytest
import torch

from rlhf_fast import gather_logprobs
from rlhf_fast.ops import _common
from rlhf_fast.ops._slices import SliceKernels
from tests.cases import OPS, assert_close, units_of

slices = SliceKernels("gather_logprobs")


def options_of(call):
    kwargs, logits = call.kwargs, call.args[0]
    tau = kwargs.get("temperature", 1.0)
    taus = tau.to(torch.float64 if logits.dtype == torch.float64 else torch.float32) if torch.is_tensor(tau) else None
    numbers = (1.0 if taus is not None else tau, kwargs.get("softcap") or 0.0, kwargs.get("logit_scale", 1.0), -100)
    return taus, kwargs.get("mask"), numbers


def cuts_of(rng: random.Random, vocab: int) -> list[int]:
    """Where the slices start, and V: some of them empty."""
    inner = sorted(
        rng.choice([rng.randrange(vocab + 1), 2048 * rng.randrange(vocab // 2048 + 1)]) for _ in range(rng.randrange(5))
    )
    return [0, *inner, vocab]


@pytest.mark.parametrize("how", ["combined", "running"])
@pytest.mark.parametrize("seed", range(6))
def test_any_slices_give_the_log_probs_and_gradients_of_the_whole(seed, how, device):
    rng = random.Random(f"slices {seed} {how}")
    for _ in range(15):
        call = OPS["gather_logprobs"].draw(rng)
        logits, labels = (t.to(device) for t in call.args)
        while logits.dim() > 3:
            logits, labels = logits.flatten(0, 1), labels.flatten(0, 1)
        taus, mask, numbers = options_of(call)
        taus, mask = (None if t is None else t.reshape(labels.shape).to(device) for t in (taus, mask))
        vocab, with_entropy = logits.shape[-1], call.kwargs["with_entropy"]
        cuts = cuts_of(rng, vocab)
        parts = [logits[..., a:b] for a, b in itertools.pairwise(cuts)]
        rest = (labels, taus, mask, *numbers)
        if how == "combined":
            partials = torch.stack(
                [slices.statistics(p, *rest, a, vocab, with_entropy) for p, a in zip(parts, cuts, strict=False)]
            )
        else:
            running = slices.statistics(logits[..., :0], *rest, 0, vocab, with_entropy)
            for p, a in zip(parts, cuts, strict=False):
                slices.statistics_into(running, p, *rest, a, vocab, with_entropy)
            partials = running.unsqueeze(0)
        got = slices.combine(partials, *rest, with_entropy, logits.dtype == torch.float64)

        leaf = logits.detach().clone().requires_grad_()
        kwargs = {k: v.reshape(labels.shape).to(device) if torch.is_tensor(v) else v for k, v in call.kwargs.items()}
        want = gather_logprobs(leaf, labels, **{**kwargs, "with_entropy": True})
        units = 2 * units_of("gather_logprobs", call)
        for i in range(1 + with_entropy):
            assert_close(f"output {i}", got[i], want[i], units)
        if (
            how == "running"
            and device == "cpu"
            and all(c % 2048 == 0 for c in cuts[:-1])
            and _common._namespace == "rlhf_fast"
        ):
            assert torch.equal(got[0].nan_to_num(), want[0].nan_to_num()), "other bits than the whole"

        upstream = [torch.randn_like(want[0]) for _ in range(2)]
        if not with_entropy:
            upstream[1] = torch.zeros_like(want[0])
        torch.autograd.backward(want, upstream)
        grads = upstream[0], upstream[1] if with_entropy else None
        back = [
            slices.backward(*grads, p, labels, taus, mask, got[2], *numbers, a, vocab)
            for p, a in zip(parts, cuts, strict=False)
        ]
        assert_close("gradient", torch.cat(back, -1), leaf.grad, units + 1)
        place = logits.detach().clone()
        for a, b in itertools.pairwise(cuts):
            slices.backward_inplace(*grads, place[..., a:b], labels, taus, mask, got[2], *numbers, a, vocab)
        assert torch.equal(place.nan_to_num(), torch.cat(back, -1).nan_to_num())


def statistics(logits, labels, start=0, vocab=None, entropy=True):
    return slices.statistics(logits, labels, None, None, 1.0, 0.0, 1.0, -100, start, vocab or logits.shape[-1], entropy)


def combine(partials, labels):
    return slices.combine(torch.stack(partials), labels, None, None, 1.0, 0.0, 1.0, -100, True, False)


def test_slices_of_minus_infinity_and_of_nothing_change_no_bit(device):
    logits = torch.randn(4, 9).to(device)
    labels = torch.tensor([0, 8, 3, -100]).to(device)
    alone = combine([statistics(logits, labels, 2, 20)], labels + 2 * (labels >= 0))
    assert alone[0].isnan().any()  # label 0 and 8 were taken as ids of the whole
    labels = labels + 2 * (labels >= 0)
    whole = statistics(logits, labels, 2, 20)
    low = statistics(torch.full((4, 2), -math.inf).to(device), labels, 0, 20)
    none = statistics(logits[:, :0], labels, 11, 20)
    high = statistics(torch.full((4, 9), -math.inf).to(device), labels, 11, 20)
    want = combine([whole], labels)
    for partials in ([low, whole, none, high], [none, whole], [whole, high, low], [none, none, low, whole]):
        assert all(torch.equal(a, b) for a, b in zip(combine(partials, labels), want, strict=True))
    assert want[0][3] == 0 and torch.isfinite(want[0]).all()


def test_a_label_on_minus_infinity_and_a_nan_row_stay_in_their_rows(device):
    logits = torch.randn(3, 10).to(device)
    logits[0, 7], logits[1, 2] = -math.inf, math.nan
    labels = torch.tensor([7, 8, 1]).to(device)
    parts = [statistics(logits[:, a : a + 5], labels, a, 10) for a in (0, 5)]
    logprobs, entropy, _ = combine(parts, labels)
    assert logprobs[0] == -math.inf and torch.isfinite(entropy[0])
    assert logprobs[1].isnan() and entropy[1].isnan()
    want = gather_logprobs(logits[2], labels[2], with_entropy=True)
    torch.testing.assert_close((logprobs[2], entropy[2]), want, rtol=0, atol=1e-6)


def test_a_label_outside_the_whole_is_refused_on_the_cpu_and_nan_in_its_row_elsewhere(device):
    logits, labels = torch.randn(2, 5).to(device), torch.tensor([3, 10]).to(device)
    if _common._namespace == "rlhf_fast" and device == "cpu":
        with pytest.raises(ValueError, match=r"gather_logprobs: `labels` holds 10 at flat position 1; .* in \[0, 10\)"):
            statistics(logits, labels, 0, 10)
        return
    parts = [statistics(logits, labels, 0, 10), statistics(logits, labels, 5, 10)]
    logprobs, _, stats = combine(parts, labels)
    assert torch.isfinite(logprobs[0]) and logprobs[1].isnan()
    grad = slices.backward(
        torch.ones_like(logprobs), None, logits, labels, None, None, stats, 1.0, 0.0, 1.0, -100, 0, 10
    )
    assert torch.isfinite(grad[0]).all() and grad[1].isnan().all()


def test_slices_outside_the_vocabulary_are_refused(device):
    logits, labels = torch.randn(2, 5).to(device), torch.tensor([3, 1]).to(device)
    for start, vocab in ((-1, 10), (6, 10), (0, 4)):
        with pytest.raises(ValueError, match="gather_logprobs: a slice of 5 logits from"):
            statistics(logits, labels, start, vocab)


def test_operators_pass_opcheck():
    logits, labels = (
        torch.randn(2, 3, 7),
        torch.randint(4, 11, (2, 3)),
    )  # in the slice: opcheck takes no NaN for another
    rest = (labels, torch.rand(2, 3) + 0.5, torch.ones(2, 3), 1.0, 3.0, 1.0, -100)
    ops = torch.ops.rlhf_fast
    running = ops.logprob_slice_statistics(logits, *rest, 4, 20, True)
    stats = ops.logprob_slices_combine(running.unsqueeze(0), *rest, True, False)[2]
    grad = torch.randn(2, 3)
    torch.library.opcheck(ops.logprob_slice_statistics.default, (logits, *rest, 4, 20, True))
    torch.library.opcheck(ops.logprob_slice_statistics_into.default, (running, logits, *rest, 11, 20, True))
    torch.library.opcheck(ops.logprob_slices_combine.default, (torch.stack([running, running]), *rest, True, False))
    backward = (*rest[:3], stats, *rest[3:], 4, 20)
    torch.library.opcheck(ops.logprob_slice_backward.default, (grad, None, logits, *backward))
    torch.library.opcheck(ops.logprob_slice_backward_inplace.default, (grad, grad, logits, *backward))
