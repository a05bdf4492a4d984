"""Log-probabilities of given tokens from logits whose vocabulary is spread over processes."""

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf_fast.ops import _logits
from rlhf_fast.ops._common import first_derivative_only, flag, integer, need_tensor, optional_mask
from rlhf_fast.ops._slices import SliceKernels

_kernels = SliceKernels("vocab_parallel_logprobs")
_UNKNOWN = -1  # V, as long as the slices have not met
# One call, by its newer and its older name.
_all_gather = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


def vocab_parallel_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    group: "dist.ProcessGroup | None" = None,
    vocab_start: int | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    with_entropy: bool = False,
    inplace_backward: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`gather_logprobs` of logits that lie in slices of the vocabulary, one a rank, as Megatron's tensor parallelism leaves them.

    Each rank reads its own slice once; four numbers a token (maximum, two sums, the label's logit) meet in one all_gather and
    are combined in the order of the ranks, so that every rank returns the same bits. The backward pass gives each rank the
    gradient of its slice and communicates nothing: as in Megatron, what comes after is taken to be the same on every rank,
    and with it the gradient of the log-probs. It is what verl calls `vocab_parallel_log_probs_from_logits` (and
    `vocab_parallel_entropy`) and NeMo-RL `from_parallel_logits_to_logprobs`, which also shifts its targets by one; neither
    softmax nor whole logits exist here.

    Args:
        logits: [..., v], this rank's slice, float32, bfloat16, float16 or float64, any row strides. v may differ between
            ranks, and be 0; padding of the vocabulary is -inf. The other dimensions are the same on every rank.
        labels: [...], int64 or int32, ids of the whole vocabulary. They are the same on every rank, as are all arguments
            below but vocab_start.
        group: the process group that has the slices; None for the default group, or for this process alone where
            torch.distributed is not initialised.
        vocab_start: the id of this slice's first logit; by default v times the rank: equal slices, in the order of the ranks.
            V is where the last slice ends. The slices must follow one another without a gap, from 0 on, in any order; that
            is checked on the CPU, and not on a GPU, which is not waited for.
        temperature, softcap, logit_scale, ignore_index, mask, with_entropy: as in `gather_logprobs`.
        inplace_backward: write the gradient over this slice's memory, as in `gather_logprobs`.

    Returns:
        logprobs [...], or (logprobs, entropy), on every rank. float32, or float64 for float64 logits. The bits are those of
        `gather_logprobs` where one rank has all logits but those of -inf, and as near the exact value otherwise.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be; on the CPU also for labels outside the
            whole vocabulary, which on a GPU give NaN in their row. What is wrong on one rank alone is raised there alone, and
            leaves the others waiting.
    """
    op = "vocab_parallel_logprobs"
    need_tensor(op, "logits", logits)
    need_tensor(op, "labels", labels)
    mask = optional_mask(op, mask)
    flag(op, "with_entropy", with_entropy)
    flag(op, "inplace_backward", inplace_backward)
    if logits.dim() == 0:
        raise ValueError(f"{op}: `logits` must be [..., v], got a tensor without dimensions")
    taus, *numbers = _logits.options_of(op, logits, labels, temperature, softcap, logit_scale, ignore_index)
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"{op}: `group` must be a process group or None, got {type(group).__name__}")
    ranks, rank = (1, 0) if group is None and not _initialized() else (dist.get_world_size(group), dist.get_rank(group))
    if rank < 0:
        raise ValueError(f"{op}: `group` must have this process, rank {dist.get_rank()}, among its ranks")
    if vocab_start is None:
        vocab_start = rank * logits.shape[-1]
    elif integer(op, "vocab_start", vocab_start) < 0:
        raise ValueError(f"{op}: `vocab_start` must be at least 0, got {vocab_start}")

    shape = labels.shape
    if logits.dim() > 3:
        for name, value in (("labels", labels), ("temperature", taus), ("mask", mask)):
            if value is not None and value.shape != logits.shape[:-1]:
                raise ValueError(
                    f"{op}: `{name}` has shape {list(value.shape)} but must have {list(logits.shape[:-1])}, that of `logits` "
                    "without its last dimension"
                )
        logits = logits.flatten(0, -2)
        labels, taus, mask = (None if t is None else t.flatten() for t in (labels, taus, mask))
    logprobs, entropy, _ = _VocabParallel.apply(
        logits, labels, taus, mask, *numbers, with_entropy, inplace_backward, vocab_start, group, ranks
    )
    logprobs = logprobs.view(shape)
    return (logprobs, entropy.view(shape)) if with_entropy else logprobs


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


class _VocabParallel(torch.autograd.Function):
    """A slice of the logits, labels, temperature and mask -> log-probs, entropy or nothing, and the statistics of whole rows."""

    @staticmethod
    def forward(
        ctx, logits, labels, taus, mask, tau, cap, scale, ignore_index, with_entropy, inplace, start, group, ranks
    ):
        rest = labels, taus, mask, tau, cap, scale, ignore_index
        partials = _kernels.statistics(logits, *rest, start, _UNKNOWN, with_entropy)
        rows = len(partials)
        checked = logits.device.type == "cpu" and not torch.compiler.is_compiling()
        if checked:  # a row more: where the slice lies
            partials = torch.cat([partials, partials.new_tensor([[start, logits.shape[-1], 0, 0]])])
        if ranks > 1:
            own, partials = partials, partials.new_empty((ranks * len(partials), 4))
            _all_gather(partials, own, group=group)
        partials = partials.view(ranks, -1, 4)
        if checked:
            _check_slices(partials[:, rows].tolist(), labels, mask, ignore_index)
        wide = logits.dtype == torch.float64
        logprobs, entropy, stats = _kernels.combine(partials[:, :rows], *rest, with_entropy, wide)

        ctx.options = tau, cap, scale, ignore_index, start, _UNKNOWN, with_entropy, inplace
        ctx.overwritten = False
        ctx.save_for_backward(logits, labels, taus, mask, stats)
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        return logprobs, entropy, stats

    backward = staticmethod(
        first_derivative_only(
            "vocab_parallel_logprobs",
            _logits.formula(_kernels.backward, _kernels.backward_inplace, 13, "vocab_parallel_logprobs"),
        )
    )


def _check_slices(slices: list[list[float]], labels: Tensor, mask: Tensor | None, ignore_index: int) -> None:
    """What the ranks know only together, refused by all of them. A slice: its start and its size."""
    op = "vocab_parallel_logprobs"
    slices = [(int(start), int(size)) for start, size, *_ in slices]
    end = 0
    for start, size in sorted(slices):
        if size and start != end:
            found = ", ".join(f"[{a}, {a + n})" for a, n in slices)
            raise ValueError(
                f"{op}: the slices of the vocabulary must follow one another from 0 on, but are, in the order of the ranks, "
                f"{found}; `vocab_start` says where this one starts"
            )
        end += size
    if end == 0 and labels.numel():
        raise ValueError(f"{op}: `logits` must not have an empty vocabulary on every rank")
    used = labels != ignore_index if mask is None else (labels != ignore_index) & (mask != 0)
    wrong = (used & ((labels < 0) | (labels >= end))).flatten().nonzero()
    if len(wrong):
        place = int(wrong[0])
        raise ValueError(
            f"{op}: `labels` holds {int(labels.flatten()[place])} at flat position {place}; a label must be in [0, {end}), "
            f"or ignore_index = {ignore_index}, or masked"
        )
