"""TRL's functions on our ops: log-probs and entropy (trl.trainer.utils) and, up to 1.12, those of its PPO trainer.

TRL 1.13 removed PPO. In 1.12 the trainer keeps most of its arithmetic inside PPOTrainer.train, where no name can be replaced:
the k1 and k3 penalty and the score on the last token (`shape_rewards`), the loop over t (`gae`), the clipped losses
(`ppo_policy_loss`, `ppo_value_loss`), and the entropy it logs, over two more tensors of the size of the logits. What it calls by
name is here.

Not here: masked_var (no op of ours gives a variance alone; nothing but masked_whiten calls it) and the log-probs from hidden
states of 1.12 (patch_chunked_lm_head), which keep running as they are.
"""

import importlib
import importlib.metadata
import inspect
import os

import torch
from torch import Tensor

from rlhf_fast.adapters._patch import Replacement, assert_same
from rlhf_fast.ops import gather_logprobs, linear_logprobs
from rlhf_fast.ops import masked_mean as _masked_mean
from rlhf_fast.ops import masked_whiten as _masked_whiten

LIBRARY = "trl"
VERSIONS = ("1.12.0", "1.16.0")


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """trl.trainer.utils.selective_log_softmax: log_softmax(logits / temperature) at `index`, [...] or [..., K].

    float32 for bf16 logits, as in TRL's Triton kernel; its PyTorch path rounds them to bf16. Rows with index -100 give 0.
    """
    if index.dim() == logits.dim() - 1:
        return gather_logprobs(logits, index, temperature=temperature, mask=_rows(row_mask))
    logits = logits if logits.dtype == torch.float64 else logits.float()  # their gradient is a sum: rounded once, then
    chosen = logits.gather(-1, index)
    best = chosen.argmax(-1, keepdim=True)  # finite where any of them is
    of_best = gather_logprobs(logits, index.gather(-1, best).squeeze(-1), temperature=temperature)
    logprobs = (chosen - chosen.gather(-1, best)) / temperature + of_best.unsqueeze(-1)
    logprobs = logprobs.masked_fill(chosen == -torch.inf, -torch.inf)
    return logprobs if row_mask is None else logprobs.masked_fill(row_mask == 0, 0.0)


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """trl.trainer.utils.entropy_from_logits, in float32, and right where a logit is -inf. Nothing is chunked: one pass."""
    label = torch.zeros((), dtype=torch.int64, device=logits.device)
    return gather_logprobs(logits, label.expand(logits.shape[:-1]), with_entropy=True)[1]


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """trl.trainer.utils.selective_log_softmax_and_entropy of TRL 1.16."""
    logprobs, entropy = _fused_logprob_entropy(logits, index, temperature, row_mask)
    return logprobs, entropy if entropy_requires_grad else entropy.detach()


def _fused_logprob_entropy(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """trl.kernels.selective_log_softmax_and_entropy, the Triton kernel that those above call on a GPU."""
    return gather_logprobs(logits, index, temperature=temperature, mask=_rows(row_mask), with_entropy=True)


class _ChunkedLogProbFunction:
    """trl.kernels.ChunkedLogProbFunction of TRL 1.16: log-probs and entropy from hidden states, what its GRPO and RLOO ask for.

    `chunk_size` is not used: our workspace is bounded in bytes. Left to TRL's own: the other outputs (log_sum_sq_probs,
    mean_logits, is_top1), which no op of ours gives, a weight wider than the hidden states outside autocast, whose gradient
    would be rounded to their dtype, and weights that DeepSpeed ZeRO-3 gathers for TRL's backward pass alone.
    """

    of_trl: type | None = None  # set before ours takes its place

    def __init__(self, *args, **kwargs):
        raise TypeError("_ChunkedLogProbFunction has no instances: call `apply`")

    @classmethod
    def apply(
        cls,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        rounded = weight.element_size() > hidden.element_size() and not torch.is_autocast_enabled(hidden.device.type)
        if {"log_sum_sq_probs", "mean_logits", "is_top1"} & set(outputs) or rounded or hasattr(weight, "ds_id"):
            of_trl = cls.of_trl or importlib.import_module("trl.kernels").ChunkedLogProbFunction
            options = chunk_size, final_logit_softcapping, logit_scale, outputs
            return of_trl.apply(hidden, weight, bias, targets, temperature, *options)
        found = linear_logprobs(
            hidden,
            weight.to(hidden.dtype),
            targets,
            bias=bias if bias is None else bias.to(hidden.dtype),
            temperature=temperature,
            softcap=final_logit_softcapping,
            logit_scale=logit_scale,
            with_entropy="entropy" in outputs,
        )
        return (*(found if "entropy" in outputs else (found, None)), None, None, None)


def masked_mean(values: Tensor, mask: Tensor, axis: int | None = None) -> Tensor:
    """trl.experimental.ppo.ppo_trainer.masked_mean; 0 where the mask keeps nothing (TRL: NaN)."""
    return _masked_mean(values, _weights(mask), dim=axis)


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """trl.experimental.ppo.ppo_trainer.masked_whiten; 0 off the mask, which PPOTrainer fills with 0 itself.

    An empty mask gives 0 (TRL: ValueError), a single token its distance from itself, 0 (TRL: NaN).
    """
    return _masked_whiten(values, _weights(mask), shift_mean=shift_mean)


def _rows(row_mask: Tensor | None) -> Tensor | None:
    """TRL's masks keep or skip a row, also where they are floating point."""
    return row_mask != 0 if row_mask is not None and row_mask.is_floating_point() else row_mask


def _weights(mask: Tensor) -> Tensor:
    """TRL multiplies by the mask, also where it is an integer."""
    return mask if mask.dtype == torch.bool else mask.float()


# ---------------------------------------------------------------------------------------------------------------------
# What `patch` puts in place


def replacements() -> list[Replacement]:
    utils, ppo = "trl.trainer.utils", "trl.experimental.ppo.ppo_trainer"
    found = [
        Replacement(utils, "selective_log_softmax", selective_log_softmax, _check_logprobs),
        Replacement(utils, "entropy_from_logits", entropy_from_logits, _check_entropy),
    ]
    if importlib.metadata.version(LIBRARY).startswith("1.12."):
        return [
            *found,
            Replacement(ppo, "masked_mean", masked_mean, _check_mean),
            Replacement(ppo, "masked_whiten", masked_whiten, _check_whiten),
        ]
    both = Replacement(utils, "selective_log_softmax_and_entropy", selective_log_softmax_and_entropy, _check_both)
    theirs = importlib.import_module(utils)._ChunkedLogProbFunction
    if theirs is not _ChunkedLogProbFunction:
        _ChunkedLogProbFunction.of_trl = theirs
    found += [both, Replacement(utils, "_ChunkedLogProbFunction", _ChunkedLogProbFunction, _check_chunked)]
    device = _triton_device()
    if device is None:
        return found

    def check_kernel(original, ours):
        logits, index = (x.to(device) for x in _logits_and_index())
        assert_same(original, ours, logits, index, 0.7, (index > 1).int())

    return [*found, Replacement(utils, "_fused_logprob_entropy", _fused_logprob_entropy, check_kernel)]


def _triton_device() -> str | None:
    """Where TRL's Triton kernel runs here, if anywhere: there alone can ours be compared with it, and there alone is it used."""
    if not hasattr(importlib.import_module("trl.trainer.utils"), "_fused_logprob_entropy"):
        return None
    if torch.cuda.is_available():
        return "cuda"
    return "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else None


def _logits_and_index() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 5, 11, requires_grad=True), torch.randint(11, (2, 5))


def _check_logprobs(original, ours):
    logits, index = _logits_and_index()
    assert_same(original, ours, logits, index)
    assert_same(original, ours, logits, torch.randint(11, (2, 5, 3)))
    if "row_mask" in inspect.signature(original).parameters:
        assert_same(original, ours, logits, index, 0.7, index > 1)


def _check_entropy(original, ours):
    assert_same(original, ours, _logits_and_index()[0], 3)


def _check_both(original, ours):
    logits, index = _logits_and_index()
    for requires_grad in (True, False):
        assert_same(original, ours, logits, index, requires_grad, 0.7, index > 1)


def _check_chunked(original, ours):
    hidden, weight, bias = (torch.randn(shape, requires_grad=True) for shape in ((7, 5), (11, 5), (11,)))
    targets = torch.randint(11, (7,))
    for outputs in ((), ("entropy",), ("entropy", "is_top1")):
        options = 0.7, 4, 3.0, 0.5, outputs
        assert_same(original.apply, ours.apply, hidden, weight, bias, targets, *options)
    assert_same(original.apply, ours.apply, hidden, weight, None, targets, 1.0, 4, None, 1.0, ())


def _check_mean(original, ours):
    values, mask = torch.randn(4, 6, requires_grad=True), torch.arange(24).view(4, 6) % 5 > 1
    for axis in (None, 1):
        assert_same(original, ours, values, mask, axis)


def _check_whiten(original, ours):
    values, mask = torch.randn(4, 6, requires_grad=True), torch.arange(24).view(4, 6) % 5 > 1
    for shift_mean in (True, False):
        assert_same(
            lambda x, f=shift_mean: original(x, mask, f)[mask], lambda x, f=shift_mean: ours(x, mask, f)[mask], values
        )
