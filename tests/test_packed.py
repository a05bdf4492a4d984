"""Packed rows: what [N] with `cu_seqlens` promises beside [B, T], for every op that takes both."""

from itertools import pairwise

import pytest
import torch

from rlhf_fast import gae, masked_mean, ppo_policy_loss, ppo_value_loss, shape_rewards
from rlhf_fast.ops.ppo_loss import LEVELS, LOSS_TYPES
from tests.cases import AGGREGATES
from tests.conftest import DEVICES

GPU_KERNELS = [d for d in DEVICES if d != "cpu"]  # the CPU refuses broken offsets: test_contract.py

LENGTHS = [5, 0, 1, 2049, 300, 4096, 2048, 7]  # below, at and above the chunks that the kernels cut a row into


class Batch:
    """The same sequences packed and padded; NaN in the padding."""

    def __init__(self, lengths=LENGTHS, device="cpu", width=None):
        self.lengths, self.device, self.width = lengths, device, width or max(lengths)
        self.generator = torch.Generator().manual_seed(0)
        self.offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)
        self.inside = torch.arange(self.width, device=device) < torch.tensor(lengths, device=device).unsqueeze(1)
        self.mask = torch.rand(sum(lengths), generator=self.generator).to(device) < 0.8
        self.padded_mask = self.pad(self.mask, False)

    def pad(self, packed, fill=float("nan")):
        out = torch.full(self.inside.shape, fill, dtype=packed.dtype, device=self.device)
        out[self.inside] = packed
        return out

    def draw(self, scale=0.2):
        packed = torch.randn(sum(self.lengths), generator=self.generator).to(self.device) * scale
        return packed, self.pad(packed)


def test_means_and_their_gradients_have_the_bits_of_padded_rows(device):
    batch = Batch(device=device, width=5000)
    x, padded = batch.draw()
    leaves = [t.requires_grad_() for t in (x, padded)]
    packed_mean = masked_mean(x, batch.mask, cu_seqlens=batch.offsets)
    padded_mean = masked_mean(padded, batch.padded_mask, dim=1)
    assert torch.equal(packed_mean, padded_mean) and packed_mean[1] == 0
    upstream = torch.arange(1.0, 9.0, device=device)
    a, b = (
        torch.autograd.grad(m, leaf, upstream)[0] for m, leaf in zip((packed_mean, padded_mean), leaves, strict=True)
    )
    assert torch.equal(a, b[batch.inside])


def test_a_row_has_the_same_bits_alone_and_in_any_batch(device):
    batch = Batch(device=device)
    x, _ = batch.draw()
    whole = masked_mean(x, batch.mask, cu_seqlens=batch.offsets)
    for b, length in enumerate(LENGTHS):
        part = slice(int(batch.offsets[b]), int(batch.offsets[b + 1]))
        alone = torch.tensor([0, length], device=device)
        assert torch.equal(masked_mean(x[part], batch.mask[part], cu_seqlens=alone), whole[b : b + 1])


def test_rewards_have_the_bits_of_padded_rows(device):
    batch = Batch(device=device)
    (logprobs, padded_logprobs), (ref, padded_ref) = batch.draw(), batch.draw()
    scores = torch.randn(len(LENGTHS), generator=batch.generator).to(device)
    results = []
    for arguments, offsets in (
        ((logprobs, ref, batch.mask), batch.offsets),
        ((padded_logprobs, padded_ref, batch.padded_mask), None),
    ):
        leaves = [t.clone().requires_grad_() for t in (scores, *arguments[:2])]
        rewards = shape_rewards(*leaves, arguments[2], kl_coef=0.1, estimator="k3", cu_seqlens=offsets)
        rewards.square().sum().backward()
        results.append((rewards.detach(), *(leaf.grad for leaf in leaves)))
    for packed, padded in zip(*results, strict=True):
        assert torch.equal(packed, padded if padded.dim() == 1 else padded[batch.inside])


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_policy_losses_have_the_bits_of_padded_rows(aggregate, level, loss_type, device):
    batch = Batch([5, 0, 1, 2049, 300], device)
    new, old, advantages = batch.draw(), batch.draw(), batch.draw(1.0)
    options = {"aggregate": aggregate, "importance_sampling_level": level, "loss_type": loss_type}
    results = []
    for form, mask, offsets in ((0, batch.mask, batch.offsets), (1, batch.padded_mask, None)):
        leaves = [t[form].clone().requires_grad_() for t in (new, old, advantages)]
        loss, stats = ppo_policy_loss(*leaves, mask, **options, cu_seqlens=offsets)
        loss.backward()
        results.append([loss.detach(), *stats.values(), *(leaf.grad for leaf in leaves)])
    for packed, padded in zip(*results, strict=True):
        assert torch.equal(packed, padded if padded.dim() < 2 else padded[batch.inside])


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_value_losses_have_the_bits_of_padded_rows(aggregate, device):
    batch = Batch([5, 0, 1, 2049, 300], device)
    tensors = batch.draw(), batch.draw(), batch.draw()
    results = []
    for form, mask, offsets in ((0, batch.mask, batch.offsets), (1, batch.padded_mask, None)):
        leaves = [t[form].clone().requires_grad_() for t in tensors]
        loss, stats = ppo_value_loss(*leaves, mask, aggregate=aggregate, cu_seqlens=offsets)
        loss.backward()
        results.append([loss.detach(), *stats.values(), *(leaf.grad for leaf in leaves)])
    for packed, padded in zip(*results, strict=True):
        assert torch.equal(packed, padded if padded.dim() < 2 else padded[batch.inside])


def test_one_advantage_a_packed_sequence(device):
    batch = Batch([3, 0, 4], device)
    (new, _), (old, _) = batch.draw(), batch.draw()
    rows = torch.tensor([1.5, 9.0, -0.5], device=device)
    per_token = torch.repeat_interleave(rows, torch.tensor(batch.lengths, device=device)).requires_grad_()
    want, _ = ppo_policy_loss(new, old, per_token, batch.mask, cu_seqlens=batch.offsets)
    want.backward()
    for shape in ((3,), (3, 1)):
        leaf = rows.clone().view(shape).requires_grad_()
        loss, _ = ppo_policy_loss(new, old, leaf, batch.mask, cu_seqlens=batch.offsets)
        loss.backward()
        assert torch.equal(loss, want)
        sums = [g.sum() for g in per_token.grad.split(batch.lengths)]
        torch.testing.assert_close(leaf.grad, torch.stack(sums).view(shape))


def test_a_packed_batch_without_sequences_is_zero(device):
    nothing, offsets = torch.zeros(0, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    for loss_of in (ppo_policy_loss, ppo_value_loss):
        leaf = nothing.clone().requires_grad_()
        loss, stats = loss_of(leaf, nothing, nothing, cu_seqlens=offsets)
        loss.backward()
        assert loss == 0 and all(v == 0 for v in stats.values()) and leaf.grad.shape == (0,)
    assert masked_mean(nothing, nothing, cu_seqlens=offsets).shape == (0,)
    assert shape_rewards(nothing, nothing, nothing, nothing, kl_coef=0.1, cu_seqlens=offsets).shape == (0,)


BROKEN = [
    [0, 3],
    [2, 5, 9],
    [0, 7, 3, 9],
    [-5, 4, 9],
    [0, 2**40, 9],
    [9, 0],
    [4000, 5000, 6000],
    [0, 9000, 1, 5000, 2, 6000],
]


@pytest.mark.parametrize("device", GPU_KERNELS, indirect=True)
@pytest.mark.parametrize("offsets", BROKEN)
def test_broken_offsets_on_a_gpu_stay_inside_and_unclaimed_tokens_get_zero(offsets, device):
    """A GPU's offsets cannot be read on the host. Whatever they say, no access leaves the tensors (`make emulate` runs this
    under AddressSanitizer); what no sequence claims is 0."""
    n = 6000 if max(offsets) > 9 else 9
    x = torch.randn(n, generator=torch.Generator().manual_seed(0)).to(device)
    cu_seqlens = torch.tensor(offsets, device=device)
    rows = len(offsets) - 1
    leaf = x.clone().requires_grad_()
    masked_mean(leaf, torch.ones_like(x), cu_seqlens=cu_seqlens)
    options = {"importance_sampling_level": "sequence", "cu_seqlens": cu_seqlens}
    loss, _ = ppo_policy_loss(leaf, x * 0.9, torch.ones(rows, 1, device=device), **options)
    loss.backward()
    rewards = shape_rewards(
        torch.ones(rows, device=device), x, x * 0.9, torch.ones_like(x), kl_coef=0.1, cu_seqlens=cu_seqlens
    )
    advantages, _ = gae(x, x, cu_seqlens=cu_seqlens)
    claimed = torch.zeros(n, dtype=torch.bool)
    for start, end in pairwise(offsets):
        claimed[max(start, 0) : max(end, 0)] = True
    for result in (leaf.grad, rewards, advantages):
        assert result.shape == (n,) and torch.all(result[~claimed.to(device)] == 0)


@pytest.mark.parametrize("device", GPU_KERNELS, indirect=True)
def test_offsets_that_end_early_lose_no_sequence(device):
    x = torch.arange(10.0, device=device)
    means = masked_mean(x, torch.ones_like(x), cu_seqlens=torch.tensor([1, 3, 7], device=device))
    assert means.tolist() == [1.5, 4.5]
