"""Advantages of several replies to one prompt, each measured against the others of its group."""

import torch
from torch import Tensor

from rlhf_fast.ops._common import Kernel, as_reals, choice, flag, integer, number, register

_forward = Kernel("group_advantages")
_backward = Kernel("group_advantages_backward")

# The codes of csrc/group.h.
SCALES = {"std": 0, "none": 1, "batch": 2}


def group_advantages(
    rewards: Tensor, group_size: int, *, scale: str = "std", leave_one_out: bool = False, eps: float = 1e-6
) -> Tensor:
    """(reward - baseline) / (std + eps) of each reply, the baseline being the mean reward of the replies to the same prompt.

    GRPO (Shao et al. 2024, arXiv 2402.03300) is the default, with the unbiased std and verl's eps; TRL's eps is 1e-4.
    Dr. GRPO (Liu et al. 2025, arXiv 2503.20783) is scale="none". RLOO (Ahmadian et al. 2024, arXiv 2402.14740) is
    scale="none", leave_one_out=True. All rewards of a group equal give exactly 0.

    Args:
        rewards: [B], floating point; replies to one prompt stand together, `group_size` of them a prompt.
        group_size: at least 2; B must be a multiple of it.
        scale: "std", divide by the std of the reply's group; "batch", by that of all B rewards, around their common mean (TRL's
            scale_rewards="batch"); "none", do not divide, and `eps` is not used.
        leave_one_out: the baseline of a reply is the mean of the others of its group. That is its deviation from the whole
            group's mean, times group_size / (group_size - 1), which no scale but "none" leaves meaningful: beside "std" or
            "batch" it only lengthens the step by that factor.
        eps: at least 0, added to the std. With 0, a group (or batch) without spread gives 0.

    Returns:
        advantages [B], float32 or float64 where the rewards are, with the exact gradient to them. Where the std is 0 no gradient
        flows through it, as in torch.std.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
    """
    op = "group_advantages"
    group_size = integer(op, "group_size", group_size)
    code = choice(op, "scale", scale, SCALES)
    flag(op, "leave_one_out", leave_one_out)
    eps = number(op, "eps", eps, low=0.0)
    (rewards,) = as_reals(op, rewards=rewards)
    return _forward(rewards, group_size, code, leave_one_out, eps)[0]


def group_advantages_reference(
    rewards: Tensor, group_size: int, *, scale: str = "std", leave_one_out: bool = False, eps: float = 1e-6
) -> Tensor:
    """`group_advantages` in plain torch."""
    if rewards.numel() == 0:
        return rewards * 1
    # Nothing here depends on where 0 is; with it on a reward, equal rewards have no rounding error to be divided by eps.
    groups = rewards.view(-1, group_size)
    groups = groups - groups[:, :1].detach()
    baseline = groups.mean(-1, keepdim=True)
    if leave_one_out:
        baseline = (groups.sum(-1, keepdim=True) - groups) / (group_size - 1)
    advantages = groups - baseline
    if scale != "none":
        std = groups.std(-1, keepdim=True) if scale == "std" else (rewards - rewards[0].detach()).std()
        divisor = std + eps
        advantages = torch.where(divisor != 0, advantages / divisor.where(divisor != 0, torch.ones_like(divisor)), 0.0)
    return advantages.flatten()


def _setup_context(ctx, inputs, output):
    rewards, *ctx.options = inputs
    ctx.save_for_backward(rewards, output[1])
    ctx.set_materialize_grads(False)


def _formula(ctx, grad, *_):
    return None if grad is None else _backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None, None


register(
    "group_advantages",
    lambda rewards, group_size, scale, *options: (
        rewards.new_empty(rewards.shape),
        rewards.new_empty(
            (rewards.shape[0] // group_size + (1 if scale == SCALES["batch"] else 0), 3), dtype=torch.float64
        ),  # torch 2.10 cannot add a symbolic truth
    ),
    hidden=1,
    differentiable=1,
    setup_context=_setup_context,
    backward=_formula,
)
register("group_advantages_backward", lambda grad, rewards, *rest: rewards.new_empty(rewards.shape))
