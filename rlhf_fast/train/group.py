"""GRPO and RLOO: several replies to each prompt, weighed against each other instead of against a value model.

    GRPO (Shao et al. 2024, arXiv 2402.03300): A = (score - mean of the group) / (std of the group + 1e-4), and the loss is
        max(-A ratio, -A clip(ratio, 1 +- cliprange)) + kl_coef * (exp(-d) - 1 + d),  d = log p - log p_ref,  a token
    RLOO (Ahmadian et al. 2024, arXiv 2402.14740): A = R - mean R of the others, R = score - kl_coef * KL of the reply, and
        max(-A ratio, -A clip(ratio, 1 +- cliprange)),  the ratio that of the whole reply's probabilities,  a reply

Both as TRL 1.16 has them: GRPO's loss is averaged over all tokens of a batch (its loss_type "dapo", the default), with the KL
term of the paper (use_bias_correction_kl off); RLOO's over replies.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_fast import group_advantages, ppo_policy_loss, shape_rewards
from rlhf_fast.train.rollout import Advantaged, Scored

STD_EPSILON = 1e-4
KL_IN_LOSS = "k3"


def advantage(
    scored: Scored, kind: str, group_size: int, *, kl_coef: float, kl_estimator: str, score_clip: float | None
) -> Advantaged:
    """One advantage a reply; the replies to one prompt stand together."""
    rewards = shape_rewards(
        scored.scores,
        scored.logprobs,
        scored.ref_logprobs,
        scored.rollout.response_mask,
        kl_coef=kl_coef if kind == "rloo" else 0.0,
        estimator=kl_estimator,
        score_clip=score_clip,
    ).sum(1)
    options = {"grpo": {"eps": STD_EPSILON}, "rloo": {"scale": "none", "leave_one_out": True}}[kind]
    return Advantaged(scored, kl_coef, group_advantages(rewards, group_size, **options).unsqueeze(1), None)


def reply_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, replies: int, **limits: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """RLOO's loss and the statistics of `ppo_policy_loss`, whose limits it takes, over replies: log-probs [B, T], 0 off the
    response mask."""
    ratio_of = logprobs.sum(1, keepdim=True), old_logprobs.sum(1, keepdim=True)
    return ppo_policy_loss(*ratio_of, advantages, normalizer=replies, **limits)


def kl_options(ref_logprobs: Tensor, kl_coef: float) -> dict[str, Any]:
    """GRPO's KL term, as `linear_ppo_loss` takes it."""
    return {"ref_logprobs": ref_logprobs, "kl_coef": kl_coef, "kl_estimator": KL_IN_LOSS}


def describe(scores: Tensor, group_size: int) -> dict[str, float]:
    """How much the scores say: their spread, and the share of groups whose scores are all the same, which teach nothing."""
    groups = scores.view(-1, group_size)
    same = (groups == groups[:, :1]).all(1)
    spread, idle = torch.stack([scores.double().std(), same.double().mean()]).tolist()
    return {"reward_std": spread, "frac_reward_zero_std": idle}
