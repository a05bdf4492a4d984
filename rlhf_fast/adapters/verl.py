"""verl's functions on our ops: log-probs and entropy (verl.utils.torch_functional), GAE, KL and the losses of PPO
(verl.trainer.ppo.core_algos, with their entries in its registries), and the fused head (FusedLinearForPPO).

Results are float32 where verl's are bf16, nothing is read where the mask is 0, and a batch without a token gives 0 where verl
gives NaN or raises.

Not here: masked_sum, masked_var, agg_loss, calculate_sum_pi_squared_from_logits (no op of ours gives them alone), GRPO's and
RLOO's advantages (ours want the replies to one prompt side by side and equally many, verl's take any index), the policy losses
with other mathematics (dppo, sapo, gpg, clip_cov, kl_cov, geo_mean, dro) and the Triton and Megatron heads.

verl computes in Ray workers, each a process of its own that has to be patched:
main_ppo ... +ray_kwargs.ray_init.runtime_env.worker_process_setup_hook=rlhf_fast.adapters.verl.patch_worker
"""

import importlib
import inspect
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.adapters._patch import Replacement, assert_same, patch
from rlhf_fast.ops import gae, gather_logprobs, linear_logprobs, ppo_policy_loss, ppo_value_loss
from rlhf_fast.ops import kl_penalty as _kl_penalty
from rlhf_fast.ops import masked_mean as _masked_mean
from rlhf_fast.ops import masked_whiten as _masked_whiten

LIBRARY = "verl"
VERSIONS = ("0.9.1",)


def patch_worker() -> None:
    """For Ray's `worker_process_setup_hook`."""
    patch("verl", quiet=True)


# ---------------------------------------------------------------------------------------------------------------------
# verl.utils.torch_functional


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """verl.utils.torch_functional.logprobs_from_logits, in float32. Labels of -100 give 0, as in flash-attn's kernel.

    `inplace_backward` holds always, not with flash-attn alone: the backward pass writes the gradient over the logits. An
    operation before it whose own backward pass reads the logits, such as a tanh, is then refused by autograd.
    """
    return gather_logprobs(logits, labels, inplace_backward=inplace_backward)


def entropy_from_logits(logits: Tensor) -> Tensor:
    """verl.utils.torch_functional.entropy_from_logits, in float32, and right where a logit is -inf."""
    label = torch.zeros((), dtype=torch.int64, device=logits.device)
    return gather_logprobs(logits, label.expand(logits.shape[:-1]), with_entropy=True)[1]


def entropy_from_logits_with_chunking(logits: Tensor, chunk_size: int = 2048) -> Tensor:
    """verl.utils.torch_functional.entropy_from_logits_with_chunking. Nothing is chunked: one pass, no temporary."""
    return entropy_from_logits(logits)


def masked_mean(values: Tensor, mask: Tensor, axis: int | tuple[int, ...] | None = None) -> Tensor:
    """verl.utils.torch_functional.masked_mean: sum(values * mask) / (sum(mask) + 1e-8)."""
    values = values if values.is_floating_point() else values.float()
    values, mask = torch.broadcast_tensors(values, _weights(mask))
    if isinstance(axis, tuple):
        order = range(-len(axis), 0)
        values, mask = (x.movedim(axis, tuple(order)).flatten(-len(axis)) for x in (values, mask))
        axis = -1
    return _masked_mean(values, mask, dim=axis)


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """verl.utils.torch_functional.masked_whiten; 0 off the mask, where verl whitens what it finds.

    A mask with fewer than two tokens gives 0 (verl: ValueError).
    """
    return _masked_whiten(values, _weights(mask), shift_mean=shift_mean)


def fused_linear_for_ppo(
    self: Any, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """verl.utils.experimental.torch_functional.FusedLinearForPPO.forward, for its "torch" and "liger" backends.

    The logits and the entropy are float32 (verl rounds both to the dtype of the hidden states), the gradient of 16-bit weights is
    added up in float32, and as many tokens as fit in the workspace of `linear_logprobs` go at a time, whatever self.chunk_size.
    """
    labels = input_ids.to(torch.int64)
    return linear_logprobs(hidden_states, vocab_weights, labels, temperature=temperature, with_entropy=True)


def _weights(mask: Tensor) -> Tensor:
    """verl multiplies by the mask, also where it is an integer."""
    return mask if mask.dtype == torch.bool or mask.is_floating_point() else mask.float()


# ---------------------------------------------------------------------------------------------------------------------
# verl.trainer.ppo.core_algos


def compute_gae_advantage_return(
    token_level_rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """verl's GAE, advantage estimator "gae": whitened advantages and returns. 0 off the mask, where verl leaves other values."""
    with torch.no_grad():
        return gae(token_level_rewards, values, response_mask, gamma=float(gamma), lam=float(lam), whiten=True)


def compute_reinforce_plus_plus_outcome_advantage(
    token_level_rewards: Tensor, response_mask: Tensor, config: Any = None, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """verl's REINFORCE++, advantage estimator "reinforce_plus_plus": GAE with lambda 1 and values of 0."""
    values = torch.zeros_like(token_level_rewards)
    return compute_gae_advantage_return(token_level_rewards, values, response_mask, config.gamma, 1.0)


def compute_policy_loss_vanilla(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """verl's clipped loss of PPO with a dual clip, policy loss "vanilla". One host synchronisation for its metrics, not three.

    `rollout_is_weights`, at least 0, weigh the advantages, so tokens with weight 0 are not counted as clipped.
    """
    options = {"dual_clip": config.get("clip_ratio_c", 3.0)}
    return _policy_loss(
        old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights, options
    )


def compute_policy_loss_gspo(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "seq-mean-token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """verl's policy loss "gspo". The sequence's log-ratio is held within +-10; verl bounds it above alone, so a sequence below
    e^-10 keeps a loss and gradient of that size here and none, or a smaller one, there.
    """
    options = {"importance_sampling_level": "sequence", "log_ratio_clip": 10.0}
    return _policy_loss(
        old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights, options
    )


def compute_policy_loss_cispo(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """verl's policy loss "cispo"."""
    options = {"loss_type": "cispo"}
    return _policy_loss(
        old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights, options
    )


def compute_policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    cliprange: float | None = None,
    cliprange_low: float | None = None,
    cliprange_high: float | None = None,
    clip_ratio_c: float = 3.0,
    loss_agg_mode: str = "token-mean",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """verl's deprecated form of "vanilla": (loss, clip fraction, KL, fraction held by the dual clip); the last three as
    numbers, without the gradient that verl's KL has.
    """
    loss, stats = ppo_policy_loss(
        log_prob,
        old_log_prob,
        advantages,
        response_mask,
        **_clips(cliprange, cliprange_low, cliprange_high),
        dual_clip=clip_ratio_c,
        aggregate=loss_agg_mode,
    )
    return loss, stats["clip_fraction"], stats["ppo_kl"], stats["clip_fraction_low"]


def compute_value_loss(
    vpreds: Tensor,
    returns: Tensor,
    values: Tensor,
    response_mask: Tensor,
    cliprange_value: float,
    loss_agg_mode: str = "token-mean",
    dp_size: int = 1,
    batch_num_tokens: float | Tensor | None = None,
    global_batch_size: float | Tensor | None = None,
    loss_scale_factor: float | None = None,
) -> tuple[Tensor, Tensor]:
    """verl's clipped value loss: (loss, clip fraction). A value exactly on a clip's bound has its full gradient (verl: 3/4)."""
    aggregation, factor = _aggregation(loss_agg_mode, dp_size, batch_num_tokens, global_batch_size, loss_scale_factor)
    loss, stats = ppo_value_loss(vpreds, values, returns, response_mask, clip=cliprange_value, **aggregation)
    return _times(loss, factor), stats["clip_fraction"]


# verl's names of its estimators, and what stands for them here: estimator, log_ratio_clip, output_clip.
_ESTIMATORS = {
    "kl": ("k1", None, None),
    "k1": ("k1", None, None),
    "abs": ("abs", None, None),
    "mse": ("k2", None, None),
    "k2": ("k2", None, None),
    "low_var_kl": ("k3", 20.0, 10.0),
    "k3": ("k3", 20.0, 10.0),
}


def kl_penalty(logprob: Tensor, ref_logprob: Tensor, kl_penalty: str) -> Tensor:
    """verl.trainer.ppo.core_algos.kl_penalty. A "+" at the end gives the estimate the gradient of k2."""
    base = kl_penalty.removesuffix("+")
    if base not in _ESTIMATORS:
        raise NotImplementedError(f"kl_penalty: `kl_penalty` must be one of {', '.join(_ESTIMATORS)}, got {kl_penalty}")
    estimator, log_ratio_clip, output_clip = _ESTIMATORS[base]
    clips = {"log_ratio_clip": log_ratio_clip, "output_clip": output_clip}
    if base == kl_penalty or estimator == "k2":
        return _kl_penalty(logprob, ref_logprob, estimator=estimator, **clips)
    if estimator != "abs":
        return _kl_penalty(logprob, ref_logprob, estimator=f"{estimator}+", **clips)
    square = _kl_penalty(logprob, ref_logprob, estimator="k2")
    return _kl_penalty(logprob, ref_logprob, estimator="abs").detach() + (square - square.detach())


def _policy_loss(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, weights, options):
    aggregation, factor = _aggregation(loss_agg_mode, **config.global_batch_info)
    loss, stats = ppo_policy_loss(
        log_prob,
        old_log_prob,
        advantages if weights is None else advantages * weights,
        response_mask,
        **_clips(config.clip_ratio, config.clip_ratio_low, config.clip_ratio_high),
        **options,
        **aggregation,
    )
    metrics = {"pg_clipfrac": "clip_fraction", "ppo_kl": "ppo_kl", "pg_clipfrac_lower": "clip_fraction_low"}
    values = torch.stack([stats[name] for name in metrics.values()]).tolist()
    return _times(loss, factor), {f"actor/{name}": value for name, value in zip(metrics, values, strict=True)}


def _clips(both: float | None, low: float | None, high: float | None) -> dict[str, float]:
    low, high = (both if bound is None else bound for bound in (low, high))
    return {"clip_low": min(low, 1.0), "clip_high": high}  # a bound below 0 never binds


def _aggregation(
    loss_agg_mode: str,
    dp_size: int = 1,
    batch_num_tokens: float | Tensor | None = None,
    global_batch_size: float | Tensor | None = None,
    loss_scale_factor: float | None = None,
) -> tuple[dict[str, Any], float]:
    """The options of verl's agg_loss as ours, and the number that the loss is then multiplied by."""
    of_tokens = loss_agg_mode == "token-mean"
    name, count = ("batch_num_tokens", batch_num_tokens) if of_tokens else ("global_batch_size", global_batch_size)
    if loss_agg_mode == "token-sum":
        count = None
    elif count is None and dp_size > 1:
        raise ValueError(f"agg_loss: `{name}` must be given where `dp_size` is above 1, got None and {dp_size}")
    elif not isinstance(count, Tensor) and count == 0:
        count = None  # there is no token here either, which gives 0
    if loss_agg_mode == "seq-mean-token-sum-norm" and loss_scale_factor is not None:
        return {"aggregate": "seq-mean-token-sum", "normalizer": count}, dp_size / loss_scale_factor
    return {"aggregate": loss_agg_mode, "normalizer": count}, dp_size


def _times(loss: Tensor, factor: float) -> Tensor:
    return loss if factor == 1 else loss * factor


# ---------------------------------------------------------------------------------------------------------------------
# What `patch` puts in place


def replacements() -> list[Replacement]:
    functional, algos = "verl.utils.torch_functional", "verl.trainer.ppo.core_algos"
    return [
        Replacement(functional, "logprobs_from_logits", logprobs_from_logits, _check_logprobs),
        Replacement(functional, "entropy_from_logits", entropy_from_logits, _check_entropy),
        Replacement(functional, "entropy_from_logits_with_chunking", entropy_from_logits_with_chunking, _check_entropy),
        Replacement(functional, "masked_mean", masked_mean, _check_mean),
        Replacement(functional, "masked_whiten", masked_whiten, _check_whiten),
        Replacement(
            "verl.utils.experimental.torch_functional",
            "FusedLinearForPPO.forward",
            fused_linear_for_ppo,
            _check_linear,
        ),
        Replacement(algos, "compute_gae_advantage_return", compute_gae_advantage_return, _check_gae),
        Replacement(
            algos,
            "compute_reinforce_plus_plus_outcome_advantage",
            compute_reinforce_plus_plus_outcome_advantage,
            _check_reinforce,
        ),
        Replacement(algos, "compute_policy_loss", compute_policy_loss, _check_policy_loss),
        *(
            Replacement(algos, f.__name__, f, _check_registered)
            for f in (compute_policy_loss_vanilla, compute_policy_loss_gspo, compute_policy_loss_cispo)
        ),
        Replacement(algos, "compute_value_loss", compute_value_loss, _check_value_loss),
        Replacement(algos, "kl_penalty", kl_penalty, _check_kl),
    ]


def _mask() -> Tensor:
    """[4, 6]: padding, gaps, an empty row."""
    mask = torch.arange(24).view(4, 6) % 5 > 1
    mask[3] = False
    return mask


def _check_logprobs(original, ours):
    logits, labels = torch.randn(7, 11, requires_grad=True), torch.randint(11, (7,))
    for inplace in (True, False):
        assert_same(original, ours, logits, labels, inplace)


def _check_entropy(original, ours):
    assert_same(original, ours, torch.randn(7, 11, requires_grad=True))


def _check_mean(original, ours):
    for axis in (None, -1):
        assert_same(original, ours, torch.randn(4, 6, requires_grad=True), _mask(), axis)


def _check_whiten(original, ours):
    mask = _mask()
    for shift_mean in (True, False):
        theirs, mine = (lambda x, f=f, s=shift_mean: f(x, mask, s)[mask] for f in (original, ours))
        assert_same(theirs, mine, torch.randn(4, 6, requires_grad=True))


def _check_linear(original, ours):
    module = importlib.import_module("verl.utils.experimental.torch_functional").FusedLinearForPPO()
    hidden, weight = torch.randn(2, 5, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    assert_same(original, ours, module, hidden, weight, torch.randint(11, (2, 5)), 0.7)


def _check_gae(original, ours):
    mask = _mask()
    theirs, mine = (
        lambda rewards, values, f=f: [x[mask] for x in f(rewards, values, mask.long(), 0.9, 0.8)]
        for f in (original, ours)
    )
    assert_same(theirs, mine, torch.randn(4, 6), torch.randn(4, 6))


def _check_reinforce(original, ours):
    mask, config = _mask(), importlib.import_module("verl.trainer.config").AlgoConfig(gamma=0.9)
    theirs, mine = (
        lambda rewards, f=f: [x[mask] for x in f(rewards, mask.long(), config=config)] for f in (original, ours)
    )
    assert_same(theirs, mine, torch.randn(4, 6))


def _check_policy_loss(original, ours):
    old, new = torch.randn(4, 6), torch.randn(4, 6, requires_grad=True)
    plain = inspect.unwrap(original)  # without its warning that it is deprecated
    theirs, mine = (lambda *a, f=f: [x if i == 0 else x.detach() for i, x in enumerate(f(*a))] for f in (plain, ours))
    assert_same(theirs, mine, old, new, torch.randn(4, 6), _mask(), 0.2)


def _check_registered(original, ours):
    old, new = torch.randn(4, 6), torch.randn(4, 6, requires_grad=True)
    config = importlib.import_module("verl.workers.config").ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio_high=0.28
    )
    for mode in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"):
        for weights in (None, torch.rand(4, 6)):
            assert_same(original, ours, old, new, torch.randn(4, 6), _mask(), mode, config, weights)


def _check_value_loss(original, ours):
    values, returns, old = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6), torch.randn(4, 6)
    assert_same(original, ours, values, returns, old, _mask(), 0.5)
    assert_same(original, ours, values, returns, old, _mask(), 0.5, "seq-mean-token-mean", 2, None, 7)


def _check_kl(original, ours):
    for name in (*_ESTIMATORS, "k1+", "k3+", "abs+"):
        new, reference = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6, requires_grad=True)
        assert_same(original, ours, new, reference, name)
