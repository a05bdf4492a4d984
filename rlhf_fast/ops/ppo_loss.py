"""The clipped PPO losses, with their statistics and without a host synchronisation."""

import math

import torch
from torch import Tensor

from rlhf_fast.ops._common import (
    AGGREGATES,
    Kernel,
    aggregate_reference,
    as_reals,
    choice,
    normalizer_of,
    number,
    optional_mask,
    register,
    weights_reference,
)

_policy = Kernel("ppo_policy_loss")
_policy_backward = Kernel("ppo_policy_loss_backward")
_value = Kernel("ppo_value_loss")
_value_backward = Kernel("ppo_value_loss_backward")

# The order in which csrc/ppo_loss.h writes them.
POLICY_STATS = (
    "clip_fraction",
    "clip_fraction_low",
    "approx_kl",
    "ppo_kl",
    "ratio_mean",
    "ratio_min",
    "ratio_max",
    "ratio_var",
    "tokens",
)
VALUE_STATS = ("clip_fraction", "error", "value_mean", "return_mean", "explained_variance", "tokens")


def ppo_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    log_ratio_clip: float | None = 20.0,
    aggregate: str = "token-mean",
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped surrogate loss of PPO (Schulman et al. 2017, arXiv 1707.06347, eq. 7).

    Per token, with r = exp(clamp(logprobs - old_logprobs, +-log_ratio_clip)) and A the advantage,
    max(-A r, -A clamp(r, 1 - clip_low, 1 + clip_high)); with a dual clip c (Ye et al. 2019, arXiv 1912.09729), where A < 0,
    at most -A c. Gradients are those of torch.max and torch.clamp, ties included, and flow to logprobs, old_logprobs and
    advantages where asked for.

    Args:
        logprobs, old_logprobs: [B, T], floating point.
        advantages: [B, T], or [B, 1] or [B] for one a sequence.
        mask: [B, T]; bool, integer or a floating-point weight.
        clip_low, clip_high: the ratio's range is [1 - clip_low, 1 + clip_high]; at least 0, clip_low at most 1.
        dual_clip: above 1 (3.0 is verl's default), or None.
        log_ratio_clip: above 0 (20 in verl and OpenRLHF), or None.
        aggregate: "token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", or "seq-mean-token-sum-norm" (also
            divided by T). Sequences without a token do not count.
        normalizer: the token or sequence count to divide by instead of this batch's own, as number or one-element tensor on
            any device (never read on the host). With the global count, the losses of micro-batches sum to the full batch's.

    Returns:
        (loss, stats): loss [], float32 or float64 where an argument is, and a dict of [] views into one tensor, each over the
        mask and weighted by it: `clip_fraction`
        (the clipped branch was larger), `clip_fraction_low` (the dual clip held), `approx_kl` (mean of half the squared
        log-ratio, as TRL), `ppo_kl` (mean of old - new log-prob, as verl), `ratio_mean`, `ratio_min`, `ratio_max`,
        `ratio_var` (over tokens), `tokens` (sum of weights). All 0 where the mask keeps nothing.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
    """
    op = "ppo_policy_loss"
    logprobs, old_logprobs, advantages = as_reals(
        op, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages
    )
    mask = optional_mask(op, mask)
    options = (
        number(op, "clip_low", clip_low, low=0.0, high=1.0),
        number(op, "clip_high", clip_high, low=0.0),
        number(op, "dual_clip", dual_clip, above=1.0, none=math.inf),
        number(op, "log_ratio_clip", log_ratio_clip, above=0.0, none=math.inf),
    )
    mode = choice(op, "aggregate", aggregate, AGGREGATES)
    if logprobs.dim() == 2 and advantages.dim() in (1, 2) and advantages.shape != logprobs.shape:
        column = advantages.unsqueeze(-1) if advantages.dim() == 1 else advantages
        if column.shape == (logprobs.shape[0], 1):
            advantages = column.expand(logprobs.shape)
    loss, stats, _ = _policy(logprobs, old_logprobs, advantages, mask, *options, mode, *normalizer_of(op, normalizer))
    return loss, dict(zip(POLICY_STATS, stats.unbind(), strict=True))


def ppo_policy_loss_reference(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    log_ratio_clip: float | None = 20.0,
    aggregate: str = "token-mean",
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`ppo_policy_loss` in plain torch."""
    weight = weights_reference(mask, logprobs)
    kept = weight != 0
    if advantages.dim() == 1:
        advantages = advantages.unsqueeze(-1)
    logprobs, old_logprobs = torch.where(kept, logprobs, 0.0), torch.where(kept, old_logprobs, 0.0)
    advantages = torch.where(kept, advantages.expand(logprobs.shape), 0.0)
    log_ratio = logprobs - old_logprobs
    if log_ratio_clip is not None:
        log_ratio = log_ratio.clamp(-log_ratio_clip, log_ratio_clip)
    ratio = log_ratio.exp()
    free, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.max(free, clipped)
    dual = torch.zeros_like(kept)
    if dual_clip is not None:
        bound = -advantages * dual_clip
        dual = (advantages < 0) & (loss > bound)
        loss = torch.where(advantages < 0, torch.min(loss, bound), loss)
    n = weight.sum()

    def mean(x):
        return (weight * x).sum() / n if n != 0 else n * 0

    kept_ratio = ratio[kept]
    stats = {
        "clip_fraction": mean(clipped > free),
        "clip_fraction_low": mean(dual),
        "approx_kl": mean(log_ratio**2 / 2),
        "ppo_kl": mean(-log_ratio),
        "ratio_mean": mean(ratio),
        "ratio_min": kept_ratio.min() if kept.any() else n * 0,
        "ratio_max": kept_ratio.max() if kept.any() else n * 0,
        "ratio_var": mean((ratio - mean(ratio)) ** 2),
        "tokens": n,
    }
    return aggregate_reference(loss, weight, aggregate, normalizer), {k: v.detach() for k, v in stats.items()}


def ppo_value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor | None = None,
    *,
    clip: float | None = 0.2,
    aggregate: str = "token-mean",
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped value loss of PPO, 1/2 max((v - R)^2, (clamp(v, v_old - clip, v_old + clip) - R)^2) per token.

    As in OpenAI's lm-human-preferences, TRL, verl and OpenRLHF. Gradients are those of torch.max and torch.clamp, ties included.

    Args:
        values, old_values, returns: [B, T], floating point.
        mask: [B, T]; bool, integer or a floating-point weight.
        clip: at least 0, or None for the plain squared error.
        aggregate, normalizer: as in `ppo_policy_loss`.

    Returns:
        (loss, stats): loss [], float32 or float64 where an argument is, and a dict of [] views into one tensor, each over the
        mask: `clip_fraction`, `error` (mean
        squared error), `value_mean`, `return_mean`, `explained_variance` (1 - Var(R - v) / Var(R); 0 where R does not vary),
        `tokens`. All 0 where the mask keeps nothing.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
    """
    op = "ppo_value_loss"
    values, old_values, returns = as_reals(op, values=values, old_values=old_values, returns=returns)
    mask = optional_mask(op, mask)
    bound = number(op, "clip", clip, low=0.0, none=math.inf)
    mode = choice(op, "aggregate", aggregate, AGGREGATES)
    loss, stats, _ = _value(values, old_values, returns, mask, bound, mode, *normalizer_of(op, normalizer))
    return loss, dict(zip(VALUE_STATS, stats.unbind(), strict=True))


def ppo_value_loss_reference(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor | None = None,
    *,
    clip: float | None = 0.2,
    aggregate: str = "token-mean",
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`ppo_value_loss` in plain torch."""
    weight = weights_reference(mask, values)
    kept = weight != 0
    values, old_values, returns = (torch.where(kept, x, 0.0) for x in (values, old_values, returns))
    bounded = values
    if clip is not None:  # torch.clamp with tensor bounds, but for the gradient of the bounds where clip = 0
        low, high = old_values - clip, old_values + clip
        bounded = torch.where(values < low, low, torch.where(values > high, high, values))
    free_square, bounded_square = (values - returns) ** 2, (bounded - returns) ** 2
    loss = torch.max(free_square, bounded_square) / 2
    n = weight.sum()

    def mean(x):
        return (weight * x).sum() / n if n != 0 else n * 0

    residual = returns - values
    return_var, residual_var = mean((returns - mean(returns)) ** 2), mean((residual - mean(residual)) ** 2)
    stats = {
        "clip_fraction": mean(bounded_square > free_square),
        "error": mean(free_square),
        "value_mean": mean(values),
        "return_mean": mean(returns),
        "explained_variance": 1 - residual_var / return_var if return_var > mean(returns**2) * 2.0**-40 else n * 0,
        "tokens": n,
    }
    return aggregate_reference(loss, weight, aggregate, normalizer), {k: v.detach() for k, v in stats.items()}


def _policy_context(ctx, inputs, output):
    logprobs, old_logprobs, advantages, mask, *ctx.options = inputs
    ctx.save_for_backward(logprobs, old_logprobs, advantages, mask, output[2])
    ctx.mark_non_differentiable(output[1], output[2])


def _policy_formula(ctx, grad, *_):
    logprobs, old_logprobs, advantages, mask, row_weight = ctx.saved_tensors
    new, old, adv = ctx.needs_input_grad[:3]
    by_logprob, by_advantage = _policy_backward(
        grad, logprobs, old_logprobs, advantages, mask, row_weight, *ctx.options[:4], new or old, adv
    )
    return by_logprob if new else None, -by_logprob if old else None, by_advantage if adv else None, *(None,) * 8


def _value_context(ctx, inputs, output):
    values, old_values, returns, mask, *ctx.options = inputs
    ctx.save_for_backward(values, old_values, returns, mask, output[2])
    ctx.mark_non_differentiable(output[1], output[2])


def _value_formula(ctx, grad, *_):
    needs = tuple(ctx.needs_input_grad[:3])
    gradients = _value_backward(grad, *ctx.saved_tensors, ctx.options[0], *needs)
    return *(g if need else None for g, need in zip(gradients, needs, strict=True)), *(None,) * 5


def _fake_loss(stats):
    def fake(first, *rest):
        return (
            first.new_empty(()),
            first.new_empty((len(stats),)),
            first.new_empty(first.shape[:1], dtype=torch.float64),
        )

    return fake


def _fake_gradients(first_input, needs):
    def fake(*args):
        like = args[first_input]
        return tuple(like.new_empty(like.shape if need else (0,)) for need in args[-needs:])

    return fake


register("ppo_policy_loss", _fake_loss(POLICY_STATS), setup_context=_policy_context, backward=_policy_formula)
register("ppo_policy_loss_backward", _fake_gradients(1, 2))
register("ppo_value_loss", _fake_loss(VALUE_STATS), setup_context=_value_context, backward=_value_formula)
register("ppo_value_loss_backward", _fake_gradients(1, 3))
