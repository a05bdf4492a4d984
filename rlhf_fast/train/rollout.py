"""Experience for PPO, in three frozen steps: Rollout (what was said) -> Scored (under every model) -> Advantaged.

    R_t = -kl_coef * KL_t, plus the reply's score at its last token
    A_t = sum_l (gamma lam)^l (R_{t+l} + gamma V_{t+l+1} - V_{t+l})            GAE, Schulman et al. 2015, eq. 16

Letters: B rollouts, C prompt tokens (left-padded), T response tokens (right-padded), S = C + T. Models see a few rows
at a time, cut to the columns that hold their tokens; nothing here depends on how many, or on the padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlhf_fast import gae, masked_whiten, shape_rewards
from rlhf_fast.train import fsdp, loop
from rlhf_fast.train.errors import NotFinite, UserError
from rlhf_fast.train.generate import Engine, Sample, generate
from rlhf_fast.train.lora import switched_off
from rlhf_fast.train.model import sequence_scores, token_values
from rlhf_fast.train.policy import response_logprobs

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RewardFunction = Callable[[list[Sample]], Sequence[float]]


@dataclass(frozen=True)
class Models:
    """What takes part: `policy` and `value` are trained, `reference` stays; `reward` is a model or any function.

    A policy with an adapter is its own reference, with the adapter switched off: read it inside `referring`.
    Without a value model, replies are weighed against each other: see `group`.
    """

    policy: PreTrainedModel
    reference: PreTrainedModel
    value: PreTrainedModel | None
    reward: PreTrainedModel | RewardFunction
    tokenizer: PreTrainedTokenizerBase
    average: PreTrainedModel | None = None  # of the policy's weights over the steps
    engine: Engine | None = None

    @contextmanager
    def referring(self) -> Iterator[PreTrainedModel]:
        """The reference, as it is to be read: inside, a policy that is its own reference is the policy no longer."""
        with switched_off(self.policy) if self.reference is self.policy else nullcontext():
            yield self.reference

    @property
    def trained(self) -> dict[str, PreTrainedModel]:
        return {"policy": self.policy} | ({} if self.value is None else {"value": self.value})


@dataclass(frozen=True)
class Window:
    """Some rows of a rollout, the columns of S and of T that hold their tokens, and the number of response tokens."""

    rows: Tensor  # int64 [b]
    both: slice
    response: slice
    tokens: int

    @property
    def response_length(self) -> int:
        return self.response.stop


@dataclass(frozen=True)
class Rollout:
    """B prompts and the policy's replies; the lengths count the tokens of each row on the host."""

    samples: list[Sample]
    ids: Tensor  # int64 [B, S]
    mask: Tensor  # bool [B, S], real tokens
    response_mask: Tensor  # bool [B, T], up to and including the end token
    finished: Tensor  # bool [B], the reply ended by itself
    query_lengths: list[int]
    response_lengths: list[int]

    @property
    def lengths(self) -> list[int]:
        """Tokens of prompt and reply of each row."""
        return [query + response for query, response in zip(self.query_lengths, self.response_lengths, strict=True)]

    def windows(self, rows: Sequence[int], micro_batch_size: int, micro_batch_tokens: int = 0) -> Iterator[Window]:
        """`rows` in parts of similar length, at most `micro_batch_size` (0: one part) and `micro_batch_tokens` (0: any) each."""
        lengths = self.lengths
        width = self.ids.shape[1] - self.response_mask.shape[1]
        widths = (self.query_lengths, self.response_lengths)
        for part in loop.micro_batches(rows, lengths, micro_batch_size, micro_batch_tokens, widths=widths):
            query = max(self.query_lengths[row] for row in part)
            response = max(self.response_lengths[row] for row in part)
            index = torch.tensor(part, device=self.ids.device)
            tokens = sum(self.response_lengths[row] for row in part)
            yield Window(index, slice(width - query, width + response), slice(0, response), tokens)

    def inputs(self, window: Window) -> tuple[Tensor, Tensor, Tensor]:
        """(ids, mask, response_mask) of a window."""
        rows, both = window.rows, window.both
        return self.ids[rows, both], self.mask[rows, both], self.response_mask[rows, window.response]


@dataclass(frozen=True)
class Scored:
    """A rollout under every model, before any update. Per token, and 0 off the response mask, except `scores`."""

    rollout: Rollout
    scores: Tensor  # [B], after the penalty for a missing end
    logprobs: Tensor  # [B, T]
    ref_logprobs: Tensor  # [B, T]
    values: Tensor | None  # [B, T], of the state before each token


@dataclass(frozen=True)
class Advantaged:
    """What the update needs, 0 off the response mask."""

    scored: Scored
    kl_coef: float
    advantages: Tensor  # [B, T], whitened if that was asked for; or one a reply, [B, 1]
    returns: Tensor | None  # [B, T], advantages before whitening plus values
    score_scale: float = 1.0  # what the scores were divided by before they became rewards


def roll_out(
    models: Models,
    prompts: Sequence[str],
    queries: Sequence[list[int]],
    *,
    response_length: int,
    temperature: float,
    stop: Sequence[int] | None = None,
    watch: Callable[[Tensor, Tensor], object] | None = None,
) -> Rollout:
    """One reply of the policy to each of `prompts`, whose token ids are `queries`; `stop` and `watch` as in `generate`.

    Watched, they are always sampled by `transformers`.
    """
    sampling = {"max_new_tokens": response_length, "temperature": temperature, "batch_size": len(queries), "stop": stop}
    engine = models.engine if watch is None else None
    try:
        completions = generate(models.policy, models.tokenizer, queries, **sampling, watch=watch, engine=engine)
    except NotFinite as error:
        # Its row counts from the first of these prompts, which are a part of the batch where there are several processes.
        error.texts = {"prompt": prompts[error.row]}
        raise
    finished = completions.finished.tolist()
    samples = map(Sample, prompts, completions.texts(models.tokenizer), finished)
    return Rollout(
        samples=list(samples),
        ids=torch.cat([completions.query_ids, completions.response_ids], 1),
        mask=torch.cat([completions.query_mask, completions.response_mask], 1),
        response_mask=completions.response_mask,
        finished=completions.finished,
        query_lengths=[len(query) for query in queries],
        response_lengths=completions.response_mask.sum(1).tolist(),
    )


@torch.no_grad()
def score(
    rollout: Rollout,
    models: Models,
    *,
    temperature: float,
    missing_eos: str,
    missing_eos_penalty: float,
    micro_batch_size: int,
    micro_batch_tokens: int = 0,
    min_response_length: int = 0,
    full_logits: bool = False,
) -> Scored:
    """Score the replies and weigh each of their tokens, so many rows or tokens at a time as in `Rollout.windows`.

    missing_eos: a reply without an end, or of less than `min_response_length` tokens, scores -missing_eos_penalty
    ("replace"), that much less ("subtract"), or what the reward says ("none").
    """
    wide = torch.promote_types(models.policy.dtype, torch.float32)
    logprobs, ref_logprobs, values = (rollout.ids.new_zeros(rollout.response_mask.shape, dtype=wide) for _ in range(3))
    scores = rollout.ids.new_zeros(len(rollout.ids), dtype=wide)
    windows = list(rollout.windows(range(len(rollout.ids)), micro_batch_size, micro_batch_tokens))
    for window in windows + windows[-1:] * fsdp.missing(len(windows)):
        ids, mask, response_mask = rollout.inputs(window)
        place, length = (window.rows, window.response), window.response_length
        scale = {"temperature": temperature, "response_mask": response_mask, "full_logits": full_logits}
        logprobs[place] = response_logprobs(models.policy, ids, mask, length, **scale)
        with models.referring() as reference:
            ref_logprobs[place] = response_logprobs(reference, ids, mask, length, **scale)
        if models.value is not None:
            values[place] = token_values(models.value, ids, mask, length) * response_mask
        if isinstance(models.reward, torch.nn.Module):
            scores[window.rows] = sequence_scores(models.reward, ids, mask)
    if not isinstance(models.reward, torch.nn.Module):
        scores = call_reward(models.reward, rollout.samples).to(scores)
    right = rollout.finished & (rollout.response_mask.sum(1) >= min_response_length)
    if missing_eos == "replace":
        scores = scores.masked_fill(~right, -missing_eos_penalty)
    elif missing_eos == "subtract":
        scores = torch.where(right, scores, scores - missing_eos_penalty)
    return Scored(rollout, scores, logprobs, ref_logprobs, None if models.value is None else values)


def joined(parts: Sequence[Scored], pad_id: int) -> Scored:
    """Several scored rollouts as one, in their order, padded to the longest prompt and the longest reply of all."""
    rollouts = [part.rollout for part in parts]
    replies = [rollout.response_mask.shape[1] for rollout in rollouts]
    prompts = [rollout.ids.shape[1] - reply for rollout, reply in zip(rollouts, replies, strict=True)]

    def padded(tensors: Sequence[Tensor], value: float = 0, *, both: bool = False) -> Tensor:
        left = [max(prompts) - prompt if both else 0 for prompt in prompts]
        sizes = zip(tensors, left, replies, strict=True)
        pad = torch.nn.functional.pad
        return torch.cat([pad(x, (before, max(replies) - reply), value=value) for x, before, reply in sizes])

    def of(name: str) -> Tensor:
        return padded([getattr(part, name) for part in parts])

    rollout = Rollout(
        samples=[sample for rollout in rollouts for sample in rollout.samples],
        ids=padded([rollout.ids for rollout in rollouts], pad_id, both=True),
        mask=padded([rollout.mask for rollout in rollouts], both=True),
        response_mask=padded([rollout.response_mask for rollout in rollouts]),
        finished=torch.cat([rollout.finished for rollout in rollouts]),
        query_lengths=[length for rollout in rollouts for length in rollout.query_lengths],
        response_lengths=[length for rollout in rollouts for length in rollout.response_lengths],
    )
    scores = torch.cat([part.scores for part in parts])
    values = None if parts[0].values is None else of("values")
    return Scored(rollout, scores, of("logprobs"), of("ref_logprobs"), values)


def moved(scored: Scored, device: str | torch.device) -> Scored:
    """The same on another device."""

    def there(record: object) -> dict[str, Tensor]:
        return {name: value.to(device) for name, value in vars(record).items() if isinstance(value, Tensor)}

    return replace(scored, rollout=replace(scored.rollout, **there(scored.rollout)), **there(scored))


def call_reward(reward: RewardFunction, samples: list[Sample]) -> Tensor:
    """Scores [B] of a user's reward function. UserError unless it gives one finite number for each sample."""
    scores = torch.tensor([float(value) for value in reward(samples)], dtype=torch.float64)
    if len(scores) != len(samples):
        raise UserError(
            f"the reward function gave {len(scores)} scores for {len(samples)} replies; it must give one each"
        )
    if not scores.isfinite().all():
        row = int((~scores.isfinite()).nonzero()[0])
        texts = {"prompt": samples[row].prompt, "reply": samples[row].response}
        message = f"the reward function gave a score that is not finite ({scores[row].item()})"
        raise NotFinite(message, row=row, tensors={"scores": scores}, texts=texts)
    return scores


def advantage(
    scored: Scored,
    *,
    kl_coef: float,
    kl_estimator: str,
    score_clip: float | None,
    gamma: float,
    lam: float,
    whiten_rewards: bool,
    whiten_advantages: bool,
    whiten_unbiased: bool = False,
    advantage_clip: float | None = None,
) -> Advantaged:
    """Rewards per token, then advantages and returns; whitened advantages are clipped last, returns never."""
    mask = scored.rollout.response_mask
    rewards = shape_rewards(
        scored.scores,
        scored.logprobs,
        scored.ref_logprobs,
        mask,
        kl_coef=kl_coef,
        estimator=kl_estimator,
        score_clip=score_clip,
    )
    if whiten_rewards:
        rewards = masked_whiten(rewards, mask, shift_mean=False)
    advantages, returns = gae(rewards, scored.values, mask, gamma=gamma, lam=lam)
    if whiten_advantages:
        advantages = masked_whiten(advantages, mask, unbiased=whiten_unbiased)
    if advantage_clip is not None:
        advantages = advantages.clamp(-advantage_clip, advantage_clip)
    return Advantaged(scored, kl_coef, advantages, returns)
