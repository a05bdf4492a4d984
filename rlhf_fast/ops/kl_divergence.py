"""The exact KL divergence of two distributions over the vocabulary, straight from their logits."""

import math

import torch
from torch import Tensor

from rlhf_fast.ops import _logits
from rlhf_fast.ops._common import (
    Kernel,
    need_tensor,
    optional_mask,
    register,
    weights_reference,
    without_gradient,
)

_forward = Kernel("kl_divergence")
_backward = Kernel("kl_divergence_backward")


def kl_divergence(
    logits: Tensor,
    ref_logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """KL(policy || reference) over the whole vocabulary for each row, in nats; one pass over both logits, no [..., V] temporary.

    sum_j p_j (log p_j - log q_j) with p = softmax(logits / temperature) and q = softmax(ref_logits / temperature): what
    `kl_penalty` estimates from one sampled token. It is `torch.nn.functional.kl_div(log q, log p, log_target=True).sum(-1)`,
    the penalty that verl's `kl_penalty` names "full", and with ref_logits from a teacher the reverse KL of on-policy
    distillation (Agarwal et al. 2023, arXiv 2306.13649). The gradient flows to `logits` alone, p_j (log p_j - log q_j - KL) /
    temperature, written in one more pass. Arithmetic is float32 whatever the logits are; the result is never below 0, and
    however small, off by 1e-7 or so; its gradient by 1e-7 max(1, KL).

    Args:
        logits: [..., V], float32, bfloat16, float16 or float64, any row strides: `logits[:, :-1]` is read in place. A last
            stride other than 1 costs a copy.
        ref_logits: like logits; its strides may be others, and its dtype: read as it is where both have one dtype or one of them
            is float32 and the other bfloat16 or float16, converted in a copy otherwise. No gradient flows to it.
        temperature: above 0; one number, or a tensor [...] of one a token.
        mask: [...], bool, integer (0 or not) or floating point (a weight that multiplies); rows with 0 give 0 and no gradient.

    Returns:
        [...], float32, or float64 where an argument is float64. A logit of -inf is a probability of 0: it adds 0 on the policy's
        side, and where it is on the reference's side alone KL is +inf and its row gets no gradient. A row with NaN, +inf or with
        nothing but -inf in either gives NaN.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
    """
    op = "kl_divergence"
    need_tensor(op, "logits", logits)
    without_gradient(op, "ref_logits", ref_logits)
    mask = optional_mask(op, mask)
    if logits.dim() == 0:
        raise ValueError(f"{op}: `logits` must be [..., V], got a tensor without dimensions")
    if ref_logits.dtype != logits.dtype and logits.is_floating_point() and ref_logits.is_floating_point():
        logits, ref_logits = _readable_together(logits, ref_logits)
    shape = logits.shape[:-1]
    taus, tau = _logits.temperature_of(op, logits, shape, temperature)
    if logits.dim() <= 3:
        return _forward(logits, ref_logits, taus, mask, tau)[0]

    if ref_logits.shape != logits.shape:
        raise ValueError(
            f"{op}: `ref_logits` has shape {list(ref_logits.shape)} but must have that of `logits`, {list(logits.shape)}"
        )
    for name, value in (("temperature", taus), ("mask", mask)):
        if value is not None and value.shape != shape:
            raise ValueError(
                f"{op}: `{name}` has shape {list(value.shape)} but must have {list(shape)}, that of `logits` without V"
            )
    taus, mask = (None if t is None else t.flatten() for t in (taus, mask))
    return _forward(logits.flatten(0, -2), ref_logits.flatten(0, -2), taus, mask, tau)[0].view(shape)


def kl_divergence_reference(
    logits: Tensor,
    ref_logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """`kl_divergence` in plain torch, in the dtype of the logits: its specification, and the oracle of its tests."""
    if mask is not None:  # NaN in a masked row would find its way into the gradient
        kept = (mask != 0).unsqueeze(-1)
        logits, ref_logits = torch.where(kept, logits, 0.0), torch.where(kept, ref_logits, 0.0)
    tau = temperature.unsqueeze(-1) if isinstance(temperature, Tensor) and temperature.dim() else temperature
    log_p, log_q = (logits / tau).log_softmax(-1), (ref_logits / tau).log_softmax(-1)
    possible = logits > -math.inf
    cut = (possible & (ref_logits == -math.inf)).any(-1)
    difference = torch.where(possible & ~cut.unsqueeze(-1), log_p - log_q, 0.0)
    invalid = log_p.isnan().any(-1) | log_q.isnan().any(-1)
    kl = (log_p.exp() * difference).sum(-1)
    kl = torch.where(cut & ~invalid, math.inf, kl * torch.where(invalid, math.nan, 1.0))
    weight = weights_reference(mask, kl)
    return torch.where(weight != 0, weight * torch.where(weight != 0, kl, 0.0), 0.0)


def _readable_together(logits: Tensor, ref_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Two dtypes that the kernels read side by side."""
    if torch.float64 in (logits.dtype, ref_logits.dtype):
        return logits.double(), ref_logits.double()
    return logits, ref_logits if torch.float32 in (logits.dtype, ref_logits.dtype) else ref_logits.float()


def _fake(logits, ref_logits, *rest):
    dtype = _logits.accumulate_dtype(logits)
    rows = logits.shape[:-1]
    return logits.new_empty(rows, dtype=dtype), logits.new_empty((rows.numel(), 4), dtype=dtype)


def _context(ctx, inputs, output):
    *tensors, ctx.tau = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)


def _formula(ctx, grad, *_):
    logits_grad = None if grad is None else _backward(grad, *ctx.saved_tensors, ctx.tau)
    return logits_grad, None, None, None, None


register("kl_divergence", _fake, hidden=1, differentiable=1, setup_context=_context, backward=_formula)
register("kl_divergence_backward", lambda grad, logits, *rest: logits.new_empty(logits.shape))
