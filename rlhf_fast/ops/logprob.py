"""Log-probabilities of given tokens, and entropies, straight from logits."""

import torch
from torch import Tensor

from rlhf_fast.ops import _logits
from rlhf_fast.ops._common import (
    Kernel,
    flag,
    is_compiling,
    need_tensor,
    optional_mask,
    optional_tensor,
    register,
    weights_reference,
)
from rlhf_fast.ops.kept import keep_only, kept_logprobs

_forward = Kernel("gather_logprobs")
_without_entropy = Kernel("gather_logprobs", hidden=2)
_backward = Kernel("gather_logprobs_backward")
_backward_inplace = Kernel("gather_logprobs_backward_inplace")
_INF = float("inf")


def gather_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    kept: Tensor | None = None,
    with_entropy: bool = False,
    inplace_backward: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """log p(label) for each row of logits and, on request, the entropy of p; one pass over the logits, no [..., V] temporary.

    p = softmax(z), z = logit_scale * logits / temperature, or softcap * tanh(logit_scale * logits / softcap) / temperature.
    It replaces `log_softmax(logits).gather(labels)` and what TRL calls `selective_log_softmax` and verl
    `logprobs_from_logits` with `entropy_from_logits`, and is more accurate than they are in bf16: arithmetic is float32
    whatever the logits are. Gradients of both outputs are exact and written in one backward pass.

    Args:
        logits: [..., V], float32, bfloat16, float16 or float64, any row strides: `logits[:, :-1]` is read in place. A last
            stride other than 1 costs a copy.
        labels: [...], int64 or int32. A label outside [0, V) is a ValueError on the CPU and NaN in its row on CUDA.
        temperature: above 0; one number, or a tensor [...] of one a token.
        softcap: above 0, as Gemma's `final_logit_softcapping`.
        logit_scale: above 0, as Cohere's `logit_scale`.
        ignore_index: rows with this label give 0 and get no gradient.
        mask: [...], bool, integer (0 or not) or floating point (a weight that multiplies); rows with 0 give 0 and no gradient.
        kept: [..., K], int64 or int32, K at most 512: the tokens that top-k or top-p sampling kept. p is then normalised over
            them alone, and so is the entropy ("Keep Sampling Mask", DeepSeek-V3.2, arXiv 2512.02556). Negative ids are padding,
            an id given twice counts once. A label that was not kept has log-prob -inf and its row gets no gradient, as NeMo-RL,
            which then leaves the token out; slime adds the label to the set, which torch.cat([kept, labels.unsqueeze(-1)], -1)
            does here, and takes its entropy over all of V. An id of V or more, or a row with padding alone (prime-rl normalises
            such a row over V), is a ValueError on the CPU and NaN in its row on CUDA; masked and ignored rows may hold anything.
            Only K logits a row are read; ascending ids are the fastest.
        with_entropy: also return the entropy -sum p log p, in nats.
        inplace_backward: write the gradient over the logits' own memory. Only where nothing else reads them afterwards; a
            second backward is an error.

    Returns:
        logprobs [...], or (logprobs, entropy). float32, or float64 for float64 logits.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
    """
    op = "gather_logprobs"
    if (
        type(logits) is Tensor is type(labels)
        and mask is None is kept is softcap
        and type(temperature) is float is type(logit_scale)
        and 0 < temperature < _INF
        and 0 < logit_scale < _INF
        and type(ignore_index) is int
        and type(with_entropy) is bool is type(inplace_backward)
        and not is_compiling()
    ):
        # The usual call goes to the kernel at once: for few rows the checks take as long. What it refuses comes to them yet.
        args = (logits, labels, None, None, temperature, 0.0, logit_scale, ignore_index, with_entropy, inplace_backward)
        try:
            return _forward.eager(args) if with_entropy else _without_entropy.eager(args)[0]
        except (TypeError, ValueError, RuntimeError, OverflowError):
            pass
    need_tensor(op, "logits", logits)
    need_tensor(op, "labels", labels)
    mask = optional_mask(op, mask)
    kept = optional_tensor(op, "kept", kept)
    flag(op, "with_entropy", with_entropy)
    flag(op, "inplace_backward", inplace_backward)
    if logits.dim() == 0:
        raise ValueError(f"{op}: `logits` must be [..., V], got a tensor without dimensions")
    taus, tau, cap, scale, ignore_index = _logits.options_of(
        op, logits, labels, temperature, softcap, logit_scale, ignore_index
    )

    shape = labels.shape
    if logits.dim() > 3:
        if shape != logits.shape[:-1]:
            raise ValueError(
                f"{op}: `labels` has shape {list(shape)} but must have {list(logits.shape[:-1])}, that of `logits` without V"
            )
        if kept is not None:
            if kept.dim() != logits.dim() or kept.shape[:-1] != shape:
                raise ValueError(
                    f"{op}: `kept` has shape {list(kept.shape)} but must have {list(shape)} and a last dimension of ids"
                )
            kept = kept.flatten(0, -2)
        logits, labels, taus, mask = logits.flatten(0, -2), labels.flatten(), _flat(taus), _flat(mask)

    options = (taus, mask, tau, cap, scale, ignore_index, with_entropy, inplace_backward)
    if kept is None:
        logprobs, entropy = _forward(logits, labels, *options)
    else:
        logprobs, entropy = kept_logprobs(logits, labels, kept, *options)
    if logprobs.shape != shape:
        logprobs, entropy = logprobs.view(shape), entropy.view(shape) if with_entropy else entropy
    return (logprobs, entropy) if with_entropy else logprobs


def gather_logprobs_reference(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    kept: Tensor | None = None,
    with_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`gather_logprobs` in plain torch, in the dtype of the logits: its specification, and the oracle of its tests."""
    z = logits * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z / (temperature.unsqueeze(-1) if isinstance(temperature, Tensor) and temperature.dim() else temperature)
    if kept is not None:
        z = keep_only(z, labels, kept)
    log_p = z.log_softmax(-1)
    keep = labels != ignore_index
    logprobs = log_p.gather(-1, labels.long().where(keep, torch.zeros_like(labels.long())).unsqueeze(-1)).squeeze(-1)
    weight = weights_reference(mask, logprobs)
    used = keep & (weight != 0)
    zero = torch.zeros_like(logprobs)
    logprobs = torch.where(used, weight * torch.where(used, logprobs, zero), zero)
    if not with_entropy:
        return logprobs
    p = log_p.exp()
    entropy = -torch.where(p > 0, p * log_p.where(p > 0, torch.zeros_like(log_p)), p).sum(-1)
    return logprobs, torch.where(used, weight * torch.where(used, entropy, zero), zero)


def _flat(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.flatten()


register(
    "gather_logprobs",
    lambda logits, labels, *rest: _logits.fake_outputs(logits, labels, rest[-2]),
    hidden=1,
    differentiable=1,
    setup_context=_logits.setup_context,
    backward=_logits.formula(_backward, _backward_inplace, inputs=10),
)
register("gather_logprobs_backward", lambda grad_logprobs, grad_entropy, logits, *rest: logits.new_empty(logits.shape))
register("gather_logprobs_backward_inplace", lambda *args: None)
