"""Generalised advantage estimation."""

import torch
from torch import Tensor

from rlhf_fast.ops._common import (
    Kernel,
    as_reals,
    choice,
    constants,
    flag,
    number,
    optional_mask,
    optional_offsets,
    optional_tensor,
    register,
    weights_reference,
)
from rlhf_fast.ops.masked import masked_whiten

_gae = Kernel("gae")
_gae_backward = Kernel("gae_backward")

GAPS = {"carry": False, "decay": True}


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    *,
    gamma: float = 1.0,
    lam: float | Tensor = 0.95,
    gaps: str = "carry",
    bootstrap: Tensor | None = None,
    returns_lam: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    whiten: bool = False,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns by generalised advantage estimation (Schulman et al. 2015, arXiv 1506.02438, eq. 16).

    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lam A_{t+1};  returns_t = A_t + V_t. The recursion runs in
    float64 and is rounded once.

    Args:
        rewards, values: [B, T], or packed [N] with `cu_seqlens`; floating point.
        mask: like rewards; bool, integer, or a floating-point weight. What stands off the mask is never read.
        gamma: discount in [0, 1].
        lam: lambda in [0, 1]; one number, or [B] of one a sequence (VAPO, arXiv 2504.05118).
        gaps: what a masked token inside a row does. "carry": the state passes over it (verl, NeMo-RL, AReaL). "decay": it
            counts as a token of reward 0 and value 0 (OpenRLHF). The same on rows padded at the end without bootstrap.
        bootstrap: [B], the value after each row's last column (for truncated sequences); 0 by default.
        returns_lam: a lambda of their own for the returns (decoupled GAE), number or [B].
        cu_seqlens: [B + 1], int32 or int64, rising from 0 to N: where each packed sequence starts.
        whiten: advantages to mean 0 and variance 1 over the mask (`masked_whiten`); the returns are taken before that.

    Returns:
        (advantages, returns), shaped like rewards, 0 off the mask; float32, or float64 where an argument is float64.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
    """
    op = "gae"
    mask = optional_mask(op, mask)
    bootstrap = optional_tensor(op, "bootstrap", bootstrap)
    cu_seqlens = optional_offsets(op, cu_seqlens)
    flag(op, "whiten", whiten)
    decay = choice(op, "gaps", gaps, GAPS)
    gamma = number(op, "gamma", gamma, low=0.0, high=1.0)
    if bootstrap is None:
        rewards, values = as_reals(op, rewards=rewards, values=values)
    else:
        rewards, values, bootstrap = as_reals(op, rewards=rewards, values=values, bootstrap=bootstrap)
    lam_rows, lam_value = _lam(op, "lam", lam)
    returns_rows, returns_value = (lam_rows, lam_value) if returns_lam is None else _lam(op, "returns_lam", returns_lam)
    advantages, returns = _gae(
        rewards, values, mask, bootstrap, lam_rows, returns_rows, cu_seqlens, gamma, lam_value, returns_value, decay
    )
    if whiten:
        advantages = masked_whiten(advantages, torch.ones_like(advantages, dtype=torch.bool) if mask is None else mask)
    return advantages, returns


def gae_reference(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    *,
    gamma: float = 1.0,
    lam: float | Tensor = 0.95,
    gaps: str = "carry",
    bootstrap: Tensor | None = None,
    returns_lam: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    whiten: bool = False,
) -> tuple[Tensor, Tensor]:
    """`gae` in plain torch: the loop over t that peers run."""
    from rlhf_fast.ops.masked import masked_whiten_reference

    if cu_seqlens is not None:
        advantages, returns = torch.zeros_like(rewards), torch.zeros_like(rewards)
        for b, (start, end) in enumerate(zip(cu_seqlens.tolist()[:-1], cu_seqlens.tolist()[1:], strict=True)):
            part = slice(start, end)
            one = [
                None if x is None else x[b : b + 1] if isinstance(x, Tensor) else x
                for x in (lam, bootstrap, returns_lam)
            ]
            row_mask = None if mask is None else mask[part].unsqueeze(0)
            a, r = gae_reference(
                rewards[part].unsqueeze(0),
                values[part].unsqueeze(0),
                row_mask,
                gamma=gamma,
                lam=one[0],
                gaps=gaps,
                bootstrap=one[1],
                returns_lam=one[2],
            )
            advantages = torch.cat([advantages[:start], a[0], advantages[end:]])
            returns = torch.cat([returns[:start], r[0], returns[end:]])
    else:
        weight = weights_reference(mask, rewards)
        kept = weight != 0
        rewards, values = torch.where(kept, rewards, 0.0), torch.where(kept, values, 0.0)
        if gaps == "decay":
            rewards, values, mix = rewards * weight, values * weight, torch.ones_like(weight)
        else:
            mix = weight

        def recursion(lam):
            next_value = torch.zeros_like(rewards[:, 0]) if bootstrap is None else bootstrap
            advantage, out = torch.zeros_like(next_value), []
            for t in reversed(range(rewards.shape[1])):
                delta = rewards[:, t] + gamma * next_value - values[:, t]
                advantage = mix[:, t] * (delta + gamma * lam * advantage) + (1 - mix[:, t]) * advantage
                next_value = mix[:, t] * values[:, t] + (1 - mix[:, t]) * next_value
                out.append(advantage)
            return torch.stack(out[::-1], 1)

        if rewards.shape[1] == 0:
            return rewards * 1, values * 1
        advantages = recursion(lam)
        returns = recursion(lam if returns_lam is None else returns_lam)
        advantages, returns = (
            weight * advantages,
            weight * (returns + (values if gaps == "carry" else values / weight.where(kept, 1.0))),
        )
    if whiten:
        advantages = masked_whiten_reference(advantages, torch.ones_like(advantages) if mask is None else mask)
    return advantages, returns


def _lam(op, name, value) -> tuple[Tensor | None, float]:
    if isinstance(value, Tensor):
        return constants(op, name, value, torch.float64), 0.0
    return None, number(op, name, value, low=0.0, high=1.0)


def _context(ctx, inputs, output):
    rewards, values, mask, bootstrap, lam_rows, returns_rows, cu_seqlens, *ctx.options = inputs
    ctx.save_for_backward(rewards, values, mask, bootstrap, lam_rows, returns_rows, cu_seqlens)


def _formula(ctx, grad_advantages, grad_returns):
    by_reward, by_value, by_bootstrap = _gae_backward(grad_advantages, grad_returns, *ctx.saved_tensors, *ctx.options)
    return by_reward, by_value, None, by_bootstrap if ctx.needs_input_grad[3] else None, *(None,) * 7


register(
    "gae",
    lambda rewards, *rest: (rewards.new_empty(rewards.shape), rewards.new_empty(rewards.shape)),
    differentiable=4,
    setup_context=_context,
    backward=_formula,
)
register(
    "gae_backward",
    lambda ga, gr, rewards, values, mask, bootstrap, *rest: (
        rewards.new_empty(rewards.shape),
        rewards.new_empty(rewards.shape),
        rewards.new_empty((0,) if bootstrap is None else bootstrap.shape),
    ),
)
