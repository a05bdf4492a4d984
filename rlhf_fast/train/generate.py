"""Sampling replies. The policy's own generation defaults are set aside, because PPO's log-probabilities are those of
the plain distribution: a repetition penalty in `generation_config.json` would make the samples come from another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlhf_fast.train.data import collate

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sample:
    """One reply as a judge sees it. finished: it ended by itself, not by the limit on its length."""

    prompt: str
    response: str
    finished: bool


@dataclass(frozen=True)
class Completions:
    """B prompts, left-padded to C tokens, and their replies of up to T tokens, pad after the first end token."""

    query_ids: Tensor  # int64 [B, C]
    query_mask: Tensor  # bool [B, C]
    response_ids: Tensor  # int64 [B, T]
    response_mask: Tensor  # bool [B, T], true up to and including the end token
    finished: Tensor  # bool [B], the row holds an end token

    def texts(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """The replies as text, without special tokens."""
        rows = zip(self.response_ids.tolist(), self.response_mask.sum(1).tolist(), strict=True)
        return [
            tokenizer.decode(ids[:length], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for ids, length in rows
        ]


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    batch_size: int,
) -> Completions:
    """One reply to each of `prompts` (token ids, B of them), `batch_size` at a time.

    temperature 0 is greedy. top_k 0 and top_p 1 leave the distribution as it is. Draws from torch's global generator:
    same state, same prompts and same batch size give the same replies.
    """
    query_ids, query_mask = (x.to(model.device) for x in collate(prompts, tokenizer.pad_token_id, side="left"))
    config = generation_config(tokenizer, max_new_tokens, temperature, top_k, top_p)
    own, model.generation_config = model.generation_config, config
    try:
        parts = [
            _generate(model, query_ids[start : start + batch_size], query_mask[start : start + batch_size])
            for start in range(0, len(prompts), batch_size)
        ]
    finally:
        model.generation_config = own
    pad, longest = tokenizer.pad_token_id, max(part.shape[1] for part in parts)
    ids = torch.cat([torch.nn.functional.pad(part, (0, longest - part.shape[1]), value=pad) for part in parts])
    ends = ids == tokenizer.eos_token_id
    mask = ends.cumsum(1) - ends.long() == 0
    return Completions(query_ids, query_mask, ids, mask, ends.any(1))


def generation_config(
    tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> GenerationConfig:
    """Sampling settings in the form `transformers` reads and stores beside a model."""
    from transformers import GenerationConfig

    greedy = temperature == 0
    sampling = {} if greedy else {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    return GenerationConfig(
        do_sample=not greedy,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **sampling,
    )


def _generate(model: PreTrainedModel, query_ids: Tensor, query_mask: Tensor) -> Tensor:
    with torch.inference_mode():
        sequences = model.generate(query_ids, attention_mask=query_mask.long())
    # Tensors made in inference mode cannot take part in a later backward pass.
    return sequences[:, query_ids.shape[1] :].clone()
