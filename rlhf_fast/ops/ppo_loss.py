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
    needs_gradient,
    normalizer_of,
    number,
    optional_mask,
    optional_offsets,
    padded_reference,
    register,
    weights_reference,
)

_policy = Kernel("ppo_policy_loss")
_value = Kernel("ppo_value_loss")
_backward = Kernel("ppo_loss_backward")

LEVELS = {"token": False, "sequence": True}
LOSS_TYPES = {"ppo": 0, "cispo": 1}  # the codes of csrc/ppo_loss.h

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


def policy_options(op, clip_low, clip_high, dual_clip, log_ratio_clip, importance_sampling_level, loss_type, aggregate):
    """What the kernels take of a policy loss's options, in their order, checked."""
    options = (
        number(op, "clip_low", clip_low, low=0.0, high=1.0),
        number(op, "clip_high", clip_high, low=0.0),
        number(op, "dual_clip", dual_clip, above=1.0, none=math.inf),
        number(op, "log_ratio_clip", log_ratio_clip, above=0.0, none=math.inf),
        choice(op, "importance_sampling_level", importance_sampling_level, LEVELS),
        choice(op, "loss_type", loss_type, LOSS_TYPES),
        choice(op, "aggregate", aggregate, AGGREGATES),
    )
    if dual_clip is not None and loss_type == "cispo":
        raise ValueError(
            f"{op}: `dual_clip` must be None with loss_type='cispo', which bounds every ratio, got {dual_clip}"
        )
    return options


def one_a_row(advantages: Tensor, tokens: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Advantages [B] as [B, 1]; of any other shape as they are. `tokens` has a value a token."""
    if advantages.dim() == 1 and tokens.dim() > 0 and advantages.shape != tokens.shape:
        rows = len(tokens) if cu_seqlens is None else cu_seqlens.numel() - 1
        return advantages.unsqueeze(-1) if len(advantages) == rows else advantages
    return advantages


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
    importance_sampling_level: str = "token",
    loss_type: str = "ppo",
    aggregate: str = "token-mean",
    normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped surrogate loss of PPO (Schulman et al. 2017, arXiv 1707.06347, eq. 7), of GSPO and of CISPO.

    Per token, with r = exp(clamp(logprobs - old_logprobs, +-log_ratio_clip)) and A the advantage,
    max(-A r, -A clamp(r, 1 - clip_low, 1 + clip_high)); with a dual clip c (Ye et al. 2019, arXiv 1912.09729), where A < 0,
    at most -A c. Gradients are those of torch.max and torch.clamp, ties included, and flow to logprobs, old_logprobs and
    advantages where asked for.

    At sequence level (GSPO: Zheng et al. 2025, arXiv 2507.18071, in its GSPO-token form, which verl runs) the mean of
    logprobs - old_logprobs over the row's mask stands in the place of each token's own, and d r / d logprobs is r at every
    token: with one advantage a sequence and "seq-mean-token-mean" this has GSPO's loss and gradient. CISPO (MiniMax-M1 2025,
    arXiv 2506.13585) weights a policy gradient with the clipped ratio, -A clamp(r, 1 - clip_low, 1 + clip_high) logprobs,
    the ratio a constant. Neither has a gradient to old_logprobs: it is 0.

    Args:
        logprobs, old_logprobs: [B, T], or packed [N] with `cu_seqlens`; floating point.
        advantages: like logprobs; or one a sequence, [B, 1] or [B] (taken as [N] where packed tokens are as many as sequences).
        mask: like logprobs; bool, integer or a floating-point weight.
        clip_low, clip_high: the ratio's range is [1 - clip_low, 1 + clip_high]; at least 0, clip_low at most 1, which sets no
            lower bound.
        dual_clip: above 1 (3.0 is verl's default), or None. Not for "cispo".
        log_ratio_clip: above 0 (20 in verl and OpenRLHF), or None.
        importance_sampling_level: "token" or "sequence".
        loss_type: "ppo" or "cispo".
        aggregate: "token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", or "seq-mean-token-sum-norm" (also
            divided by T; by the longest sequence where packed). Sequences without a token do not count.
        normalizer: the token or sequence count to divide by instead of this batch's own, as number or one-element tensor on
            any device (never read on the host). With the global count, the losses of micro-batches sum to the full batch's.
        cu_seqlens: [B + 1], int32 or int64, rising from 0 to N: where each packed sequence starts.

    Returns:
        (loss, stats): loss [], float32 or float64 where an argument is, and a dict of [] views into one tensor, each over the
        mask and weighted by it, of the ratio that the loss uses: `clip_fraction`
        (the clipped branch was larger; "cispo": the ratio was clipped), `clip_fraction_low` (the dual clip held), `approx_kl`
        (mean of half the squared log-ratio, as TRL), `ppo_kl` (mean of old - new log-prob, as verl), `ratio_mean`, `ratio_min`,
        `ratio_max`, `ratio_var` (over tokens), `tokens` (sum of weights). All 0 where the mask keeps nothing.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
    """
    op = "ppo_policy_loss"
    logprobs, old_logprobs, advantages = as_reals(
        op, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages
    )
    mask, cu_seqlens = optional_mask(op, mask), optional_offsets(op, cu_seqlens)
    options = policy_options(
        op, clip_low, clip_high, dual_clip, log_ratio_clip, importance_sampling_level, loss_type, aggregate
    )
    advantages = one_a_row(advantages, logprobs, cu_seqlens)
    count = normalizer_of(op, normalizer)
    need = needs_gradient(advantages)
    loss, stats = _policy(logprobs, old_logprobs, advantages, mask, cu_seqlens, *options, *count, need)
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
    importance_sampling_level: str = "token",
    loss_type: str = "ppo",
    aggregate: str = "token-mean",
    normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`ppo_policy_loss` in plain torch."""
    if advantages.dim() == 1 and advantages.shape != logprobs.shape:
        advantages = advantages.unsqueeze(-1)
    if cu_seqlens is not None:
        mask, logprobs, old_logprobs, advantages = padded_reference(
            cu_seqlens, mask, logprobs, old_logprobs, advantages
        )
    weight = weights_reference(mask, logprobs)
    kept = weight != 0
    logprobs, old_logprobs = torch.where(kept, logprobs, 0.0), torch.where(kept, old_logprobs, 0.0)
    advantages = torch.where(kept, advantages.expand(logprobs.shape), 0.0)
    log_ratio = logprobs - old_logprobs
    if (
        importance_sampling_level == "sequence"
    ):  # the value is the mean's, the gradient is passed straight to each token
        tokens = weight.sum(-1, keepdim=True)
        mean = (weight * log_ratio).sum(-1, keepdim=True) / torch.where(tokens != 0, tokens, 1.0)
        mean = torch.where(kept, mean, 0.0).detach()
        log_ratio = mean if loss_type == "cispo" else _straight_through(mean, logprobs)
    if log_ratio_clip is not None:
        log_ratio = log_ratio.clamp(-log_ratio_clip, log_ratio_clip)
    ratio = log_ratio.exp()
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
    free, clipped = -advantages * ratio, -advantages * bounded
    loss, was_clipped = torch.max(free, clipped), clipped > free
    if loss_type == "cispo":
        loss, was_clipped = -advantages * bounded.detach() * logprobs, bounded != ratio
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
        "clip_fraction": mean(was_clipped),
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


def _straight_through(value: Tensor, gradient_of: Tensor) -> Tensor:
    """`value`, with the gradient of `gradient_of`, infinities included."""
    return value + torch.where(gradient_of.isfinite(), gradient_of - gradient_of.detach(), 0.0)


def ppo_value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor | None = None,
    *,
    clip: float | None = 0.2,
    aggregate: str = "token-mean",
    normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped value loss of PPO, 1/2 max((v - R)^2, (clamp(v, v_old - clip, v_old + clip) - R)^2) per token.

    As in OpenAI's lm-human-preferences, TRL, verl and OpenRLHF. Gradients are those of torch.max and torch.clamp, ties included.

    Args:
        values, old_values, returns: [B, T], or packed [N] with `cu_seqlens`; floating point.
        mask: like values; bool, integer or a floating-point weight.
        clip: at least 0, or None for the plain squared error.
        aggregate, normalizer, cu_seqlens: as in `ppo_policy_loss`.

    Returns:
        (loss, stats): loss [], float32 or float64 where an argument is, and a dict of [] views into one tensor, each over the
        mask: `clip_fraction`, `error` (mean squared error), `value_mean`, `return_mean`, `explained_variance`
        (1 - Var(R - v) / Var(R); 0 where R does not vary by more than rounding), `tokens`. All 0 where the mask keeps nothing.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
    """
    op = "ppo_value_loss"
    values, old_values, returns = as_reals(op, values=values, old_values=old_values, returns=returns)
    mask, cu_seqlens = optional_mask(op, mask), optional_offsets(op, cu_seqlens)
    bound = number(op, "clip", clip, low=0.0, none=math.inf)
    mode = choice(op, "aggregate", aggregate, AGGREGATES)
    count = normalizer_of(op, normalizer)
    needs = needs_gradient(old_values), needs_gradient(returns)
    loss, stats = _value(values, old_values, returns, mask, cu_seqlens, bound, mode, *count, *needs)
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
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`ppo_value_loss` in plain torch."""
    if cu_seqlens is not None:
        mask, values, old_values, returns = padded_reference(cu_seqlens, mask, values, old_values, returns)
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


def _context(ctx, inputs, output):
    # cu_seqlens, the rows' weights, the slopes; and the inputs, from which a second derivative is known to be asked for.
    ctx.save_for_backward(inputs[4], *output[2:], *inputs[:3])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else backward starts by filling zeros for each of those


def _policy_context(ctx, inputs, output):
    _context(ctx, inputs, output)
    ctx.detached = inputs[9] or inputs[10] != LOSS_TYPES["ppo"]


def _policy_formula(ctx, grad, *_):
    if grad is None:
        return (None,) * 15
    cu_seqlens, row_weight, slope, advantage_slope, *_ = ctx.saved_tensors
    new, old, adv = ctx.needs_input_grad[:3]
    by_logprob = _backward(grad, slope, row_weight, cu_seqlens) if new or old else None
    by_old = (torch.zeros_like(by_logprob) if ctx.detached else -by_logprob) if old else None
    by_advantage = None
    if adv:  # one advantage a row comes with one slope a row
        by_advantage = _backward(grad, advantage_slope, row_weight, cu_seqlens if advantage_slope.dim() == 1 else None)
    return by_logprob if new else None, by_old, by_advantage, *(None,) * 12


def _value_formula(ctx, grad, *_):
    if grad is None:
        return (None,) * 11
    cu_seqlens, row_weight, *slopes = ctx.saved_tensors[:-3]
    needs = ctx.needs_input_grad[:3]
    gradients = (
        _backward(grad, s, row_weight, cu_seqlens) if need else None for s, need in zip(slopes, needs, strict=True)
    )
    return *gradients, *(None,) * 8


def _fake_loss(stats, *maybe):
    """`maybe`: the places of the arguments whose slopes the last flags ask for."""

    def fake(*args):
        first, cu_seqlens = args[0], args[4]
        rows = first.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        needs = zip(maybe, args[-len(maybe) :], strict=True)
        return (
            first.new_empty(()),
            first.new_empty((len(stats),)),
            first.new_empty((rows,), dtype=torch.float64),
            first.new_empty(first.shape),
            *(first.new_empty(args[place].shape if need else (0,)) for place, need in needs),
        )

    return fake


register(
    "ppo_policy_loss",
    _fake_loss(POLICY_STATS, 2),
    hidden=3,
    differentiable=3,
    setup_context=_policy_context,
    backward=_policy_formula,
)
register(
    "ppo_value_loss",
    _fake_loss(VALUE_STATS, 1, 2),
    hidden=4,
    differentiable=3,
    setup_context=_context,
    backward=_value_formula,
)
register("ppo_loss_backward", lambda grad, slope, *rest: slope.new_empty(slope.shape))
