"""The public operations: one file an op, holding the function, its reference, its fake kernel and its autograd formula."""

from rlhf_fast.ops.gae import gae
from rlhf_fast.ops.group import group_advantages
from rlhf_fast.ops.kl import kl_penalty, shape_rewards
from rlhf_fast.ops.linear import linear_logprobs
from rlhf_fast.ops.linear_ppo_loss import linear_ppo_loss
from rlhf_fast.ops.logprob import gather_logprobs
from rlhf_fast.ops.masked import masked_mean, masked_whiten
from rlhf_fast.ops.ppo_loss import ppo_policy_loss, ppo_value_loss
from rlhf_fast.ops.ppo_loss_from_logits import ppo_loss_from_logits
from rlhf_fast.ops.preference import dpo_loss, reward_pair_loss

__all__ = [
    "dpo_loss",
    "gae",
    "gather_logprobs",
    "group_advantages",
    "kl_penalty",
    "linear_logprobs",
    "linear_ppo_loss",
    "masked_mean",
    "masked_whiten",
    "ppo_loss_from_logits",
    "ppo_policy_loss",
    "ppo_value_loss",
    "reward_pair_loss",
    "shape_rewards",
]
