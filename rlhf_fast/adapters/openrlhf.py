"""OpenRLHF's functions on our ops: log-probs, entropy, KL and rewards (openrlhf.models.utils), the losses (openrlhf.models.loss),
GAE (its experience maker), and Actor.forward, which there copies all logits to float32 first.

Results are float32 where OpenRLHF's are bf16, nothing is read where the mask is 0, and a batch without a token gives 0 where
OpenRLHF gives NaN.

Not here: aggregate_loss and SFTLoss (no op of ours averages a given loss under a given count), masked_normalize (a variance of
each row, bounded below), and what has no name: the baselines and the whitening in the experience maker. OpenRLHF's own code runs
on for PolicyLoss with policy_loss_type="gspo" or an is_correction_level other than "off" (gradients and weights that ours do not
have), for Actor.forward of vision models and where it is asked for logits.

OpenRLHF computes in Ray workers, each a process of its own that has to be patched: give ray.init, or ray job submit,
runtime_env={"worker_process_setup_hook": "rlhf_fast.adapters.openrlhf.patch_worker"}.
"""

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.adapters._patch import Replacement, assert_same, patch
from rlhf_fast.ops import (
    dpo_loss,
    gae,
    gather_logprobs,
    kl_penalty,
    ppo_policy_loss,
    ppo_value_loss,
    reward_pair_loss,
    shape_rewards,
)
from rlhf_fast.ops import masked_mean as _masked_mean

LIBRARY = "openrlhf"
VERSIONS = ("0.11.2",)


def patch_worker() -> None:
    """For Ray's `worker_process_setup_hook`."""
    patch("openrlhf", quiet=True)


# ---------------------------------------------------------------------------------------------------------------------
# openrlhf.models.utils


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """openrlhf.models.utils.log_probs_from_logits, in float32. The logits stay as they are (OpenRLHF divides them in place)."""
    return gather_logprobs(logits, labels, temperature=temperature)


def compute_entropy(logits: Tensor) -> Tensor:
    """openrlhf.models.utils.compute_entropy, in float32, and right where a logit is -inf."""
    label = torch.zeros((), dtype=torch.int64, device=logits.device)
    return gather_logprobs(logits, label.expand(logits.shape[:-1]), with_entropy=True)[1]


def compute_approx_kl(
    log_probs: Tensor,
    log_probs_base: Tensor,
    log_probs_old: Tensor | None = None,
    kl_estimator: str = "k1",
    unbiased_gradient: bool = False,
) -> Tensor:
    """openrlhf.models.utils.compute_approx_kl."""
    # OpenRLHF bounds k3's log-ratio at -10; from there on the estimate is bounded to 10 and has no gradient.
    bound = 20.0 if kl_estimator == "k3" else None
    value = kl_penalty(log_probs, log_probs_base, estimator=kl_estimator, log_ratio_clip=bound, output_clip=10.0)
    if not unbiased_gradient:
        return value
    weight = None
    if log_probs_old is not None:
        weight = (log_probs.detach().float() - log_probs_old.detach().float()).exp().clamp(max=10.0)
    square = kl_penalty(log_probs, log_probs_base, estimator="k2", mask=weight)
    return value.detach() + (square - square.detach())


def compute_reward(
    r: Tensor,
    kl_coef: float,
    kl: Tensor,
    action_mask: Tensor | None = None,
    reward_clip_range: tuple[float, float] | None = None,
) -> Tensor:
    """openrlhf.models.utils.compute_reward. 0 off the mask; a row without a token drops its reward (OpenRLHF puts it in the last
    column).
    """
    if reward_clip_range:
        r = r.clamp(*reward_clip_range)
    r = r.to(torch.promote_types(kl.dtype, torch.float32))  # the result has the KL's dtype, not that of float64 rewards
    return shape_rewards(r, kl, torch.zeros_like(kl), action_mask, kl_coef=max(kl_coef, 0.0))


def masked_mean(tensor: Tensor, mask: Tensor | None, dim: int | None = None) -> Tensor:
    """openrlhf.models.utils.masked_mean; 0 where the mask keeps nothing (OpenRLHF: NaN)."""
    if mask is None:
        mask = torch.ones_like(tensor, dtype=torch.bool)
    return _masked_mean(tensor, _weights(mask), dim=dim)


def _weights(mask: Tensor) -> Tensor:
    """OpenRLHF multiplies by the mask, also where it is an integer."""
    return mask if mask.dtype == torch.bool or mask.is_floating_point() else mask.float()


# ---------------------------------------------------------------------------------------------------------------------
# openrlhf.models.loss, the `forward` of each class


def policy_loss(
    self: Any,
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    action_mask: Tensor | None = None,
    rollout_log_probs: Tensor | None = None,
    dp_size: int = 1,
    batch_num_tokens: float | Tensor | None = None,
    global_batch_size: float | Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, None, None]:
    """PolicyLoss of policy_loss_type "ppo" without is_correction: (loss, clip_ratio, ppo_kl, None, None)."""
    if self.policy_loss_type != "ppo" or self.is_correction_level != "off":
        raise NotImplementedError(
            "PolicyLoss: `policy_loss_type` must be 'ppo' and `is_correction_level` 'off' here, got "
            f'{self.policy_loss_type!r} and {self.is_correction_level!r}; patch("openrlhf") leaves those to OpenRLHF'
        )
    aggregation = _aggregation(self.token_level_loss, batch_num_tokens, global_batch_size)
    loss, stats = ppo_policy_loss(
        log_probs,
        old_log_probs,
        advantages,
        action_mask,
        clip_low=min(self.clip_eps_low, 1.0),  # a bound below 0 never binds
        clip_high=self.clip_eps_high,
        dual_clip=self.dual_clip,
        **aggregation,
    )
    # Of the log-ratio before it is bounded, unlike the op's own.
    ppo_kl = masked_mean(_difference(old_log_probs, log_probs), action_mask)
    return _times(loss, dp_size, aggregation), stats["clip_fraction"], ppo_kl, None, None


def value_loss(
    self: Any,
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    action_mask: Tensor | None = None,
    dp_size: int = 1,
    batch_num_tokens: float | Tensor | None = None,
    global_batch_size: float | Tensor | None = None,
) -> Tensor:
    """ValueLoss."""
    aggregation = _aggregation(self.token_level_loss, batch_num_tokens, global_batch_size)
    loss, _ = ppo_value_loss(values, old_values, returns, action_mask, clip=self.clip_eps, **aggregation)
    return _times(loss, dp_size, aggregation)


def pairwise_loss(self: Any, chosen_reward: Tensor, reject_reward: Tensor, margin: Tensor | None = None) -> Tensor:
    """PairWiseLoss."""
    margin = margin if margin is None else margin.expand_as(chosen_reward).flatten()
    return reward_pair_loss(chosen_reward.flatten(), reject_reward.flatten(), margin=margin)[0]


def log_exp_loss(self: Any, chosen_reward: Tensor, reject_reward: Tensor, margin: Tensor | None = None) -> Tensor:
    """LogExpLoss, which knows no margin. It does not overflow where a rejected reply is far ahead."""
    return reward_pair_loss(chosen_reward.flatten(), reject_reward.flatten())[0]


def dpo(
    self: Any,
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """DPOLoss: (loss, chosen rewards [B], rejected rewards [B])."""
    chosen, rejected = policy_chosen_logps, policy_rejected_logps
    loss, _ = dpo_loss(
        chosen,
        rejected,
        reference_chosen_logps,
        reference_rejected_logps,
        beta=self.beta,
        label_smoothing=0.0 if self.ipo else self.label_smoothing,
        loss_type="ipo" if self.ipo else "sigmoid",
    )
    rewards = (_difference(chosen, reference_chosen_logps), _difference(rejected, reference_rejected_logps))
    return loss, *(self.beta * r for r in rewards)


def _difference(log_probs: Tensor, others: Tensor) -> Tensor:
    """Without a gradient, and float32 where they are bf16."""
    return kl_penalty(log_probs.detach(), others.detach(), estimator="k1")


def _aggregation(token_level: bool, batch_num_tokens: Any, global_batch_size: Any) -> dict[str, Any]:
    """OpenRLHF's aggregate_loss in our words."""
    count = batch_num_tokens if token_level else global_batch_size
    if not isinstance(count, Tensor) and count == 0:
        count = None  # there is no token here either, which gives 0
    return {"aggregate": "token-mean" if token_level else "seq-mean-token-mean", "normalizer": count}


def _times(loss: Tensor, dp_size: int, aggregation: dict[str, Any]) -> Tensor:
    """`dp_size` undoes the averaging over processes, which only a global count needs."""
    return loss if aggregation["normalizer"] is None or dp_size == 1 else loss * dp_size


# ---------------------------------------------------------------------------------------------------------------------
# openrlhf.trainer.ppo_utils.experience_maker.RemoteExperienceMaker


@torch.no_grad()
def get_advantages_and_returns(
    self: Any, values: Tensor, rewards: Tensor, action_mask: Tensor | None, gamma: float, lambd: float
) -> tuple[Tensor, Tensor]:
    """OpenRLHF's GAE: a gap in the mask counts as tokens of reward and value 0. 0 off the mask (OpenRLHF: a decaying tail)."""
    return gae(rewards, values, action_mask, gamma=gamma, lam=lambd, gaps="decay")


@torch.no_grad()
def get_cumulative_returns(self: Any, rewards: Tensor, action_mask: Tensor | None, gamma: float) -> Tensor:
    """Discounted sums of the rewards to come: GAE with lambda 1 and values of 0. 0 off the mask."""
    return gae(rewards, torch.zeros_like(rewards), action_mask, gamma=gamma, lam=1.0, gaps="decay")[1]


# ---------------------------------------------------------------------------------------------------------------------
# openrlhf.models.actor


def actor_forward(
    self: Any,
    sequences: Tensor,
    action_mask: Tensor | None = None,
    attention_mask: Tensor | None = None,
    return_output: bool = False,
    allgather_logits: bool = False,
    return_logprobs: bool = False,
    ring_attn_group: Any = None,
    packed_seq_lens: list[int] | None = None,
    return_entropy: bool = False,
    **mm_inputs: Any,
) -> Any:
    """Actor.forward where it returns log-probs: [B, S - 1], or those of the actions [B, A] times their mask.

    The logits are read as the model made them, and the backward pass writes their gradient over them; OpenRLHF makes a float32
    copy, divides it by the temperature and goes through it once for the entropy and once for the log-probs. Without entropy
    only the logits of the actions are read. output.logits, where `return_output` asks for it, are those of the model, neither
    float32 nor divided, and overwritten once backward has run.
    """
    if (action_mask is None and not return_logprobs) or getattr(self, "is_vlm", False):
        raise NotImplementedError('Actor.forward: here it returns log-probs of text; patch("openrlhf") leaves the rest')
    batch, length = sequences.shape
    if self.packing_samples:
        packing = importlib.import_module("openrlhf.models.ring_attn_utils")
        tokens, positions, labels, *layout = packing.unpad_and_slice_tensor(sequences, attention_mask, ring_attn_group)
        output = self.model(tokens, attention_mask=None, position_ids=positions, **mm_inputs)

        def rows(x):
            return packing.gather_and_pad_tensor(x, ring_attn_group, *layout, batch, length)[:, :-1]
    else:
        positions = (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 1)
        output = self.model(sequences, attention_mask=attention_mask, position_ids=positions, **mm_inputs)
        labels = sequences.roll(-1, 1)

        def rows(x):
            return x[:, :-1]

    logits, options = output["logits"], {"temperature": self.temperature, "inplace_backward": True}
    if action_mask is not None and not self.packing_samples and not return_entropy:
        actions = slice(length - 1 - action_mask.shape[1], length - 1)
        logprobs = gather_logprobs(logits[:, actions], labels[:, actions], mask=action_mask, **options)
        return (logprobs, output) if return_output else logprobs
    if return_entropy:
        logprobs, entropy = gather_logprobs(logits, labels, with_entropy=True, **options)
        output.entropy = rows(entropy)
    else:
        logprobs = gather_logprobs(logits, labels, **options)
    logprobs = rows(logprobs)
    if action_mask is not None:
        logprobs = logprobs[:, -action_mask.shape[1] :] * action_mask.float()
    return (logprobs, output) if return_output else logprobs


# ---------------------------------------------------------------------------------------------------------------------
# What `patch` puts in place


def replacements() -> list[Replacement]:
    utils, losses, actor = (importlib.import_module(f"openrlhf.models.{name}") for name in ("utils", "loss", "actor"))
    found = [
        Replacement(utils.__name__, "log_probs_from_logits", log_probs_from_logits, _check_logprobs),
        Replacement(utils.__name__, "compute_entropy", compute_entropy, _check_entropy),
        Replacement(utils.__name__, "compute_approx_kl", compute_approx_kl, _check_kl),
        Replacement(utils.__name__, "compute_reward", compute_reward, _check_reward),
        Replacement(utils.__name__, "masked_mean", masked_mean, _check_mean),
        Replacement(losses.__name__, "PolicyLoss.forward", _policy_loss_or(losses.PolicyLoss.forward), _check_policy),
        Replacement(losses.__name__, "ValueLoss.forward", value_loss, _check_value),
        Replacement(losses.__name__, "PairWiseLoss.forward", pairwise_loss, _check_pairs),
        Replacement(losses.__name__, "LogExpLoss.forward", log_exp_loss, _check_pairs),
        Replacement(losses.__name__, "DPOLoss.forward", dpo, _check_dpo),
        Replacement(actor.__name__, "Actor.forward", _actor_forward_or(actor.Actor.forward), _check_actor),
    ]
    if importlib.util.find_spec("vllm") is None:  # the experience maker needs it: here are no rollouts
        return found
    maker = "openrlhf.trainer.ppo_utils.experience_maker"
    return [
        *found,
        Replacement(
            maker, "RemoteExperienceMaker.get_advantages_and_returns", get_advantages_and_returns, _check_advantages
        ),
        Replacement(maker, "RemoteExperienceMaker.get_cumulative_returns", get_cumulative_returns, _check_returns),
    ]


def _policy_loss_or(original: Callable) -> Callable:
    @functools.wraps(policy_loss)
    def forward(self, *args, **kwargs):
        ours = self.policy_loss_type == "ppo" and self.is_correction_level == "off"
        return (policy_loss if ours else original)(self, *args, **kwargs)

    return forward


def _actor_forward_or(original: Callable) -> Callable:
    signature = inspect.signature(actor_forward)

    @functools.wraps(actor_forward)
    def forward(self, *args, **kwargs):
        given = signature.bind(self, *args, **kwargs).arguments
        ours = given.get("action_mask") is not None or given.get("return_logprobs", False)
        return (actor_forward if ours and not getattr(self, "is_vlm", False) else original)(self, *args, **kwargs)

    return forward


def _mask(empty_row: bool = False) -> Tensor:
    """[4, 6]: padding and gaps."""
    mask = torch.arange(24).view(4, 6) % 5 > 1
    mask[3] &= not empty_row
    return mask


def _pair(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(shape, requires_grad=True), torch.randn(shape, requires_grad=True)


def _check_logprobs(original, ours):
    logits, labels = torch.randn(3, 7, 11, requires_grad=True), torch.randint(11, (3, 7))
    for temperature in (1.0, 0.7):
        assert_same(original, ours, logits, labels, temperature)


def _check_entropy(original, ours):
    eager = getattr(original, "_torchdynamo_orig_callable", original)  # compiling it takes a minute
    assert_same(eager, ours, torch.randn(3, 7, 11, requires_grad=True))


def _check_kl(original, ours):
    new, base = _pair(4, 6)
    for estimator in ("k1", "k2", "k3"):
        assert_same(original, ours, new, base, None, estimator)
        assert_same(original, ours, new, base, torch.randn(4, 6), estimator, True)


def _check_reward(original, ours):
    mask = _mask()
    kl = torch.randn(4, 6) * mask
    for clip in (None, (-0.5, 0.7)):
        assert_same(original, ours, torch.randn(4), 0.1, kl, mask, clip)


def _check_mean(original, ours):
    x, _ = _pair(4, 6)
    for mask, dim in ((_mask(), None), (_mask().long(), -1), (None, None)):
        assert_same(original, ours, x, mask, dim)


def _check_policy(original, ours):
    losses = importlib.import_module("openrlhf.models.loss")
    for options in ({}, {"dual_clip": 3.0, "clip_eps_high": 0.28}, {"token_level_loss": False}):
        (new, old), mask = _pair(4, 6), _mask(empty_row=True)
        for counts in ((), (2, 50, 9)):
            loss = losses.PolicyLoss(**options)
            assert_same(original, ours, loss, new, old, torch.randn(4, 6), mask, None, *counts)


def _check_value(original, ours):
    losses = importlib.import_module("openrlhf.models.loss")
    for options in ({}, {"clip_eps": 0.5}, {"clip_eps": 0.5, "token_level_loss": False}):
        (values, old), mask = _pair(4, 6), _mask(empty_row=True)
        for counts in ((), (2, 50, 9)):
            assert_same(original, ours, losses.ValueLoss(**options), values, old, torch.randn(4, 6), mask, *counts)


def _check_pairs(original, ours):
    assert_same(original, ours, None, *_pair(5), torch.rand(5))


def _check_dpo(original, ours):
    losses = importlib.import_module("openrlhf.models.loss")
    for options in ({}, {"label_smoothing": 0.1}, {"ipo": True}):
        assert_same(original, ours, losses.DPOLoss(0.1, **options), *_pair(5), torch.randn(5), torch.randn(5))


class _TableModel(torch.nn.Module):
    """A causal language model whose logits are a row of `table` for each token."""

    def __init__(self, table: Tensor):
        super().__init__()
        self.table = table

    def forward(self, tokens, attention_mask=None, position_ids=None, **_):
        outputs = importlib.import_module("transformers.modeling_outputs")
        return outputs.CausalLMOutputWithPast(
            logits=self.table[tokens] + position_ids.unsqueeze(-1).sin() * self.table[0]
        )


def _check_actor(original, ours):
    kind = importlib.import_module("openrlhf.models.actor").Actor
    tokens, attention = torch.randint(11, (3, 7)), torch.ones(3, 7, dtype=torch.int64)
    attention[0, :2] = 0

    def run(forward, table, *args):
        actor = kind(_TableModel(table), temperature=0.7)
        actor.packing_samples = False
        result = forward(actor, tokens, *args)
        return [result[0], result[1].entropy] if isinstance(result, tuple) else result

    table, mask = torch.randn(11, 11, requires_grad=True), torch.ones(3, 4).tril()
    for args in (
        (mask, attention),
        (None, attention, False, False, True),
        (mask, attention, True, *(False,) * 2, None, None, True),
    ):
        assert_same(lambda t, a=args: run(original, t, *a), lambda t, a=args: run(ours, t, *a), table)


def _check_advantages(original, ours):
    mask = _mask()
    theirs, mine = (lambda v, r, f=f: [x[mask] for x in f(None, v, r, mask, 0.9, 0.8)] for f in (original, ours))
    assert_same(theirs, mine, torch.randn(4, 6), torch.randn(4, 6))


def _check_returns(original, ours):
    mask = _mask()
    theirs, mine = (lambda r, f=f: f(None, r, mask, 0.9)[mask] for f in (original, ours))
    assert_same(theirs, mine, torch.randn(4, 6))
