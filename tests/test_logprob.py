import math

import pytest
import torch

from rlhf_fast import gather_logprobs


def eager(logits, labels):
    return logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def draw(*batch, vocab=50, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*batch, vocab, generator=generator) * 3
    return logits.to(dtype).to(device), torch.randint(0, vocab, batch, generator=generator).to(device)


def test_replaces_log_softmax_and_gather(device):
    logits, labels = draw(2, 5, device=device)
    torch.testing.assert_close(gather_logprobs(logits, labels), eager(logits, labels), rtol=0, atol=2e-6)


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("shape", [(), (5,), (2, 5), (2, 1, 3)])
def test_a_call_without_options_is_the_call_with_a_mask_of_ones(shape, with_entropy, device):
    logits, labels = draw(*shape, device=device)
    results = []
    for mask in (None, torch.ones_like(labels)):  # the first goes to the kernel before any check
        x = logits.clone().requires_grad_()
        outputs = gather_logprobs(x, labels, mask=mask, with_entropy=with_entropy)
        outputs = outputs if with_entropy else (outputs,)
        assert all(out.shape == labels.shape for out in outputs)
        sum(out.sum() for out in outputs).backward()
        results.append((*outputs, x.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("inplace", [False, True])
def test_an_expanded_gradient_is_read_as_a_dense_one(inplace, dtype, device):
    logits, labels = draw(3, 5, dtype=dtype, device=device)
    gradients = []
    for upstream in (torch.tensor(0.7, dtype=dtype).expand(3, 5), torch.full((3, 5), 0.7, dtype=dtype)):
        x = logits.clone().requires_grad_()
        gather_logprobs(x * 1, labels, inplace_backward=inplace).backward(upstream.to(device))
        gradients.append(x.grad)
    assert torch.equal(*gradients) and gradients[0].abs().max() > 0.1


def test_a_row_has_the_same_bits_alone_and_in_any_batch(device):
    logits, labels = draw(3, 7, vocab=50_257 if device == "cuda" else 2_503, device=device)
    batch = gather_logprobs(logits, labels, with_entropy=True)
    for b, t in ((0, 0), (2, 6), (1, 3)):
        # Off 16-byte alignment, too.
        row = torch.cat([logits.new_zeros(1), logits[b, t]])[1:]
        alone = gather_logprobs(row, labels[b, t], with_entropy=True)
        assert all(torch.equal(a, whole[b, t]) for a, whole in zip(alone, batch, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("vocab", [1, 7, 9, 130, 2_050])
def test_alignment_changes_no_bits(vocab, dtype, device):
    size = torch.finfo(dtype).bits // 8
    logits, labels = draw(2, vocab=vocab, dtype=dtype, device=device)
    results = []
    for offset in range(16 // size):  # with the stride of vocab + 1, rows of two alignments
        storage = torch.full((2 * vocab + offset + 3,), math.nan, dtype=dtype, device=device)
        rows = storage.as_strided((2, vocab), (vocab + 1, 1), storage_offset=offset)
        x = rows.copy_(logits).detach().requires_grad_()
        logprobs, entropy = gather_logprobs(x, labels, with_entropy=True)
        (logprobs.sum() + entropy.sum()).backward()
        inplace = rows.detach().requires_grad_()
        both = gather_logprobs(inplace.view_as(inplace), labels, with_entropy=True, inplace_backward=True)
        (both[0].sum() + both[1].sum()).backward()
        results.append((logprobs.detach(), entropy.detach(), x.grad, rows.detach()))
        assert storage[:offset].isnan().all() and storage[offset + vocab].isnan(), "written beside the rows"
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert torch.equal(results[0][2], results[0][3])


def test_threads_do_not_change_the_bits():
    logits, labels = draw(64, vocab=5003)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            x = logits.clone().requires_grad_()
            logprobs, entropy = gather_logprobs(x, labels, with_entropy=True)
            (logprobs.sum() + entropy.sum()).backward()
            results.append((logprobs, entropy, x.grad))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_ignored_and_masked_rows_give_zero_and_no_gradient(device):
    logits, labels = draw(2, 6, device=device)
    labels[0, 0] = -100
    mask = torch.ones(2, 6, device=device)
    mask[1] = 0
    mask[0, 1] = 0.5
    x = logits.clone().requires_grad_()
    logprobs = gather_logprobs(x, labels, mask=mask)
    logprobs.sum().backward()
    assert logprobs[0, 0] == 0 and torch.all(logprobs[1] == 0)
    assert torch.all(x.grad[0, 0] == 0) and torch.all(x.grad[1] == 0) and x.grad[0, 1].abs().sum() > 0
    torch.testing.assert_close(logprobs[0, 1], 0.5 * eager(logits, labels.clamp(min=0))[0, 1], rtol=0, atol=1e-6)


def test_in_place_backward_writes_over_the_logits(device):
    logits, labels = draw(2, 6, vocab=131, dtype=torch.bfloat16, device=device)
    leaf = logits.clone().requires_grad_()
    logprobs, entropy = gather_logprobs(leaf * 1, labels, with_entropy=True)
    (logprobs.sum() + 0.1 * entropy.sum()).backward()

    again = logits.clone().requires_grad_()
    produced = again * 1
    before = produced.data_ptr()
    logprobs, entropy = gather_logprobs(produced, labels, with_entropy=True, inplace_backward=True)
    (logprobs.sum() + 0.1 * entropy.sum()).backward()
    assert torch.equal(again.grad, leaf.grad)
    assert produced.data_ptr() == before and torch.equal(produced.detach(), leaf.grad)


def test_in_place_backward_into_a_view_leaves_the_other_rows(device):
    logits, labels = draw(2, 6, vocab=131, device=device)
    leaf = logits.clone().requires_grad_()
    produced = leaf * 1
    last = produced[:, -1].detach().clone()
    gather_logprobs(produced[:, :-1], labels[:, 1:], inplace_backward=True).sum().backward()
    assert torch.equal(produced.detach()[:, -1], last)
    plain = logits.clone().requires_grad_()
    gather_logprobs(plain[:, :-1], labels[:, 1:]).sum().backward()
    assert torch.equal(leaf.grad, plain.grad)


def test_a_second_backward_in_place_says_why_not(device):
    logits, labels = draw(3, device=device)
    loss = gather_logprobs(logits.requires_grad_() * 1, labels, inplace_backward=True).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="wrote the gradient over the logits"):
        loss.backward()


def test_what_saved_the_logits_is_not_differentiated_through_their_gradient(device):
    logits, labels = draw(3, device=device)
    loss = gather_logprobs(torch.tanh(logits.requires_grad_()), labels, inplace_backward=True).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_in_place_backward_refuses_rows_that_share_memory(device):
    logits, labels = draw(1, 4, device=device)
    shared = (logits.requires_grad_() * 1).expand(3, 4, 50)
    loss = gather_logprobs(shared, labels.expand(3, 4), inplace_backward=True).sum()
    with pytest.raises(ValueError, match="expanded or overlap"):
        loss.backward()


def test_backward_twice_without_in_place_repeats(device):
    logits, labels = draw(3, device=device)
    x = logits.requires_grad_()
    loss = gather_logprobs(x, labels).sum()
    first = torch.autograd.grad(loss, x, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, x)[0])
