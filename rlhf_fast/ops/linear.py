"""Log-probabilities of given tokens straight from hidden states: the logits exist a tile at a time."""

from collections.abc import Iterator
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from rlhf_fast.ops import _logits
from rlhf_fast.ops._common import Kernel, define, flag, integer, need_tensor, optional_mask, register
from rlhf_fast.ops._slices import SliceKernels
from rlhf_fast.ops.logprob import gather_logprobs_reference

_forward = Kernel("linear_logprobs")
_backward = Kernel("linear_logprobs_backward")
_gather = Kernel("gather_logprobs", "linear_logprobs", hidden=0)
_slices = SliceKernels("linear_logprobs")

# Bytes of the logits that exist at a time and of what is made of them: a tile, its slice of the weight in float32.
WORKSPACE = {"cpu": 64 << 20, "cuda": 512 << 20}
# Tokens of a tile, at most: each slice of the weight's gradient is one product over them.
TOKENS = {"cpu": 4096, "cuda": 16384}
BLOCK = 2048  # ids of a slice, a multiple of it where that fits: see _slices


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
    """`gather_logprobs` of the logits hidden @ weight.T + bias, which never exist as a whole.

    Tiles of tokens times vocabulary are made by torch's product and folded into four numbers a token; the backward pass makes
    the same tiles again, with the same bits, and turns them into their gradient in place: 8 n H V operations in all where
    keeping the logits takes 6, 6 where hidden or weight is frozen. What is kept is O(n + V) beside the inputs. TRL's
    ChunkedLogProbFunction, verl's FusedLinearForPPO and cut cross-entropy (Wijmans et al. 2025, arXiv 2411.09009) are of the
    same kind.

    Logits are float32 however narrow hidden and weight are: a bfloat16 logit of 20 is off by up to 1/16. Both gradients are
    added up in float32 and rounded once: that of the weight a slice of the vocabulary at a time, so that no float32 [V, H]
    exists; that of hidden takes a float32 [n, H]. A GPU multiplies 16-bit factors into float32 sums. torch's CPU has no such
    product, so slices are widened there and multiplied in float32: exact, and on processors with 16-bit matrix units slower
    than a 16-bit product (torch.backends.mkldnn.matmul.fp32_precision = "bf16" lets torch use those; logits from bfloat16
    lose nothing by it).

    Masked and ignored tokens cost no product on the CPU; on a GPU finding them would wait for it, and they are computed and
    dropped. The bits of a token depend on the number of tokens, as those of torch's product do.

    Args:
        hidden: [..., H], float32, bfloat16, float16 or float64; any strides.
        weight: [V, H], of the same dtype, a plain tensor: a DTensor (FSDP, tensor parallelism) or a quantised weight is refused.
            An adapter on the head (LoRA) is not part of its weight and cannot be seen here: pass the merged weight.
        labels: [...], int64 or int32. A label outside [0, V) is a ValueError on the CPU and NaN in its row on CUDA.
        bias: [V], of the same dtype. Under autocast hidden, weight and bias are cast as torch.nn.functional.linear casts them.
        temperature, softcap, logit_scale, ignore_index, mask, with_entropy: as in `gather_logprobs`.
        chunk_tokens: tokens of a tile, at least 1. By default tiles fill 64 MiB on the CPU and 512 MiB on a GPU, with what is
            made of them; they are not larger with it.

    Returns:
        logprobs [...], or (logprobs, entropy). float32, or float64 for float64 hidden states.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
    """
    op = "linear_logprobs"
    mask = optional_mask(op, mask)
    flag(op, "with_entropy", with_entropy)
    hidden, weight, bias = head_inputs(op, hidden, weight, bias, labels, mask)
    taus, *numbers = _logits.options_of(op, hidden, labels, temperature, softcap, logit_scale, ignore_index)
    need_twin(op, "temperature", taus, labels)
    chunk = chunk_of(op, chunk_tokens)
    rows = hidden.reshape(labels.numel(), hidden.shape[-1])
    logprobs, entropy = _forward(
        rows, weight, bias, labels.reshape(-1), flat(taus), flat(mask), *numbers, with_entropy, chunk, False
    )
    logprobs = logprobs.view(labels.shape)
    return (logprobs, entropy.view(labels.shape)) if with_entropy else logprobs


def linear_logprobs_reference(
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
    """`linear_logprobs` in plain torch: all logits at once."""
    options = {"temperature": temperature, "softcap": softcap, "logit_scale": logit_scale, "ignore_index": ignore_index}
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return gather_logprobs_reference(logits, labels, **options, mask=mask, with_entropy=with_entropy)


# ---------------------------------------------------------------------------------------------------------------------
# Arguments, of every op over hidden states


def head_inputs(op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, mask: Tensor | None):
    """hidden, weight and bias, checked and as autocast wants them; `labels` and `mask` checked beside them."""
    need_plain(op, "hidden", hidden)
    need_plain(op, "weight", weight)
    need_tensor(op, "labels", labels)
    if bias is not None:
        need_plain(op, "bias", bias)
    if hidden.dim() == 0:
        raise ValueError(f"{op}: `hidden` must be [..., H], got a tensor without dimensions")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        raise ValueError(
            f"{op}: `weight` has shape {list(weight.shape)} but must be [V, {hidden.shape[-1]}], V above 0, beside `hidden` of "
            f"{list(hidden.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{op}: `bias` has shape {list(bias.shape)} but must be [{weight.shape[0]}], one a row of `weight`"
        )
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"{op}: `labels` has shape {list(labels.shape)} but must have that of `hidden` without its last dimension; `hidden` "
            f"is {list(hidden.shape)}"
        )
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: `labels` must be int64 or int32, got {labels.dtype}")
    need_twin(op, "mask", mask, labels)
    for name, tensor in (("weight", weight), ("bias", bias), ("labels", labels)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(
                f"{op}: `{name}` is on {tensor.device.type} and `hidden` on {hidden.device.type}; they must be on one device"
            )
    hidden, weight, bias = autocast(hidden, weight, bias)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise TypeError(f"{op}: `{name}` is {tensor.dtype} but must have the dtype of `hidden`, {hidden.dtype}")
    return hidden, weight, bias


def need_plain(op: str, name: str, value: Tensor) -> None:
    need_tensor(op, name, value)
    if hasattr(value, "full_tensor"):
        raise TypeError(
            f"{op}: `{name}` is a DTensor, spread over processes, and must be a plain tensor; pass {name}.full_tensor(), or call "
            "inside the forward pass of the FSDP module that holds it"
        )
    if is_traceable_wrapper_subclass(value):
        raise TypeError(f"{op}: `{name}` must be a plain tensor, got a {type(value).__name__}; pass it dequantised")
    if value.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise TypeError(f"{op}: `{name}` must be float32, bfloat16, float16 or float64, got {value.dtype}")


def need_twin(op: str, name: str, value: Tensor | None, labels: Tensor) -> None:
    """A value a token, on the same device. Checked here, because flattened tensors no longer show what they were."""
    if value is None:
        return
    if value.shape != labels.shape:
        raise ValueError(
            f"{op}: `{name}` has shape {list(value.shape)} but must have the shape of `labels`, {list(labels.shape)}"
        )
    if value.device != labels.device:
        raise ValueError(
            f"{op}: `{name}` is on {value.device.type} and `labels` on {labels.device.type}; they must be on one device"
        )


def chunk_of(op: str, chunk_tokens: int | None) -> int:
    """0: as many as the workspace holds."""
    if chunk_tokens is None:
        return 0
    if integer(op, "chunk_tokens", chunk_tokens, none=True) < 1:
        raise ValueError(f"{op}: `chunk_tokens` must be at least 1, got {chunk_tokens}")
    return int(chunk_tokens)


def autocasts(device: str) -> bool:
    """torch.amp.is_autocast_available is not asked: torch 2.10 cannot compile it, and the kernels know no other device."""
    return device in ("cpu", "cuda") and torch.is_autocast_enabled(device)


def autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    device = tensors[0].device.type
    if not autocasts(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]


def autocast_off(t: Tensor):
    """For products between tensors that have been cast already; not entered where there is nothing to turn off."""
    device = t.device.type
    if autocasts(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def flat(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.reshape(-1)


# ---------------------------------------------------------------------------------------------------------------------
# Products in float32 (float64 of float64), whatever the factors


def factor(t: Tensor) -> Tensor:
    """As a factor of `product`: CUDA sums products of 16-bit numbers in float32, the CPU is given float32."""
    return t if t.is_cuda else t.to(_logits.accumulate_dtype(t))


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    return torch.mm(a, b, out=out) if a.dtype == out.dtype else torch.mm(a, b, out_dtype=out.dtype, out=out)


def add_product(into: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    if first:
        product(a, b, into)
    elif a.dtype == into.dtype:
        into.addmm_(a, b)
    else:  # addmm with out_dtype wants `into` in 16 bits, or not, by torch's version
        into.add_(torch.mm(a, b, out_dtype=into.dtype))


def spans(total: int, step: int) -> Iterator[tuple[int, int]]:
    return ((first, min(first + step, total)) for first in range(0, total, max(step, 1)))


def at(tensors: tuple[Tensor | None, ...], first: int, last: int) -> list[Tensor | None]:
    return [None if t is None else t[first:last] for t in tensors]


def select(kept: Tensor | None, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tensors if kept is None else tuple(None if t is None else t.index_select(0, kept) for t in tensors)


def spread(kept: Tensor | None, tokens: int, x: Tensor) -> Tensor:
    """What `select` has taken, in its place among zeros."""
    return x if kept is None else x.new_zeros((tokens, *x.shape[1:])).index_copy_(0, kept, x)


def waits(t: Tensor) -> bool:
    """Whether looking at numbers on the host would wait for the device."""
    return not t.is_cpu


def counts(labels: Tensor, mask: Tensor | None, ignore_index: int) -> Tensor:
    return labels != ignore_index if mask is None else (labels != ignore_index) & (mask != 0)


def kept_of(counting: Tensor) -> Tensor | None:
    """Which tokens count; None for all of them, and where nobody may look."""
    return None if waits(counting) or bool(counting.all()) else counting.nonzero().squeeze(-1)


def tile(hidden: Tensor, weight: Tensor, chunk_tokens: int) -> tuple[int, int]:
    """Tokens and ids of a tile: by the shapes alone, so that the backward pass has the products of the forward pass."""
    (tokens, width), vocab = hidden.shape, weight.shape[0]
    kind = "cpu" if hidden.is_cpu else "cuda"
    wide = 8 if hidden.dtype == torch.float64 else 4
    narrow = hidden.element_size() == 2
    logit = wide + (2 if narrow and kind == "cuda" else 0)  # its gradient is a 16-bit factor there
    # Of the weight's gradient, and of the weight where it is widened.
    row = narrow * width * (8 if kind == "cpu" else 4)
    budget = WORKSPACE[kind]
    tokens = max(1, min(tokens, chunk_tokens or TOKENS[kind], budget // (256 * logit)))
    ids = budget // (tokens * logit + row)
    unit = BLOCK if ids >= BLOCK else 256
    return tokens, min(vocab, max(ids // unit * unit, 256))


class Tiles:
    """The logits of `hidden` [n, H], by slices of the vocabulary and chunks of tokens."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, chunk_tokens: int):
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.dtype = _logits.accumulate_dtype(hidden)
        self.tokens, self.ids = tile(hidden, weight, chunk_tokens)
        self.memory = hidden.new_empty(self.tokens * self.ids, dtype=self.dtype)
        self.single = self.tokens >= hidden.shape[0] and self.ids >= weight.shape[0]

    def slices(self) -> Iterator[tuple[int, Tensor]]:
        """(first id, the weight of the slice as a factor)."""
        return ((a, factor(self.weight[a:b])) for a, b in spans(self.weight.shape[0], self.ids))

    def chunks(self) -> Iterator[tuple[int, int, Tensor]]:
        """(first token, end, their hidden states as a factor)."""
        return ((i, j, factor(self.hidden[i:j])) for i, j in spans(self.hidden.shape[0], self.tokens))

    def logits(self, x: Tensor, w: Tensor, first_id: int) -> Tensor:
        """A tile; the next one takes its memory."""
        n, v = x.shape[0], w.shape[0]
        z = product(x, w.t(), self.memory[: n * v].view(n, v))
        return z if self.bias is None else z.add_(self.bias[first_id : first_id + v])


# ---------------------------------------------------------------------------------------------------------------------
# The op: hidden [n, H], labels, temperatures and mask [n]. `wide`: its outputs are float64, for what goes on in that.


def _logprobs(hidden, weight, bias, labels, taus, mask, *options):
    *numbers, with_entropy, chunk_tokens, wide = options
    n, vocab = hidden.shape[0], weight.shape[0]
    with autocast_off(hidden):
        kept = kept_of(counts(labels, mask, numbers[-1]))
        hidden, *rest = select(kept, hidden, labels, taus, mask)
        tiles = Tiles(hidden, weight, bias, chunk_tokens)
        single = tiles.single and not wide
        if not single or kept is not None:
            # Of no logits: labels and temperatures are checked before there is a product, and where nothing counts.
            nothing = hidden.new_empty((n, 0), dtype=tiles.dtype)
            statistics = _slices.statistics(nothing, labels, taus, mask, *numbers, 0, vocab, with_entropy)
        if single:
            outputs = _gather(tiles.logits(factor(hidden), factor(weight), 0), *rest, *numbers, with_entropy, False)
        else:
            (statistics,) = select(kept, statistics)
            for a, w in tiles.slices():
                for i, j, x in tiles.chunks():
                    z = tiles.logits(x, w, a)
                    _slices.statistics_into(statistics[i:j], z, *at(rest, i, j), *numbers, a, vocab, with_entropy)
            wide = wide or tiles.dtype == torch.float64
            if wide and taus is not None:
                rest[1] = rest[1].double()
            outputs = _slices.combine(statistics.unsqueeze(0), *rest, *numbers, with_entropy, wide)
        logprobs, entropy, stats = outputs
        return spread(kept, n, logprobs), spread(kept, n, entropy) if with_entropy else entropy, spread(kept, n, stats)


def _gradients(grad_logprobs, grad_entropy, hidden, weight, bias, labels, taus, mask, stats, *options):
    *numbers, chunk_tokens, need_hidden, need_weight, need_bias = options
    n, vocab, dtype = hidden.shape[0], weight.shape[0], _logits.accumulate_dtype(hidden)
    grad_logprobs, grad_entropy, stats = (t if t is None else t.to(dtype) for t in (grad_logprobs, grad_entropy, stats))
    with autocast_off(hidden):
        counting = counts(labels, mask, numbers[-1])
        kept = kept_of(counting)
        if waits(hidden):  # 0 times what stands off the mask, NaN perhaps, would be in the product
            hidden = hidden.where(counting.unsqueeze(-1), 0)
        hidden, *rest = select(kept, hidden, grad_logprobs, grad_entropy, labels, taus, mask, stats)
        tiles = Tiles(hidden, weight, bias, chunk_tokens)
        make = weight.new_empty if hidden.shape[0] else weight.new_zeros
        by_hidden = make(hidden.shape if need_hidden else (0,), dtype=tiles.dtype)
        by_weight = make(weight.shape if need_weight else (0,))
        by_bias = weight.new_zeros(vocab if need_bias else 0, dtype=tiles.dtype)
        for a, w in tiles.slices():
            b = a + w.shape[0]
            in_place = need_weight and weight.dtype == tiles.dtype
            rows = by_weight[a:b] if in_place else weight.new_empty(w.shape, dtype=tiles.dtype) if need_weight else None
            for i, j, x in tiles.chunks():
                z = tiles.logits(x, w, a)
                up, others = at(rest[:2], i, j), at(rest[2:], i, j)
                _slices.backward_inplace(*up, z, *others, *numbers, a, vocab)
                if need_bias:
                    by_bias[a:b] += z.sum(0)
                z = z.to(w.dtype)
                if need_hidden:
                    add_product(by_hidden[i:j], z, w, first=a == 0)
                if need_weight:
                    add_product(rows, z.t(), x, first=i == 0)
            if need_weight and not in_place and hidden.shape[0]:
                by_weight[a:b] = rows
        if need_hidden:
            by_hidden = spread(kept, n, by_hidden.to(weight.dtype))
        return by_hidden, by_weight, by_bias.to(weight.dtype)


def _context(ctx, inputs, output):
    hidden, weight, bias, labels, taus, mask, *numbers, ctx.with_entropy, chunk_tokens, _ = inputs
    ctx.options = (*numbers, chunk_tokens)
    ctx.save_for_backward(hidden, weight, bias, labels, taus, mask, output[2])
    ctx.set_materialize_grads(False)


def _formula(ctx, grad_logprobs, grad_entropy, *_):
    nothing = (None,) * 13
    if grad_logprobs is None and grad_entropy is None:
        return nothing
    needs = ctx.needs_input_grad[:3]
    upstream = grad_logprobs, grad_entropy if ctx.with_entropy else None
    gradients = _backward(*upstream, *ctx.saved_tensors, *ctx.options, *needs)
    return (*(g if need else None for g, need in zip(gradients, needs, strict=True)), *nothing[3:])


def _fake_gradients(grad_logprobs, grad_entropy, hidden, weight, *rest):
    shapes = hidden.shape, weight.shape, weight.shape[:1]
    return tuple(weight.new_empty(shape if need else (0,)) for shape, need in zip(shapes, rest[-3:], strict=True))


define(
    "linear_logprobs(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? temperature, Tensor? mask, "
    "float temperature_value, float softcap, float logit_scale, int ignore_index, bool with_entropy, int chunk_tokens, "
    "bool wide) -> (Tensor, Tensor, Tensor)",
    _logprobs,
)
define(
    "linear_logprobs_backward(Tensor? grad_logprobs, Tensor? grad_entropy, Tensor hidden, Tensor weight, Tensor? bias, "
    "Tensor labels, Tensor? temperature, Tensor? mask, Tensor row_stats, float temperature_value, float softcap, "
    "float logit_scale, int ignore_index, int chunk_tokens, bool need_hidden, bool need_weight, bool need_bias) "
    "-> (Tensor, Tensor, Tensor)",
    _gradients,
)


def _fake_logprobs(hidden, weight, bias, labels, *rest):
    *_, with_entropy, _, wide = rest
    return _logits.fake_outputs(hidden.new_empty(0, dtype=torch.float64) if wide else hidden, labels, with_entropy)


register(
    "linear_logprobs",
    _fake_logprobs,
    hidden=1,
    differentiable=3,
    setup_context=_context,
    backward=_formula,
)
register("linear_logprobs_backward", _fake_gradients, function="linear_logprobs")
