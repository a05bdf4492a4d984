"""Losses on pairs of replies, one preferred to the other."""

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_fast.ops._common import Kernel, as_reals, choice, number, register

_pair = Kernel("reward_pair_loss")
_pair_backward = Kernel("reward_pair_loss_backward")
_dpo = Kernel("dpo_loss")
_dpo_backward = Kernel("dpo_loss_backward")

# The order in which csrc/preference.h writes them.
PAIR_STATS = ("accuracy", "margin", "chosen_mean", "rejected_mean", "reward_min", "reward_max")
DPO_STATS = ("accuracy", "margin", "chosen_reward", "rejected_reward", "margin_min", "margin_max")

# The codes of csrc/preference.h, by name: "robust" is "sigmoid" with another tilt.
DPO_LOSS_TYPES = {"sigmoid": 0, "robust": 0, "hinge": 1, "ipo": 2}


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
        tensor: `accuracy` (chosen > rejected, ties half), `margin` (mean of chosen - rejected), `chosen_mean`,
        `rejected_mean`, `reward_min`, `reward_max`.

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


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    loss_type: str = "sigmoid",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Direct preference optimisation: the mean over pairs of a loss on h = (chosen - ref_chosen) - (rejected - ref_rejected).

    With z = beta * h and e = label_smoothing, `loss_type` is
    "sigmoid": -(1 - e) log sigmoid(z) - e log sigmoid(-z). Rafailov et al. 2023 (arXiv 2305.18290), eq. 7; with e above 0 its
    conservative form, for labels wrong with probability e, as OpenRLHF's DPOLoss.
    "robust": (-(1 - e) log sigmoid(z) + e log sigmoid(-z)) / (1 - 2e), unbiased where labels are wrong with probability e.
    Chowdhury et al. 2024 (arXiv 2403.00409).
    "hinge": max(0, 1 - z), as SLiC (Zhao et al. 2023, arXiv 2305.10425).
    "ipo": (h - 1 / (2 beta))^2, Azar et al. 2023 (arXiv 2310.12036), eq. 17. Give it mean log-probs a token instead of sums for
    TRL's length-normalised form; the values of OpenRLHF's `ipo` are those of sums.

    The differences are taken in float64: log-probs of long replies are large, and float32 can turn the sign of h.

    Args:
        chosen, rejected: [B], floating point: the policy's log-prob of each reply, summed over its tokens.
        ref_chosen, ref_rejected: [B], the reference model's.
        beta: above 0; how strongly the policy is held to the reference.
        label_smoothing: at least 0 and below 0.5; only "sigmoid" and "robust" take one.
        loss_type: "sigmoid", "robust", "hinge" or "ipo".

    Returns:
        (loss, stats): loss [], float32 or float64 where an argument is, 0 for an empty batch, and a dict of [] views into one
        tensor: `accuracy` (h > 0, ties half), `margin` (mean of z), `chosen_reward` and `rejected_reward` (means of beta times
        the log-ratio to the reference), `margin_min`, `margin_max`.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
    """
    op = "dpo_loss"
    beta = number(op, "beta", beta, above=0.0)
    code = choice(op, "loss_type", loss_type, DPO_LOSS_TYPES)
    e = number(op, "label_smoothing", label_smoothing, low=0.0)
    if e >= 0.5:
        raise ValueError(f"{op}: `label_smoothing` must be below 0.5, got {e}")
    if e > 0 and loss_type not in ("sigmoid", "robust"):
        raise ValueError(f"{op}: `label_smoothing` must be 0 where `loss_type` is {loss_type!r}, got {e}")
    tilt = -e / (1 - 2 * e) if loss_type == "robust" else e
    tensors = as_reals(op, chosen=chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    loss, stats = _dpo(*tensors, beta, tilt, code)
    return loss, dict(zip(DPO_STATS, stats.unbind(), strict=True))


def dpo_loss_reference(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    loss_type: str = "sigmoid",
) -> tuple[Tensor, dict[str, Tensor]]:
    """`dpo_loss` in plain torch."""
    chosen_reward, rejected_reward = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
    h = (chosen - ref_chosen) - (rejected - ref_rejected)
    z, e, n = beta * h, label_smoothing, max(len(h), 1)
    if loss_type == "hinge":
        losses = torch.relu(1 - z)
    elif loss_type == "ipo":
        losses = (h - 1 / (2 * beta)) ** 2
    elif e == 0:
        losses = -F.logsigmoid(z)
    elif loss_type == "sigmoid":
        losses = -(1 - e) * F.logsigmoid(z) - e * F.logsigmoid(-z)
    else:
        losses = (-(1 - e) * F.logsigmoid(z) + e * F.logsigmoid(-z)) / (1 - 2 * e)
    stats = {
        "accuracy": ((h > 0).to(h.dtype) + 0.5 * (h == 0)).sum() / n,
        "margin": z.sum() / n,
        "chosen_reward": chosen_reward.sum() / n,
        "rejected_reward": rejected_reward.sum() / n,
        "margin_min": z.min() if len(h) else z.sum(),
        "margin_max": z.max() if len(h) else z.sum(),
    }
    return losses.sum() / n, {k: v.detach() for k, v in stats.items()}


def _fake(chosen, *rest):
    return (
        chosen.new_empty(()),
        chosen.new_empty((len(PAIR_STATS),)),
        chosen.new_empty(chosen.shape, dtype=torch.float64),
    )


def _pair_context(ctx, inputs, output):
    chosen, rejected, _, ctx.center_coef = inputs
    ctx.save_for_backward(chosen, rejected, output[2])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _pair_formula(ctx, grad, *_):
    if grad is None:
        return None, None, None, None
    need_margin = ctx.needs_input_grad[2]
    by_chosen, by_rejected, by_margin = _pair_backward(grad, *ctx.saved_tensors, ctx.center_coef, need_margin)
    return by_chosen, by_rejected, by_margin if need_margin else None, None


def _dpo_context(ctx, inputs, output):
    ctx.save_for_backward(output[2], *inputs[:4])  # the inputs: from them a second derivative is known to be asked for
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _dpo_formula(ctx, grad, *_):
    if grad is None:
        return (None,) * 7
    needed = ctx.needs_input_grad[:4]
    gradients = _dpo_backward(grad, ctx.saved_tensors[0], *needed)
    return *(g if need else None for g, need in zip(gradients, needed, strict=True)), None, None, None


register("reward_pair_loss", _fake, hidden=1, differentiable=3, setup_context=_pair_context, backward=_pair_formula)
register(
    "reward_pair_loss_backward",
    lambda grad, chosen, rejected, slopes, center_coef, need_margin: (
        chosen.new_empty(chosen.shape),
        chosen.new_empty(chosen.shape),
        chosen.new_empty(chosen.shape if need_margin else (0,)),
    ),
)
register("dpo_loss", _fake, hidden=1, differentiable=4, setup_context=_dpo_context, backward=_dpo_formula)
register(
    "dpo_loss_backward",
    lambda grad, slopes, *needed: tuple(grad.new_empty(slopes.shape if need else (0,)) for need in needed),
)
