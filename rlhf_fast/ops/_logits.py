"""What the ops over logits share: options, the fake kernel's outputs and the autograd formula, in place or not."""

from collections.abc import Callable

import torch
from torch import Tensor

from rlhf_fast.ops._common import constants, integer, number


def accumulate_dtype(logits: Tensor) -> torch.dtype:
    """Of the arithmetic and the outputs."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def options_of(op, logits, labels, temperature, softcap, logit_scale, ignore_index):
    """(temperatures or None, temperature, cap or 0, scale, ignore_index), checked."""
    cap = 0.0 if softcap is None else number(op, "softcap", softcap, above=0.0, none=0.0)
    scale = number(op, "logit_scale", logit_scale, above=0.0)
    ignore_index = integer(op, "ignore_index", ignore_index)
    return *temperature_of(op, logits, labels.shape, temperature), cap, scale, ignore_index


def temperature_of(op, logits, shape, temperature):
    """(temperatures, 1) where it is a tensor, one of the `shape` of the rows if it has no dimensions; else (None, number)."""
    if not isinstance(temperature, Tensor):
        return None, number(op, "temperature", temperature, above=0.0)
    taus = constants(op, "temperature", temperature, accumulate_dtype(logits))
    return taus.expand(shape) if taus.dim() == 0 else taus, 1.0


def fake_outputs(logits, labels, with_entropy):
    """Log-probs, entropy (empty where not asked for) and row statistics, as the forward kernels return them."""
    dtype = accumulate_dtype(logits)
    logprobs = labels.new_empty(labels.shape, dtype=dtype)
    entropy = labels.new_empty(labels.shape if with_entropy else (0,), dtype=dtype)
    return logprobs, entropy, labels.new_empty((labels.numel(), 3), dtype=dtype)


def setup_context(ctx, inputs, output):
    ctx.options = inputs[-6:]  # temperature, cap, scale, ignore_index, with_entropy, inplace
    ctx.overwritten = False
    ctx.save_for_backward(*inputs[:-6], output[2])
    ctx.set_materialize_grads(False)


def formula(backward: Callable, backward_inplace: Callable, inputs: int, function: str = "gather_logprobs") -> Callable:
    """The gradient to the logits, the first of an op's `inputs` inputs, by one of two kernels."""
    nothing, others = (None,) * inputs, (None,) * (inputs - 1)

    def run(ctx, grad_logprobs, grad_entropy=None, *_):
        if grad_logprobs is None and grad_entropy is None:
            return nothing
        *options, with_entropy, inplace = ctx.options
        if inplace and ctx.overwritten:
            raise RuntimeError(
                f"{function}(inplace_backward=True): the first backward wrote the gradient over the logits, so there can be "
                "no second one; pass inplace_backward=False to run backward twice"
            )
        if not with_entropy:
            grad_entropy = None
        saved = ctx.saved_tensors
        # A traced graph may not write over what it saved; the compiler plans that memory itself.
        if inplace and not torch.compiler.is_compiling():
            logits_grad = saved[0].detach()
            backward_inplace(grad_logprobs, grad_entropy, logits_grad, *saved[1:], *options)
            # An operation that saved the logits now refuses to go on.
            torch.autograd.graph.increment_version(logits_grad)
            ctx.overwritten = True
            return (logits_grad, *others)
        return (backward(grad_logprobs, grad_entropy, *saved, *options), *others)

    return run
