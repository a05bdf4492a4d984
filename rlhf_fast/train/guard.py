"""Is PPO still making the policy better? A judge that PPO is not trained on says so during training, and can stop it.

The policy answers the same held-out prompts every few updates, beside the policy that PPO started from. What PPO is paid for
and what the judge thinks rise together at first; where the reward is wrong about replies that nobody wrote before, they part
(Gao et al. 2023, arXiv 2210.10760). Then training is stopped and the policy that the judge liked best is what is kept.

Two rules say when. The alarm wants a fall that chance does not explain, which a judge who hardly likes the policy better than
its start shows only after the policy is worse than that. Early stopping (Prechelt 1998, doi 10.1007/3-540-49430-8_3) counts
looks without testing anything: it is sooner, stops a policy that merely no longer improves, and so has to be asked for. It
waits until the policy was once better than its start, as before there is nothing to keep.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rlhf_fast import kl_penalty
from rlhf_fast.train import distributed, fsdp
from rlhf_fast.train.checkpoint import save_model
from rlhf_fast.train.errors import UserError
from rlhf_fast.train.evaluate import Judge, PairJudge, verdicts, win_rate
from rlhf_fast.train.generate import Sample, stop_ids
from rlhf_fast.train.model import load_policy
from rlhf_fast.train.rollout import Models, roll_out, score

BEST, LOOKS = "best", "looks.jsonl"
CLEARLY = (
    3.0  # standard errors; over twenty looks at a policy that no longer changes, 18 % alarm all the same (simulated)
)
BATCH = 128
SEED = 7


@dataclass(frozen=True)
class Settings:
    """How the policy is asked, as PPO asks it."""

    response_length: int
    temperature: float
    micro_batch_size: int
    micro_batch_tokens: int
    full_logits: bool
    dtype: str
    stop_token: str | None


@dataclass
class Guard:
    """Looks at the policy with `look` and remembers what it saw in `history`, plain values that `looks.jsonl` keeps as well.

    The first look is at the policy as it starts, which is what every later one is compared with.
    """

    models: Models
    judge: Judge | PairJudge
    prompts: Sequence[str]
    queries: Sequence[list[int]]
    settings: Settings
    out: Path
    patience: int | None = None
    history: list[dict[str, Any]] = field(default_factory=list)

    def begin(self, done: int = 0) -> None:
        """Look at the policy as it starts, or take up what an earlier process saw in its first `done` updates."""
        path = self.out / LOOKS
        self.history[:] = distributed.from_main(lambda: self._remembered(path, done))
        if not self.history:
            self.look(0)

    def _remembered(self, path: Path, done: int) -> list[dict[str, Any]]:
        lines = path.read_text(encoding="utf-8").splitlines() if done and path.is_file() else []
        history = [look for look in map(json.loads, lines) if look["update"] <= done]
        path.write_text("".join(json.dumps(look) + "\n" for look in history), encoding="utf-8")
        if done and not history:
            raise UserError(
                f"{path} is missing, so the policy cannot be compared with its start; begin in a new output_dir"
            )
        return history

    def look(self, update: int) -> dict[str, float]:
        """Let the policy answer, judge the answers, and keep the policy if it is the best so far -> the numbers to log.

        Of several processes the main one looks, and tells the others: a judge may not say the same twice. Of sharded models
        all give the answers, the same ones.
        """
        if update and not self.history:
            raise ValueError("guard: the first look must come before the first update")
        answers = self._answers() if fsdp.on() else None
        self.history.append(distributed.from_main(lambda: self._seen(update, *(answers or self._answers()))))
        if distributed.is_main():
            with (self.out / LOOKS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.history[-1]) + "\n")
        if self.best is self.history[-1]:
            save_model(self.out / BEST, self.models.policy, self.models.tokenizer)
        return {name: value for name, value in self.history[-1].items() if name.startswith("eval/")}

    def _seen(self, update: int, samples: list[Sample], rewards: list[float], kl: float) -> dict[str, Any]:
        if not self.history:
            start = [[sample.prompt, sample.response, sample.finished] for sample in samples]
            scores = verdicts(self.judge, samples, samples)[1]
            return _record(0, samples, scores, scores, rewards, kl) | {"start": start}
        start = [Sample(*row) for row in self.history[0]["start"]]
        return _record(update, samples, *verdicts(self.judge, start, samples), rewards, kl)

    @property
    def best(self) -> dict[str, Any]:
        """What was seen when the judge liked the policy best."""
        return max(self.history, key=lambda seen: (seen["eval/judge"], -seen["update"]))

    def alarm(self) -> str | None:
        """What is wrong, if the judge likes the policy clearly less than it once did although the reward clearly rose since.

        Clearly: by more than CLEARLY standard errors, on the same prompts. A policy whose judgement rises again is given time:
        a single step that was too large looks the same and passes.
        """
        best, now = self.best, self.history[-1]
        if now is best or now["eval/judge"] > self.history[-2]["eval/judge"]:
            return None
        if _change(best["scores"], now["scores"]) > -CLEARLY or _change(best["rewards"], now["rewards"]) < CLEARLY:
            return None
        against = win_rate(best["scores"], now["scores"])
        return (
            f"the judge's score fell from {best['eval/judge']:.3g} (update {best['update']}) to {now['eval/judge']:.3g} (update "
            f"{now['update']}) while the reward rose from {best['eval/reward']:.3g} to {now['eval/reward']:.3g}; against the "
            f"best policy this one wins {against.rate:.1%} ({against.low:.1%} to {against.high:.1%})"
        )

    def early_stop(self) -> str | None:
        """What ran out, if at each of the last `patience` looks the judge liked the policy no better than when it was best,
        and the reward was above what it was then.

        Means alone are compared. A look at which the reward is no higher begins the count anew: PPO is then not being paid
        for what the judge does not see. While the start is the best there is no count: a policy that gets better later may
        well begin by getting worse.
        """
        best, now = self.best, self.history[-1]
        if self.patience is None or not best["update"]:
            return None
        last = [look for look in self.history if look["update"] > best["update"]][-self.patience :]
        if len(last) < self.patience or any(look["eval/reward"] <= best["eval/reward"] for look in last):
            return None
        return (
            f"at {self.patience} looks in a row the judge's score was not above the {best['eval/judge']:.3g} of update "
            f"{best['update']} (now {now['eval/judge']:.3g}) while the reward was above its {best['eval/reward']:.3g} (now "
            f"{now['eval/reward']:.3g})"
        )

    def conclusion(self) -> dict[str, Any]:
        """For the stage's results: which update was the best, and what the last look says against going on."""
        kept = {
            f"best/{name.removeprefix('eval/')}": self.best[name] for name in ("eval/win_rate", "eval/judge", "eval/kl")
        }
        said = {"alarm": self.alarm(), "early_stop": self.early_stop()}
        return {"best_update": self.best["update"], **said, **kept}

    def load_best(self) -> torch.nn.Module:
        """The policy that the judge liked best."""
        return load_policy(self.out / BEST, dtype=self.settings.dtype)[0]

    def _answers(self) -> tuple[list[Sample], list[float], float]:
        """Replies to all prompts, what the reward gives for each, and the mean KL per reply to the reference."""
        device = self.models.policy.device
        samples, rewards, kl = [], [], 0.0
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(SEED)
            for begin in range(0, len(self.prompts), BATCH):
                rows = slice(begin, begin + BATCH)
                rollout = roll_out(
                    self.models,
                    self.prompts[rows],
                    self.queries[rows],
                    response_length=self.settings.response_length,
                    temperature=self.settings.temperature,
                    stop=stop_ids(self.models.tokenizer, self.settings.stop_token),
                )
                scored = score(
                    rollout,
                    self.models,
                    temperature=self.settings.temperature,
                    missing_eos="none",
                    missing_eos_penalty=0.0,
                    micro_batch_size=self.settings.micro_batch_size,
                    micro_batch_tokens=self.settings.micro_batch_tokens,
                    full_logits=self.settings.full_logits,
                )
                samples += rollout.samples
                rewards += scored.scores.tolist()
                kl += kl_penalty(scored.logprobs, scored.ref_logprobs, mask=rollout.response_mask).sum().item()
        return samples, rewards, kl / len(self.prompts)


def _record(
    update: int, samples: list[Sample], before: list[float], after: list[float], rewards: list[float], kl: float
) -> dict[str, Any]:
    """One look, as plain values; those under eval/ are logged."""
    wins = win_rate(before, after)
    count = len(samples)
    return {
        "update": update,
        "scores": after,
        "rewards": rewards,
        "eval/win_rate": wins.rate,
        "eval/win_rate_lo": wins.low,
        "eval/win_rate_hi": wins.high,
        "eval/ties": wins.ties / count,
        "eval/judge": sum(after) / count,
        "eval/reward": sum(rewards) / count,
        "eval/kl": kl,
    }


def _change(before: Sequence[float], after: Sequence[float]) -> float:
    """By how many standard errors the mean of a number rose from one look at the same prompts to another."""
    gains = [b - a for a, b in zip(before, after, strict=True)]
    mean = sum(gains) / len(gains)
    variance = sum((gain - mean) ** 2 for gain in gains) / max(1, len(gains) - 1)
    return mean / math.sqrt(variance / len(gains)) if variance else math.copysign(math.inf, mean) if mean else 0.0
