"""What is wrong with a model, its words or its data, found before the first step, in seconds, and said in one sentence.

Each check was a run that somebody lost: it trained to the end, its curves looked like curves, and nothing could come of it.
A few rows are sampled and read in several ways; what should not matter (padding, a second look, the other rows of the batch)
must not change what is read. Nothing here draws from the run's own random numbers.

Letters as in `model`: B rows, S tokens, T of them the reply.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rlhf_fast.train import fsdp
from rlhf_fast.train.checkpoint import stage_summary
from rlhf_fast.train.data import collate, common_length
from rlhf_fast.train.errors import NotFinite, UserError
from rlhf_fast.train.model import compute_dtype, hidden_states, sequence_scores
from rlhf_fast.train.policy import response_logprobs
from rlhf_fast.train.rollout import Models, Rollout, roll_out

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rlhf_fast.train.loop import Encoder

PROBES = 8  # rows that are sampled and read
PROBE_TOKENS = 256  # longer replies are sampled up to here
PROBE_TEXTS = (
    "Hello, world!  Two spaces",
    " leading space",
    "line\n\nbreaks\ttab",
    "CamelCase and UPPER, 3.14 don't — ñ é 中 🙂",
)
SEED = 20240317
MOST_CUT = 0.5  # share of prompts or replies that may be cut
FEWEST_ENDS = 0.1  # share of replies that must keep their end
END_CHANCE = 1e-3  # of a reply to end by itself
FEWEST_PROMPTS = 8  # distinct ones, to tell a template from an accident
SHORTEST_TEMPLATE = 3  # characters
SMALLEST_SPREAD = 1e-6
# Mean difference in nats between two readings of one token that only rounding may explain, and, for scores and values, the
# difference as a share of their spread.
NATS = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.05}
SHARE = {torch.float64: 1e-5, torch.float32: 1e-2, torch.bfloat16: 0.2}


# -------------------------------------------------------------------------------------------------------- data


def check_prompts_fit(cut: int, count: int, limit: int) -> None:
    """UserError if most prompts lose their beginning: the instruction stands there."""
    if cut > MOST_CUT * count:
        raise UserError(
            f"{cut} of {count} prompts are longer than {limit} tokens and would lose their beginning; raise "
            "max_prompt_tokens, ask for shorter replies, or take a model with a longer context"
        )


def check_replies_end(replies: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase, limit: int) -> None:
    """UserError if a reply goes on after an end token, or if hardly any ends: then the model never learns to stop."""
    end = tokenizer.eos_token_id
    for row, reply in enumerate(replies):
        if end in reply[:-1]:
            raise UserError(
                f"reply {row + 1} of the training data holds the end token {tokenizer.eos_token!r} before its end, so "
                "the model would learn to go on after it; take it out of the text"
            )
    ended = sum(reply[-1] == end for reply in replies)
    if ended < FEWEST_ENDS * len(replies):
        raise UserError(
            f"only {ended} of {len(replies)} replies keep their end token, so the model would not learn to stop; raise "
            f"max_response_tokens, now {limit}"
        )


def check_pairs_differ(pairs: Sequence[tuple[Sequence[int], Sequence[int]]], limit: int) -> None:
    """UserError if the two replies of most pairs are the same once they are cut."""
    same = sum(list(chosen) == list(rejected) for chosen, rejected in pairs)
    if same > MOST_CUT * len(pairs):
        raise UserError(
            f"in {same} of {len(pairs)} pairs chosen equals rejected in its first {limit} tokens; raise max_response_tokens"
        )


def check_preferences(
    config: Any,
    model: PreTrainedModel,
    encoder: Encoder,
    prompts: Sequence[str],
    rows: int,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    pad_id: int,
    full_logits: bool = False,
) -> None:
    """UserError if the stage of `config` could not learn from its pairs, of `rows` read and encoded, or its model not read them.

    prompts: of the `pairs`, which are token ids, that are trained on.
    """
    check_prompts_fit(encoder.truncated_prompts, rows, encoder.max_prompt_tokens)
    check_pairs_differ(pairs, config.max_response_tokens)
    check_same_form(config.model, prompts)
    check_weights({"model": model})
    probes = [chosen for chosen, _ in pairs[:PROBES]]
    check_reading("model", model, probes, pad_id=pad_id, full_logits=full_logits)


def prompt_form(prompts: Sequence[str]) -> dict[str, Any]:
    """What all prompts of a file have in common, for `stage.json`: with enough of them, the template they stand in."""
    distinct = sorted(set(prompts))
    flipped = sorted(prompt[::-1] for prompt in distinct)
    # Of a sorted list the first and the last differ most.
    start, end = (texts[0][: common_length(texts[0], texts[-1])] for texts in (distinct, flipped))
    return {"prompt_form": {"start": start, "end": end[::-1], "prompts": len(distinct)}}


def check_same_form(model_dir: str | Path, prompts: Sequence[str]) -> None:
    """UserError if the model was trained on prompts in one template and is now given another, or none.

    What `model_dir` was trained on stands in its `stage.json`; other models are taken as they are.
    """
    record = stage_summary(model_dir)
    known = record.get("data", {}).get("prompt_form")
    if not known or known["prompts"] < FEWEST_PROMPTS:
        return
    for place, template, has in (("begin", known["start"], str.startswith), ("end", known["end"], str.endswith)):
        if len(template.strip()) >= SHORTEST_TEMPLATE and not any(has(prompt, template) for prompt in prompts):
            raise UserError(
                f"{model_dir} was trained on prompts that all {place} with {template[:60]!r} and none of the prompts here "
                "does; write them in the same template, or pass --checks false if that is meant"
            )


def check_same_split(model_dir: str | Path, *, heldout_fraction: float, split_seed: int) -> None:
    """UserError if prompts that count as held out here may be prompts that the model was trained on."""
    trained = stage_summary(model_dir).get("config", {})
    if "split_seed" not in trained or heldout_fraction == 0:
        return
    if trained["split_seed"] != split_seed or trained["heldout_fraction"] < heldout_fraction:
        raise UserError(
            f"{model_dir} was trained with heldout_fraction {trained['heldout_fraction']} and split_seed "
            f"{trained['split_seed']}, so prompts held out here ({heldout_fraction}, {split_seed}) may be among those it has "
            "seen; give the same two values, or pass --checks false"
        )


# -------------------------------------------------------------------------------------------------------- words


def check_same_words(
    first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase, names: tuple[str | Path, str | Path]
) -> None:
    """UserError unless two models read the same text as the same tokens, in the same template."""
    one, other = names
    if first.get_vocab() != second.get_vocab():
        raise UserError(
            f"the tokenizers of {one} and {other} differ, so the reward model would read other words than the policy "
            "wrote; train the reward model from this policy"
        )
    for role in ("bos_token", "eos_token"):
        mine, theirs = getattr(first, role), getattr(second, role)
        if mine != theirs:
            raise UserError(
                f"the {role} of {one} is {mine!r} and that of {other} is {theirs!r}; write the same into both "
                "tokenizer_config.json"
            )
    if first.chat_template != second.chat_template:
        raise UserError(
            f"{one} and {other} have different chat templates, so one was trained on prompts of another form; train the "
            "reward model from this policy, or give both the same chat_template.jinja"
        )
    for text in PROBE_TEXTS:
        if first.encode(text, add_special_tokens=False) != second.encode(text, add_special_tokens=False):
            raise UserError(
                f"the tokenizers of {one} and {other} split {text[:40]!r} into different tokens; copy tokenizer.json from "
                "one directory to the other and train the reward model again"
            )


def check_end_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """UserError if the end token is padding, has no logit, or is not what the model's own settings end with."""
    end, head = tokenizer.eos_token_id, model.get_output_embeddings()
    if end == tokenizer.pad_token_id:
        raise UserError(
            f"the pad token and the end token are both {tokenizer.eos_token!r}, so ends would be masked as padding; give "
            "the tokenizer a pad token of its own"
        )
    if head is not None and end >= head.weight.shape[0]:
        raise UserError(
            f"the end token {tokenizer.eos_token!r} is token {end} and the model has logits for {head.weight.shape[0]}, so it "
            "can never stop; resize its output layer or choose another eos_token"
        )
    own = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = [] if own is None else [own] if isinstance(own, int) else list(own)
    # A config made for another vocabulary keeps that one's defaults, which the model cannot say.
    ends = [token for token in ends if head is None or token < head.weight.shape[0]]
    if ends and end not in ends:
        raise UserError(
            f"the model stops at token {ends} by its generation_config.json and the tokenizer's end token is "
            f"{tokenizer.eos_token!r} ({end}), at which no reply would end; set eos_token to what the model was trained "
            "to end with"
        )


# ------------------------------------------------------------------------------------------------------- models


@torch.no_grad()
def check_weights(models: Mapping[str, nn.Module]) -> None:
    """UserError if a weight is NaN or infinite."""
    for name, model in models.items():
        for parameter_name, parameter in model.named_parameters():
            if not fsdp.is_finite(parameter):
                raise UserError(
                    f"the weights of the {name} hold NaN or infinity in {parameter_name}; train or convert it again"
                )


@torch.inference_mode()
def check_steady(name: str, model: PreTrainedModel, sequences: Sequence[Sequence[int]], *, pad_id: int) -> None:
    """UserError unless a model reads `sequences` twice the same: a dropout that is still on falsifies every later number."""
    ids, mask = (x.to(model.device) for x in collate(sequences, pad_id, side="right"))
    once, again = (hidden_states(model, ids, mask)[mask].double() for _ in range(2))
    if not once.isfinite().all():
        raise UserError(f"the {name} gives numbers that are not finite; use dtype float32, or another model")
    if (difference := (once - again).abs().mean() / once.std()) > SHARE[compute_dtype(model)]:
        raise UserError(
            f"the {name} reads the same tokens differently each time (by {difference.item():.1%}), as dropout that is still "
            "on does; turn it off in the model's config.json"
        )


@torch.inference_mode()
def check_reading(
    name: str, model: PreTrainedModel, sequences: Sequence[Sequence[int]], *, pad_id: int, full_logits: bool = False
) -> None:
    """UserError unless a model reads `sequences` the same whatever padding and rows stand beside them.

    What is read are log-probs or, of a model with a head `score`, scores.
    """
    check_steady(name, model, sequences, pad_id=pad_id)

    def read(rows: Sequence[Sequence[int]], left: int = 0, right: int = 0) -> list[Tensor]:
        return _read(model, rows, pad_id, left=left, right=right, full_logits=full_logits)

    first = read(sequences)
    if not torch.cat(first).isfinite().all():
        raise UserError(f"the {name} gives numbers that are not finite; use dtype float32, or another model")
    limit = _limit(model, first)
    alone = [reading for row in sequences for reading in read([row])]
    for other in (alone, read(sequences, right=5), read(sequences, left=5)):
        if (difference := _apart(first, other)) > limit:
            raise UserError(
                f"what the {name} says depends on padding (by {difference:.2g}), so it would change with the other rows of a "
                "batch; take a model that heeds attention_mask and position_ids"
            )


@torch.inference_mode()
def check_scores_differ(name: str, model: PreTrainedModel, sequences: Sequence[Sequence[int]], *, pad_id: int) -> None:
    """UserError if a reward model gives different texts one score: PPO would have nothing to follow."""
    scores = torch.cat(_read(model, sequences, pad_id))
    if not (scores.max() - scores.min()).item() > SMALLEST_SPREAD:
        raise UserError(
            f"the {name} gives {len(scores)} different texts the same score ({scores[0].item():.4g}); train it again, longer "
            "or on pairs that differ"
        )


@torch.inference_mode()
def check_reference(models: Models, sequences: Sequence[Sequence[int]], *, pad_id: int) -> None:
    """UserError unless the policy starts as the reference: the KL penalty would pull it elsewhere from the first step."""
    mine = _read(models.policy, sequences, pad_id, full_logits=True)
    with models.referring() as reference:
        theirs = _read(reference, sequences, pad_id, full_logits=True)
    if (difference := _apart(mine, theirs)) > _limit(models.policy, mine):
        raise UserError(
            f"the reference is not the model that the policy starts from: they differ by {difference:.2g} nats a token; load "
            "both from one directory"
        )


def _read(
    model: PreTrainedModel,
    sequences: Sequence[Sequence[int]],
    pad_id: int,
    *,
    left: int = 0,
    right: int = 0,
    full_logits: bool = False,
) -> list[Tensor]:
    """For each of `sequences` its score [1], or the log-prob of each of its tokens but the first; padded as told."""
    tensors = zip(collate(sequences, pad_id, side="right"), (pad_id, False), strict=True)
    ids, mask = (nn.functional.pad(x, (left, right), value=value).to(model.device) for x, value in tensors)
    if hasattr(model, "score"):
        return list(sequence_scores(model, ids, mask)[:, None])
    logprobs = response_logprobs(model, ids, mask, ids.shape[1] - 1, full_logits=full_logits)
    return [row[left : left + len(sequence) - 1] for row, sequence in zip(logprobs, sequences, strict=True)]


def _apart(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """How far two readings are apart in the row where they are most, on the mean over its tokens."""
    return torch.stack([(a - b).abs().mean() for a, b in zip(one, other, strict=True)]).max().item()


def _limit(model: PreTrainedModel, reading: Sequence[Tensor]) -> float:
    if not hasattr(model, "score"):
        return NATS[compute_dtype(model)]
    numbers = torch.cat(list(reading))
    return SHARE[compute_dtype(model)] * (numbers.std().item() if len(numbers) > 1 else numbers.abs().item())


# --------------------------------------------------------------------------------------------------------- PPO


def check_ppo(
    models: Models,
    prompts: Sequence[str],
    queries: Sequence[list[int]],
    *,
    response_length: int,
    temperature: float,
    missing_eos: str,
    stop: Sequence[int] | None = None,
    full_logits: bool = False,
) -> None:
    """Sample a few replies and look at them with every model as PPO will. UserError: the first fault found."""
    scalars = {} if models.value is None else {"value model": models.value}
    if isinstance(models.reward, nn.Module) and hasattr(models.reward, "score"):
        scalars["reward model"] = models.reward
    check_weights({"policy": models.policy, "reference": models.reference} | scalars)
    check_end_token(models.policy, models.tokenizer)

    rows = sorted({i * len(prompts) // PROBES for i in range(PROBES)})
    prompts, queries = [prompts[row] for row in rows], [queries[row] for row in rows]
    rollout, witness = _sample(models, prompts, queries, min(response_length, PROBE_TOKENS), temperature, stop)
    sequences, pad_id = _sequences(rollout), models.tokenizer.pad_token_id
    reading = {"pad_id": pad_id, "full_logits": full_logits}
    check_reading("policy", models.policy, sequences, **reading)
    with models.referring() as reference:
        check_reading("reference", reference, sequences, **reading)
    for name, model in scalars.items():
        check_reading(name, model, sequences, **reading)
    check_reference(models, sequences, pad_id=pad_id)
    if "reward model" in scalars:
        check_scores_differ("reward model", models.reward, [*sequences, *_nonsense(models)], pad_id=pad_id)
    _check_same_logprobs(models.policy, rollout, witness, temperature, full_logits)
    _check_something_is_said(rollout)
    if missing_eos != "none" and response_length <= PROBE_TOKENS:
        _check_end_is_reached(models, rollout, temperature, stop, full_logits)


class _Witness:
    """Notes the log-prob of every token as it is drawn."""

    def __init__(self, temperature: float) -> None:
        self._temperature, self._last, self._seen = temperature, None, []

    def __call__(self, ids: Tensor, logits: Tensor) -> None:
        self._note(ids[:, -1])
        self._last = (logits / self._temperature).log_softmax(-1)

    def _note(self, drawn: Tensor) -> None:
        if self._last is not None:
            self._seen.append(self._last.gather(1, drawn[:, None]))

    def logprobs(self, response_ids: Tensor) -> Tensor:
        """[B, T] of the replies in full; call once."""
        self._note(response_ids[:, -1])
        return torch.cat(self._seen, 1)


def _sample(
    models: Models,
    prompts: Sequence[str],
    queries: Sequence[list[int]],
    length: int,
    temperature: float,
    stop: Sequence[int] | None,
) -> tuple[Rollout, Tensor]:
    """Replies, and the log-probs [B, T] with which they were drawn."""
    device, witness = models.policy.device, _Witness(temperature)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(SEED)
        try:
            rollout = roll_out(
                models, prompts, queries, response_length=length, temperature=temperature, stop=stop, watch=witness
            )
        except NotFinite as error:
            raise UserError(f"{error}; train the policy again, or use dtype float32") from None
    return rollout, witness.logprobs(rollout.ids[:, -rollout.response_mask.shape[1] :])


def _sequences(rollout: Rollout) -> list[list[int]]:
    return [ids[mask].tolist() for ids, mask in zip(rollout.ids, rollout.mask, strict=True)]


def _nonsense(models: Models) -> list[list[int]]:
    """Random tokens: a policy that always says the same must not make its reward model look blind."""
    draw = torch.randint(len(models.tokenizer), (4, 8), generator=torch.Generator().manual_seed(SEED))
    return draw.tolist()


@torch.inference_mode()
def _check_same_logprobs(
    policy: PreTrainedModel, rollout: Rollout, witness: Tensor, temperature: float, full_logits: bool
) -> None:
    mask, length = rollout.response_mask, rollout.response_mask.shape[1]
    scale = {"temperature": temperature, "response_mask": mask, "full_logits": full_logits}
    read = response_logprobs(policy, rollout.ids, rollout.mask, length, **scale)
    difference = ((read - witness).abs() * mask).sum().item() / int(mask.sum())
    if not difference <= NATS[compute_dtype(policy)]:
        raise UserError(
            f"the policy samples from another distribution than training computes: log-probs differ by {difference:.2g} nats a "
            "token, so the ratio would not be 1 at the first minibatch; look for a model that handles its cache or left "
            "padding wrongly, and update transformers"
        )


def _check_something_is_said(rollout: Rollout) -> None:
    if not any(sample.response.strip() for sample in rollout.samples):
        raise UserError(
            f"the policy answers nothing: all {len(rollout.samples)} sampled replies are empty; fine-tune it on replies first"
        )


@torch.inference_mode()
def _check_end_is_reached(
    models: Models, rollout: Rollout, temperature: float, stop: Sequence[int] | None, full_logits: bool
) -> None:
    if rollout.finished.any():
        return
    length = rollout.response_mask.shape[1]
    chance = 0.0
    for token in [models.tokenizer.eos_token_id] if stop is None else stop:
        ends = torch.full_like(rollout.ids[:, -length:], token)
        scale = {"temperature": temperature, "labels": ends, "full_logits": full_logits}
        chances = response_logprobs(models.policy, rollout.ids, rollout.mask, length, **scale).exp()
        chance += chances.sum(1).mean().item()
    if chance < END_CHANCE:
        raise UserError(
            f"no reply would end within response_length {length} (chance {chance:.1g}), and each scores as one that does not "
            "end; raise response_length, fine-tune on replies that end, or set missing_eos to none"
        )


def check_first_ratio(ratio: Tensor, spread: Tensor, dtype: torch.dtype, where: str) -> None:
    """UserError unless new and old log-probs agree before the first step of an update.

    ratio, spread: mean and variance of new over old probability over the response tokens of its first minibatch.
    """
    mean, variance = torch.stack([ratio.double(), spread.double()]).tolist()
    if abs(mean - 1) > NATS[dtype] or variance > NATS[dtype]:
        raise UserError(
            f"{where}: the ratio of new to old probabilities is {mean:.4g} (variance {variance:.2g}) before the first step "
            "and must be 1: rollout and training read the policy differently; turn dropout off and load the model again"
        )
