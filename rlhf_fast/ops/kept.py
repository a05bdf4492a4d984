"""Log-probabilities over a kept set of tokens: the kernels behind `gather_logprobs(..., kept=...)`."""

import torch
from torch import Tensor

from rlhf_fast.ops._common import Kernel, register

kept_logprobs = Kernel("kept_logprobs")
_backward = Kernel("kept_logprobs_backward")
_backward_inplace = Kernel("kept_logprobs_backward_inplace")


def keep_only(z: Tensor, labels: Tensor, kept: Tensor) -> Tensor:
    """z [..., V] with -inf off the ids of kept [..., K], in plain torch. A row whose label is not kept gets no gradient."""
    vocab = z.shape[-1]
    inside = torch.zeros(
        (*z.shape[:-1], vocab + 1), dtype=torch.bool, device=z.device
    )  # the last column takes the padding
    inside = inside.scatter(-1, kept.long().where(kept >= 0, vocab), True)[..., :vocab]
    has_label = (kept == labels.unsqueeze(-1)).any(-1, keepdim=True)
    return torch.where(has_label, z, z.detach()).masked_fill(~inside, -torch.inf)


def _fake(logits, labels, kept, temperature, mask, tau, cap, scale, ignore_index, with_entropy, inplace_backward):
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logprobs = labels.new_empty(labels.shape, dtype=dtype)
    entropy = labels.new_empty(labels.shape if with_entropy else (0,), dtype=dtype)
    return logprobs, entropy, labels.new_empty((labels.numel(), 3), dtype=dtype)


def _setup_context(ctx, inputs, output):
    *tensors, tau, cap, scale, ignore_index, ctx.with_entropy, ctx.inplace = inputs
    ctx.options = tau, cap, scale, ignore_index
    ctx.overwritten = False
    ctx.save_for_backward(*tensors, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _formula(ctx, grad_logprobs, grad_entropy, _):
    nothing = (None,) * 11
    if grad_logprobs is None and grad_entropy is None:
        return nothing
    if ctx.overwritten:
        raise RuntimeError(
            "gather_logprobs(inplace_backward=True): the first backward wrote the gradient over the logits, so there can be no "
            "second one; pass inplace_backward=False to run backward twice"
        )
    logits, *rest = ctx.saved_tensors
    gradients = grad_logprobs, grad_entropy if ctx.with_entropy else None
    # A traced graph may not write over what it saved; the compiler plans that memory itself.
    if ctx.inplace and not torch.compiler.is_compiling():
        logits_grad = logits.detach()
        _backward_inplace(*gradients, logits_grad, *rest, *ctx.options)
        ctx.overwritten = True
        return (logits_grad, *nothing[1:])
    return (_backward(*gradients, logits, *rest, *ctx.options), *nothing[1:])


register("kept_logprobs", _fake, setup_context=_setup_context, backward=_formula, function="gather_logprobs")
register("kept_logprobs_backward", lambda grad_logprobs, grad_entropy, logits, *rest: logits.new_empty(logits.shape))
register("kept_logprobs_backward_inplace", lambda *args: None)
