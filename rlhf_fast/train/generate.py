"""Sampling replies. The policy's own generation defaults are set aside, because PPO's log-probabilities are those of
the plain distribution: a repetition penalty in `generation_config.json` would make the samples come from another one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from rlhf_fast.train.data import collate
from rlhf_fast.train.errors import NotFinite, UserError
from rlhf_fast.train.fsdp import whole
from rlhf_fast.train.model import in_precision

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


class Engine(Protocol):
    """What samples replies for a model with its weights of the moment."""

    def replies(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        *,
        stop: Sequence[int],
        max_new_tokens: int,
        temperature: float,
        top_k: int,
        top_p: float,
    ) -> list[list[int]]:
        """Token ids of a reply to each prompt, up to and including the first token of `stop`, or `max_new_tokens` without one."""


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
    finished: Tensor  # bool [B], the row holds an end token or another at which replies stop

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
    stop: Sequence[int] | None = None,
    watch: Callable[[Tensor, Tensor], object] | None = None,
    engine: Engine | None = None,
) -> Completions:
    """One reply to each of `prompts` (token ids, B of them), `batch_size` at a time.

    stop: the tokens of which the first ends a reply and is its last (see `stop_ids`); none: the end token.

    temperature 0 is greedy. top_k 0 and top_p 1 leave the distribution as it is. Draws from torch's global generator:
    same state, same prompts and same batch size give the same replies.
    watch: is shown the ids so far and the logits of the next token, before the temperature, at each step.
    engine: samples in place of `transformers`, all prompts at once; it has no logits to be watched.
    NotFinite: a row of logits held NaN or infinity; what was drawn from it is thrown away.
    """
    query_ids, query_mask = (x.to(model.device) for x in collate(prompts, tokenizer.pad_token_id, side="left"))
    stop = [tokenizer.eos_token_id] if stop is None else stop
    if engine is not None:
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "max_new_tokens": max_new_tokens}
        replies = engine.replies(model, prompts, stop=stop, **options)
        ids = collate(replies, tokenizer.pad_token_id, side="right")[0].to(model.device)
        return _completions(query_ids, query_mask, ids, stop)
    config = generation_config(tokenizer, max_new_tokens, temperature, top_k, top_p, stop=stop)
    own, model.generation_config = model.generation_config, config
    broken = torch.zeros(len(prompts), dtype=torch.bool, device=model.device)
    try:
        parts = []
        with whole(model), in_precision(model):
            for start in range(0, len(prompts), batch_size):
                rows = slice(start, start + batch_size)
                parts.append(_generate(model, query_ids[rows], query_mask[rows], _Watched(broken[rows], watch)))
    finally:
        model.generation_config = own
    if broken.any():
        row = int(broken.nonzero()[0])
        tensors = {"query_ids": query_ids, "query_mask": query_mask}
        raise NotFinite("the policy's logits are not finite", row=row, tensors=tensors)
    pad, longest = tokenizer.pad_token_id, max(part.shape[1] for part in parts)
    ids = torch.cat([torch.nn.functional.pad(part, (0, longest - part.shape[1]), value=pad) for part in parts])
    return _completions(query_ids, query_mask, ids, stop)


def _completions(query_ids: Tensor, query_mask: Tensor, ids: Tensor, stop: Sequence[int]) -> Completions:
    ends = torch.isin(ids, torch.tensor(stop, dtype=ids.dtype, device=ids.device))
    mask = ends.cumsum(1) - ends.long() == 0
    return Completions(query_ids, query_mask, ids, mask, ends.any(1))


def generation_config(
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    *,
    stop: Sequence[int] | None = None,
) -> GenerationConfig:
    """Sampling settings in the form `transformers` reads and stores beside a model; stop as in `generate`."""
    from transformers import GenerationConfig

    ends = [tokenizer.eos_token_id] if stop is None else list(stop)
    greedy = temperature == 0
    sampling = {} if greedy else {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    return GenerationConfig(
        do_sample=not greedy,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends[0] if len(ends) == 1 else ends or None,
        **sampling,
    )


EOS = "eos"
STOP_TOKEN = "where replies end: eos, the end token, or at the text of one more token; none: only at response_length"


def stop_ids(tokenizer: PreTrainedTokenizerBase, stop_token: str | None) -> list[int]:
    """The tokens that end a reply: the end token ("eos"), that one or the token whose text is given, or none at all.

    UserError: a text that is not one token of the vocabulary.
    """
    if stop_token is None:
        return []
    end = [tokenizer.eos_token_id]
    if stop_token == EOS:
        return end
    ids = tokenizer.encode(stop_token, add_special_tokens=False)
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise UserError(
            f"stop_token {stop_token!r} is not one token of this tokenizer but {len(ids)}; give a text that is, eos or none"
        )
    return sorted({*end, *ids})


class _Watched:
    """Stands between a model and the sampler and marks the rows whose logits are not finite, without a wait for the device."""

    def __init__(self, broken: Tensor, watch: Callable[[Tensor, Tensor], object] | None) -> None:
        self._broken, self._watch = broken, watch  # broken: bool [b], written to

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        # The largest is NaN if one is NaN; -inf is a token that the model rules out.
        broken = ~logits.amax(-1).isfinite()
        self._broken |= broken
        if self._watch is not None:
            self._watch(ids, logits)
        # The sampler refuses such rows, on a GPU by ending the process.
        return logits.masked_fill_(broken[:, None], 0.0)


def _generate(model: PreTrainedModel, query_ids: Tensor, query_mask: Tensor, watched: _Watched) -> Tensor:
    from transformers import LogitsProcessorList

    processors = LogitsProcessorList([watched])
    with torch.inference_mode():
        sequences = model.generate(query_ids, attention_mask=query_mask.long(), logits_processor=processors)
    # Tensors made in inference mode cannot take part in a later backward pass.
    return sequences[:, query_ids.shape[1] :].clone()
