"""Log-probabilities of given tokens straight from hidden states: the logits never exist as a whole."""

import torch
from torch import Tensor

from rlhf_fast.ops._common import (
    _first_derivative_only,
    constants,
    flag,
    integer,
    need_tensor,
    number,
    optional_mask,
    optional_tensor,
)
from rlhf_fast.ops.logprob import _backward_inplace, _flat, _forward, gather_logprobs_reference

# Bytes of the logits that exist at a time.
WORKSPACE = {"cpu": 64 << 20, "cuda": 512 << 20}


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    with_entropy: bool = False,
    chunk_tokens: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`gather_logprobs` of the logits hidden @ weight.T + bias, made a few tokens at a time and never kept.

    The backward pass makes each chunk of logits again, by the same product and so with the same bits, and turns it into its
    gradient in place: 8 n H V operations in all where keeping the logits takes 6, for n H + V H numbers kept instead of n V.
    Gradients flow to hidden, weight and bias; a frozen one costs no product. What TRL calls ChunkedLogProbFunction and verl
    FusedLinearForPPO do the same; here masked and ignored tokens cost no product on the CPU, and 16-bit weights have their
    gradient added up in float32 ([V, H], for the time of the backward pass) and rounded once.

    Args:
        hidden: [..., H], float32, bfloat16, float16 or float64.
        weight: [V, H], of the same dtype; bias: [V] or None. Under autocast both are cast as torch.nn.functional.linear does.
            An adapter on the head (LoRA) is not part of its weight: pass the merged weight.
        labels: [...], int64 or int32.
        temperature, softcap, logit_scale, ignore_index, mask, with_entropy: as in `gather_logprobs`.
        chunk_tokens: tokens whose logits exist at a time; by default as many as fit in 64 MiB on the CPU and 512 MiB on a GPU,
            at least one.

    Returns:
        logprobs [...], or (logprobs, entropy). float32, or float64 for float64 hidden states.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
    """
    op = "linear_logprobs"
    _need_real(op, "hidden", hidden)
    _need_real(op, "weight", weight)
    if bias is not None:
        _need_real(op, "bias", bias)
    need_tensor(op, "labels", labels)
    mask = optional_mask(op, optional_tensor(op, "mask", mask))
    flag(op, "with_entropy", with_entropy)
    cap = number(op, "softcap", softcap, above=0.0, none=0.0)
    scale = number(op, "logit_scale", logit_scale, above=0.0)
    ignore_index = integer(op, "ignore_index", ignore_index)
    hidden, weight, bias = _autocast(hidden, weight, bias)
    _check(op, hidden, weight, bias, labels, mask)
    taus, tau = None, 1.0
    if isinstance(temperature, Tensor):
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        taus = constants(op, "temperature", temperature, wide)
        if taus.dim() and taus.shape != labels.shape:
            raise ValueError(
                f"{op}: `temperature` has shape {list(taus.shape)} but must be a number or have the shape of `labels`, "
                f"{list(labels.shape)}"
            )
        _need_device(op, "temperature", taus, hidden)
        taus = taus.expand(labels.shape).reshape(-1)
    else:
        tau = number(op, "temperature", temperature, above=0.0)
    if chunk_tokens is None:
        # On the CPU 16-bit gradients are widened for their product.
        size = hidden.element_size() + (4 if hidden.element_size() == 2 and hidden.device.type == "cpu" else 0)
        chunk_tokens = max(1, WORKSPACE.get(hidden.device.type, WORKSPACE["cuda"]) // max(1, size * len(weight)))
    elif integer(op, "chunk_tokens", chunk_tokens, none=True) < 1:
        raise ValueError(f"{op}: `chunk_tokens` must be at least 1, got {chunk_tokens}")

    rows, flat_labels, flat_mask = hidden.reshape(-1, hidden.shape[-1]), labels.flatten(), _flat(mask)
    kept = _kept(flat_labels, flat_mask, ignore_index)
    if kept is not None:
        rows, flat_labels = rows[kept], flat_labels[kept]
        taus, flat_mask = (None if t is None else t[kept] for t in (taus, flat_mask))
    options = (tau, cap, scale, ignore_index, with_entropy, chunk_tokens)
    outputs = _LinearLogprobs.apply(rows, weight, bias, flat_labels, taus, flat_mask, *options)
    if kept is not None:
        outputs = [o.new_zeros(labels.numel()).index_copy(0, kept, o) if len(o) == len(kept) else o for o in outputs]
    logprobs = outputs[0].view(labels.shape)
    return (logprobs, outputs[1].view(labels.shape)) if with_entropy else logprobs


def linear_logprobs_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    chunk_tokens: int | None = None,
    **options,
) -> Tensor | tuple[Tensor, Tensor]:
    """`linear_logprobs` in plain torch: all logits at once."""
    return gather_logprobs_reference(torch.nn.functional.linear(hidden, weight, bias), labels, **options)


def _need_real(op: str, name: str, value: Tensor) -> None:
    need_tensor(op, name, value)
    if hasattr(value, "full_tensor"):
        raise TypeError(f"{op}: `{name}` is a DTensor, spread over processes; pass {name}.full_tensor()")
    if not value.is_floating_point():
        raise TypeError(f"{op}: `{name}` must be floating point, got {value.dtype}")


def _need_device(op: str, name: str, value: Tensor, hidden: Tensor) -> None:
    if value.device != hidden.device:
        raise ValueError(
            f"{op}: `{name}` is on {value.device.type} and `hidden` on {hidden.device.type}; they must be on one device"
        )


def _check(op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, mask: Tensor | None) -> None:
    if hidden.dim() < 1:
        raise ValueError(f"{op}: `hidden` must be [..., H], got a tensor without dimensions")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or len(weight) == 0:
        raise ValueError(
            f"{op}: `weight` has shape {list(weight.shape)} but must be [V, {hidden.shape[-1]}], the last dimension that of "
            "`hidden`, V above 0"
        )
    if bias is not None and bias.shape != (len(weight),):
        raise ValueError(
            f"{op}: `bias` has shape {list(bias.shape)} but must be [{len(weight)}], one a row of `weight`"
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise TypeError(f"{op}: `{name}` is {tensor.dtype} but must have the dtype of `hidden`, {hidden.dtype}")
    for name, tensor in (("labels", labels), ("mask", mask)):
        if tensor is not None and tensor.shape != hidden.shape[:-1]:
            raise ValueError(
                f"{op}: `{name}` has shape {list(tensor.shape)} but must have {list(hidden.shape[:-1])}, that of `hidden` "
                "without its last dimension"
            )
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: `labels` must be int64 or int32, got {labels.dtype}")
    for name, tensor in (("weight", weight), ("bias", bias), ("labels", labels), ("mask", mask)):
        if tensor is not None:
            _need_device(op, name, tensor, hidden)


def _autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]


def _kept(labels: Tensor, mask: Tensor | None, ignore_index: int) -> Tensor | None:
    """The tokens that count, where leaving out the others costs no synchronisation and saves something."""
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    counts = labels != ignore_index if mask is None else (labels != ignore_index) & (mask != 0)
    return None if bool(counts.all()) else counts.nonzero().squeeze(-1)


def _gradients(ctx, grad_logprobs, grad_entropy):
    if not ctx.with_entropy:
        grad_entropy = None
    if grad_logprobs is None and grad_entropy is None:
        return (None,) * 12
    hidden, weight, bias, *rest = ctx.saved_tensors
    need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
    wide = hidden.dtype if hidden.element_size() > 2 else torch.float32
    by_hidden = torch.empty_like(hidden) if need_hidden else None
    by_weight = weight.new_zeros(weight.shape, dtype=wide) if need_weight else None
    by_bias = weight.new_zeros(len(weight), dtype=wide) if need_bias else None
    for part in _chunks(len(hidden), ctx.chunk):
        x = hidden[part]
        upstream = [None if g is None else g[part] for g in (grad_logprobs, grad_entropy)]
        labels, taus, mask, stats = (None if a is None else a[part] for a in rest)
        logits = torch.nn.functional.linear(x, weight, bias)
        _backward_inplace(*upstream, logits, labels, taus, mask, stats, *ctx.options)
        if need_hidden:
            by_hidden[part] = logits @ weight
        if need_weight:
            _add_product(by_weight, logits, x)
        if need_bias:
            by_bias += logits.sum(0, dtype=wide)
    return (
        by_hidden,
        by_weight.to(weight.dtype) if need_weight else None,
        by_bias.to(weight.dtype) if need_bias else None,
        *(None,) * 9,
    )


class _LinearLogprobs(torch.autograd.Function):
    """hidden [n, H], labels, temperature and mask [n] -> log-probs [n], entropy [n] or empty."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, taus, mask, tau, cap, scale, ignore_index, with_entropy, chunk):
        ctx.options, ctx.with_entropy, ctx.chunk = (tau, cap, scale, ignore_index), with_entropy, chunk
        parts = []
        for part in _chunks(len(hidden), chunk):
            x, y, t, m = (None if a is None else a[part] for a in (hidden, labels, taus, mask))
            parts.append(
                _forward(torch.nn.functional.linear(x, weight, bias), y, t, m, *ctx.options, with_entropy, False)
            )
        logprobs, entropy, stats = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))
        ctx.save_for_backward(hidden, weight, bias, labels, taus, mask, stats)
        ctx.set_materialize_grads(False)
        if not with_entropy:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    backward = staticmethod(_first_derivative_only("linear_logprobs", _gradients))


def _chunks(tokens: int, chunk: int) -> list[slice]:
    return [slice(first, min(first + chunk, tokens)) for first in range(0, max(tokens, 1), chunk)]


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total [V, H] += a.T @ b for a [n, V] and b [n, H], no narrower than `total` on the way."""
    if a.dtype == total.dtype:
        total.addmm_(a.t(), b)
    elif a.device.type == "cuda":
        total += torch.mm(a.t(), b, out_dtype=total.dtype)
    else:
        total.addmm_(a.t().to(total.dtype), b.to(total.dtype))
