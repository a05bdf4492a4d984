"""Mean and whitening over a mask."""

import torch
from torch import Tensor

from rlhf_fast.ops._common import (
    Kernel,
    as_reals,
    flag,
    integer,
    need_mask,
    number,
    optional_offsets,
    padded_reference,
    register,
    weights_reference,
)

_mean = Kernel("masked_mean")
_mean_backward = Kernel("masked_mean_backward")
_whiten = Kernel("masked_whiten")
_whiten_backward = Kernel("masked_whiten_backward")


def masked_mean(x: Tensor, mask: Tensor, *, dim: int | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
    """sum(mask * x) / sum(mask), over everything, one dimension or each packed sequence; 0 where the mask keeps nothing.

    Values off the mask are never read: NaN or infinity there changes nothing.

    Args:
        x: [...], floating point; packed [N] beside `cu_seqlens`.
        mask: the shape of x; bool, integer (0 or not) or floating point (weights).
        dim: the dimension to reduce, or None for all.
        cu_seqlens: [B + 1], int32 or int64, rising from 0 to N: where each packed sequence starts, for a mean of each.

    Returns:
        [], x's shape without `dim`, or [B] of packed sequences; float32, or float64 for float64 x.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
    """
    op = "masked_mean"
    (x,) = as_reals(op, x=x)
    mask = _same_shape(op, mask, x)
    if cu_seqlens is not None:
        if dim is not None:
            raise ValueError(f"{op}: `dim` must be None beside `cu_seqlens`, got {dim}")
        return _mean(x, mask, optional_offsets(op, cu_seqlens))[0]
    if dim is None:
        return _mean(x.reshape(1, -1), mask.reshape(1, -1), None)[0].view(())
    dim = integer(op, "dim", dim, none=True)
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"{op}: `dim` must be in [{-x.dim()}, {x.dim()}) for `x` of shape {list(x.shape)}, got {dim}")
    x, mask = x.movedim(dim, -1), mask.movedim(dim, -1)
    rows = x.shape[:-1]
    flat = (rows.numel(), x.shape[-1])
    return _mean(x.reshape(flat), mask.reshape(flat), None)[0].view(rows)


def masked_mean_reference(
    x: Tensor, mask: Tensor, *, dim: int | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """`masked_mean` in plain torch."""
    if cu_seqlens is not None:
        return masked_mean_reference(*reversed(padded_reference(cu_seqlens, mask, x)), dim=1)
    weight = weights_reference(mask, x)
    dims = tuple(range(x.dim())) if dim is None else dim
    total = torch.where(weight != 0, weight * torch.where(weight != 0, x, 0.0), 0.0).sum(dims)
    count = weight.sum(dims)
    return torch.where(count != 0, total / count.where(count != 0, torch.ones_like(count)), total * 0)


def masked_whiten(
    x: Tensor, mask: Tensor, *, shift_mean: bool = True, unbiased: bool = True, eps: float = 1e-8
) -> Tensor:
    """(x - mean) / sqrt(var + eps) with mean and variance over the mask, as TRL's and verl's `masked_whiten`; 0 off the mask.

    Args:
        x: [...], floating point.
        mask: the shape of x; bool, integer (0 or not) or floating point (weights of the statistics).
        shift_mean: False adds the mean back (reward whitening).
        unbiased: Bessel's correction, as TRL and verl; False for OpenAI's and the N+ implementation's biased variance. A
            single token has variance 0 either way.
        eps: at least 0, inside the square root.

    Returns:
        The shape of x; float32, or float64 for float64 x. The gradient includes that of mean and variance.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
    """
    op = "masked_whiten"
    (x,) = as_reals(op, x=x)
    mask = _same_shape(op, mask, x)
    flag(op, "shift_mean", shift_mean)
    flag(op, "unbiased", unbiased)
    return _whiten(x, mask, shift_mean, unbiased, number(op, "eps", eps, low=0.0))[0]


def masked_whiten_reference(
    x: Tensor, mask: Tensor, *, shift_mean: bool = True, unbiased: bool = True, eps: float = 1e-8
) -> Tensor:
    """`masked_whiten` in plain torch."""
    weight = weights_reference(mask, x)
    x = torch.where(weight != 0, x, 0.0)
    count = weight.sum()
    if count == 0:
        return x * 0
    mean = (weight * x).sum() / count
    divisor = count - 1 if unbiased and count > 1 else count
    var = (weight * (x - mean) ** 2).sum() / divisor
    whitened = (x - mean) * torch.rsqrt(var + eps) + (0.0 if shift_mean else mean)
    return torch.where(weight != 0, whitened, 0.0)


def _same_shape(op, mask, x):
    mask = need_mask(op, mask)
    if mask.shape != x.shape:
        raise ValueError(f"{op}: `mask` has shape {list(mask.shape)} but must have the shape of `x`, {list(x.shape)}")
    return mask


def _mean_context(ctx, inputs, output):
    ctx.save_for_backward(inputs[1], output[1], inputs[2])


def _whiten_context(ctx, inputs, output):
    x, mask, ctx.shift_mean, _, _ = inputs
    ctx.save_for_backward(x, mask, output[1])


def _fake_mean(x, mask, cu_seqlens):
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty((rows,)), x.new_empty((rows,), dtype=torch.float64)


register(
    "masked_mean",
    _fake_mean,
    hidden=1,
    differentiable=1,
    setup_context=_mean_context,
    backward=lambda ctx, grad, *_: (_mean_backward(grad, *ctx.saved_tensors), None, None),
)
register("masked_mean_backward", lambda grad, mask, *rest: grad.new_empty(mask.shape))
register(
    "masked_whiten",
    lambda x, mask, *rest: (x.new_empty(x.shape), x.new_empty((4,), dtype=torch.float64)),
    hidden=1,
    differentiable=1,
    setup_context=_whiten_context,
    backward=lambda ctx, grad, *_: (_whiten_backward(grad, *ctx.saved_tensors, ctx.shift_mean), None, None, None, None),
)
register("masked_whiten_backward", lambda grad, x, *rest: x.new_empty(x.shape))
