"""Reading a run directory for the report: whatever is there is used, whatever is damaged is named, nothing crashes."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from rlhf_fast.train.errors import UserError

STAGES = ("sft", "reward", "ppo", "dpo")
PLACES = ", ".join(f"{name}/" for name in STAGES)
METHODS = {"gae": "PPO", "grpo": "GRPO", "rloo": "RLOO"}  # by the advantage of stage ppo
NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@dataclass(frozen=True)
class Stage:
    """One stage's directory. `summary` is stage.json (empty when missing or damaged), `log` the readable log lines."""

    name: str
    status: str  # "complete", "unfinished" (no stage.json), "damaged" (stage.json unreadable) or "absent"
    summary: dict = field(default_factory=dict)
    log: tuple[dict, ...] = ()

    def curve(self, metric: str) -> list[tuple[float, float]]:
        """(step, value) for each log line that has the metric; a value logged as "nan" or "inf" is that float."""
        points = []
        for line in self.log:
            value = line.get(metric)
            if isinstance(value, str):
                value = NON_FINITE.get(value)
            if isinstance(value, int | float) and not isinstance(value, bool):
                points.append((line["step"], _as_float(value)))
        return points


@dataclass(frozen=True)
class Run:
    directory: Path
    stages: dict[str, Stage]
    evaluation: dict
    config: str  # text of config.yaml
    problems: tuple[str, ...]  # what could not be read, one line each

    @property
    def last(self) -> str:
        """The stage that learns from preferences: dpo where there is no ppo."""
        return "dpo" if self.stages["dpo"].status != "absent" and self.stages["ppo"].status == "absent" else "ppo"

    @property
    def method(self) -> str:
        """What that stage did, as people call it."""
        advantage = lookup(self.stages["ppo"].summary, "config", "advantage")
        return "DPO" if self.last == "dpo" else METHODS.get(str(advantage), "PPO")

    @property
    def pipeline(self) -> list[str]:
        """The stages that belong to this run, in order; DPO needs no reward model, and PPO no DPO."""
        needed = {"sft", self.last} | ({"reward"} if self.last == "ppo" else set())
        return [name for name in STAGES if name in needed or self.stages[name].status != "absent"]


def finite(mapping: object, *path: str) -> float | None:
    """The finite number at `mapping[path[0]][path[1]]...`, or None when anything on the way is something else."""
    value = lookup(mapping, *path)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    value = _as_float(value)
    return value if math.isfinite(value) else None


def finite_list(mapping: dict, key: str) -> list[float]:
    """The finite numbers of the list at `mapping[key]`; empty when there is no list."""
    values = mapping.get(key)
    numbers = [finite({key: value}, key) for value in values] if isinstance(values, list) else []
    return [value for value in numbers if value is not None]


def lookup(mapping: object, *path: str) -> object:
    for key in path:
        mapping = mapping.get(key) if isinstance(mapping, dict) else None
    return mapping


def _as_float(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def read_run(directory: str | Path) -> Run:
    """Read a run directory, or the directory of a single stage. UserError when it is neither."""
    directory = Path(directory)
    if not directory.is_dir():
        kind = "is a file" if directory.exists() else "does not exist"
        raise UserError(f"{directory} {kind}; give the output directory of a run, which holds {PLACES}")
    problems: list[str] = []
    places = {name: directory / name for name in STAGES if (directory / name).is_dir()}
    alone = not places and any((directory / name).is_file() for name in ("stage.json", "log.jsonl"))
    if alone:
        places = {_stage_of(directory): directory}
    if not places:
        raise UserError(f"{directory} is not a run: it holds none of {PLACES}; give the output directory of a run")
    stages = {name: _read_stage(name, places.get(name), directory, problems) for name in STAGES}
    config = _read_text(directory / "config.yaml", "config.yaml", problems)
    evaluation = _read_object(directory / "evaluation.json", "evaluation.json", problems)
    # Only a run of all stages writes config.yaml; stages that were run one by one have nothing to compare them.
    trained = [name for name in ("ppo", "dpo") if stages[name].status == "complete"]
    if not (directory / "evaluation.json").exists() and config is not None and trained:
        problems.append(
            f"evaluation.json is missing: nothing has compared the policy in {trained[0]}/ with the SFT policy"
        )
    return Run(directory, stages, evaluation or {}, config or "", tuple(problems))


def _stage_of(directory: Path) -> str:
    """Which stage a lone stage directory belongs to: what stage.json says, else its name, else its log's metrics."""
    summary = _read_object(directory / "stage.json", "stage.json", []) or {}
    if summary.get("stage") in STAGES:
        return summary["stage"]
    if directory.resolve().name in STAGES:
        return directory.resolve().name
    metrics = set().union(*_read_log(directory / "log.jsonl", "log.jsonl", []))
    if "rewards/margins" in metrics:
        return "dpo"
    return "ppo" if "objective/scores" in metrics else "reward" if "margin" in metrics else "sft"


def _read_stage(name: str, place: Path | None, root: Path, problems: list[str]) -> Stage:
    if place is None:
        return Stage(name, "absent")
    prefix = "" if place == root else f"{name}/"
    log = _read_log(place / "log.jsonl", f"{prefix}log.jsonl", problems)
    if not (place / "stage.json").is_file():
        problems.append(f"{prefix}stage.json is missing: the stage was stopped before its end, or is still running")
        return Stage(name, "unfinished", log=log)
    summary = _read_object(place / "stage.json", f"{prefix}stage.json", problems)
    return Stage(name, "damaged" if summary is None else "complete", summary or {}, log)


def _read_text(path: Path, name: str, problems: list[str]) -> str | None:
    """The file's text, with undecodable bytes replaced and reported; None when there is no file or it is unreadable."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        problems.append(f"{name} cannot be read: {error.strerror}")
        return None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        problems.append(f"{name} is not valid UTF-8 at byte {error.start}; the damaged characters are shown as \ufffd")
        return data.decode("utf-8", errors="replace")


def _read_object(path: Path, name: str, problems: list[str]) -> dict | None:
    text = _read_text(path, name, problems)
    if text is None:
        return None
    value = _parse(text)
    if not isinstance(value, dict):
        problems.append(f"{name} is damaged: it is not one JSON object")
        return None
    return value


def _read_log(path: Path, name: str, problems: list[str]) -> tuple[dict, ...]:
    """Log lines in order of step. Of several lines with one step (a resumed run) the last counts."""
    text = _read_text(path, name, problems)
    if text is None:
        problems.append(f"{name} is missing: there are no curves for this stage")
        return ()
    lines: dict[float, dict] = {}
    damaged = []
    for row, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        value = _parse(line)
        step = finite(value, "step")
        if step is None:
            damaged.append(row)
        else:
            lines[step] = {**value, "step": step}
    if damaged:
        shown = ", ".join(map(str, damaged[:5])) + (", …" if len(damaged) > 5 else "")
        problems.append(
            f"{name}: {_count(len(damaged), 'line')} ({shown}) could not be read and "
            f"{'was' if len(damaged) == 1 else 'were'} left out; a run stopped while it writes leaves such a line"
        )
    if not lines:
        problems.append(f"{name} holds no readable step: there are no curves for this stage")
    return tuple(lines[step] for step in sorted(lines))


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _parse(text: str) -> object:
    """The JSON value, or None when it is none (also for nesting too deep to be a record of ours)."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
