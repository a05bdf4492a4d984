"""Did training make the policy better? Two policies answer the same held-out prompts and a judge scores every answer.

A judge is any callable with a `name` that maps a list of `Sample(prompt, response, finished)` to one number each,
higher is better: a program, a person's ratings, or a reward model (`reward_judge`). A reward model that PPO was
trained against is a poor judge of PPO (Goodhart's law; Gao et al. 2023, "Scaling laws for reward model
overoptimization"), so the result always records whether the judge was that very model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from rlhf_fast.train.data import Preference, collate, encode_prompt, encode_response
from rlhf_fast.train.errors import UserError
from rlhf_fast.train.generate import EOS, Sample, generate, stop_ids
from rlhf_fast.train.loop import NO_LIMIT, Z_95, Encoder, length_batches, pick_device, wilson_interval
from rlhf_fast.train.model import context_length, load_policy, load_scalar_model, sequence_scores

if TYPE_CHECKING:
    from rlhf_fast.train.chat import Chat

__all__ = [
    "Judge",
    "PairJudge",
    "RewardJudge",
    "Sample",
    "WinRate",
    "compare_policies",
    "distinct_n",
    "judge_name",
    "reward_agreement",
    "reward_judge",
    "wilson_interval",
    "win_rate",
]


class Judge(Protocol):
    """Scores answers: one finite number per sample, higher is better, comparable between samples of one prompt."""

    name: str

    def __call__(self, samples: list[Sample]) -> list[float]: ...


@dataclass(frozen=True)
class PairJudge:
    """A judge that only says which of two replies is better: above 0 the first, below 0 the second, 0 neither.

    compare: (prompts, first replies, second replies) -> one number for each prompt.
    """

    name: str
    compare: Callable[[list[str], list[str], list[str]], Sequence[float]]

    def verdicts(self, before: Sequence[Sample], after: Sequence[Sample]) -> list[float]:
        """1, 0 or -1 for each prompt: is `after` better? Asked in both orders; who prefers a place rather than a reply ties."""
        prompts, old, new = [s.prompt for s in before], [s.response for s in before], [s.response for s in after]
        there, back = ([float(x) for x in self.compare(prompts, *pair)] for pair in ((new, old), (old, new)))
        for given in (there, back):
            if len(given) != len(prompts) or not all(math.isfinite(x) for x in given):
                raise UserError(
                    f"judge '{self.name}' must return one finite number for each of {len(prompts)} pairs; it returned "
                    f"{len(given)}"
                )
        votes = [(_sign(a) - _sign(b)) / 2 if a != 0 and b != 0 else 0.0 for a, b in zip(there, back, strict=True)]
        return [0.0 if x.response == y.response else vote for x, y, vote in zip(before, after, votes, strict=True)]


def _sign(x: float) -> float:
    return float(x > 0) - float(x < 0)


@dataclass(frozen=True)
class WinRate:
    """How often B beat A on the same prompts. `rate` counts a tie as half; `low` and `high` bound it at 95 %."""

    wins: int
    ties: int
    losses: int
    rate: float
    low: float
    high: float


# ---------------------------------------------------------------------------------------------------- intervals


def win_rate(scores_before: Sequence[float], scores_after: Sequence[float]) -> WinRate:
    """Share of prompts on which `after` scored higher than `before`, a tie counting half, with its 95 % interval.

    Each prompt gives one outcome in {0, ½, 1}. With w, t, l the shares of wins, ties and losses the rate is
    w + t/2 = ½ + (w − l)/2, so an interval for the difference of the two paired proportions w − l is an interval
    for the rate. It is Tango's score interval (Tango 1998, Statistics in Medicine 17:891): all rates that a score
    test, with the share of ties at its maximum-likelihood value, does not reject at 5 %. Without ties it is exactly
    `wilson_interval(wins, n)`.

    Why not Wilson's interval with half successes: a tie carries no variance, so that interval is too wide (at 50 %
    ties and a rate of .7 it covers 99.8 %). Why not a normal interval from the sample variance: it covers 88 %
    at n = 50 and a rate of .9, and has no width when every outcome is a win. In simulations of 20 to 512 prompts,
    0 to 90 % ties and rates of .5 to .97, Tango's interval covered 93 to 99 %, and 94 to 97 % from 200 prompts on.
    """
    before, after = list(scores_before), list(scores_after)
    if len(before) != len(after):
        raise ValueError(f"win_rate: one score per prompt on both sides is needed, got {len(before)} and {len(after)}")
    if not all(math.isfinite(score) for score in before + after):
        raise ValueError("win_rate: every score must be a finite number")
    wins = sum(b > a for a, b in zip(before, after, strict=True))
    losses = sum(b < a for a, b in zip(before, after, strict=True))
    ties = len(before) - wins - losses
    return _rate(wins, ties, losses)


def _rate(wins: int, ties: int, losses: int) -> WinRate:
    n = wins + ties + losses
    rate = (wins + ties / 2) / n if n else 0.5
    low, high = _tango_interval(wins, losses, n)
    return WinRate(wins, ties, losses, rate, (1 + low) / 2, (1 + high) / 2)


def _tango_interval(wins: int, losses: int, n: int) -> tuple[float, float]:
    """95 % score interval for P(win) − P(loss) from `n` paired outcomes (Tango 1998)."""
    if n == 0:
        return -1.0, 1.0
    observed = (wins - losses) / n

    def score(delta: float) -> float:
        # P(loss) that maximises the likelihood when P(win) − P(loss) = delta: the root of a·q² + b·q + c.
        a = 2 * n
        b = (2 * n - wins + losses) * delta - wins - losses
        c = -losses * delta * (1 - delta)
        loss = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
        variance = n * (2 * loss + delta * (1 - delta))
        gap = wins - losses - n * delta
        return gap / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, gap)

    def crossing(low: float, high: float, target: float) -> float:
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if score(middle) > target else (low, middle)
        return (low + high) / 2

    # The score falls as delta grows and is zero at the observed difference.
    low = -1.0 if observed == -1 else crossing(-1.0, observed, Z_95)
    high = 1.0 if observed == 1 else crossing(observed, 1.0, -Z_95)
    return low, high


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Distinct word n-grams over all word n-grams of all `texts`: 1 is all different, near 0 is all the same.

    Li et al. (2016), "A diversity-promoting objective function for neural conversation models". Depends on how
    much text there is, so compare only sets with the same number of replies. 0.0 when there is no n-gram.
    """
    seen: set[tuple[str, ...]] = set()
    total = 0
    for text in texts:
        words = text.split()
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        seen.update(grams)
        total += len(grams)
    return len(seen) / total if total else 0.0


# ------------------------------------------------------------------------------------------------------- judges


class RewardJudge:
    """The judge that is a reward model: scores a reply by the model's output at its last token."""

    def __init__(self, directory: str | Path, *, device: str = "cpu", batch_size: int = 64) -> None:
        self.name = f"the reward model in {Path(directory).name}/"
        self._model, self._tokenizer = load_scalar_model(directory, device=pick_device(device))
        self._batch_size = batch_size

    @torch.inference_mode()
    def __call__(self, samples: list[Sample]) -> list[float]:
        rows = [self._encode(sample) for sample in samples]
        scores = [math.nan] * len(rows)
        for batch in length_batches([len(row) for row in rows], self._batch_size, generator=None):
            ids, mask = collate([rows[i] for i in batch], self._tokenizer.pad_token_id, side="right")
            device = self._model.device
            batch_scores = sequence_scores(self._model, ids.to(device), mask.to(device)).tolist()
            for i, score in zip(batch, batch_scores, strict=True):
                scores[i] = score
        return scores

    def _encode(self, sample: Sample) -> list[int]:
        context = context_length(self._model) or NO_LIMIT
        response = encode_response(self._tokenizer, sample.response, context - 1)
        # What was stopped by the length limit has no end token, and the model scores it at its last word.
        if not sample.finished and response[-1] == self._tokenizer.eos_token_id:
            response.pop()
        return encode_prompt(self._tokenizer, sample.prompt, context - len(response)) + response


def reward_judge(directory: str | Path, *, device: str = "cpu", batch_size: int = 64) -> Judge:
    """Judge that scores with the reward model in `directory`. Prompts lose their beginning where they do not fit."""
    return RewardJudge(directory, device=device, batch_size=batch_size)


def _ask(judge: Judge, samples: list[Sample]) -> list[float]:
    """The judge's score of each sample; UserError unless it gives one finite number for each.

    Equal samples are asked about once: two policies that say the same must tie, which a reward model's last bit,
    changed by the padding of another batch, would break.
    """
    name, asked = judge_name(judge), list(dict.fromkeys(samples))
    scores = [float(score) for score in judge(asked)]
    if len(scores) != len(asked):
        raise UserError(f"judge '{name}' returned {len(scores)} scores for {len(asked)} replies; return one for each")
    for sample, score in zip(asked, scores, strict=True):
        if not math.isfinite(score):
            raise UserError(
                f"judge '{name}' scored {score} for the reply {sample.response[:60]!r}; return finite numbers"
            )
    known = dict(zip(asked, scores, strict=True))
    return [known[sample] for sample in samples]


def verdicts(
    judge: Judge | PairJudge, before: Sequence[Sample], after: Sequence[Sample]
) -> tuple[list[float], list[float]]:
    """A number for each reply of two policies to the same prompts, of which the higher wins; of a judge of pairs the numbers
    of `before` are 0."""
    if isinstance(judge, PairJudge):
        return [0.0] * len(before), judge.verdicts(before, after)
    return _ask(judge, list(before)), _ask(judge, list(after))


def judge_name(judge: Judge) -> str:
    return str(getattr(judge, "name", None) or getattr(judge, "__name__", None) or type(judge).__name__)


def reward_agreement(
    reward: str | Path | Judge, judge: Judge, preferences: Sequence[Preference]
) -> dict[str, float | int] | None:
    """How often the reward model (a directory or a judge) orders a held-out pair as the judge does.

    -> {"agreement", "low", "high", "pairs"}: share and its 95 % interval as in `win_rate`, an undecided reward model
    counting half, over the pairs on which the judge is not itself undecided. None when there is no such pair. The
    replies of the data count as finished.
    """
    reward = reward if callable(reward) else reward_judge(reward)
    replies = [Sample(p.prompt, text, True) for p in preferences for text in (p.chosen, p.rejected)]
    if not replies:
        return None
    judged, rewarded = _ask(judge, replies), _ask(reward, replies)
    orders = [
        math.copysign(1.0, judged[i] - judged[i + 1]) * (rewarded[i] - rewarded[i + 1])
        for i in range(0, len(replies), 2)
        if judged[i] != judged[i + 1]
    ]
    if not orders:
        return None
    agreed, opposed = sum(order > 0 for order in orders), sum(order < 0 for order in orders)
    result = _rate(agreed, len(orders) - agreed - opposed, opposed)
    return {"agreement": result.rate, "low": result.low, "high": result.high, "pairs": len(orders)}


# --------------------------------------------------------------------------------------------------- comparison


@dataclass(frozen=True)
class _Replies:
    """What one policy answered to the prompts, in their order."""

    samples: list[Sample]
    lengths: list[int]  # tokens, the end-of-text token included


def _answer(
    directory: str | Path,
    prompts: Sequence[str],
    *,
    max_prompt_tokens: int,
    response_length: int,
    temperature: float,
    top_k: int,
    top_p: float,
    batch_size: int,
    seed: int,
    device: str,
    chat: Chat | None,
    stop_token: str | None,
    picks: Judge | None = None,
    best_of: int = 1,
) -> _Replies:
    """Replies to `prompts`; of `best_of` to each the one that `picks` likes best."""
    where = pick_device(device)
    model, tokenizer = load_policy(directory, device=where, chat=chat)
    encoder = Encoder(model, tokenizer, max_prompt_tokens=max_prompt_tokens, max_response_tokens=response_length)
    encoded = [encoder.prompt(prompt) for prompt in prompts]
    with torch.random.fork_rng(devices=[where] if where.type == "cuda" else []):
        torch.manual_seed(seed)
        completions = generate(
            model,
            tokenizer,
            encoded * best_of,
            max_new_tokens=response_length,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            batch_size=batch_size,
            stop=stop_ids(tokenizer, stop_token),
        )
    texts = completions.texts(tokenizer)
    finished = completions.finished.tolist()
    samples = [Sample(*row) for row in zip([*prompts] * best_of, texts, finished, strict=True)]
    lengths = completions.response_mask.sum(1).tolist()
    if best_of > 1:
        scores = _ask(picks, samples)
        chosen = [max(range(i, len(samples), len(prompts)), key=scores.__getitem__) for i in range(len(prompts))]
        samples, lengths = [samples[i] for i in chosen], [lengths[i] for i in chosen]
    return _Replies(samples, lengths)


def compare_policies(
    sft_dir: str | Path,
    ppo_dir: str | Path,
    prompts: Sequence[str],
    judge: Judge | PairJudge | None,
    *,
    reward_dir: str | Path | None = None,
    reward: Judge | None = None,
    best_of: int = 1,
    preferences: Sequence[Preference] = (),
    kl: float | None = None,
    max_prompt_tokens: int = 512,
    response_length: int = 53,
    temperature: float = 0.7,
    top_k: int = 0,
    top_p: float = 1.0,
    stop_token: str | None = EOS,
    batch_size: int = 64,
    samples: int = 24,
    seed: int = 0,
    device: str = "cpu",
    chat: Chat | None = None,
) -> dict:
    """Both policies answer `prompts`, drawn at one `temperature` from the same seed; `judge` scores the answers.

    judge: None means the reward model in `reward_dir`, which PPO optimised, or which learned from the same pairs as DPO: the
    result then says so.
    reward_dir, or any other `reward`: also scores the replies and, with held-out `preferences`, measures its agreement with
    the judge.
    best_of: of so many replies of the second policy the one that the reward likes best is judged.
    stop_token: where replies end, as in PPO (see `stop_ids`).
    kl: the sequence KL to the SFT model in nats, as PPO measured it last; copied into the result.
    chat: what the prompts were rendered with, if they are conversations.
    samples: how many replies are kept as text, the first ones; besides them, up to 5 that lost the most.

    -> the content of evaluation.json: win rate with interval, mean scores, lengths in tokens, share of replies that
    ended by themselves, distinct-1 and distinct-2, every score (for histograms), and the samples.
    """
    if not prompts:
        raise UserError("no held-out prompt to compare the policies on; raise heldout_fraction or add data")
    if reward_dir is not None:
        reward = reward_judge(reward_dir, device=device, batch_size=batch_size)
    judge = judge or reward
    if best_of > 1 and (reward is None or isinstance(reward, PairJudge)):
        raise UserError(f"the best of {best_of} replies is picked by a reward that scores them; give one")
    if judge is None:
        raise UserError("comparing two policies needs a judge or a reward model; neither was given")

    sampling = {
        "max_prompt_tokens": max_prompt_tokens,
        "response_length": response_length,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "stop_token": stop_token,
        "batch_size": batch_size,
        "seed": seed,
        "device": device,
        "chat": chat,
    }
    replies = {
        "before": _answer(sft_dir, prompts, **sampling),
        "after": _answer(ppo_dir, prompts, **sampling, picks=reward, best_of=best_of),
    }
    scores = dict(zip(replies, verdicts(judge, *(reply.samples for reply in replies.values())), strict=True))
    rewards = (
        scores
        if reward is judge
        else {side: _ask(reward, reply.samples) if reward else None for side, reply in replies.items()}
    )
    outcome = asdict(win_rate(scores["before"], scores["after"]))

    result = {
        "judge": judge_name(judge),
        "judge_is_training_reward": judge is reward,
        "pairs": len(prompts),
        "win_rate": outcome.pop("rate"),
        **outcome,
        "kl": kl,
        "temperature": temperature,
        "seed": seed,
        "best_of": best_of,
        "reward_agreement": reward_agreement(reward, judge, preferences)
        if reward is not None and judge is not reward and not isinstance(judge, PairJudge)
        else None,
    }
    for side, reply in replies.items():
        texts = [sample.response for sample in reply.samples]
        result |= {
            f"score_{side}": _mean(scores[side]),
            f"reward_{side}": _mean(rewards[side]) if rewards[side] else None,
            f"length_{side}": _mean(reply.lengths),
            f"eos_rate_{side}": _mean([sample.finished for sample in reply.samples]),
            f"distinct_1_{side}": distinct_n(texts, 1),
            f"distinct_2_{side}": distinct_n(texts, 2),
            f"scores_{side}": scores[side],
        }

    def row(i: int) -> dict:
        return {
            "prompt": prompts[i],
            **{side: reply.samples[i].response for side, reply in replies.items()},
            **{f"judge_{side}": scores[side][i] for side in replies},
            **{f"reward_{side}": rewards[side][i] if rewards[side] else None for side in replies},
        }

    gains = [after - before for before, after in zip(scores["before"], scores["after"], strict=True)]
    worst = sorted((i for i, gain in enumerate(gains) if gain < 0), key=lambda i: gains[i])[:5]
    result["samples"] = [row(i) for i in range(min(samples, len(prompts)))]
    result["worst_samples"] = [row(i) for i in worst]
    return result


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
