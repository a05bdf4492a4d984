"""What a run shows, in plain words: one verdict, the headline numbers, and checks that a careful reader would make."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rlhf_fast.train.report.plot import change, number
from rlhf_fast.train.report.read import STAGES, Run, finite, lookup

NAMES = {"sft": "supervised fine-tuning", "reward": "the reward model", "dpo": "DPO"}


@dataclass(frozen=True)
class Verdict:
    """level: "good", "bad", "unclear", "warning" (good on paper only) or "open" (not measured)."""

    level: str
    title: str
    text: str


@dataclass(frozen=True)
class Share:
    """A share between 0 and 1 with its 95 % interval. `middle` names what 50 % means."""

    key: str
    label: str
    value: float
    low: float
    high: float
    note: str
    middle: str


@dataclass(frozen=True)
class Check:
    """passed False means: look at this before trusting the run."""

    passed: bool
    text: str


def name_of(run: Run, stage: str) -> str:
    return NAMES.get(stage, run.method)


def percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def percents(*values: float) -> tuple[str, ...]:
    return tuple(map(percent, values))


def interval(low: float, high: float) -> str:
    return f"{100 * low:.1f}–{100 * high:.1f}%"


def count(value: float) -> str:
    return f"{value:,.0f}"


# ------------------------------------------------------------------------------------------------------ verdict


def verdict(run: Run) -> Verdict:
    """Did training on preferences make the policy better? Says so only when an interval and an independent judge support it."""
    win = win_rate(run)
    if win is None:
        return _unjudged(run)
    judge = lookup(run.evaluation, "judge") or "not named"
    pairs = finite(run.evaluation, "pairs")
    prompts = f"On {count(pairs)} held-out prompts" if pairs else "On held-out prompts"
    won = (
        f"in {percent(win.value)} of the comparisons with the reply from before {run.method} "
        f"(95% interval {interval(win.low, win.high)})"
    )
    same = lookup(run.evaluation, "judge_is_training_reward")
    if same is True:
        return _judged_by_reward(
            win,
            run.method,
            f"{prompts}, the new reply scored higher {won}. But the judge was {judge}, {_tie(run)}: a policy that has "
            "learned to exploit its mistakes would win just the same. Read the samples, or judge by other means.",
        )
    text = f"{prompts}, the judge ({judge}) preferred the new reply {won}. 50% would mean no difference."
    if same is not False:
        text += f" The run does not say whether this judge is independent of what {run.method} learned from."
    if win.low > 0.5:
        return Verdict("good" if same is False else "warning", f"{run.method} made the policy better.", text)
    if win.high < 0.5:
        return Verdict("bad", f"{run.method} made the policy worse.", text + _hacking_note(run))
    return Verdict(
        "unclear", f"No clear difference before and after {run.method}.", f"{text} The interval includes 50%."
    )


def _tie(run: Run) -> str:
    """How a reward model that judges is bound to what it judges."""
    if run.last == "dpo":
        return "which learned from the same pairs as DPO"
    return f"the very model that {run.method} optimised"


def _hacking_note(run: Run) -> str:
    before, after = finite(run.evaluation, "reward_before"), finite(run.evaluation, "reward_after")
    if before is None or after is None or after <= before:
        return ""
    return (
        f" Meanwhile the reward model's score rose ({change(before, after)}): the policy learned to please the reward "
        "model rather than the judge, which is called reward hacking."
    )


def _judged_by_reward(win: Share, method: str, text: str) -> Verdict:
    if win.low > 0.5:
        title = f"{method} raised the reward model's score; nobody independent has judged the replies."
        return Verdict("warning", title, text)
    if win.high < 0.5:
        return Verdict("bad", f"{method} lowered the very score it was trained on.", text)
    return Verdict("unclear", f"{method} did not clearly change even the score it was trained on.", text)


def _unjudged(run: Run) -> Verdict:
    done = [name_of(run, name) for name in STAGES if run.stages[name].status in ("complete", "damaged")]
    open_stage = next((name for name in STAGES if run.stages[name].status == "unfinished"), None)
    finished = f"Finished: {', '.join(done)}." if done else "No stage has finished."
    if open_stage:
        log = run.stages[open_stage].log
        where = f" after step {number(log[-1]['step'])}" if log else ""
        name = name_of(run, open_stage)
        title = f"{name} has not finished."
        return Verdict(
            "open",
            title[0].upper() + title[1:],
            f"{finished} The last record of {name} ends{where}: it was stopped, or it is still running.",
        )
    if run.stages[run.last].status == "absent":
        return Verdict(
            "open", "PPO has not run yet.", f"{finished} Whether the policy gets better shows only after PPO."
        )
    return Verdict(
        "open",
        f"{run.method} finished, and nothing has judged the result.",
        f"{finished} The policies before and after {run.method} were not compared, so whether it became better is unknown.",
    )


# --------------------------------------------------------------------------------------------- headline numbers


def _share(
    mapping: object, key: str, label: str, value: str, low: str, high: str, note: str, middle: str
) -> Share | None:
    numbers = [finite(mapping, name) for name in (value, low, high)]
    if None in numbers or not 0 <= numbers[1] <= numbers[0] <= numbers[2] <= 1:
        return None
    return Share(key, label, *numbers, note=note, middle=middle)


def win_rate(run: Run) -> Share | None:
    evaluation = run.evaluation
    ties = finite(evaluation, "ties")
    parts = [f"{count(n)} {name}" for name in ("wins", "ties", "losses") if (n := finite(evaluation, name)) is not None]
    note = ", ".join(parts) + ("; a tie counts half" if ties else "")
    return _share(evaluation, "win_rate", "Win rate over SFT", "win_rate", "low", "high", note, "no difference")


def reward_accuracy(run: Run) -> Share | None:
    results = lookup(run.stages["reward"].summary, "results")
    pairs = finite(results, "eval_pairs")
    note = f"orders {count(pairs)} held-out pairs as labelled" if pairs else "orders held-out pairs as labelled"
    return _share(
        results,
        "reward_accuracy",
        "Reward-model accuracy",
        "accuracy",
        "accuracy_low",
        "accuracy_high",
        note,
        "guessing",
    )


def preference_accuracy(run: Run) -> Share | None:
    results = lookup(run.stages["dpo"].summary, "results")
    pairs = finite(results, "eval_pairs")
    note = f"orders {count(pairs)} held-out pairs as labelled" if pairs else "orders held-out pairs as labelled"
    label, keys = "DPO's implicit reward", ("accuracy", "accuracy_low", "accuracy_high")
    return _share(results, "preference_accuracy", label, *keys, note, "guessing")


def judge_agreement(run: Run) -> Share | None:
    agreement = lookup(run.evaluation, "reward_agreement")
    pairs = finite(agreement, "pairs")
    note = (
        f"orders {count(pairs)} held-out pairs as the judge does"
        if pairs
        else "orders held-out pairs as the judge does"
    )
    return _share(agreement, "reward_agreement", "Reward model vs. judge", "agreement", "low", "high", note, "guessing")


def shares(run: Run) -> list[Share]:
    found = win_rate(run), reward_accuracy(run), judge_agreement(run), preference_accuracy(run)
    return [share for share in found if share is not None]


def sequence_kl(run: Run) -> float | None:
    """Distance from the SFT model in nats per reply: as the evaluation recorded it, else the end of PPO's log."""
    kl = finite(run.evaluation, "kl")
    if kl is None:
        logged = [value for _, value in run.stages["ppo"].curve("objective/kl")]
        kl = finite({"kl": logged[-1]}, "kl") if logged else None
    return kl


def total(run: Run, key: str) -> float | None:
    """Sum over the stages of a number of stage.json; an unfinished stage counts up to its last log line."""
    values = []
    for stage in run.stages.values():
        value = finite(stage.summary, key)
        values.append(value if value is not None else finite(stage.log[-1], key) if stage.log else None)
    known = [value for value in values if value is not None]
    return sum(known) if known else None


# ------------------------------------------------------------------------------------------------------- checks


def checks(run: Run) -> list[Check]:
    """What should hold in a run that can be trusted; only what this run has the numbers for."""
    found = [
        _check_judge(run),
        _check_accuracy(run),
        _check_agreement(run),
        _check_hacking(run),
        _check_alarm(run),
        _check_endings(run),
        _check_lengths(run),
        _check_diversity(run),
        *_check_finite(run),
    ]
    return [check for check in found if check is not None]


def _check_judge(run: Run) -> Check | None:
    same = lookup(run.evaluation, "judge_is_training_reward")
    if win_rate(run) is None:
        return None
    if not isinstance(same, bool):
        return Check(False, "The run does not say whether the judge is independent of the reward model.")
    if same:
        return Check(
            False,
            f"The judge is a reward model, {_tie(run)}, so the win rate cannot tell better replies from exploited mistakes.",
        )
    return Check(True, f"The judge is independent of what {run.method} learned from.")


def _check_accuracy(run: Run) -> Check | None:
    share = reward_accuracy(run)
    if share is None:
        return None
    if share.low > 0.5:
        return Check(True, f"The reward model is better than guessing on held-out pairs ({percent(share.value)}).")
    harm = "it is a poor judge" if run.last == "dpo" else f"{run.method} followed a poor guide"
    return Check(
        False,
        f"The reward model is not clearly better than guessing on held-out pairs ({percent(share.value)}): "
        f"{harm}. More or cleaner pairs help most.",
    )


def _check_agreement(run: Run) -> Check | None:
    share = judge_agreement(run)
    if share is None:
        return None
    if share.low > 0.5:
        return Check(True, f"The reward model mostly orders replies as the judge does ({percent(share.value)}).")
    return Check(
        False,
        f"The reward model does not clearly order replies as the judge does ({percent(share.value)}): "
        f"what {run.method} was paid for is not what the judge wants.",
    )


def _check_hacking(run: Run) -> Check | None:
    evaluation = run.evaluation
    values = [finite(evaluation, key) for key in ("score_before", "score_after", "reward_before", "reward_after")]
    if None in values or lookup(evaluation, "judge_is_training_reward"):
        return None
    judge_before, judge_after, reward_before, reward_after = values
    scores = f"reward model {change(reward_before, reward_after)}, judge {change(judge_before, judge_after)}"
    if reward_after > reward_before and judge_after < judge_before:
        return Check(
            False,
            f"Over-optimisation: the reward model's score rose while the judge's fell ({scores}). "
            "Raise kl_coef, stop earlier, or improve the reward model.",
        )
    if reward_after > reward_before:
        return Check(True, f"The judge's score rose together with the reward model's ({scores}).")
    return Check(False, f"{run.method} did not raise the score it was trained on ({scores}).")


def _check_alarm(run: Run) -> Check | None:
    """What the judge saw during training."""
    results = lookup(run.stages["ppo"].summary, "results")
    best = finite(results, "best_update")
    if best is None:
        return None
    alarm = lookup(results, "alarm")
    early_stop = lookup(results, "early_stop")
    if early_stop and not alarm:
        return Check(
            True,
            f"Early stopping ended PPO, and the policy of update {count(best)} was kept: {early_stop}. That is no proof of "
            "over-optimisation.",
        )
    if not alarm:
        return Check(
            True,
            f"During training the judge's score never fell clearly while the reward rose (best: update {count(best)}).",
        )
    if lookup(run.stages["ppo"].summary, "config", "guard") == "warn":
        return Check(
            False, f"Over-optimisation during training, and PPO went on: {alarm}. The best was update {count(best)}."
        )
    return Check(False, f"PPO was stopped, and the policy of update {count(best)} kept: {alarm}.")


def _check_endings(run: Run) -> Check | None:
    rate = finite(run.evaluation, "eos_rate_after")
    if rate is None:
        return None
    if rate >= 0.9:
        return Check(True, f"{percent(rate)} of the replies after {run.method} end by themselves.")
    return Check(
        False,
        f"Only {percent(rate)} of the replies after {run.method} end by themselves; the others ran into the length limit.",
    )


def _check_lengths(run: Run) -> Check | None:
    before, after = finite(run.evaluation, "length_before"), finite(run.evaluation, "length_after")
    if not before or after is None:
        return None
    lengths = f"mean length {change(before, after)} tokens"
    if 1 / 1.5 <= after / before <= 1.5:
        return Check(True, f"The replies kept their length ({lengths}).")
    direction = "longer" if after > before else "shorter"
    return Check(
        False, f"The replies became much {direction} ({lengths}): part of the gain or loss may be length alone."
    )


def _check_diversity(run: Run) -> Check | None:
    before, after = finite(run.evaluation, "distinct_2_before"), finite(run.evaluation, "distinct_2_after")
    if not before or after is None:
        return None
    shares_ = f"distinct word pairs {' → '.join(percents(before, after))} of all"
    if after >= 0.5 * before:
        return Check(True, f"The replies stayed varied ({shares_}).")
    return Check(False, f"The replies became much more alike ({shares_}).")


def _check_finite(run: Run) -> list[Check]:
    """Non-finite numbers in the logs, by stage and metric."""
    found = []
    for stage in run.stages.values():
        for metric in sorted(set().union(*stage.log)):
            steps = [step for step, value in stage.curve(metric) if not math.isfinite(value)]
            if steps:
                shown = ", ".join(map(number, steps[:5])) + (", …" if len(steps) > 5 else "")
                found.append(Check(False, f"{stage.name}: {metric} is not a finite number at step {shown}."))
    return found


# --------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Data:
    """What each stage took from its data file, and every flawed row once: (place, field, reason)."""

    stages: dict[str, dict]
    flawed: list[tuple[str, str, str]]

    def as_dict(self) -> dict:
        rows = [{"place": place, "field": field, "reason": reason} for place, field, reason in self.flawed]
        return {"stages": self.stages, "flawed_rows": rows}


COUNTS = ("rows_read", "rows_used", "rows_train", "rows_heldout", "truncated_prompts", "truncated_responses")


def data(run: Run) -> Data:
    stages, flawed = {}, {}
    for name, stage in run.stages.items():
        summary = stage.summary.get("data")
        if not isinstance(summary, dict):
            continue
        rows = summary.get("bad_rows")
        rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
        stages[name] = {
            "path": str(summary.get("path", "")),
            **{key: finite(summary, key) for key in COUNTS},
            "flawed_rows": len(rows),
        }
        for row in rows:
            place = f"{row.get('path', summary.get('path', ''))}:{row.get('line', '?')}"
            flawed[place, str(row.get("field", "")), str(row.get("reason", ""))] = None
    return Data(stages, list(flawed))
