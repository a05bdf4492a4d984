import math

import pytest
import torch

from rlhf_fast import gather_logprobs


def masked(logits, labels, kept):
    """What training code does without the op: the logits off the set become -inf, all of V is gone through."""
    keep = torch.zeros(logits.shape, dtype=torch.bool).scatter(-1, kept.long(), True)
    return logits.masked_fill(~keep, -math.inf).log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def draw(*batch, vocab=50, k=7, device="cpu", seed=0):
    """The k largest logits are kept, and the label is one of them."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*batch, vocab, generator=generator) * 3
    kept = logits.topk(k).indices
    labels = kept.gather(-1, torch.randint(0, k, (*batch, 1), generator=generator)).squeeze(-1)
    return logits.to(device), labels.to(device), kept.to(device)


def test_replaces_the_masked_log_softmax(device):
    logits, labels, kept = draw(3, 5, device=device)
    x, reference = logits.clone().requires_grad_(), logits.cpu().double().requires_grad_()
    logprobs, entropy = gather_logprobs(x, labels, kept=kept, with_entropy=True)
    want = masked(reference, labels.cpu(), kept.cpu())
    torch.testing.assert_close(logprobs.cpu(), want.float(), rtol=0, atol=2e-6)
    p = logits.gather(-1, kept).softmax(-1)
    torch.testing.assert_close(entropy, -(p * p.log()).sum(-1), rtol=1e-5, atol=2e-6)
    logprobs.sum().backward()
    want.sum().backward()
    torch.testing.assert_close(x.grad.cpu(), reference.grad.float(), rtol=0, atol=1e-6)


def test_the_whole_vocabulary_kept_is_no_set_at_all(device):
    logits, labels, _ = draw(2, 4, device=device)
    everything = torch.arange(50, device=device).flip(0).expand(2, 4, 50)
    got = gather_logprobs(logits, labels, kept=everything, with_entropy=True)
    for g, w in zip(got, gather_logprobs(logits, labels, with_entropy=True), strict=True):
        torch.testing.assert_close(g, w, rtol=0, atol=2e-6)


def test_a_set_has_no_order_no_repetition_and_no_padding(device):
    logits, labels, kept = draw(4, k=3, device=device)
    want = gather_logprobs(logits, labels, kept=kept, with_entropy=True)
    padding = torch.full_like(kept, -1)
    ascending, first = kept.sort(-1).values, kept[:, :1]
    variants = (
        torch.cat([kept.flip(-1), padding], -1),
        torch.cat([padding - 99, kept, kept, first], -1),
        kept.int(),
        torch.cat([ascending, padding], -1),
        ascending.repeat_interleave(2, -1),
        torch.cat([ascending, padding, ascending], -1),
        torch.cat([first, padding[:, :1], first, kept], -1),
    )
    for variant in variants:
        x = logits.clone().requires_grad_()
        got = gather_logprobs(x, labels, kept=variant, with_entropy=True)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=0, atol=1e-6)
        got[0].sum().backward()
        torch.testing.assert_close(x.grad.sum(-1), torch.zeros(4, device=device), rtol=0, atol=1e-6)


@pytest.mark.parametrize("k", [1, 31, 32, 33, 257, 512])
def test_sets_of_any_size(k, device):
    logits, labels, kept = draw(3, vocab=1031, k=k, device=device)
    x, reference = logits.clone().requires_grad_(), logits.cpu().double().requires_grad_()
    gather_logprobs(x, labels, kept=kept).sum().backward()
    masked(reference, labels.cpu(), kept.cpu()).sum().backward()
    torch.testing.assert_close(x.grad.cpu(), reference.grad.float(), rtol=0, atol=1e-6)
    assert ((x.grad != 0).sum(-1) <= k).all()


def test_a_label_that_was_not_kept(device):
    logits, labels, kept = draw(3, device=device)
    labels[1] = logits[1].argmin()
    x = logits.requires_grad_()
    logprobs, entropy = gather_logprobs(x, labels, kept=kept, with_entropy=True)
    assert logprobs[1] == -math.inf and torch.isfinite(logprobs[[0, 2]]).all() and torch.isfinite(entropy).all()
    (logprobs.sum() + entropy.sum()).backward()
    assert torch.all(x.grad[1] == 0) and torch.all(x.grad[[0, 2]].abs().sum(-1) > 0) and torch.isfinite(x.grad).all()
    # What slime does: the label joins the set.
    joined = gather_logprobs(x, labels, kept=torch.cat([kept, labels.unsqueeze(-1)], -1))
    assert torch.isfinite(joined).all() and torch.equal(joined[[0, 2]], logprobs[[0, 2]])


def test_what_is_not_kept_is_never_read(device):
    logits, labels, kept = draw(2, 3, device=device)
    keep = torch.zeros(logits.shape, dtype=torch.bool, device=device).scatter(-1, kept, True)
    want = gather_logprobs(logits, labels, kept=kept)
    assert torch.equal(gather_logprobs(logits.masked_fill(~keep, math.nan), labels, kept=kept), want)


def test_rows_without_a_usable_set(request, device):
    logits, labels, kept = draw(3, device=device)
    empty, beyond = kept.clone(), kept.clone()
    empty[1] = -1
    beyond[1, 3] = 50
    on_gpu = "emulated" in request.node.name or device == "cuda"
    for bad, message in (
        (empty, "at flat position 1 of `labels` it holds padding only"),
        (beyond, "`kept` holds 50 at flat position 10"),
    ):
        if on_gpu:
            x = logits.clone().requires_grad_()
            logprobs, entropy = gather_logprobs(x, labels, kept=bad, with_entropy=True)
            assert logprobs[1].isnan() and entropy[1].isnan() and torch.isfinite(logprobs[[0, 2]]).all()
            logprobs.sum().backward()
            assert torch.isfinite(x.grad[[0, 2]]).all()
        else:
            with pytest.raises(ValueError, match=message):
                gather_logprobs(logits, labels, kept=bad)
        # Nothing is asked of a masked or an ignored row.
        mask = torch.tensor([1, 0, 1], device=device)
        assert gather_logprobs(logits, labels, kept=bad, mask=mask)[1] == 0
        ignored = labels.clone()
        ignored[1] = -100
        assert gather_logprobs(logits, ignored, kept=bad)[1] == 0


def test_a_row_has_the_same_bits_alone_and_in_any_batch(device):
    logits, labels, kept = draw(3, 7, vocab=1031, k=100, device=device)
    batch = gather_logprobs(logits, labels, kept=kept, with_entropy=True)
    alone = gather_logprobs(logits[2, 4], labels[2, 4], kept=kept[2, 4], with_entropy=True)
    assert all(torch.equal(a, whole[2, 4]) for a, whole in zip(alone, batch, strict=True))


def test_views_and_more_dimensions(device):
    logits, labels, kept = draw(2, 5, device=device)
    shifted = gather_logprobs(logits[:, :-1], labels[:, :-1], kept=kept[:, :-1])
    assert torch.equal(shifted, gather_logprobs(logits, labels, kept=kept)[:, :-1])
    logits, labels, kept = draw(2, 3, 2, device=device)
    temperature = torch.rand(2, 3, 2, device=device) + 0.5
    got = gather_logprobs(logits, labels, kept=kept, temperature=temperature)
    want = gather_logprobs(logits / temperature.unsqueeze(-1), labels, kept=kept)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)


def test_in_place_backward(device):
    logits, labels, kept = draw(2, 6, vocab=131, device=device)
    for dtype in (torch.float32, torch.bfloat16):
        leaf = logits.to(dtype).clone().requires_grad_()
        gather_logprobs(leaf * 1, labels, kept=kept).sum().backward()
        again = logits.to(dtype).clone().requires_grad_()
        produced = again * 1
        before = produced.data_ptr()
        loss = gather_logprobs(produced[:, :-1], labels[:, :-1], kept=kept[:, :-1], inplace_backward=True).sum()
        last = produced[:, -1].detach().clone()
        loss.backward(retain_graph=True)
        assert torch.equal(again.grad[:, :-1], leaf.grad[:, :-1]) and torch.equal(produced.detach()[:, -1], last)
        assert produced.data_ptr() == before and torch.equal(produced.detach()[:, :-1], leaf.grad[:, :-1])
        with pytest.raises(RuntimeError, match="wrote the gradient over the logits"):
            loss.backward()
