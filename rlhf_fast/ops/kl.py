"""Per-token KL penalties and the rewards shaped with them."""

import math

import torch
from torch import Tensor

from rlhf_fast.ops._common import (
    Kernel,
    as_reals,
    choice,
    need_mask,
    number,
    optional_mask,
    optional_offsets,
    padded_reference,
    register,
    weights_reference,
)

_penalty = Kernel("kl_penalty")
_penalty_backward = Kernel("kl_penalty_backward")
_shape = Kernel("shape_rewards")
_shape_backward = Kernel("shape_rewards_backward")

# name -> (code of csrc/kl.h, straight-through)
ESTIMATORS = {
    "k1": (0, False),
    "k2": (1, False),
    "k3": (2, False),
    "abs": (3, False),
    "k1+": (0, True),
    "k3+": (2, True),
}


def kl_penalty(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    *,
    estimator: str = "k1",
    mask: Tensor | None = None,
    log_ratio_clip: float | None = None,
    output_clip: float | None = None,
) -> Tensor:
    """A per-token estimate of KL(policy || reference) from the log-probs of the sampled tokens.

    With d = logprobs - ref_logprobs (Schulman 2020, joschu.net/blog/kl-approx.html): "k1" d, "k2" d^2 / 2,
    "k3" exp(-d) - 1 + d, "abs" |d|. "k1+" and "k3+" have the value of their base and the gradient of an unclamped k2, whose
    expectation is the gradient of KL (verl's `kl_penalty`). Gradients flow to both arguments and are exact where a clip binds.

    Args:
        logprobs, ref_logprobs: [...], floating point, one shape.
        mask: [...], bool, integer or floating point (a weight that multiplies); 0 gives 0.
        log_ratio_clip: d is clamped to +- this before the estimator (verl and NeMo-RL use 20 with k3).
        output_clip: the estimate is clamped to +- this (10 in OpenRLHF, and with k3 in verl).

    Returns:
        [...], float32, or float64 where an argument is float64.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
    """
    op = "kl_penalty"
    logprobs, ref_logprobs = as_reals(op, logprobs=logprobs, ref_logprobs=ref_logprobs)
    plain = type(estimator) is str and estimator == "k1" and mask is log_ratio_clip is output_clip is None
    # Unlike shapes and devices are left to the kernel, which names them.
    if plain and logprobs.shape == ref_logprobs.shape and logprobs.device == ref_logprobs.device:
        return logprobs - ref_logprobs  # rounded once, and nothing to fuse
    code, straight_through = choice(op, "estimator", estimator, ESTIMATORS)
    mask = optional_mask(op, mask)
    ratio_clip = number(op, "log_ratio_clip", log_ratio_clip, above=0.0, none=math.inf)
    clip = number(op, "output_clip", output_clip, above=0.0, none=math.inf)
    return _penalty(logprobs, ref_logprobs, mask, code, straight_through, ratio_clip, clip)


def kl_penalty_reference(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    *,
    estimator: str = "k1",
    mask: Tensor | None = None,
    log_ratio_clip: float | None = None,
    output_clip: float | None = None,
) -> Tensor:
    """`kl_penalty` in plain torch."""
    weight = weights_reference(mask, logprobs)
    raw = torch.where(weight != 0, logprobs - ref_logprobs, 0.0)
    d = raw if log_ratio_clip is None else raw.clamp(-log_ratio_clip, log_ratio_clip)
    base = estimator.removesuffix("+")
    value = {"k1": lambda: d, "k2": lambda: d * d / 2, "k3": lambda: torch.expm1(-d) + d, "abs": d.abs}[base]()
    if output_clip is not None:
        value = value.clamp(-output_clip, output_clip)
    if base != estimator:
        square = raw * raw / 2
        value = square - square.detach() + value.detach()
    return weight * value


def shape_rewards(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    *,
    kl_coef: float,
    estimator: str = "k1",
    score_clip: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Per-token rewards of RLHF: the KL penalty everywhere, the sequence's score on its last token.

    r[b, t] = -kl_coef * KL[b, t], plus clamp(scores[b], +-score_clip) where t is the row's last masked token (Ziegler et al.
    2019, arXiv 1909.08593, eq. 2). A row without a token drops its score; OpenRLHF's `compute_reward` puts it in the last column.

    Args:
        scores: [B].
        logprobs, ref_logprobs: [B, T], or packed [N] with `cu_seqlens`.
        mask: like logprobs; bool, integer or floating point (a weight on the KL); nonzero marks a token.
        kl_coef: the weight of the penalty, at least 0.
        estimator: as in `kl_penalty`.
        score_clip: above 0 (10 in OpenRLHF, 5 in DeepSpeed-Chat), or None.
        cu_seqlens: [B + 1], int32 or int64, rising from 0 to N: where each packed sequence starts.

    Returns:
        rewards like logprobs, 0 off the mask; float32, or float64 where an argument is float64.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
    """
    op = "shape_rewards"
    code, straight_through = choice(op, "estimator", estimator, ESTIMATORS)
    scores, logprobs, ref_logprobs = as_reals(op, scores=scores, logprobs=logprobs, ref_logprobs=ref_logprobs)
    mask, cu_seqlens = need_mask(op, mask), optional_offsets(op, cu_seqlens)
    coef = number(op, "kl_coef", kl_coef, low=0.0)
    clip = number(op, "score_clip", score_clip, above=0.0, none=math.inf)
    return _shape(scores, logprobs, ref_logprobs, mask, cu_seqlens, coef, code, straight_through, clip)


def shape_rewards_reference(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    *,
    kl_coef: float,
    estimator: str = "k1",
    score_clip: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """`shape_rewards` in plain torch."""
    if cu_seqlens is not None:
        mask, logprobs, ref_logprobs = padded_reference(cu_seqlens, mask, logprobs, ref_logprobs)
        rewards = shape_rewards_reference(
            scores, logprobs, ref_logprobs, mask, kl_coef=kl_coef, estimator=estimator, score_clip=score_clip
        )
        return torch.cat([row[:n] for row, n in zip(rewards, cu_seqlens.diff().tolist(), strict=True)])
    if mask.shape[1] == 0:
        return logprobs * 0
    rewards = -kl_coef * kl_penalty_reference(logprobs, ref_logprobs, estimator=estimator, mask=mask)
    kept = mask != 0
    position = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(kept, position, -1).amax(-1, keepdim=True)
    score = scores if score_clip is None else scores.clamp(-score_clip, score_clip)
    return rewards + torch.where(kept & (position == last), score.unsqueeze(-1), 0.0)


def _penalty_context(ctx, inputs, output):
    logprobs, ref_logprobs, mask, *ctx.options = inputs
    ctx.save_for_backward(logprobs, ref_logprobs, mask)


def _penalty_formula(ctx, grad):
    slope = _penalty_backward(grad, *ctx.saved_tensors, *ctx.options)
    ref_slope = -slope if ctx.needs_input_grad[1] else None
    return slope, ref_slope, None, None, None, None, None


def _shape_context(ctx, inputs, output):
    scores, logprobs, ref_logprobs, mask, cu_seqlens, *ctx.options = inputs
    ctx.save_for_backward(scores, logprobs, ref_logprobs, mask, cu_seqlens)


def _shape_formula(ctx, grad):
    by_score, by_logprob = _shape_backward(grad, *ctx.saved_tensors, *ctx.options)
    by_ref = -by_logprob if ctx.needs_input_grad[2] else None
    return by_score, by_logprob, by_ref, *(None,) * 6


register(
    "kl_penalty",
    lambda logprobs, *rest: logprobs.new_empty(logprobs.shape),
    differentiable=2,
    setup_context=_penalty_context,
    backward=_penalty_formula,
)
register("kl_penalty_backward", lambda grad, logprobs, *rest: logprobs.new_empty(logprobs.shape))
register(
    "shape_rewards",
    lambda scores, logprobs, *rest: logprobs.new_empty(logprobs.shape),
    differentiable=3,
    setup_context=_shape_context,
    backward=_shape_formula,
)
register(
    "shape_rewards_backward",
    lambda grad, scores, logprobs, *rest: (scores.new_empty(scores.shape), logprobs.new_empty(logprobs.shape)),
)
