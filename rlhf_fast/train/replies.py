"""Written replies as a policy reads them: token ids behind their prompt, and what the policy says of each reply token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlhf_fast.train import zero
from rlhf_fast.train.data import collate
from rlhf_fast.train.policy import keep_step, response_logprobs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rlhf_fast.train.loop import Encoder


@dataclass(frozen=True)
class Example:
    """Token ids of a prompt and its reply; what is learnt begins at `start`."""

    ids: list[int]
    start: int


def accumulate_loss(
    model: PreTrainedModel,
    parts: Sequence[Sequence[Example]],
    pad_id: int,
    full_logits: bool = False,
    *,
    weight: float = 1.0,
    tokens: int | None = None,
) -> dict[str, Tensor]:
    """Add `weight` times the gradient of the mean loss over all reply tokens of a batch, given in parts.

    tokens: so many are in the batch, of which `parts` are this process's share; None: they are all of it. Returns loss and
    entropy, means over these tokens in nats, both without the weight.
    """
    normalizer = tokens or reply_tokens(example for part in parts for example in part)
    loss = entropy = torch.zeros((), device=model.device)
    keep_step([model], len(parts), full_logits)
    for part in parts:
        logprobs, entropies = reply_logprobs(model, part, pad_id, full_logits)
        part_loss = -logprobs.sum() / normalizer
        zero.backward(model, weight * part_loss)
        loss = loss + part_loss.detach()
        entropy = entropy + entropies.detach().sum() / normalizer
    return {"loss": loss, "entropy": entropy}


def reply_tokens(examples: Iterable[Example]) -> int:
    """How many tokens of `examples` are learnt."""
    return sum(len(example.ids) - example.start for example in examples)


def encode(encoder: Encoder, prompt: str, response: str) -> Example:
    prompt_ids = encoder.prompt(prompt) if prompt else encoder.beginning()
    # The first token of all follows nothing, so there is no probability of it to learn.
    return Example(prompt_ids + encoder.response(response), start=max(1, len(prompt_ids)))


def reply_logprobs(
    model: PreTrainedModel, examples: Sequence[Example], pad_id: int, full_logits: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy [B, T] of the last T columns, which hold all replies; 0 where there is no reply."""
    ids, mask = (x.to(model.device) for x in collate([example.ids for example in examples], pad_id, side="right"))
    starts = torch.tensor([example.start for example in examples], device=model.device)
    first = min(example.start for example in examples)
    columns = torch.arange(first, ids.shape[1], device=model.device)
    response_mask = mask[:, first:] & (columns >= starts[:, None])
    options = {"with_entropy": True, "full_logits": full_logits}
    return response_logprobs(model, ids, mask, len(columns), response_mask=response_mask, **options)
