"""Rewards and judges from whatever the user has: a function, a directory, a module, or several of them with weights.

    words:count_kind                      a function `count_kind` of the module `words`
    out/reward                            a reward model's directory
    out/reward=1.0, words:count_kind=0.5  their weighted sum

What comes of it maps a list of `Sample`s to one number each and has a `name`, so one object rewards in PPO, picks in
best-of-n and judges in an evaluation. A function is called by the names of its parameters:

    f(samples)                   list of Sample(prompt, response, finished)
    f(texts)                     prompt and reply as one text each
    f(responses)                 replies alone; also `replies`, `completions`
    f(prompts, responses)        both, as lists of the same length
    f(prompts, first, second)    a judge of pairs: above 0 where the first reply is better, below where the second is, 0: a tie
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rlhf_fast.train.checkpoint import stage_summary
from rlhf_fast.train.data import collate, encode_prompt, encode_response
from rlhf_fast.train.errors import UserError
from rlhf_fast.train.evaluate import Judge, PairJudge, RewardJudge, judge_name
from rlhf_fast.train.generate import Sample
from rlhf_fast.train.loop import NO_LIMIT
from rlhf_fast.train.model import sequence_scores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPEC = "module:function, a reward model's directory, or several with weights, as in 'out/reward=1.0,words:kind=0.5'"
REPLIES = ("responses", "replies", "completions")


def make_reward(
    source: Any, *, tokenizer: PreTrainedTokenizerBase | None = None, device: str | torch.device = "cpu"
) -> Judge | PairJudge:
    """The reward that `source` describes.

    source: text as above, a callable, an nn.Module, or a list of such, each alone or with its weight in a pair.
    tokenizer: what an nn.Module reads with. UserError: no such module, function or directory, or a weight that is none.
    """
    terms = [_term(term, weight, tokenizer, device) for term, weight in terms_of(source)]
    if len(terms) == 1 and terms[0][1] == 1:
        return terms[0][0]
    if pairs := [judge_name(judge) for judge, _ in terms if isinstance(judge, PairJudge)]:
        raise UserError(f"'{pairs[0]}' compares two replies and gives no score that could be weighted; use it alone")
    return WeightedSum(terms)


def terms_of(source: Any) -> list[tuple[Any, float]]:
    """The parts of a source, each with its weight."""
    if isinstance(source, str):
        parts = [part.strip() for part in source.split(",")]
        return [_weighted(part) for part in parts if part]
    if isinstance(source, list | tuple):
        return [
            _weighted(term) if isinstance(term, str) else term if isinstance(term, tuple) else (term, 1.0)
            for term in source
        ]
    return [(source, 1.0)]


def _weighted(part: str) -> tuple[str, float]:
    name, sign, weight = part.rpartition("=")
    if not sign:
        return part, 1.0
    try:
        return name.strip(), float(weight)
    except ValueError:
        raise UserError(f"the weight of '{name}' must be a number, got {weight!r}; write it as {name}=0.5") from None


def _term(
    source: Any, weight: float, tokenizer: PreTrainedTokenizerBase | None, device: str | torch.device
) -> tuple[Judge | PairJudge, float]:
    if isinstance(source, str | Path):
        named = str(source)
        if ":" in named and not Path(named).exists():
            return from_function(_import(named), named), weight
        return RewardJudge(named, device=str(device)), weight
    if isinstance(source, nn.Module):
        if tokenizer is None:
            raise UserError(f"a reward that is a {type(source).__name__} needs the tokenizer of the policy")
        return ModuleReward(source, tokenizer), weight
    if not callable(source):
        raise UserError(f"a reward must be {SPEC}, got {source!r}")
    return from_function(source), weight


def _import(named: str) -> Callable:
    module_name, _, function_name = named.partition(":")
    if (
        os.getcwd() not in sys.path
    ):  # an installed command, unlike `python -m`, does not look in the directory it is called in
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"the module of '{named}' cannot be imported: {error}; is it in this directory?") from None
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"module '{module_name}' has no function '{function_name}'")
    # A judge may be a class, to be made once.
    return function() if inspect.isclass(function) else function


def from_function(function: Callable, name: str | None = None) -> Judge | PairJudge:
    """A reward that calls `function` as its parameters ask. name: of one that has no `name`."""
    asked, name = _parameters(function), getattr(function, "name", None) or name or judge_name(function)
    if len(asked) == 3:
        return PairJudge(name, function)
    if len(asked) == 2:
        return Texts(name, lambda samples: function([s.prompt for s in samples], [s.response for s in samples]))
    if asked[:1] == ["texts"]:
        return Texts(name, lambda samples: function([s.prompt + s.response for s in samples]))
    if asked and asked[0] in REPLIES:
        return Texts(name, lambda samples: function([s.response for s in samples]))
    return Texts(name, function)


def _parameters(function: Callable) -> list[str]:
    """Names of the parameters that have to be given by position."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    return [
        p.name for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]


@dataclass(frozen=True)
class Texts:
    """A function on samples, with a name."""

    name: str
    function: Callable[[list[Sample]], Sequence[float]]

    def __call__(self, samples: list[Sample]) -> list[float]:
        return [float(score) for score in self.function(samples)]


class ModuleReward:
    """An nn.Module as a reward: its score of prompt and reply, read with the policy's tokenizer.

    A model with a head `score` is read at the last token; any other module is called with input_ids and attention_mask and
    gives one number a row, as a tensor or as `.logits`.
    """

    def __init__(self, module: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        self.name = type(module).__name__
        self._module, self._tokenizer = module, tokenizer

    @torch.inference_mode()
    def __call__(self, samples: list[Sample]) -> list[float]:
        rows = [self._encode(sample) for sample in samples]
        ids, mask = collate(rows, self._tokenizer.pad_token_id, side="right")
        device = next((parameter.device for parameter in self._module.parameters()), ids.device)
        ids, mask = ids.to(device), mask.to(device)
        if hasattr(self._module, "score") and hasattr(self._module, "base_model"):
            return sequence_scores(self._module, ids, mask).tolist()
        output = self._module(input_ids=ids, attention_mask=mask.long())
        scores = getattr(output, "logits", output)
        if scores.numel() != len(rows):
            raise UserError(
                f"the reward {self.name} gave {scores.numel()} numbers for {len(rows)} replies; it must give one each"
            )
        return scores.flatten().tolist()

    def _encode(self, sample: Sample) -> list[int]:
        response = encode_response(self._tokenizer, sample.response, NO_LIMIT)
        if not sample.finished and response[-1] == self._tokenizer.eos_token_id:
            response.pop()
        return encode_prompt(self._tokenizer, sample.prompt, NO_LIMIT) + response


class WeightedSum:
    """Several rewards, each times its weight."""

    def __init__(self, terms: Sequence[tuple[Judge, float]]) -> None:
        self.terms = list(terms)
        self.name = " + ".join(f"{weight:g} {judge_name(judge)}" for judge, weight in terms)

    def __call__(self, samples: list[Sample]) -> list[float]:
        parts = [[weight * float(score) for score in judge(samples)] for judge, weight in self.terms]
        for part, (judge, _) in zip(parts, self.terms, strict=True):
            if len(part) != len(samples):
                raise UserError(
                    f"the reward '{judge_name(judge)}' gave {len(part)} scores for {len(samples)} replies; it must give one each"
                )
        return [sum(scores) for scores in zip(*parts, strict=True)]


def check_accuracy(directory: str | Path, bar: float | None) -> None:
    """UserError if a reward model's `stage.json` states a held-out accuracy below `bar` (None: take any)."""
    results: Mapping[str, Any] = stage_summary(directory).get("results", {}) if bar is not None else {}
    accuracy = results.get("accuracy")
    if accuracy is not None and accuracy < bar:
        raise UserError(
            f"the reward model {directory} orders {accuracy:.1%} of {results['eval_pairs']} held-out pairs as labelled, below "
            f"min_reward_accuracy {bar:g}: PPO would follow a poor guide; give it more or cleaner pairs, or set "
            "min_reward_accuracy to none"
        )
