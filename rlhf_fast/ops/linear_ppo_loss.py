"""The PPO policy loss straight from hidden states: loss and gradients in one pass over tiles of logits."""

from math import inf

import torch
from torch import Tensor

from rlhf_fast.ops import _logits
from rlhf_fast.ops._common import (
    Kernel,
    define,
    needs_gradient,
    optional_mask,
    optional_offsets,
    real_constants,
    register,
)
from rlhf_fast.ops._slices import SliceKernels
from rlhf_fast.ops.linear import (
    WORKSPACE,
    Tiles,
    add_product,
    at,
    autocast_off,
    chunk_of,
    flat,
    head_inputs,
    kept_of,
    need_twin,
    product,
    select,
    spans,
    spread,
    waits,
)
from rlhf_fast.ops.ppo_loss import LOSS_TYPES, one_a_row
from rlhf_fast.ops.ppo_loss_from_logits import (
    AUTO_PLAN,
    STATS,
    objective_options,
    ppo_loss_from_logits_reference,
    scale_once,
    scaled,
    with_stats,
)

_op = "linear_ppo_loss"
_loss = Kernel(_op)
_logprobs = Kernel("linear_logprobs", _op)
_policy = Kernel("ppo_policy_loss", _op)
_penalty = Kernel("kl_penalty", _op)
_weights = Kernel("ppo_token_weights", _op)
_rows = Kernel("ppo_loss_rows", _op)
_rows_inplace = Kernel("ppo_loss_rows_inplace", _op)
_objective = Kernel("ppo_objective", _op)
_slices = SliceKernels(_op)
CISPO = LOSS_TYPES["cispo"]


def linear_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    log_ratio_clip: float | None = 20.0,
    importance_sampling_level: str = "token",
    loss_type: str = "ppo",
    aggregate: str = "token-mean",
    normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    entropy_coef: float = 0.0,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    chunk_tokens: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`ppo_loss_from_logits` of the logits hidden @ weight.T + bias, made some tokens at a time, each once.

    A tile of logits, all of V for a few tokens, becomes its own gradient in place and from that the gradients of hidden and
    weight, in the forward call: 6 n H V operations, where `linear_logprobs` with `ppo_policy_loss` takes 8 and keeps no
    gradient. The gradients, as large as hidden and weight, wait for the backward pass, which multiplies them by the upstream
    gradient on the device, and does nothing where that is 1: put loss scaling and the number of accumulated micro-batches into
    `normalizer`. They belong to one backward pass: a second one is an error.

    Logits are float32 (float64 for float64), products as in `linear_logprobs`; the gradient of a 16-bit weight is added up in a
    float32 [V, H], 2.5 GB for 151936 x 4096, during the call, and rounded once. With importance_sampling_level="sequence", where
    a ratio needs every log-prob of its sequence, `linear_logprobs` and the losses are put together instead.

    Args:
        hidden: [B, T, H], or packed [N, H] with `cu_seqlens`; float32, bfloat16, float16 or float64.
        weight: [V, H], of the same dtype, as in `linear_logprobs`, as are bias and autocast.
        labels: [B, T] or [N], int64 or int32. A label outside [0, V) is a ValueError on the CPU; on CUDA the loss is NaN.
        old_logprobs: like labels; a constant, as are the next three.
        advantages: like labels; or one a sequence, [B, 1] or [B] (taken as [N] where packed tokens are as many as sequences).
        mask: like labels; bool, integer or a floating-point weight.
        bias: [V] or None.
        temperature, softcap, logit_scale: as in `gather_logprobs`.
        ignore_index: tokens with this label count as masked.
        clip_low, clip_high, dual_clip, log_ratio_clip, importance_sampling_level, loss_type, aggregate, normalizer, cu_seqlens,
            entropy_coef, ref_logprobs, kl_coef, kl_estimator: as in `ppo_loss_from_logits`.
        chunk_tokens: tokens of a tile, at least 1; by default, and at most, as many as fit in 64 MiB on the CPU and 512 MiB on
            a GPU, but one.

    Returns:
        (loss, stats), as `ppo_loss_from_logits` gives them: float32, or float64 for float64 hidden states.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
    """
    op = _op
    mask, cu_seqlens = optional_mask(op, mask), optional_offsets(op, cu_seqlens)
    hidden, weight, bias = head_inputs(op, hidden, weight, bias, labels, mask)
    old_logprobs, advantages = real_constants(op, old_logprobs=old_logprobs, advantages=advantages)
    need_twin(op, "old_logprobs", old_logprobs, labels)
    if ref_logprobs is not None:
        (ref_logprobs,) = real_constants(op, ref_logprobs=ref_logprobs)
        need_twin(op, "ref_logprobs", ref_logprobs, labels)
    taus, *numbers = _logits.options_of(op, hidden, labels, temperature, softcap, logit_scale, ignore_index)
    need_twin(op, "temperature", taus, labels)
    policy = clip_low, clip_high, dual_clip, log_ratio_clip, importance_sampling_level, loss_type, aggregate
    count, objective = objective_options(op, policy, normalizer, entropy_coef, ref_logprobs, kl_coef, kl_estimator)
    advantages = one_a_row(advantages, labels, cu_seqlens)
    chunk = chunk_of(op, chunk_tokens)

    tensors = (hidden, weight, bias, labels, old_logprobs, advantages, mask, cu_seqlens, ref_logprobs, taus, count)
    options = (*numbers, *objective, chunk)
    if importance_sampling_level == "sequence":
        outputs = _composed(*tensors, *options)
    else:
        needs = (needs_gradient(hidden), needs_gradient(weight), bias is not None and needs_gradient(bias))
        outputs = _loss(*tensors, *options, *needs)
    return with_stats(*outputs[:4])


def linear_ppo_loss_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    log_ratio_clip: float | None = 20.0,
    importance_sampling_level: str = "token",
    loss_type: str = "ppo",
    aggregate: str = "token-mean",
    normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    entropy_coef: float = 0.0,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    chunk_tokens: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`linear_ppo_loss` in plain torch: all logits at once."""
    return ppo_loss_from_logits_reference(
        torch.nn.functional.linear(hidden, weight, bias),
        labels,
        old_logprobs,
        advantages,
        mask,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        ignore_index=ignore_index,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        log_ratio_clip=log_ratio_clip,
        importance_sampling_level=importance_sampling_level,
        loss_type=loss_type,
        aggregate=aggregate,
        normalizer=normalizer,
        cu_seqlens=cu_seqlens,
        entropy_coef=entropy_coef,
        ref_logprobs=ref_logprobs,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
    )


# ---------------------------------------------------------------------------------------------------------------------


def _check(hidden, weight, labels, taus, weights, numbers):
    """Labels and temperatures, before there is a product."""
    nothing = hidden.new_empty((labels.numel(), 0), dtype=_logits.accumulate_dtype(hidden))
    _slices.statistics(nothing, flat(labels), flat(taus), flat(weights), *numbers, 0, weight.shape[0], False)


def _composed(hidden, weight, bias, labels, old, advantages, mask, offsets, reference, taus, count, *options):
    """At sequence level: from the log-probs of every token, through autograd. O(tokens) beside them."""
    *numbers, low, high, dual, clip, sequence, form, aggregate, count_value, entropy_coef, kl_coef = options[:14]
    estimator, chunk = options[14:16], options[16]
    aggregated = (aggregate, count, count_value)
    weights, _, advantages = _weights(labels, advantages, mask, offsets, numbers[-1], *aggregated)
    _check(hidden, weight, labels, taus, weights, numbers)
    rows, counting = hidden.reshape(labels.numel(), hidden.shape[-1]), weights != 0
    logprobs, entropies = _logprobs(
        rows, weight, bias, flat(labels), flat(taus), flat(counting), *numbers, True, chunk, True
    )
    logprobs, entropies = logprobs.view(labels.shape), entropies.view(labels.shape)

    def total(x):
        """x as the aggregate has it: the CISPO loss where every ratio is 1 and every advantage -1."""
        one = torch.ones_like(x)
        return _policy(x, x.detach(), -one, weights, offsets, 0.2, 0.2, inf, inf, False, CISPO, *aggregated, False)[0]

    policy = (low, high, dual, clip, sequence, form)
    loss = _policy(logprobs, old, advantages, weights, offsets, *policy, *aggregated, False)[0]
    if entropy_coef != 0:
        loss = loss - entropy_coef * total(entropies)
    if kl_coef != 0:
        loss = loss + kl_coef * total(_penalty(logprobs, reference, counting, *estimator, inf, inf))
    dtype = _logits.accumulate_dtype(hidden)
    tokens = (logprobs.detach(), entropies.detach(), old, advantages, reference, weights, offsets)
    coefs = (entropy_coef, kl_coef, *estimator)
    _, *rest = _objective(*tokens, *policy, *coefs, *aggregated, dtype == torch.float64)
    return loss.to(dtype), *rest


class Rows(Tiles):
    """All logits of some tokens. On the CPU a 16-bit weight is widened a slice at a time; on a GPU it is its gradient that is
    added to in slices, from products that are float32.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, chunk_tokens: int):
        (n, width), vocab = hidden.shape, weight.shape[0]
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.dtype = _logits.accumulate_dtype(hidden)
        narrow, budget = hidden.dtype.itemsize == 2, WORKSPACE["cpu" if hidden.is_cpu else "cuda"]
        some = min(vocab, max(256, budget // 4 // max(1, 4 * width))) if narrow else vocab
        self.ids, self.added_ids = (some, vocab) if hidden.is_cpu else (vocab, some)
        logit = self.dtype.itemsize + 2 * (narrow and not hidden.is_cpu)
        fitting = (budget - 4 * narrow * width * some) // (vocab * logit)
        self.tokens = max(1, min(n, chunk_tokens or n, fitting))
        self.memory = hidden.new_empty((self.tokens, vocab), dtype=self.dtype)

    def logits(self, x: Tensor) -> Tensor:
        z = self.memory[: x.shape[0]]
        for a, w in self.slices():
            product(x, w.t(), z[:, a : a + w.shape[0]])
        return z if self.bias is None else z.add_(self.bias)


def _loss_and_gradients(hidden, weight, bias, labels, old, advantages, mask, offsets, reference, taus, count, *options):
    *numbers, low, high, dual, clip, sequence, form, aggregate, count_value, entropy_coef, kl_coef = options[:14]
    estimator, chunk, needs = options[14:16], options[16], options[17:]
    need_hidden, need_weight, need_bias = needs
    aggregated, n, shape = (aggregate, count, count_value), labels.numel(), hidden.shape
    weights, scale, advantages = _weights(labels, advantages, mask, offsets, numbers[-1], *aggregated)
    with autocast_off(hidden):
        _check(hidden, weight, labels, taus, weights, numbers)
        counting = flat(weights) != 0
        kept = kept_of(counting)
        hidden = hidden.reshape(n, shape[-1])
        if need_weight and waits(hidden):  # 0 times what stands off the mask, NaN perhaps, would be in the product
            hidden = hidden.where(counting.unsqueeze(-1), 0)
        beside = (labels, old, advantages, reference, weights, scale, taus)
        hidden, *beside = select(kept, hidden, *(flat(t) for t in beside))
        rows = Rows(hidden, weight, bias, chunk)
        by_hidden = hidden.new_empty(hidden.shape if need_hidden else (0,))
        make = weight.new_empty if hidden.shape[0] else weight.new_zeros
        by_weight = make(weight.shape if need_weight else (0,), dtype=rows.dtype)
        by_bias = weight.new_zeros(weight.shape[0] if need_bias else 0, dtype=rows.dtype)
        outputs = [(weights.new_empty(0), weights.new_empty(0))]
        rest = (*numbers, low, high, dual, clip, form, entropy_coef, kl_coef, *estimator)
        for i, j, x in rows.chunks():
            z = rows.logits(x)
            if not any(needs):
                outputs.append(_rows(z, *at(beside, i, j), *rest, False, AUTO_PLAN)[:2])
                continue
            outputs.append(_rows_inplace(z, *at(beside, i, j), *rest, AUTO_PLAN))
            if need_bias:
                by_bias += z.sum(0)
            z = z.to(x.dtype)
            wide = x.new_empty((j - i, x.shape[1]), dtype=rows.dtype) if need_hidden else None
            for a, w in rows.slices() if need_hidden else ():
                add_product(wide, z[:, a : a + w.shape[0]], w, first=a == 0)
            if need_hidden:
                by_hidden[i:j] = wide
            for a, b in spans(weight.shape[0], rows.added_ids) if need_weight else ():
                add_product(by_weight[a:b], z[:, a:b].t(), x, first=i == 0)
        logprobs, entropies = (spread(kept, n, torch.cat(t)).view(labels.shape) for t in zip(*outputs, strict=True))
        tokens = (logprobs, entropies, old, advantages, reference, weights, offsets)
        policy, coefs = (low, high, dual, clip, sequence, form), (entropy_coef, kl_coef, *estimator)
        objective = _objective(*tokens, *policy, *coefs, *aggregated, rows.dtype == torch.float64)
        if need_hidden:
            by_hidden = spread(kept, n, by_hidden).view(shape)
        return *objective, by_hidden, by_weight.to(weight.dtype), by_bias.to(weight.dtype)


def _context(ctx, inputs, output):
    ctx.spent = False
    ctx.save_for_backward(*output[4:], *inputs[:3])  # the inputs tell that a second derivative is asked for
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


_NOTHING = (None,) * 31


def _gradients_made(ctx):
    """By the forward pass, of what wants one."""
    return [g if need else None for g, need in zip(ctx.saved_tensors[:3], ctx.needs_input_grad[:3], strict=True)]


def _formula(ctx, grad, *_):
    if grad is None:
        return _NOTHING
    return (*(None if g is None else scaled(g, grad) for g in _gradients_made(ctx)), *_NOTHING[3:])


def _formula_eager(ctx, grad, *_):
    if grad is None:
        return _NOTHING
    gradients = _gradients_made(ctx)
    scale_once(ctx, _op, grad, *(g for g in gradients if g is not None))
    return (*gradients, *_NOTHING[3:])


def _fake(hidden, weight, bias, labels, *rest):
    dtype, needs = _logits.accumulate_dtype(hidden), rest[-3:]
    shapes = ((), (len(STATS),), labels.shape, labels.shape)
    gradients = zip((hidden.shape, weight.shape, weight.shape[:1]), needs, strict=True)
    return (
        *(weight.new_empty(shape, dtype=dtype) for shape in shapes),
        *(weight.new_empty(shape if need else (0,)) for shape, need in gradients),
    )


define(
    "linear_ppo_loss(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor old_logprobs, Tensor advantages, "
    "Tensor? mask, Tensor? cu_seqlens, Tensor? ref_logprobs, Tensor? temperature, Tensor? normalizer, float temperature_value, "
    "float softcap, float logit_scale, int ignore_index, float clip_low, float clip_high, float dual_clip, "
    "float log_ratio_clip, bool sequence_level, int form, int aggregate, float normalizer_value, float entropy_coef, "
    "float kl_coef, int kl_estimator, bool straight_through, int chunk_tokens, bool need_hidden, bool need_weight, "
    "bool need_bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _loss_and_gradients,
)
register(
    _op, _fake, hidden=3, differentiable=3, setup_context=_context, backward=_formula, backward_eager=_formula_eager
)


def _fake_rows(logits, labels, *rest):
    gradient = logits.new_empty(logits.shape if rest[-2] else (0,))
    return *_fake_rows_inplace(logits, labels), gradient


def _fake_rows_inplace(logits, labels, *rest):
    return tuple(labels.new_empty(labels.shape, dtype=torch.float64) for _ in range(2))


def _fake_objective(logprobs, *rest):
    dtype = torch.float64 if rest[-1] else torch.float32
    return tuple(logprobs.new_empty(s, dtype=dtype) for s in ((), (len(STATS),), logprobs.shape, logprobs.shape))


def _fake_weights(labels, *rest):
    return tuple(labels.new_empty(labels.shape, dtype=torch.float64) for _ in range(3))


register("ppo_token_weights", _fake_weights, function=_op)
register("ppo_loss_rows", _fake_rows, function=_op)
register("ppo_loss_rows_inplace", _fake_rows_inplace, function=_op)
register("ppo_objective", _fake_objective, function=_op)
