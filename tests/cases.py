"""The one table of cases: how each op is called at random, and what its result is compared with.

`OPS` maps an op's name to its function, its reference and a generator of calls. `check` runs one call on a device, the
reference in float64 on the same numbers, and compares outputs and gradients.
"""

import inspect
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import rlhf_fast
from rlhf_fast.ops._common import weights_reference
from rlhf_fast.ops.gae import gae_reference
from rlhf_fast.ops.group import group_advantages_reference
from rlhf_fast.ops.kl import ESTIMATORS, kl_penalty_reference, shape_rewards_reference
from rlhf_fast.ops.kl_divergence import kl_divergence_reference
from rlhf_fast.ops.linear import linear_logprobs_reference
from rlhf_fast.ops.linear_ppo_loss import linear_ppo_loss_reference
from rlhf_fast.ops.logprob import gather_logprobs_reference
from rlhf_fast.ops.masked import masked_mean_reference, masked_whiten_reference
from rlhf_fast.ops.ppo_loss import ppo_policy_loss_reference, ppo_value_loss_reference
from rlhf_fast.ops.ppo_loss_from_logits import objective_reference, ppo_loss_from_logits_reference
from rlhf_fast.ops.preference import dpo_loss_reference, reward_pair_loss_reference

EPS = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
AGGREGATES = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]


@dataclass(frozen=True)
class Call:
    args: tuple
    kwargs: dict

    def __str__(self):
        def show(x):
            if not isinstance(x, Tensor):
                return repr(x)
            if x.is_nested or x.layout is not torch.strided:
                return f"{'nested ' * x.is_nested}{str(x.layout)[6:]} {str(x.dtype)[6:]}"
            where = "" if x.device.type == "cpu" else f" on {x.device}"
            return f"{str(x.dtype)[6:]}{list(x.shape)} strides {list(x.stride())}{where}"

        return ", ".join([*map(show, self.args), *(f"{k}={show(v)}" for k, v in self.kwargs.items())])


@dataclass(frozen=True)
class Op:
    function: Callable
    reference: Callable
    draw: Callable[[random.Random], Call]
    units: float = 4.0  # allowed error, in epsilons of the output's dtype relative to max(1, |reference|)
    # In gradients that torch's product sums up in float32, over all tokens, from terms larger than their sum.
    more_by_product: float = 0.0


def randn(rng: random.Random, *shape, scale=1.0, dtype=torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(rng.getrandbits(40))
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def draw_mask(rng: random.Random, shape, weights=True) -> Tensor:
    """Any dtype; none, all, some rows or some tokens kept, gaps included."""
    generator = torch.Generator().manual_seed(rng.getrandbits(40))
    keep = torch.rand(shape, generator=generator) < rng.choice([0.0, 0.3, 0.8, 1.0])
    if len(shape) == 2 and shape[0] and rng.random() < 0.3:
        keep[rng.randrange(shape[0])] = False
    if weights and rng.random() < 0.2:
        return keep * torch.rand(shape, generator=generator).to(
            rng.choice([torch.float32, torch.float64, torch.bfloat16])
        )
    return keep.to(rng.choice([torch.bool, torch.uint8, torch.int32, torch.int64, torch.float32]))


def restride(rng: random.Random, x: Tensor, rows_only=False) -> Tensor:
    """The same values in another layout: transposed, a slice of something larger, off 16-byte alignment, a last stride of 2."""
    kind = rng.choice(["as is", "transposed", "sliced", "offset", *([] if rows_only else ["strided"])])
    if x.numel() == 0 or x.dim() == 0 or kind == "as is":
        return x
    if kind == "transposed" and x.dim() >= 3 - (not rows_only):
        first, second = (0, 1) if x.dim() > 2 or not rows_only else (0, 0)
        return x.transpose(first, second).contiguous().transpose(first, second)
    if kind == "sliced" and x.dim() >= 2:
        wider = torch.full((*x.shape[:-2], x.shape[-2] + 2, x.shape[-1]), 7.0, dtype=torch.float64).to(x.dtype)
        wider[..., 1:-1, :] = x
        return wider[..., 1:-1, :]
    if kind == "offset":
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    if kind == "strided":
        return torch.stack([x, torch.zeros_like(x)], -1)[..., 0]
    return x


def draw_shape(rng: random.Random) -> tuple[int, int]:
    return rng.choice([0, 1, 2, 3, 5]), rng.choice([0, 1, 2, 7, 8, 33, 64] * 3 + [257, 1025, 2049])


def draw_rows(rng: random.Random) -> tuple[tuple[int, ...], int, dict]:
    """(shape of a value a token, number of rows, keyword arguments): padded, or packed with `cu_seqlens`, empty rows included."""
    if rng.random() < 0.6:
        shape = draw_shape(rng)
        return shape, shape[0], {}
    lengths = [rng.choice([0, 1, 7, 8, 40] * 3 + [300, 2049]) for _ in range(rng.choice([1, 1, 2, 3, 5]))]
    offsets = torch.tensor([sum(lengths[:i]) for i in range(len(lengths) + 1)])
    offsets = offsets.to(rng.choice([torch.int32, torch.int64]))
    return (sum(lengths),), len(lengths), {"cu_seqlens": restride(rng, offsets)}


def real_dtype(rng):
    return rng.choice([torch.float32] * 4 + [torch.float64, torch.bfloat16, torch.float16])


def draw_gather_logprobs(rng: random.Random) -> Call:
    vocab = rng.choice([1, 2, 3, 7, 8, 9, 31, 64, 82, 127, 1000, 1025, 2047, 2049, 4096, 4099])
    batch = rng.choice([(), (rng.choice([0, 1, 5]),), (rng.choice([1, 2, 3]), rng.choice([0, 1, 4])), (2, 1, 3)])
    dtype = rng.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64])
    logits = randn(rng, *batch, vocab, scale=rng.choice([0.0, 1.0, 5.0, 100.0, 1e4]), dtype=dtype)
    if rng.random() < 0.2:
        logits = logits - rng.choice([200.0, 3e4])
    if vocab > 2 and rng.random() < 0.3:
        logits[..., : rng.randrange(1, vocab)] = -math.inf
    generator = torch.Generator().manual_seed(rng.getrandbits(40))
    labels = torch.randint(0, vocab, batch, generator=generator)
    if rng.random() < 0.3 and labels.numel():
        labels.flatten()[rng.randrange(labels.numel())] = -100
    kwargs = {"with_entropy": rng.random() < 0.5}
    if rng.random() < 0.3:
        kwargs["temperature"] = rng.choice([0.5, 0.7, 2.0])
    elif rng.random() < 0.3:
        kwargs["temperature"] = torch.rand(batch, generator=generator) + 0.5
    if rng.random() < 0.25 and dtype != torch.float16:
        kwargs["softcap"] = rng.choice([5.0, 30.0])
    if rng.random() < 0.25:
        kwargs["logit_scale"] = rng.choice([0.0625, 1.5])
    if rng.random() < 0.3:
        kwargs["mask"] = draw_mask(rng, batch)
    if rng.random() < 0.3:
        labels = labels.to(torch.int32)
    return Call((restride(rng, logits, rows_only=rng.random() < 0.8), restride(rng, labels)), kwargs)


def draw_head(rng: random.Random, batch, vocab, dtype, kwargs) -> tuple[Tensor, Tensor]:
    """(hidden, weight) whose logits are of a model's size, and keywords of ops over hidden states."""
    width = rng.choice([0, 3, 8, 33] if vocab > 128 else [0, 1, 3, 8])
    hidden = randn(rng, *batch, width, scale=rng.choice([0.0, 0.3, 1.0]), dtype=dtype)
    weight = randn(rng, vocab, width, scale=2 / math.sqrt(width or 1), dtype=dtype)
    if rng.random() < 0.4:
        kwargs["bias"] = randn(rng, vocab, dtype=dtype)
        if vocab > 2 and rng.random() < 0.3:  # a masked vocabulary
            kwargs["bias"][: rng.randrange(1, vocab)] = -math.inf
    if rng.random() < 0.4:
        kwargs["chunk_tokens"] = rng.choice([1, 2, 3])
    return restride(rng, hidden), restride(rng, weight)


def draw_linear_logprobs(rng: random.Random) -> Call:
    call = draw_gather_logprobs(rng)
    logits, labels = call.args
    kwargs = dict(call.kwargs)
    head = draw_head(rng, labels.shape, logits.shape[-1], logits.dtype, kwargs)
    return Call((*head, labels), kwargs)


def draw_kept_logprobs(rng: random.Random) -> Call:
    call = draw_gather_logprobs(rng)
    logits, labels = call.args
    vocab = logits.shape[-1]
    generator = torch.Generator().manual_seed(rng.getrandbits(40))
    count = rng.choice([1, 2, 20, 33, 64, 300, 512])
    kept = torch.randint(
        0, vocab, (*labels.shape, count), generator=generator
    )  # with repetitions where the set is large
    kept[torch.rand(kept.shape, generator=generator) < rng.choice([0.0, 0.4])] = rng.choice([-1, -100])
    place = torch.randint(0, count, (*labels.shape, 1), generator=generator)
    label = labels.long().clamp(min=0).unsqueeze(-1)
    others = torch.rand(label.shape, generator=generator) < rng.choice([0.0, 0.3])  # rows whose label was not kept
    kept = torch.where(kept == label, (label + 1) % vocab, kept).scatter(
        -1, place, torch.where(others, (label + 1) % vocab, label)
    )
    if torch.isinf(logits).any():  # the last logit is finite: a set of -inf alone has no distribution
        kept = torch.cat([kept[..., :511], torch.full_like(label, vocab - 1)], -1)
    return Call(call.args, {**call.kwargs, "kept": restride(rng, kept.to(rng.choice([torch.int32, torch.int64])))})


def draw_kl_divergence(rng: random.Random) -> Call:
    logits = draw_gather_logprobs(rng).args[0]
    batch, vocab, dtype = logits.shape[:-1], logits.shape[-1], logits.dtype
    reference = logits.double()
    if rng.random() < 0.7:  # near the policy, or far from it
        reference = reference + randn(
            rng, *logits.shape, scale=rng.choice([1e-3, 0.1, 3.0, 100.0]), dtype=torch.float64
        )
    if rng.random() < 0.2:
        reference = randn(rng, *logits.shape, scale=3.0, dtype=torch.float64)
    if rng.random() < 0.2:
        reference = reference + rng.choice([-3e4, -50.0, 50.0, 3e4])
    if rng.random() < 0.2:  # not a row of -inf alone, and not beside 65504, which float16 may turn into inf
        reference[..., rng.randrange(vocab)] = -math.inf if vocab > 1 else 0.0
    other = rng.choice([dtype, dtype, torch.float32, torch.bfloat16, torch.float64])
    reference = reference.clamp(max=6e4).to(other)
    kwargs = {}
    if rng.random() < 0.3:
        kwargs["temperature"] = rng.choice([0.5, 0.7, 2.0])
    elif rng.random() < 0.3:
        kwargs["temperature"] = randn(rng, *batch).abs() + 0.5
    if rng.random() < 0.3:
        kwargs["mask"] = draw_mask(rng, batch)
    return Call((logits, restride(rng, reference, rows_only=rng.random() < 0.8)), kwargs)


def draw_pair_of_logprobs(rng, shape, dtype):
    logprobs = -randn(rng, *shape, dtype=dtype).abs() * rng.choice([0.1, 1.0, 10.0])
    other = (
        logprobs.clone()
        if rng.random() < 0.2
        else logprobs + randn(rng, *shape, scale=rng.choice([0.01, 0.3, 3.0, 15.0]), dtype=dtype)
    )
    return restride(rng, logprobs), restride(rng, other)


def draw_kl_penalty(rng: random.Random) -> Call:
    shape = rng.choice([(), (rng.choice([0, 3, 2049]),), draw_shape(rng), (2, 3, 5)])
    kwargs = {"estimator": rng.choice(list(ESTIMATORS))}
    if rng.random() < 0.5:
        kwargs["mask"] = draw_mask(rng, shape)
    if rng.random() < 0.4:
        kwargs["log_ratio_clip"] = rng.choice([0.5, 20.0])
    if rng.random() < 0.4:
        kwargs["output_clip"] = rng.choice([0.1, 10.0])
    return Call(draw_pair_of_logprobs(rng, shape, real_dtype(rng)), kwargs)


def draw_shape_rewards(rng: random.Random) -> Call:
    shape, rows, kwargs = draw_rows(rng)
    scores = randn(rng, rows, scale=rng.choice([1.0, 20.0]), dtype=real_dtype(rng))
    kwargs |= {"kl_coef": rng.choice([0.0, 0.05, 1.0]), "estimator": rng.choice(list(ESTIMATORS))}
    if rng.random() < 0.4:
        kwargs["score_clip"] = rng.choice([0.5, 10.0])
    return Call((scores, *draw_pair_of_logprobs(rng, shape, real_dtype(rng)), draw_mask(rng, shape)), kwargs)


def draw_gae(rng: random.Random) -> Call:
    kwargs = {
        "gamma": rng.choice([1.0, 0.99, 0.9, 0.0]),
        "lam": rng.choice([0.0, 0.95, 1.0, 0.5]),
        "gaps": rng.choice(["carry", "decay"]),
        "whiten": rng.random() < 0.1,
    }
    dtype = real_dtype(rng)
    if rng.random() < 0.4:
        lengths = [rng.choice([0, 1, 5, 40, 300]) for _ in range(rng.randrange(1, 5))]
        shape, rows = (sum(lengths),), len(lengths)
        offsets = [sum(lengths[:i]) for i in range(rows + 1)]
        kwargs["cu_seqlens"] = torch.tensor(offsets, dtype=rng.choice([torch.int32, torch.int64]))
    else:
        shape = (rng.choice([0, 1, 2, 3]), rng.choice([0, 1, 2, 7, 8, 33, 64] * 12 + [257] * 4 + [400, 2049]))
        rows = shape[0]
    if rng.random() < 0.7:
        kwargs["mask"] = draw_mask(rng, shape)
    if rng.random() < 0.3:
        kwargs["bootstrap"] = randn(rng, rows, dtype=dtype)
    if rng.random() < 0.3:
        kwargs["lam"] = torch.rand(
            rows, dtype=torch.float64, generator=torch.Generator().manual_seed(rng.getrandbits(40))
        )
    if rng.random() < 0.3:
        kwargs["returns_lam"] = rng.choice([1.0, 0.3])
    return Call(
        (restride(rng, randn(rng, *shape, dtype=dtype)), restride(rng, randn(rng, *shape, dtype=dtype))), kwargs
    )


def draw_masked_mean(rng: random.Random) -> Call:
    shape = rng.choice([(rng.choice([0, 1, 5, 4099]),), draw_shape(rng), (2, 3, 5)])
    kwargs = {"dim": rng.choice([None, 0, -1, len(shape) - 1])}
    packed_shape, _, packed = draw_rows(rng)
    if packed:
        shape, kwargs = packed_shape, packed
    x = randn(rng, *shape, scale=rng.choice([1.0, 1e4]), dtype=real_dtype(rng))
    return Call((restride(rng, x), draw_mask(rng, shape)), kwargs)


def draw_masked_whiten(rng: random.Random) -> Call:
    shape = rng.choice([(rng.choice([0, 1, 5, 4099]),), draw_shape(rng), (2, 3, 5)])
    x = randn(rng, *shape, scale=rng.choice([0.01, 1.0, 100.0]), dtype=real_dtype(rng)) + rng.choice([0.0, 3.0])
    kwargs = {"shift_mean": rng.random() < 0.5, "unbiased": rng.random() < 0.5, "eps": rng.choice([1e-8, 1e-5])}
    return Call((restride(rng, x), draw_mask(rng, shape)), kwargs)


def draw_aggregate(rng: random.Random) -> dict:
    kwargs = {"aggregate": rng.choice(AGGREGATES)}
    if rng.random() < 0.4:
        count = rng.choice([1, 17, 1000])
        kwargs["normalizer"] = rng.choice(
            [count, torch.tensor(count), torch.tensor(float(count)), torch.tensor([count], dtype=torch.int32)]
        )
    return kwargs


def draw_ppo_policy_loss(rng: random.Random) -> Call:
    shape, rows, kwargs = draw_rows(rng)
    one_a_row = [(rows, 1), *([(rows,)] if shape != (rows,) else [])]
    advantages = randn(rng, *rng.choice([shape, shape, *one_a_row]), dtype=real_dtype(rng))
    if rng.random() < 0.2:
        advantages = advantages.round()
    kwargs |= {"clip_low": rng.choice([0.2, 0.0, 1.0]), "clip_high": rng.choice([0.2, 0.28]), **draw_aggregate(rng)}
    kwargs["loss_type"] = rng.choice(["ppo", "ppo", "cispo"])
    kwargs["importance_sampling_level"] = rng.choice(["token", "token", "sequence"])
    kwargs["dual_clip"] = rng.choice([None, None, 3.0, 1.5]) if kwargs["loss_type"] == "ppo" else None
    kwargs["log_ratio_clip"] = rng.choice([20.0, 0.5, None])
    if rng.random() < 0.8:
        kwargs["mask"] = draw_mask(rng, shape)
    return Call((*draw_pair_of_logprobs(rng, shape, real_dtype(rng)), restride(rng, advantages)), kwargs)


def off_kinks(other: Tensor, logprobs: Tensor, kinks: list[float]) -> Tensor:
    """`other`, moved up in place where logprobs - other is so near a kink that the rounding of a log-prob, made by the op
    itself, decides on which side it lies. 3e-5 of its size is ten times what the log-probs from hidden states may be off by."""
    while True:
        size = torch.maximum(logprobs.abs(), other.double().abs()).clamp(min=1.0)
        log_ratio = logprobs - other.double()
        near = torch.stack([(log_ratio - kink).abs() < 3e-5 * size for kink in kinks]).any(0)
        if not near.any():
            return other
        other[near] += (size * max(1e-4, torch.finfo(other.dtype).eps))[near].to(other.dtype)


def draw_ppo_loss_from_logits(rng: random.Random, from_hidden=False) -> Call:
    shape, rows, kwargs = draw_rows(rng)
    count = math.prod(shape)
    vocab = rng.choice([v for v in (1, 2, 7, 31, 82, 1000, 2049, 4099) if v * count < 100_000] or [1, 2])
    dtype = rng.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64])
    logits = randn(rng, *shape, vocab, scale=rng.choice([0.0, 1.0, 5.0, 100.0]), dtype=dtype)
    if vocab > 2 and rng.random() < 0.2:
        logits[..., : rng.randrange(1, vocab)] = -math.inf
    source = (restride(rng, logits, rows_only=rng.random() < 0.8),)
    if from_hidden:
        source = draw_head(rng, shape, vocab, dtype, kwargs)
        bias = kwargs.get("bias")
        logits = torch.nn.functional.linear(*(t.double() for t in source), None if bias is None else bias.double())
    generator = torch.Generator().manual_seed(rng.getrandbits(40))
    labels = torch.randint(0, vocab, shape, generator=generator)
    kwargs |= {"clip_low": rng.choice([0.2, 0.05, 1.0]), "clip_high": rng.choice([0.2, 0.28]), **draw_aggregate(rng)}
    kwargs["loss_type"] = rng.choice(["ppo", "ppo", "cispo"])
    kwargs["importance_sampling_level"] = rng.choice(["token", "token", "token", "sequence"])
    kwargs["dual_clip"] = rng.choice([None, None, 3.0, 1.5]) if kwargs["loss_type"] == "ppo" else None
    kwargs["log_ratio_clip"] = rng.choice([20.0, 0.5, None])
    kwargs["entropy_coef"] = rng.choice([0.0, 0.0, 0.01, -0.5])
    options = {}
    if rng.random() < 0.3:
        options["temperature"] = rng.choice([0.7, 2.0, torch.rand(shape, generator=generator) + 0.5])
    if rng.random() < 0.2 and dtype != torch.float16:
        options["softcap"] = rng.choice([5.0, 30.0])
    if rng.random() < 0.2:
        options["logit_scale"] = rng.choice([0.0625, 1.5])
    if rng.random() < 0.8:
        kwargs["mask"] = draw_mask(rng, shape)
    if count > 8 and kwargs["aggregate"].endswith(("token-sum", "norm")):
        # A sum of n log-probs is off by n times what one is: brought back to where one tolerance serves.
        kwargs["normalizer"] = rng.choice([count, torch.tensor(float(count)), torch.tensor([count])])
    has_reference = rng.random() < 0.4
    if has_reference or kwargs["importance_sampling_level"] == "sequence":
        # Not for labels on -inf: their KL is infinite, the reference's gradient inf times p = 0, its sequences' ratios inf - inf.
        possible = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1) > -math.inf
        labels = torch.where(possible, labels, vocab - 1)
    # Log-ratios of a policy that has moved: those of noise would all be clamped.
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()}
    logprobs = gather_logprobs_reference(logits.double(), labels, **wide).clamp(min=-1e4)

    def moved(dtype):
        # A ratio of 20 is an upstream gradient of 20: only where many tokens share the loss.
        far = rng.choice([0.01, 0.3] if torch.float16 in (dtype, source[0].dtype) or count <= 8 else [0.01, 0.3, 3.0])
        return restride(rng, (logprobs + randn(rng, *shape, scale=far, dtype=torch.float64)).to(dtype))

    if has_reference:
        kwargs["ref_logprobs"] = moved(real_dtype(rng))
        kwargs["kl_coef"] = rng.choice([0.0, 0.05, 1.0])
        kwargs["kl_estimator"] = rng.choice(list(ESTIMATORS))
        if kwargs["kl_estimator"] == "abs":
            off_kinks(kwargs["ref_logprobs"], logprobs, [0.0])
    if rng.random() < 0.3 and count:
        labels.flatten()[rng.randrange(count)] = -100
    one_a_row = [(rows, 1), *([(rows,)] if shape != (rows,) else [])]
    advantages = restride(rng, randn(rng, *rng.choice([shape, shape, *one_a_row]), dtype=real_dtype(rng)))
    labels = restride(rng, labels.to(rng.choice([torch.int32, torch.int64])))
    clips = [1 - kwargs["clip_low"], 1 + kwargs["clip_high"], kwargs["dual_clip"]]
    kinks = [math.log(ratio) for ratio in clips if ratio]
    if clip := kwargs["log_ratio_clip"]:
        kinks += [-clip, clip]
    old_logprobs = off_kinks(moved(real_dtype(rng)), logprobs, kinks)
    return Call((*source, labels, old_logprobs, advantages), kwargs | options)


def draw_linear_ppo_loss(rng: random.Random) -> Call:
    return draw_ppo_loss_from_logits(rng, from_hidden=True)


def draw_ppo_value_loss(rng: random.Random) -> Call:
    shape, _, kwargs = draw_rows(rng)
    tensors = [randn(rng, *shape, dtype=real_dtype(rng)) for _ in range(3)]
    if rng.random() < 0.3:  # ties
        tensors = [(t * 2).round() / 2 for t in tensors]
    kwargs |= {"clip": rng.choice([0.2, 0.5, 0.0, None]), **draw_aggregate(rng)}
    if rng.random() < 0.8:
        kwargs["mask"] = draw_mask(rng, shape)
    return Call(tuple(restride(rng, t) for t in tensors), kwargs)


def draw_reward_pair_loss(rng: random.Random) -> Call:
    n = rng.choice([0, 1, 2, 33, 4099])
    scale = rng.choice([0.1, 3.0, 300.0])
    chosen, rejected = (restride(rng, randn(rng, n, scale=scale, dtype=real_dtype(rng))) for _ in range(2))
    kwargs = {"center_coef": rng.choice([0.0, 0.01])}
    if rng.random() < 0.4:
        kwargs["margin"] = randn(rng, n, dtype=real_dtype(rng)).abs()
    return Call((chosen, chosen.clone() if rng.random() < 0.1 else rejected), kwargs)


def draw_dpo_loss(rng: random.Random) -> Call:
    n = rng.choice([0, 1, 2, 33, 4099])
    dtype, scale = real_dtype(rng), rng.choice([1.0, 30.0, 2000.0])
    sums = [-randn(rng, n, scale=scale, dtype=dtype).abs() for _ in range(2)]
    kwargs = {"beta": rng.choice([0.1, 0.5, 1.0]), "loss_type": rng.choice(["sigmoid", "robust", "hinge", "ipo"])}
    if kwargs["loss_type"] in ("sigmoid", "robust") and rng.random() < 0.5:
        kwargs["label_smoothing"] = rng.choice([0.1, 0.4])
    refs = [s + randn(rng, n, scale=rng.choice([0.0, 0.1, 10.0]), dtype=dtype) for s in sums]
    if rng.random() < 0.2:  # ties: h = 0, and z = 1 where beta is 0.5 or 1
        sums, refs = [s.round() for s in sums], [s.round() - rng.choice([0.0, 1.0, 2.0]) for s in sums]
    return Call(tuple(restride(rng, t) for t in (*sums, *refs)), kwargs)


def draw_group_advantages(rng: random.Random) -> Call:
    size = rng.choice([2, 3, 4, 8, 16, 33, 64, 257, 2048, 2049, 4100])
    groups = rng.choice([0, 1, 2, 3, 9, 70] if size < 100 else [1, 2])
    rewards = randn(rng, size * groups, scale=rng.choice([0.01, 1.0, 100.0]), dtype=real_dtype(rng)) + rng.choice(
        [0, 3, -50]
    )
    if rng.random() < 0.3:
        rewards = (rewards > rewards.mean()).to(rewards.dtype)  # right or wrong: groups without spread among them
    if groups and rng.random() < 0.3:
        rewards[:size] = rewards[0]
    kwargs = {"scale": rng.choice(["std", "none", "batch"]), "leave_one_out": rng.random() < 0.4}
    return Call((restride(rng, rewards), size), {**kwargs, "eps": rng.choice([1e-6, 1e-4, 0.1])})


OPS = {
    "gather_logprobs": Op(rlhf_fast.gather_logprobs, gather_logprobs_reference, draw_gather_logprobs),
    # Their logits are sums of products in float32, off by some epsilons of their own size: 20 or so.
    "linear_logprobs": Op(rlhf_fast.linear_logprobs, linear_logprobs_reference, draw_linear_logprobs, 24.0, 240.0),
    "linear_ppo_loss": Op(rlhf_fast.linear_ppo_loss, linear_ppo_loss_reference, draw_linear_ppo_loss, 24.0, 240.0),
    "kept_logprobs": Op(rlhf_fast.gather_logprobs, gather_logprobs_reference, draw_kept_logprobs),
    "kl_penalty": Op(rlhf_fast.kl_penalty, kl_penalty_reference, draw_kl_penalty, units=0.5),
    "shape_rewards": Op(rlhf_fast.shape_rewards, shape_rewards_reference, draw_shape_rewards, units=0.5),
    "gae": Op(rlhf_fast.gae, gae_reference, draw_gae, units=0.51),
    "masked_mean": Op(rlhf_fast.masked_mean, masked_mean_reference, draw_masked_mean, units=0.51),
    "masked_whiten": Op(rlhf_fast.masked_whiten, masked_whiten_reference, draw_masked_whiten, units=0.51),
    "ppo_policy_loss": Op(rlhf_fast.ppo_policy_loss, ppo_policy_loss_reference, draw_ppo_policy_loss, units=0.51),
    "ppo_value_loss": Op(rlhf_fast.ppo_value_loss, ppo_value_loss_reference, draw_ppo_value_loss, units=0.51),
    "ppo_loss_from_logits": Op(
        rlhf_fast.ppo_loss_from_logits, ppo_loss_from_logits_reference, draw_ppo_loss_from_logits
    ),
    "reward_pair_loss": Op(rlhf_fast.reward_pair_loss, reward_pair_loss_reference, draw_reward_pair_loss, units=0.51),
    "group_advantages": Op(rlhf_fast.group_advantages, group_advantages_reference, draw_group_advantages, units=0.51),
    "dpo_loss": Op(rlhf_fast.dpo_loss, dpo_loss_reference, draw_dpo_loss, units=0.51),
    "kl_divergence": Op(rlhf_fast.kl_divergence, kl_divergence_reference, draw_kl_divergence),
}


def flatten(result) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, dict):
        return list(result.values())
    return [t for part in result for t in flatten(part)]


def assert_close(what: str, actual: Tensor, expected: Tensor, units: float, size: float = 1.0) -> float:
    """Infinities and NaNs in the same places, the rest within `units` epsilons relative to max(size, |expected|); returns the
    worst error in epsilons."""
    assert actual.shape == expected.shape, f"{what}: shape {list(actual.shape)}, expected {list(expected.shape)}"
    actual64, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    largest = torch.finfo(actual.dtype).max
    expected = torch.where(expected.abs() > largest, expected.sign() * math.inf, expected)
    for name, where in (("NaN", torch.isnan), ("inf", torch.isinf)):
        assert torch.equal(where(actual64), where(expected)), (
            f"{what}: {name} in different places\n{actual64}\n{expected}"
        )
    finite = torch.isfinite(expected)
    error = (actual64 - expected)[finite].abs() / expected[finite].abs().clamp(min=size) / EPS[actual.dtype]
    worst = error.max().item() if error.numel() else 0.0
    # float64 results come from another order of the same float64 operations, not from a wider type.
    allowed = units if actual.dtype != torch.float64 else 2.0**20
    assert worst <= allowed, f"{what}: off by {worst:.3g} epsilons of {actual.dtype}, {allowed} allowed"
    return worst


COMPOSED = ("ppo_loss_from_logits", "linear_ppo_loss")  # losses that make their log-probs themselves
# What takes gradients, of the ops that refuse them for the rest.
INPUTS = {"ppo_loss_from_logits": (0, "logits"), "linear_ppo_loss": (0, 1, "hidden", "weight", "bias")}


def is_input(op: str, index: int | str, value) -> bool:
    return index in INPUTS.get(op, (index,)) and (
        is_float(value)
        and index not in ("mask", "temperature", "lam", "normalizer", "ref_logits")
        and not (
            (op in ("masked_mean", "masked_whiten", "kl_divergence") and index == 1)
            or (op == "shape_rewards" and index == 3)
        )
    )


@dataclass(frozen=True)
class Outcome:
    """One call, examined: its outputs, the gradients of its arguments by index or keyword, and the worst errors in epsilons."""

    outputs: list[Tensor]
    gradients: dict[int | str, Tensor]
    output_error: float = 0.0
    gradient_error: float = 0.0


def run(function: Callable, call: Call, places: list, convert: Callable, upstream: Callable | None) -> Outcome:
    """Call `function` on converted tensors and, with `upstream` (output -> its gradient or None), go backward to `places`."""
    args, kwargs = list(call.args), dict(call.kwargs)
    leaves = {}
    for i, value in [*enumerate(call.args), *call.kwargs.items()]:
        if isinstance(value, Tensor):
            value = convert(value)
        if i in places:
            leaves[i] = value = value.detach().requires_grad_(upstream is not None)
        if isinstance(i, int):
            args[i] = value
        else:
            kwargs[i] = value
    outputs = flatten(function(*args, **kwargs))
    if upstream is None:
        return Outcome(outputs, {})
    pairs = [(out, upstream(i, out)) for i, out in enumerate(outputs) if out.requires_grad]
    pairs = [(out, grad) for out, grad in pairs if grad is not None]
    if not pairs:
        return Outcome(outputs, {})
    outs, grads = zip(*pairs, strict=True)
    gradients = torch.autograd.grad(outs, list(leaves.values()), grads, allow_unused=True)
    return Outcome(outputs, dict(zip(leaves, gradients, strict=True)))


def is_float(x) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def widen(x):
    return x.double() if is_float(x) else x


def as_keywords(name: str, call: Call) -> dict:
    return dict(inspect.signature(OPS[name].function).bind(*call.args, **call.kwargs).arguments)


def of_reference(name: str, call: Call) -> dict:
    """The call's arguments in float64, with the reference's defaults for the rest."""
    bound = inspect.signature(OPS[name].reference).bind(*call.args, **call.kwargs)
    bound.apply_defaults()
    return {k: widen(v) for k, v in bound.arguments.items()}


def on(device: str) -> Callable[[Tensor], Tensor]:
    return lambda t: t.to(device)


def random_upstream(i: int, out: Tensor) -> Tensor:
    return randn(random.Random(i), *out.shape, dtype=out.dtype).to(out.device)


def inputs_of(name: str, call: Call) -> list[int | str]:
    return [i for i, value in [*enumerate(call.args), *call.kwargs.items()] if is_input(name, i, value)]


def variant(call: Call) -> str:
    """What widens the allowed error of a call, or nothing."""
    return "whiten" if call.kwargs.get("whiten") else "softcap" if call.kwargs.get("softcap") else ""


def units_of(name: str, call: Call) -> float:
    """The allowed error of this call, in epsilons."""
    kind, units = variant(call), OPS[name].units
    # Rounded twice: as advantages, which a spread much smaller than they are magnifies, and once whitened.
    if kind == "whiten":
        advantages, _ = OPS[name].reference(**of_reference(name, call) | {"whiten": False})
        kept = advantages[call.kwargs["mask"] != 0] if call.kwargs.get("mask") is not None else advantages.flatten()
        return 4.0 + float(kept.abs().max() / (kept.std() + 1e-4)) if kept.numel() > 1 else 4.0
    if kind == "softcap":  # z = cap tanh(..) / temperature is itself a rounded number as large as this
        smallest = torch.cat([torch.as_tensor(call.kwargs.get("temperature", 1.0)).flatten(), torch.ones(1)]).min()
        times = 3 if name == "ppo_loss_from_logits" else 1  # advantages
        return units + times * call.kwargs["softcap"] / float(smallest)
    return units


def gradient_units(name: str, call: Call, units: float) -> float:
    """The same for gradients, beside outputs off by `units`. A row's gradients to its logits sum to 0: they share the error of
    what they are multiples of, which is more than any of them where p of the label is 1."""
    share_of = {"kl_divergence": kl_shares, **dict.fromkeys(COMPOSED, loss_by_logprob)}.get(name)
    if share_of is None:
        return units
    shares = share_of(**of_reference(name, call))
    return units * max(1.0, float(shares.abs().nan_to_num(0.0, 0.0).max())) if shares.numel() else units


def kl_shares(logits, ref_logits, temperature, **_) -> Tensor:
    tau = torch.as_tensor(temperature).double().unsqueeze(-1)
    log_p, log_q = ((x / tau).log_softmax(-1) for x in (logits, ref_logits))
    return log_p.exp() * (log_p - log_q) / tau


def size_of_sums(name: str, call: Call) -> float:
    """What the scalars of a composed loss would be if all terms of their sums had one sign. The terms come from log-probs that
    are rounded themselves, so that no sum of them is better than its terms."""
    if name not in COMPOSED:
        return 1.0
    given = of_reference(name, call)
    given["advantages"] = -given["advantages"].abs()
    given["kl_estimator"] = "k3" if given["kl_estimator"].startswith("k3") else "abs"
    _, stats = OPS[name].reference(**given)
    sizes = torch.stack([stats["policy_loss"], given["entropy_coef"] * stats["entropy"], stats["kl"]]).abs()
    return float(sizes[torch.isfinite(sizes)].sum().clamp(min=1.0))


def loss_by_logprob(
    labels,
    old_logprobs,
    advantages,
    mask,
    temperature,
    softcap,
    logit_scale,
    ignore_index,
    logits=None,
    hidden=None,
    weight=None,
    bias=None,
    chunk_tokens=None,
    **objective,
) -> Tensor:
    """The gradient of a composed loss to its tokens' log-probs, over their temperatures."""
    if logits is None:
        logits = torch.nn.functional.linear(hidden, weight, bias)
    counted = weights_reference(mask, old_logprobs) * (labels != ignore_index)
    options = {"softcap": softcap, "logit_scale": logit_scale, "ignore_index": ignore_index, "with_entropy": True}
    both = gather_logprobs_reference(logits, labels, temperature=temperature, mask=counted != 0, **options)
    logprobs = both[0].requires_grad_()
    loss, _ = objective_reference(logprobs, both[1], old_logprobs, advantages, counted, **objective)
    return torch.autograd.grad(loss, logprobs)[0] / temperature


def examine(name: str, call: Call, device: str, upstream: Callable | None = random_upstream) -> Outcome:
    """Outputs and gradients of one call, held against the float64 reference on the same numbers."""
    op, places = OPS[name], inputs_of(name, call)
    got = run(op.function, call, places, on(device), upstream)
    # The reference gets the upstream gradients that the op got: of its dtype, widened.
    kinds = [out.dtype for out in got.outputs]
    wide = upstream and (lambda i, out: None if (g := upstream(i, out.to(kinds[i]))) is None else g.to("cpu").double())
    want = run(op.reference, call, places, widen, wide)
    units = units_of(name, call)
    by_gradient = gradient_units(name, call, units) + op.more_by_product
    largest = max(v.numel() for v in (*call.args, *call.kwargs.values()) if isinstance(v, Tensor))
    size = size_of_sums(name, call)
    output_error = gradient_error = 0.0
    for i, (a, e) in enumerate(zip(got.outputs, want.outputs, strict=True)):
        error = assert_close(f"{name} output {i}", a, e, units, size if e.dim() == 0 else 1.0)
        output_error = max(output_error, error)
    for place, g in got.gradients.items():
        leaf = call.args[place] if isinstance(place, int) else call.kwargs[place]
        assert g is not None, f"{name}: no gradient for argument {place}"
        assert g.dtype == leaf.dtype
        w = want.gradients.get(place)
        w = torch.zeros_like(leaf, dtype=torch.float64) if w is None else w
        # The gradient of a wide result may itself be rounded to a narrow input.
        allowed = by_gradient + (0.51 if leaf.dtype in (torch.bfloat16, torch.float16) else 1.0)
        if leaf.numel() < largest:  # one value a row: torch adds its gradient up over the tokens, in float32
            allowed = max(allowed, 4.0)
        error = assert_close(f"{name} gradient of argument {place}", g, w, allowed)
        gradient_error = max(gradient_error, error)
    return Outcome(got.outputs, got.gradients, output_error, gradient_error)


def check(name: str, call: Call, device: str, gradients: bool = True) -> float:
    """Outputs and gradients of one call against the float64 reference; the worst error in epsilons."""
    outcome = examine(name, call, device, random_upstream if gradients else None)
    return max(outcome.output_error, outcome.gradient_error)
