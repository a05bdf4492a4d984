"""Losses on pairs of replies, one preferred to the other."""

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_fast.ops._common import Kernel, as_reals, number, register

_pair = Kernel("reward_pair_loss")
_pair_backward = Kernel("reward_pair_loss_backward")

# The order in which csrc/preference.h writes them.
PAIR_STATS = ("accuracy", "margin", "chosen_mean", "rejected_mean", "reward_min", "reward_max")


def reward_pair_loss(
    chosen: Tensor, rejected: Tensor, *, margin: Tensor | None = None, center_coef: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """The Bradley-Terry loss of a reward model, mean of -log sigmoid(chosen - rejected - margin).

    Ouyang et al. 2022 (arXiv 2203.02155), eq. 1; the margin of Llama 2 (arXiv 2307.09288); and TRL's centering,
    center_coef * mean((chosen + rejected)^2), which keeps rewards around 0 (Eisenstein et al. 2023, arXiv 2312.09244).

    Args:
        chosen, rejected: [B], floating point: the rewards of the preferred and the other reply.
        margin: [B], by how much the preferred one should lead, or None.
        center_coef: at least 0; TRL recommends 0.01 where it is used.

    Returns:
        (loss, stats): loss [], float32 or float64 where an argument is, 0 for an empty batch, and a dict of [] views into one
        tensor: `accuracy` (chosen > rejected, ties
        half), `margin` (mean of chosen - rejected), `chosen_mean`, `rejected_mean`, `reward_min`, `reward_max`.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
    """
    op = "reward_pair_loss"
    center = number(op, "center_coef", center_coef, low=0.0)
    if margin is None:
        chosen, rejected = as_reals(op, chosen=chosen, rejected=rejected)
    else:
        chosen, rejected, margin = as_reals(op, chosen=chosen, rejected=rejected, margin=margin)
    loss, stats = _pair(chosen, rejected, margin, center)
    return loss, dict(zip(PAIR_STATS, stats.unbind(), strict=True))


def reward_pair_loss_reference(
    chosen: Tensor, rejected: Tensor, *, margin: Tensor | None = None, center_coef: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """`reward_pair_loss` in plain torch."""
    gap = chosen - rejected
    n = max(len(gap), 1)
    loss = (-F.logsigmoid(gap if margin is None else gap - margin) + center_coef * (chosen + rejected) ** 2).sum() / n
    both = torch.cat([chosen, rejected])
    stats = {
        "accuracy": ((gap > 0).to(gap.dtype) + 0.5 * (gap == 0)).sum() / n,
        "margin": gap.sum() / n,
        "chosen_mean": chosen.sum() / n,
        "rejected_mean": rejected.sum() / n,
        "reward_min": both.min() if len(gap) else both.sum(),
        "reward_max": both.max() if len(gap) else both.sum(),
    }
    return loss, {k: v.detach() for k, v in stats.items()}


def _context(ctx, inputs, output):
    chosen, rejected, margin, ctx.center_coef = inputs
    ctx.save_for_backward(chosen, rejected, margin)
    ctx.mark_non_differentiable(output[1])


def _formula(ctx, grad, _):
    by_chosen, by_rejected, by_margin = _pair_backward(grad, *ctx.saved_tensors, ctx.center_coef)
    return by_chosen, by_rejected, by_margin if ctx.needs_input_grad[2] else None, None


register(
    "reward_pair_loss",
    lambda chosen, *rest: (chosen.new_empty(()), chosen.new_empty((len(PAIR_STATS),))),
    setup_context=_context,
    backward=_formula,
)
register(
    "reward_pair_loss_backward",
    lambda grad, chosen, rejected, margin, center_coef: (
        chosen.new_empty(chosen.shape),
        chosen.new_empty(chosen.shape),
        chosen.new_empty((0,) if margin is None else chosen.shape),
    ),
)
