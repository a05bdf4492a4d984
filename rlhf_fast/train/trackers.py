"""Where the numbers of a stage go beside `log.jsonl`: TensorBoard, a CSV file, Weights & Biases, trackio.

After a kill a stage goes on from its newest checkpoint, and repeats steps that its trackers may have seen, while others may
have lost what they had not written yet. So a tracker says up to which `last` step it holds the run; what it lacks of the log
so far is told to it again, and what it has is not. Repeated steps have the same numbers, clocks apart.
"""

from __future__ import annotations

import csv
import importlib.util
import os
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rlhf_fast.train.checkpoint import read_json, write_file, write_json
from rlhf_fast.train.config import closest
from rlhf_fast.train.errors import UserError

REPORT_TO = (
    "who gets what log.jsonl holds as well: tensorboard, csv (log.csv), wandb, trackio, several with commas, or none"
)
NEEDS = {"tensorboard": "tensorboard", "csv": None, "wandb": "wandb", "trackio": "trackio"}
NONE, PROJECT = "none", "rlhf_fast"
NAME = "trackers.json"


@dataclass(frozen=True)
class Entry:
    """What is logged for one step: numbers by name, and replies as rows with the same columns each."""

    step: int
    metrics: Mapping[str, float]
    completions: Sequence[Mapping[str, Any]] = ()

    def table(self) -> tuple[list[str], list[list[Any]]]:
        """Columns and rows of the completions."""
        return list(self.completions[0]), [list(row.values()) for row in self.completions]


@dataclass(frozen=True)
class RunInfo:
    """What a tracker is told of the run. name: the same whenever the run is continued, and no other's."""

    directory: Path
    name: str
    config: Mapping[str, Any]
    log: Sequence[Entry]  # by processes before this one


class Tracker(Protocol):
    """One of the above, opened for a run."""

    last: int  # the last step that it holds already

    def log(self, entry: Entry) -> None: ...

    def close(self) -> None: ...


def parse(report_to: str) -> list[str]:
    """The names in `report_to`, each once. UserError: one that is not known."""
    names = [name.strip() for name in report_to.split(",") if name.strip()]
    for name in names:
        if name not in (*NEEDS, NONE):
            hint = closest(name, NEEDS) or f"; the trackers are {', '.join(NEEDS)}"
            raise UserError(f"names a tracker '{name}' that is not known{hint}")
    if NONE in names and len(names) > 1:
        raise UserError(f"names trackers beside '{NONE}', got {report_to!r}")
    return [name for name in dict.fromkeys(names) if name != NONE]


def check(report_to: str) -> None:
    """UserError: a tracker that is not known or not installed."""
    for name in parse(report_to):
        if NEEDS[name] and importlib.util.find_spec(NEEDS[name]) is None:
            raise UserError(f"{name} is not installed; pip install {NEEDS[name]}, or leave it out")


def run_name(directory: Path, stage: str, continued: bool) -> str:
    """What the trackers call the run in `directory`: kept there, and new where a run begins anew."""
    path = directory / NAME
    if continued and path.is_file():
        return read_json(path)["name"]
    name = f"{directory.resolve().name}-{stage}-{uuid.uuid4().hex[:8]}"
    write_json(path, {"name": name})
    return name


def open_trackers(
    report_to: str, directory: Path, stage: str, config: Mapping[str, Any], log: Sequence[Entry]
) -> list[Tracker]:
    """The trackers named in `report_to`, told what they lack of `log`."""
    names = parse(report_to)
    named = {"wandb", "trackio"} & set(names)
    info = RunInfo(directory, run_name(directory, stage, continued=bool(log)) if named else stage, config, log)
    opened: list[Tracker] = []
    try:
        for name in names:
            opened.append(KINDS[name](info))
            tell(opened[-1:], log)
    except BaseException:
        for tracker in opened:
            tracker.close()
        raise
    return opened


def tell(trackers: Iterable[Tracker], log: Iterable[Entry]) -> None:
    """Tell each tracker what it has not heard yet."""
    for tracker in trackers:
        for entry in log:
            if entry.step > tracker.last:
                tracker.log(entry)


# ------------------------------------------------------------------------------------------------------ the kinds


class TensorBoard:
    """Event files in `tensorboard/`, made anew whenever a run is continued: TensorBoard would show repeated texts twice."""

    def __init__(self, info: RunInfo) -> None:
        from torch.utils.tensorboard import SummaryWriter

        place = info.directory / "tensorboard"
        for file in place.glob("events.out.tfevents.*"):
            file.unlink()
        self.last = 0
        self._writer = SummaryWriter(str(place))
        self._began = time.time() - (info.log[-1].metrics.get("seconds", 0.0) if info.log else 0.0)

    def log(self, entry: Entry) -> None:
        when = self._began + entry.metrics["seconds"] if "seconds" in entry.metrics else None
        for name, value in entry.metrics.items():
            self._writer.add_scalar(name, value, entry.step, walltime=when)
        if entry.completions:
            self._writer.add_text("completions", markdown(*entry.table()), entry.step, walltime=when)

    def close(self) -> None:
        self._writer.close()


@dataclass
class Csv:
    """`log.csv`, a line a step and a column for every name; written anew from the log whenever a run is continued."""

    info: RunInfo
    last: int = 0
    _columns: list[str] = field(default_factory=list)
    _rows: list[dict[str, float]] = field(default_factory=list)

    @property
    def path(self) -> Path:
        return self.info.directory / "log.csv"

    def log(self, entry: Entry) -> None:
        row = {"step": entry.step, **entry.metrics}
        self._rows.append(row)
        if new := [name for name in row if name not in self._columns]:
            self._columns += new
            with write_file(self.path) as partial:
                self._write(partial, "w", self._rows, header=True)
        else:
            self._write(self.path, "a", [row])

    def _write(self, path: Path, mode: str, rows: Sequence[Mapping[str, float]], header: bool = False) -> None:
        with path.open(mode, encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, self._columns, restval="")
            if header:
                writer.writeheader()
            writer.writerows(rows)

    def close(self) -> None:
        pass


class WandB:
    """A run of Weights & Biases, under the name of the run as its id; project, entity and mode by its own variables.

    Its server takes each step once. Offline, where a process cannot know what was synced, every process tells the whole run:
    sync the newest directory alone.
    """

    def __init__(self, info: RunInfo) -> None:
        import wandb

        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                id=info.name,
                name=os.environ.get("WANDB_NAME", info.name),
                dir=str(info.directory),
                config=dict(info.config),
                resume="allow",
            )
        except (wandb.Error, ValueError) as error:
            raise UserError(
                f"wandb cannot begin: {error}; log in with `wandb login`, or set WANDB_MODE=offline"
            ) from None
        self._table = wandb.Table
        self.last = self._run.step - 1 if self._run.resumed else 0

    def log(self, entry: Entry) -> None:
        columns, rows = entry.table() if entry.completions else ([], [])
        told = {"completions": self._table(columns=columns, data=rows)} if rows else {}
        self._run.log({**entry.metrics, **told}, step=entry.step)

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A run of trackio, in the project named by TRACKIO_PROJECT."""

    def __init__(self, info: RunInfo) -> None:
        import trackio

        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=info.name,
            config=dict(info.config),
            resume="allow",
            embed=False,
        )
        self._table, self._finish = trackio.Table, trackio.finish
        self.last = self._run._next_step - 1  # it has no public name

    def log(self, entry: Entry) -> None:
        columns, rows = entry.table() if entry.completions else ([], [])
        told = {"completions": self._table(columns=columns, data=rows)} if rows else {}
        self._run.log({**entry.metrics, **told}, step=entry.step)

    def close(self) -> None:
        self._finish()


KINDS = {"tensorboard": TensorBoard, "csv": Csv, "wandb": WandB, "trackio": Trackio}


def markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table as TensorBoard shows it."""

    def line(cells: Sequence[Any]) -> str:
        return "| " + " | ".join(" ".join(str(cell).split()).replace("|", "\\|") for cell in cells) + " |"

    return "\n".join(map(line, [columns, ["---"] * len(columns), *rows]))
