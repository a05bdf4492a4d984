"""The PPO policy loss straight from logits: loss and gradient in one pass over them."""

import torch
from torch import Tensor

from rlhf_fast import _C
from rlhf_fast.ops import _logits
from rlhf_fast.ops._common import (
    Kernel,
    aggregate_reference,
    choice,
    first_derivative_only,
    flag,
    integer,
    need_tensor,
    needs_gradient,
    normalizer_of,
    number,
    optional_mask,
    optional_offsets,
    padded_reference,
    real_constants,
    register,
    weights_reference,
)
from rlhf_fast.ops.kl import ESTIMATORS, kl_penalty_reference
from rlhf_fast.ops.logprob import gather_logprobs_reference
from rlhf_fast.ops.ppo_loss import POLICY_STATS, one_a_row, policy_options, ppo_policy_loss_reference

_loss = Kernel("ppo_loss_from_logits")
_loss_inplace = Kernel("ppo_loss_from_logits_inplace")
_scale_gradient = Kernel("ppo_scale_gradient")

# The order in which csrc/ppo_loss_from_logits.h writes them; behind them come a log-prob and an entropy a token.
STATS = (*POLICY_STATS, "policy_loss", "entropy", "kl")
AUTO_PLAN = -1  # how a GPU holds the rows: as csrc/on_chip.h chooses


def ppo_loss_from_logits(
    logits: Tensor,
    labels: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
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
    inplace: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's policy loss, less an entropy bonus, plus a KL penalty, from logits: each logit is read once and its gradient written.

    loss = aggregate(policy loss - entropy_coef * entropy + kl_coef * KL) over the tokens of the mask, where the log-prob and
    the entropy of a token are those of `gather_logprobs`, the policy loss that of `ppo_policy_loss`, KL that of `kl_penalty`.
    Their composition gives the same numbers in two reads of the logits; this one makes the gradient while the row is at hand,
    for all that the gradient of a row needs beside it, the weight of its token in the loss, is known before. Only
    importance_sampling_level="sequence", where a ratio needs every log-prob of its sequence, reads the logits twice.

    The gradient is made in the forward call, where logits.requires_grad, for an upstream gradient of 1. Backward multiplies it
    by the upstream gradient on the device, which costs a pass where that is not 1: put loss scaling and the number of
    accumulated micro-batches into `normalizer`, not behind the loss. It belongs to one backward pass: a second one is an error.

    Args:
        logits: [B, T, V], or packed [N, V] with `cu_seqlens`; float32, bfloat16, float16 or float64, any row strides.
        labels: [B, T] or [N], int64 or int32. A label outside [0, V) is a ValueError on the CPU; on CUDA the loss and the
            gradient of its row are NaN.
        old_logprobs: like labels; a constant, as are the next three.
        advantages: like labels; or one a sequence, [B, 1] or [B] (taken as [N] where packed tokens are as many as sequences).
        mask: like labels; bool, integer or a floating-point weight.
        temperature, softcap, logit_scale: as in `gather_logprobs`.
        ignore_index: tokens with this label count as masked.
        clip_low, clip_high, dual_clip, log_ratio_clip, importance_sampling_level, loss_type: as in `ppo_policy_loss`.
        aggregate, normalizer, cu_seqlens: as in `ppo_policy_loss`.
        entropy_coef: what a nat of entropy is worth in the loss.
        ref_logprobs: like labels: the reference policy's log-probs, for the KL penalty.
        kl_coef: at least 0; above 0 it needs ref_logprobs.
        kl_estimator: "k1", "k2", "k3", "abs", "k1+" or "k3+", as in `kl_penalty`, without its clips.
        inplace: write the gradient over the logits' own memory. Only where nothing else reads them afterwards: an op that kept
            them for its own backward pass raises torch's error about a version. Logits that are a leaf are refused. Where no
            gradient is asked for nothing is written; under torch.compile it has no effect.

    Returns:
        (loss, stats): loss [], float32, or float64 for float64 logits; and a dict of tensors without gradient: the [] views that
        `ppo_policy_loss` gives, `clip_fraction` to `tokens`; `policy_loss`, `entropy` and `kl` [], each aggregated as the loss
        is, so that loss = policy_loss - entropy_coef * entropy + kl_coef * kl (`kl` is 0 without ref_logprobs); and `logprobs`
        and `entropies`, like labels, 0 where the mask is 0.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
    """
    op = "ppo_loss_from_logits"
    need_tensor(op, "logits", logits)
    need_tensor(op, "labels", labels)
    flag(op, "inplace", inplace)
    old_logprobs, advantages = real_constants(op, old_logprobs=old_logprobs, advantages=advantages)
    mask, cu_seqlens = optional_mask(op, mask), optional_offsets(op, cu_seqlens)
    if ref_logprobs is not None:
        (ref_logprobs,) = real_constants(op, ref_logprobs=ref_logprobs)
    taus, *logit_options = _logits.options_of(op, logits, labels, temperature, softcap, logit_scale, ignore_index)
    policy = clip_low, clip_high, dual_clip, log_ratio_clip, importance_sampling_level, loss_type, aggregate
    count, objective = objective_options(op, policy, normalizer, entropy_coef, ref_logprobs, kl_coef, kl_estimator)
    advantages = one_a_row(advantages, labels, cu_seqlens)

    need = needs_gradient(logits)
    inplace = inplace and need and not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()
    if inplace and logits.is_leaf:
        raise ValueError(
            f"{op}: `inplace` needs logits that an op made; these are a leaf that requires grad, which may not be overwritten"
        )
    tensors = (logits, labels, old_logprobs, advantages, mask, cu_seqlens, ref_logprobs, taus, count)
    arguments = (*tensors, *logit_options, *objective)
    outputs = _InPlace.apply(*arguments, AUTO_PLAN) if inplace else _loss(*arguments, need, AUTO_PLAN)
    return with_stats(*outputs[:4])


def objective_options(op, policy, normalizer, entropy_coef, ref_logprobs, kl_coef, kl_estimator):
    """The normalizer as a tensor or None, and what the kernels take of the other options, in their order; checked."""
    checked = policy_options(op, *policy)
    entropy_coef = number(op, "entropy_coef", entropy_coef)
    kl_coef = number(op, "kl_coef", kl_coef, low=0.0)
    estimator = choice(op, "kl_estimator", kl_estimator, ESTIMATORS)
    if kl_coef != 0 and ref_logprobs is None:
        raise ValueError(f"{op}: `ref_logprobs` must be given where `kl_coef` is not 0, got None and {kl_coef}")
    count, count_value = normalizer_of(op, normalizer)
    return count, (*checked, count_value, entropy_coef, kl_coef, *estimator)


def with_stats(loss: Tensor, stats: Tensor, logprobs: Tensor, entropies: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """What the kernels return, as the public functions return it."""
    return loss, dict(zip(STATS, stats.unbind(), strict=True)) | {"logprobs": logprobs, "entropies": entropies}


def plan(vocab: int, dtype: torch.dtype, capability: tuple[int, int]) -> dict[str, str | int]:
    """How the CUDA kernels have a row of logits the second time, for its gradient, on a GPU of this compute capability.

    `from rlhf_fast.ops.ppo_loss_from_logits import plan`: asks what the launcher asks, and needs no GPU.

    Args:
        vocab: V.
        dtype: of the logits.
        capability: (9, 0) for an H100, as torch.cuda.get_device_capability() has it.

    Returns:
        A dict. `name`: "warp" (V up to 2048: a warp a row; with a soft cap "block"), "block" (a block holds the row in its shared
        memory), "cluster" (a few blocks hold a slice each) or "stream" (the row is read again, in hope of the L2 cache; always
        so in float64). `blocks` a row and `threads` a block that work on it, `row_bytes` of shared memory for the row in each
        block, and `resident`, how many rows or slices a multiprocessor has at a time (0: not limited by this).

    >>> plan(151936, torch.bfloat16, (9, 0))
    {'name': 'cluster', 'blocks': 4, 'threads': 256, 'row_bytes': 75968, 'resident': 3}
    """
    op = "plan"
    major, minor = (integer(op, "capability", part) for part in capability)
    vocab = integer(op, "vocab", vocab)
    if vocab < 1:
        raise ValueError(f"{op}: `vocab` must be at least 1, got {vocab}")
    if dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise TypeError(f"{op}: `dtype` must be float32, bfloat16, float16 or float64, got {dtype}")
    return _C.on_chip_plan(vocab, dtype.itemsize, 10 * major + minor)


def ppo_loss_from_logits_reference(
    logits: Tensor,
    labels: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
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
) -> tuple[Tensor, dict[str, Tensor]]:
    """`ppo_loss_from_logits` in plain torch."""
    weight = weights_reference(mask, old_logprobs).to(logits.dtype) * (labels != ignore_index)
    logit_options = {"temperature": temperature, "softcap": softcap, "logit_scale": logit_scale}
    logprobs, entropies = gather_logprobs_reference(
        logits, labels, **logit_options, ignore_index=ignore_index, mask=weight != 0, with_entropy=True
    )
    return objective_reference(
        logprobs,
        entropies,
        old_logprobs,
        advantages,
        weight,
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


def objective_reference(
    logprobs: Tensor,
    entropies: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weight: Tensor,
    *,
    entropy_coef,
    ref_logprobs,
    kl_coef,
    kl_estimator,
    **policy,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The same of log-probs and entropies, with a weight a token; `policy`: the options of `ppo_policy_loss`, all of them."""
    policy_loss, stats = ppo_policy_loss_reference(logprobs, old_logprobs, advantages, weight, **policy)
    aggregate, normalizer, cu_seqlens = (policy[name] for name in ("aggregate", "normalizer", "cu_seqlens"))
    kl = torch.zeros_like(logprobs)
    if ref_logprobs is not None:
        kl = kl_penalty_reference(logprobs, ref_logprobs, estimator=kl_estimator, mask=weight != 0)
    rows = (weight, entropies, kl) if cu_seqlens is None else padded_reference(cu_seqlens, weight, entropies, kl)
    entropy, kl = (aggregate_reference(x, rows[0], aggregate, normalizer) for x in rows[1:])
    loss = policy_loss
    if entropy_coef != 0:
        loss = loss - entropy_coef * entropy
    if kl_coef != 0:
        loss = loss + kl_coef * kl
    stats |= {"policy_loss": policy_loss, "entropy": entropy, "kl": kl, "logprobs": logprobs, "entropies": entropies}
    return loss, {k: v.detach() for k, v in stats.items()}


def _keep_gradient(ctx, gradient, logits):
    ctx.spent = False
    ctx.save_for_backward(gradient, logits)  # the logits: from them a second derivative is known to be asked for
    ctx.set_materialize_grads(False)


def _context(ctx, inputs, output):
    _keep_gradient(ctx, output[4], inputs[0])
    ctx.mark_non_differentiable(*output[1:])


def scaled(gradient: Tensor, grad: Tensor) -> Tensor:
    """A gradient made for an upstream gradient of 1, for the one that came; 0 stays 0."""
    return torch.where(gradient != 0, (gradient.to(grad.dtype) * grad).to(gradient.dtype), gradient)


def scale_once(ctx, op: str, grad: Tensor, *gradients: Tensor) -> None:
    """The same in the memory of the gradients themselves, which serve one backward pass."""
    if ctx.spent:
        raise RuntimeError(
            f"{op}: the gradient was made by the forward call and used by the first backward, so there can be no second one; "
            "call the function again"
        )
    ctx.spent = True
    for gradient in gradients:
        _scale_gradient(gradient, grad)


_NOTHING = (None,) * 27


def _formula(ctx, grad, *_):
    """The gradient to the logits, which the forward pass has made."""
    return _NOTHING if grad is None else (scaled(ctx.saved_tensors[0], grad), *_NOTHING[1:])


def _formula_eager(ctx, grad, *_):
    if grad is None:
        return _NOTHING
    gradient, _ = ctx.saved_tensors
    scale_once(ctx, "ppo_loss_from_logits", grad, gradient)
    return (gradient, *_NOTHING[1:])


_once = first_derivative_only("ppo_loss_from_logits", _formula_eager)


class _InPlace(torch.autograd.Function):
    """The op that writes over its logits. torch.library has no gradients for such ops, so that this is for eager calls alone."""

    @staticmethod
    def forward(ctx, logits, *rest):
        outputs = _loss_inplace(logits.detach(), *rest)
        torch.autograd.graph.increment_version(logits)
        _keep_gradient(ctx, logits.detach(), logits)
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx, *gradients):
        return _once(ctx, *gradients)[:-1]


def _fake_inplace(logits, labels, *rest):
    dtype = _logits.accumulate_dtype(logits)
    shapes = ((), (len(STATS),), labels.shape, labels.shape)
    return tuple(labels.new_empty(shape, dtype=dtype) for shape in shapes)


def _fake(logits, labels, *rest):
    need_gradient = rest[-2]
    return *_fake_inplace(logits, labels), logits.new_empty(logits.shape if need_gradient else (0,))


register(
    "ppo_loss_from_logits",
    _fake,
    hidden=1,
    differentiable=1,
    setup_context=_context,
    backward=_formula,
    backward_eager=_formula_eager,
)
register("ppo_loss_from_logits_inplace", _fake_inplace, function="ppo_loss_from_logits")
register("ppo_scale_gradient", lambda gradient, grad: None)
