"""What a policy says about the tokens of its replies: log-probabilities and entropies.

Logits are the largest tensor of a training step, V numbers a token, and none is needed but to be summed up. So the head is
applied here a few tokens at a time, from the body's hidden states, and a [B, T, V] tensor never exists, forward or backward.

Letters as in `model`: B rows, S tokens of prompt and response together, T of them the response.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from rlhf_fast import gather_logprobs, linear_logprobs, linear_ppo_loss, ppo_loss_from_logits
from rlhf_fast.train import fsdp, zero
from rlhf_fast.train.errors import UserError
from rlhf_fast.train.model import (
    accepts,
    forward_inputs,
    forward_pass,
    hidden_states,
    remembering_little,
    sequence_scores,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FULL_LOGITS = (
    "make the logits of all tokens at once, for a model whose head is more than a linear layer; takes more memory"
)

# The factors by which architectures stretch their logits, or the hidden states before the head: Cohere, Granite and
# MiniCPM (which divide), Falcon-H1.
SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
SOFTCAP = "final_logit_softcapping"  # Gemma
ADVICE = "Set full_logits, which makes the logits of all tokens at once and takes more memory"


def response_logprobs(
    model: PreTrainedModel,
    ids: Tensor,
    mask: Tensor,
    response_length: int,
    *,
    labels: Tensor | None = None,
    temperature: float = 1.0,
    response_mask: Tensor | None = None,
    with_entropy: bool = False,
    full_logits: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each of the last `response_length` = T tokens given all before it, in nats.

    ids int64 [B, S], mask bool [B, S], response_mask [B, T] (0 where it is 0) -> [B, T], with `with_entropy` also the
    entropy [B, T] of the distribution each token was drawn from. Logits are divided by `temperature` first. The last
    token is not read. `labels` [B, T] asks for other tokens at the same places. `full_logits` asks the model itself for its
    logits, of T positions, as a whole.
    """
    options = {"temperature": temperature, "mask": response_mask, "with_entropy": with_entropy}
    labels = ids[:, -response_length:] if labels is None else labels
    if full_logits:
        logits = _logits(model, ids, mask, response_length)
        return gather_logprobs(logits, labels, inplace_backward=_output_of_linear(logits), **options)
    head = logit_head(model)

    def read() -> Tensor | tuple[Tensor, Tensor]:
        hidden = _response_hidden(model, ids, mask, response_length)
        return linear_logprobs(hidden, labels=labels, **head.arguments(), **options)

    return forward_pass(model, read)


def response_ppo_loss(
    model: PreTrainedModel,
    ids: Tensor,
    mask: Tensor,
    response_length: int,
    old_logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    full_logits: bool = False,
    **options: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's loss over the last `response_length` = T tokens, and its statistics: one backward pass belongs to it.

    ids, mask and full_logits as in `response_logprobs`, the tensors after them [B, T], options those of `linear_ppo_loss`.
    """
    labels = ids[:, -response_length:]
    tensors = {"labels": labels, "old_logprobs": old_logprobs, "advantages": advantages, "mask": response_mask}
    if full_logits:
        logits = _logits(model, ids, mask, response_length)
        return ppo_loss_from_logits(logits, **tensors, **options, inplace=_output_of_linear(logits))
    head = logit_head(model)

    def read() -> tuple[Tensor, dict[str, Tensor]]:
        hidden = _response_hidden(model, ids, mask, response_length)
        return linear_ppo_loss(hidden, **tensors, **head.arguments(), **options)

    return forward_pass(model, read)


def keep_step(
    models: Sequence[PreTrainedModel], passes: int, full_logits: bool = False, *, read: Sequence[PreTrainedModel] = ()
) -> None:
    """Before so many forward and backward passes of each of `models` in turn: add what this process has less than another.

    Where models are sharded, or their gradients. Of one token each, whose gradient is zero. read: those of `models` that have
    no backward pass.
    """
    for _ in range(zero.missing(passes)):
        for model in models:
            ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
            mask = torch.ones_like(ids, dtype=torch.bool)
            learns = not any(model is other for other in read)
            with torch.set_grad_enabled(learns):
                if hasattr(model, "score"):
                    numbers = sequence_scores(model, ids, mask)
                else:
                    numbers = response_logprobs(model, ids, mask, 1, full_logits=full_logits)
            if learns:
                zero.backward(model, 0 * numbers.sum())


def _response_hidden(model: PreTrainedModel, ids: Tensor, mask: Tensor, length: int) -> Tensor:
    return hidden_states(model, ids[:, :-1], mask[:, :-1])[:, -length:]


def _logits(model: PreTrainedModel, ids: Tensor, mask: Tensor, length: int) -> Tensor:
    kept = {"logits_to_keep": length} if accepts(type(model), "logits_to_keep") else {}
    inputs = forward_inputs(model, ids[:, :-1], mask[:, :-1]) | kept
    with remembering_little(model):
        logits = forward_pass(model, lambda: fsdp.entry(model)(**inputs).logits)
    return logits if logits.shape[1] == length else logits[:, -length:]


def _output_of_linear(x: Tensor) -> bool:
    """Whether x comes straight from a linear layer, whose backward does not read it, so that it may be overwritten."""
    step = x.grad_fn
    if step is not None and "View" in step.name():
        step = step.next_functions[0][0]
    return step is not None and step.name() in ("MmBackward0", "AddmmBackward0")


# -------------------------------------------------------------------------------------------------------- the head


@dataclass(frozen=True)
class LogitHead:
    """A model's logits from its body's hidden states h: softcap * tanh(logit_scale * (W h + b) / softcap)."""

    layer: nn.Linear
    softcap: float | None
    logit_scale: float

    def arguments(self) -> dict[str, Any]:
        """As the ops over hidden states take them."""
        scaling = {"softcap": self.softcap, "logit_scale": self.logit_scale}
        return {"weight": self.layer.weight, "bias": self.layer.bias, **scaling}


_heads: WeakKeyDictionary[nn.Module, LogitHead] = WeakKeyDictionary()


def logit_head(model: PreTrainedModel) -> LogitHead:
    """The head of a causal language model, tried out on it once.

    UserError where the logits are not those of a plain linear layer, but for a scale and a soft cap: an adapter on the head,
    a hook, an architecture that does more. Such a model can be trained with `full_logits`.
    """
    head = _heads.get(model)
    if head is None or head.layer is not model.get_output_embeddings():
        head = _heads[model] = _find_head(model)
    return head


@torch.no_grad()
def _find_head(model: PreTrainedModel) -> LogitHead:
    layer, name = model.get_output_embeddings(), type(model).__name__
    # Exactly that class: an adapter that starts at zero would pass every trial.
    if type(layer) is not nn.Linear or layer._forward_hooks or layer._forward_pre_hooks:
        kind = type(layer).__name__
        if type(layer) is nn.Linear:
            kind += " with hooks"
        elif kind == "Linear":  # as an adapter's calls itself
            kind = f"{type(layer).__module__}.Linear"
        raise UserError(f"the logits of {name} come from a {kind}, not a plain nn.Linear. {ADVICE}")
    read, made, logits, hidden = _trial(model, layer)
    config = model.config.get_text_config()
    stretches = [getattr(config, key, None) for key in SCALES]
    stretches = [float(s) for s in stretches if isinstance(s, (int, float)) and s > 0]
    stretches = [1.0, *stretches, *(1 / s for s in stretches)]
    before = _first(stretches, lambda s: s * hidden, read)
    cap = getattr(config, SOFTCAP, None)
    for softcap in (None, cap) if cap else (None,):
        after = _first(stretches, lambda s, c=softcap: _capped(s * made, c), logits)
        if after is not None and before is not None and (before == 1 or layer.bias is None):
            return LogitHead(layer, softcap, before * after)
    raise UserError(f"{name} does more to its logits than scale and cap the output of a linear layer. {ADVICE}")


def _trial(model: PreTrainedModel, layer: nn.Linear) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the head read, what it gave (random, lest a head of zeros hides the rest), the logits, and the body's output."""
    seen = {}

    def replace(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        numbers = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)) * 4
        seen["read"], seen["made"] = inputs[0], numbers.to(output)
        return seen["made"]

    ids = torch.arange(4, device=model.device).remainder(layer.out_features).unsqueeze(0)
    mask = torch.ones_like(ids, dtype=torch.bool)
    hook = layer.register_forward_hook(replace)
    try:
        logits = forward_pass(model, lambda: fsdp.entry(model)(**forward_inputs(model, ids, mask)).logits)
    finally:
        hook.remove()
    if "read" not in seen:
        raise UserError(f"{type(model).__name__} makes its logits without its own head. {ADVICE}")
    hidden = hidden_states(model, ids, mask)
    return tuple(x.double() for x in (seen["read"], seen["made"], logits, hidden))


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _first(scales: Iterable[float], function: Any, expected: Tensor) -> float | None:
    """The first scale that explains `expected`, or None; a model in bfloat16 rounds more than once on the way."""
    for scale in scales:
        made = function(scale)
        if made.shape == expected.shape and (made - expected).abs().max() <= 0.02 * expected.abs().max():
            return scale
    return None
