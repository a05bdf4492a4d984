"""NeMo-RL's functions on our ops: next-token log-probs (nemo_rl.distributed.model_utils), KL estimates, GAE and the value loss.

NeMo-RL is installed from its repository. Tested were its release 0.7.0 and its main branch of August 2026, which calls itself
0.6.0; the release 0.6.0 has neither GAE nor a value loss and is refused for want of them.

Its own code runs on where logits are spread over several processes or filtered by top-k or top-p, and for KL estimates with
importance weights, to which a gradient flows. Not here: masked_mean and masked_var (a sum under a given count, and a variance),
the rewards with their clipped KL, GRPO's baselines, and ClippedPGLossFn: its importance-sampling corrections and nineteen
metrics are more than ppo_policy_loss knows.

NeMo-RL computes in Ray workers, each a process of its own that has to be patched: give ray.init
runtime_env={"worker_process_setup_hook": "rlhf_fast.adapters.nemo_rl.patch_worker"}.
"""

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from rlhf_fast.adapters._patch import Replacement, assert_same, patch
from rlhf_fast.ops import gae, gather_logprobs, kl_penalty, masked_mean, masked_whiten, ppo_value_loss

LIBRARY = "nemo-rl"
VERSIONS = ("0.6.0", "0.7.0")


def patch_worker() -> None:
    """For Ray's `worker_process_setup_hook`."""
    patch("nemo_rl", quiet=True)


def get_next_token_logprobs_from_logits(
    input_ids: Tensor,
    next_token_logits: Tensor,
    seq_index: Tensor | None = None,
    vocab_parallel_rank: int | None = None,
    vocab_parallel_group: Any = None,
    context_parallel_group: Any = None,
    sampling_params: Any = None,
    chunk_size: int | None = None,
) -> Tensor:
    """nemo_rl.distributed.model_utils.get_next_token_logprobs_from_logits of logits in one piece: [B, S] ids -> [B, S - 1].

    Nothing is copied or chunked; NeMo-RL makes a float32 copy of the logits and another of their log_softmax.
    """
    if not _in_one_piece(next_token_logits, vocab_parallel_group, context_parallel_group, sampling_params):
        raise NotImplementedError(
            "get_next_token_logprobs_from_logits: here the logits are in one piece and unfiltered; "
            'patch("nemo_rl") leaves the rest to NeMo-RL'
        )
    length = input_ids.shape[1]
    return gather_logprobs(next_token_logits[:, : length - 1], input_ids[:, 1:].to(next_token_logits.device))


def from_parallel_logits_to_logprobs(
    vocab_parallel_logits: Tensor,
    target: Tensor,
    vocab_start_index: int,
    vocab_end_index: int,
    tp_group: Any,
    inference_only: bool = False,
    cp_group: Any = None,
    chunk_size: int | None = None,
    sampling_params: Any = None,
) -> Tensor:
    """nemo_rl.distributed.model_utils.from_parallel_logits_to_logprobs where both groups have one process."""
    return get_next_token_logprobs_from_logits(
        target,
        vocab_parallel_logits,
        vocab_parallel_group=tp_group,
        context_parallel_group=cp_group,
        sampling_params=sampling_params,
    )


def _in_one_piece(logits: Tensor, tp_group: Any, cp_group: Any, sampling_params: Any) -> bool:
    filtered = sampling_params is not None and (
        (sampling_params.top_k is not None and sampling_params.top_k > 0) or sampling_params.top_p not in (None, 1.0)
    )
    spread = hasattr(logits, "full_tensor") or any(
        group is not None and torch.distributed.get_world_size(group) > 1 for group in (tp_group, cp_group)
    )
    return not filtered and not spread


def calculate_kl(
    logprobs: Tensor,
    logprobs_reference: Tensor,
    kl_type: str = "k3",
    input_clamp_value: float | None = 20.0,
    output_clamp_value: float | None = 10.0,
    importance_sampling_weights: Tensor | None = None,
) -> Tensor:
    """nemo_rl.algorithms.utils.calculate_kl without importance weights."""
    if importance_sampling_weights is not None:
        raise NotImplementedError(
            "calculate_kl: `importance_sampling_weights` must be None here, where no gradient would flow to them; "
            'patch("nemo_rl") leaves them to NeMo-RL'
        )
    return kl_penalty(
        logprobs,
        logprobs_reference,
        estimator=kl_type,
        log_ratio_clip=input_clamp_value,
        output_clip=output_clamp_value,
    )


def compute_gae(
    self: Any, token_level_rewards: Tensor, values: Tensor, mask: Tensor, gae_lambda: Tensor | float | None = None
) -> tuple[Tensor, Tensor]:
    """GeneralizedAdvantageEstimator._compute_gae. 0 off the mask, where NeMo-RL leaves other values."""
    lam = self.gae_lambda if gae_lambda is None else gae_lambda
    return gae(token_level_rewards, values, mask, gamma=self.gae_gamma, lam=lam)


def reward_whiten(self: Any, rewards: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """GeneralizedAdvantageEstimator._reward_whiten; 0 off the mask, which NeMo-RL fills with 0 afterwards."""
    return masked_whiten(rewards, _weights(mask), shift_mean=shift_mean)


def value_loss(
    self: Any, logits: Tensor, data: Any, global_valid_seqs: Tensor, global_valid_toks: Tensor
) -> tuple[Tensor, dict[str, Any]]:
    """MseValueLossFn.__call__: (loss, metrics). One host synchronisation, not nine.

    The metrics sum over micro-batches to those of the whole batch, but for the extrema.
    """
    values = logits.squeeze(-1) if logits.dim() > 2 and logits.shape[-1] == 1 else logits
    returns, mask = data["returns"], _weights(data["token_mask"] * data["sample_mask"].unsqueeze(-1))
    clipped = bool(self.cliprange and self.cliprange > 0)
    old_values, clip = (data["values"], self.cliprange) if clipped else (values.detach(), None)
    loss, stats = ppo_value_loss(values, old_values, returns, mask, clip=clip, normalizer=global_valid_toks)
    loss = loss if self.scale == 1 else loss * self.scale

    seen, kept = values.detach(), mask != 0
    share = stats["tokens"] / global_valid_toks
    metrics = {
        "loss": loss.detach(),
        "vf_clipfrac": stats["clip_fraction"] * share,
        "returns_mean": stats["return_mean"] * share,
        "values_mean": stats["value_mean"] * share,
        "values_min": _extremum(torch.amin, seen, kept, torch.inf),
        "values_max": _extremum(torch.amax, seen, kept, -torch.inf),
        "returns_sq_mean": masked_mean(returns.square(), mask) * share,
        "residual_sq_mean": stats["error"] * share,
    }
    numbers = torch.stack([m.float().reshape(()) for m in metrics.values()]).tolist()
    return loss, dict(zip(metrics, numbers, strict=True)) | {"num_valid_samples": len(values)}


def _extremum(function: Callable, values: Tensor, kept: Tensor, nothing: float) -> Tensor:
    """0 where nothing is kept."""
    found = function(torch.where(kept, values, nothing))
    return torch.where(found == nothing, 0.0, found)


def _weights(mask: Tensor) -> Tensor:
    """NeMo-RL multiplies by the mask, also where it is an integer."""
    return mask if mask.dtype == torch.bool or mask.is_floating_point() else mask.float()


# ---------------------------------------------------------------------------------------------------------------------
# What `patch` puts in place


def replacements() -> list[Replacement]:
    model, utils = (
        importlib.import_module(f"nemo_rl.{name}") for name in ("distributed.model_utils", "algorithms.utils")
    )
    estimator = "nemo_rl.algorithms.advantage_estimator"

    def next_token(ids, logits, seq_index, rank, tp_group, cp_group, sampling_params, chunk_size):
        return _in_one_piece(logits, tp_group, cp_group, sampling_params)

    def parallel(logits, target, start, end, tp_group, inference_only, cp_group, chunk_size, sampling_params):
        return tp_group is not None and _in_one_piece(
            logits, tp_group, cp_group, sampling_params
        )  # None: all processes

    def unweighted(*options):
        return options[-1] is None

    return [
        _where(next_token, model, get_next_token_logprobs_from_logits, _check_logprobs),
        _where(parallel, model, from_parallel_logits_to_logprobs, _check_parallel),
        _where(unweighted, utils, calculate_kl, _check_kl),
        Replacement(estimator, "GeneralizedAdvantageEstimator._compute_gae", compute_gae, _check_gae),
        Replacement(estimator, "GeneralizedAdvantageEstimator._reward_whiten", reward_whiten, _check_whiten),
        Replacement("nemo_rl.algorithms.loss.loss_functions", "MseValueLossFn.__call__", value_loss, _check_value_loss),
    ]


def _where(condition: Callable, module: Any, ours: Callable, check: Callable) -> Replacement:
    """Ours for the arguments that `condition` holds of, the library's own for the rest."""
    original, signature = getattr(module, ours.__name__), inspect.signature(ours)

    @functools.wraps(ours)
    def function(*args, **kwargs):
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        return (ours if condition(*given.arguments.values()) else original)(*args, **kwargs)

    return Replacement(module.__name__, ours.__name__, function, check)


def _mask() -> Tensor:
    """[4, 6]: padding, gaps, an empty row."""
    mask = torch.arange(24).view(4, 6) % 5 > 1
    mask[3] = False
    return mask.float()


def _check_logprobs(original, ours):
    ids, logits = torch.randint(11, (3, 7)), torch.randn(3, 7, 11, requires_grad=True)
    with mock.patch.object(Tensor, "cuda", lambda x: x):  # where NeMo-RL sends the ids
        assert_same(original, ours, ids, logits)


def _check_parallel(original, ours):
    """As one process alone would run it."""
    ids, logits = torch.randint(11, (3, 7)), torch.randn(3, 8, 11, requires_grad=True)
    alone = {
        "get_rank": lambda group=None: 0,
        "get_world_size": lambda group=None: 1,
        "all_reduce": lambda *a, **k: None,
    }
    with mock.patch.multiple(torch.distributed, **alone):
        assert_same(original, ours, logits, ids, 0, 11, "this process")


def _check_kl(original, ours):
    for kind in ("k1", "k2", "k3"):
        for clamps in ((20.0, 10.0), (None, None)):
            new, reference = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6, requires_grad=True)
            assert_same(original, ours, new, reference, kind, *clamps)
            assert_same(original, ours, new, reference, kind, *clamps, torch.rand(4, 6, requires_grad=True))


def _estimator():
    kind = importlib.import_module("nemo_rl.algorithms.advantage_estimator").GeneralizedAdvantageEstimator
    estimator = kind.__new__(kind)
    estimator.gae_lambda, estimator.gae_gamma = 0.8, 0.9
    return estimator


def _check_gae(original, ours):
    mask = _mask()
    for lam in (None, torch.rand(4)):
        theirs, mine = (
            lambda r, v, f=f, lam=lam: [x[mask != 0] for x in f(_estimator(), r, v, mask, lam)]
            for f in (original, ours)
        )
        assert_same(theirs, mine, torch.randn(4, 6), torch.randn(4, 6))


def _check_whiten(original, ours):
    mask = _mask()
    for shift_mean in (True, False):
        theirs, mine = (lambda x, f=f, s=shift_mean: f(_estimator(), x, mask, s)[mask != 0] for f in (original, ours))
        assert_same(theirs, mine, torch.randn(4, 6))


def _check_value_loss(original, ours):
    losses = importlib.import_module("nemo_rl.algorithms.loss.loss_functions")
    for cliprange in (None, 0.5):
        loss = losses.MseValueLossFn(losses.MseValueLossConfig(scale=0.7, cliprange=cliprange))
        data = {
            "token_mask": _mask(),
            "sample_mask": torch.tensor([1.0, 0.0, 1.0, 1.0]),
            "returns": torch.randn(4, 6),
            "values": torch.randn(4, 6),
        }
        values = torch.randn(4, 6, 1, requires_grad=True)
        assert_same(original, ours, loss, values, data, torch.tensor(5.0), torch.tensor(20.0))
