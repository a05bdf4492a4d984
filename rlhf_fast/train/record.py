"""What a stage leaves behind beside its model: `log.jsonl`, what trackers keep, replies, a progress bar, `stage.json`."""

from __future__ import annotations

import json
import math
import os
import platform
import random
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TextIO, TypeVar

import numpy as np
import torch

import rlhf_fast
from rlhf_fast.train import distributed, zero
from rlhf_fast.train.checkpoint import SUMMARY, finite_json, remove_partials, write_file, write_json
from rlhf_fast.train.config import to_dict
from rlhf_fast.train.loop import StageConfig, say
from rlhf_fast.train.resume import Checkpoints, Record, State, clear, sources
from rlhf_fast.train.trackers import Entry, open_trackers, tell

COMPLETIONS = "completions.jsonl"
ON_SCREEN, CELL = 4, 240  # completions, and letters of each text
LINE_EVERY = 30.0  # seconds between progress lines where there is no terminal
MOST_TIME_SAVING = 0.01  # share of a stage's time

Batch = TypeVar("Batch")


class RunLog:
    """`log.jsonl` (one object per logged step, flushed at once), the same numbers for trackers, and `completions.jsonl`.

    It begins with `text`, the log of the first `done` steps; whatever else a killed process logged is forgotten. report_to:
    see `trackers`, who are told `title` and `config` as well.
    """

    def __init__(
        self,
        directory: Path,
        text: bytes = b"",
        done: int = 0,
        *,
        report_to: str = "tensorboard",
        title: str = "",
        config: Mapping[str, Any] | None = None,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._path, self._replies_path = directory / "log.jsonl", directory / COMPLETIONS
        with write_file(self._path) as partial:
            partial.write_bytes(text)
        replies = self._keep_replies(done)
        self._file = self._path.open("a", encoding="utf-8")
        entries = [_entry(json.loads(line), replies) for line in text.splitlines()]
        with undisturbed():
            self._trackers = open_trackers(report_to, directory, title, config or {}, entries)

    def _keep_replies(self, done: int) -> dict[int, list[dict[str, Any]]]:
        """Forget the replies of later steps -> those of the first `done` by step."""
        if not self._replies_path.is_file():
            return {}
        kept = []
        for line in self._replies_path.read_text(encoding="utf-8").splitlines():
            with suppress(json.JSONDecodeError):  # the line at which a process was killed
                kept.append(json.loads(line))
        kept = [row for row in kept if row["step"] <= done]
        with write_file(self._replies_path) as partial:
            partial.write_text(_lines(kept), encoding="utf-8")
        by_step: dict[int, list[dict[str, Any]]] = {}
        for row in kept:
            by_step.setdefault(row.pop("step"), []).append(row)
        return by_step

    def log(self, step: int, metrics: Mapping[str, float], completions: Sequence[Mapping[str, Any]] = ()) -> None:
        line = {"step": step} | {name: finite_json(float(value)) for name, value in metrics.items()}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        if completions:
            with self._replies_path.open("a", encoding="utf-8") as file:
                file.write(_lines([{"step": step, **row} for row in completions]))
        values = {name: float(value) for name, value in metrics.items()}
        with undisturbed():
            tell(self._trackers, [Entry(step, values, completions)])

    def text(self) -> bytes:
        """What `log.jsonl` holds."""
        return self._path.read_bytes()

    def close(self) -> None:
        os.fsync(self._file.fileno())
        self._file.close()
        for tracker in self._trackers:
            tracker.close()


def _entry(line: Mapping[str, Any], replies: Mapping[int, list[dict[str, Any]]]) -> Entry:
    """What a line of `log.jsonl` and the replies of its step say."""
    metrics = {name: float(value) for name, value in line.items() if name != "step"}
    return Entry(line["step"], metrics, replies.get(line["step"], ()))


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(finite_json(dict(row)), allow_nan=False) + "\n" for row in rows)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Python's and numpy's random numbers go on as if nothing inside had drawn any; importing rich does, for one."""
    python, numbers = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)


class Progress:
    """A bar with speed and time left on a terminal; elsewhere a line at the start, at the end and now and then."""

    def __init__(self, title: str, total: int, stream: TextIO | None = None, *, before: int = 0) -> None:
        self._title, self._total, self._before, self._stream = title, total, before, stream or sys.stderr
        self._started, self._last_line = time.monotonic(), -math.inf
        self._bar = _rich_bar(self._stream) if self._stream.isatty() else None
        if self._bar:
            self._bar.start()
            self._task = self._bar.add_task(title, total=total, completed=before, shown="")

    def update(self, done: int, shown: str) -> None:
        """`done` of `total` steps, `before` by an earlier process; `shown` are the numbers to print beside it."""
        now = time.monotonic()
        speed = (done - self._before) / max(now - self._started, 1e-9)
        if self._bar:
            self._bar.update(self._task, completed=done, shown=f"{speed:.3g}/s  {shown}")
        elif done >= self._total or now - self._last_line >= LINE_EVERY:
            self._last_line = now
            left = (self._total - done) / speed
            line = f"{self._title}  {done}/{self._total}  {speed:.3g}/s  {left:.0f} s left  {shown}"
            print(line, file=self._stream, flush=True)

    def show(self, step: int, completions: Sequence[Mapping[str, Any]]) -> None:
        """Print the first completions of a step as a table."""
        with undisturbed():
            from rich.console import Console

            table = completions_table(f"{self._title} {step}", completions[:ON_SCREEN])
            (self._bar.console if self._bar else Console(file=self._stream, width=100)).print(table)

    def close(self) -> None:
        if self._bar:
            self._bar.stop()


def completions_table(title: str, completions: Sequence[Mapping[str, Any]]) -> Any:
    """A rich table of completions; what a model writes is shown as text, whatever it says to the terminal."""
    from rich.table import Table
    from rich.text import Text

    def cell(value: Any) -> Text:
        text = f"{value:.3g}" if isinstance(value, float) else " ".join(str(value).split())
        text = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
        return Text(text if len(text) <= CELL else text[: CELL - 1] + "…")

    table = Table(title=title)
    for name in completions[0]:
        table.add_column(name)
    for row in completions:
        table.add_row(*map(cell, row.values()))
    return table


def _rich_bar(stream: TextIO) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Bar(*columns, TextColumn("{task.fields[shown]}"), console=Console(file=stream))


@dataclass
class Stage:
    """One stage: `with Stage(...) as stage`, `for step, batch in stage.steps(...)`, `stage.log(...)`, `stage.finish(...)`.

    `out` is made on entry, and so must have been claimed; where a killed process left checkpoints there, `state` is taken
    from the newest. `stage.json` is written by `finish`, last of all: its presence means that the stage is complete.
    """

    name: str
    config: StageConfig
    out: Path
    total_steps: int
    parameters: int
    device: torch.device
    data: Mapping[str, Any]
    state: State

    def __enter__(self) -> Stage:
        self._wall, self._cpu, self._started = time.perf_counter(), time.process_time(), now()
        self._origin = {
            "stage": self.name,
            "config": to_dict(self.config),
            "inputs": sources(self.config) | self.state.digests(),
            "machine": {"device": str(self.device), "threads": torch.get_num_threads()} | versions() | zero.described(),
        }
        self._checkpoints = Checkpoints(self.out, self.state, self._origin, self.config.keep_checkpoints)
        with ExitStack() as stack:
            distributed.from_main(lambda: self._take(stack))
            text = distributed.main_first(self._restore)
            distributed.from_main(lambda: self._open(stack, text))
            self._stack = stack.pop_all()
        self._saved_at, self._save_seconds, self._saves = time.perf_counter(), 0.0, 0
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _take(self, stack: ExitStack) -> None:
        """Lock the directory, and clear it of what was not finished."""
        stack.enter_context(self._checkpoints.locked())
        remove_partials(self.out, *filter(Path.is_dir, self.out.iterdir()))

    def _open(self, stack: ExitStack, text: bytes) -> None:
        """Begin to log where `text` ends, and to show how far it is."""
        told = {"report_to": self.config.report_to, "title": self.name, "config": self._origin["config"]}
        self._log = RunLog(self.out, text, self.state.step, **told)
        stack.callback(self._log.close)
        self._progress = Progress(self.name, self.total_steps, before=self.state.step)
        stack.callback(self._progress.close)

    def _restore(self) -> bytes:
        """Go back to the newest checkpoint, if there is one -> the log up to there."""
        begun = (self.out / "log.jsonl").exists()
        found = self._checkpoints.restore()
        if found is None:
            if begun:
                say(f"{self.name}: no checkpoint yet in {self.out}, so it starts anew")
            self._resumed_at: list[int] = []
            return b""
        say(f"{self.name}: continued after step {self.state.step} of {self.total_steps}, in {self.out}")
        self._started, self._resumed_at = found.started, [*found.resumed_at, self.state.step]
        self._wall, self._cpu = self._wall - found.seconds, self._cpu - found.cpu_seconds
        return found.log

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._wall

    def _clocks(self) -> dict[str, float]:
        return {"seconds": self.seconds, "cpu_seconds": time.process_time() - self._cpu}

    def steps(self, batches: Iterable[Batch]) -> Iterator[tuple[int, Batch]]:
        """Number and batch of each step that is left; where a checkpoint is due, it is written between two steps."""
        for step, batch in enumerate(batches, self.state.step + 1):
            yield step, batch
            self.state.step = step
            if distributed.from_main(self._save_is_due):
                self._save()

    def _save_is_due(self) -> bool:
        every = self.config.save_every
        last = self._save_seconds / self._saves if self._saves else 0.0
        return time.perf_counter() - self._saved_at >= (max(every, last / MOST_TIME_SAVING) if every else 0.0)

    def _save(self) -> None:
        start = time.perf_counter()
        log = self._log.text() if distributed.is_main() else b""
        self._checkpoints.save(Record(self._started, self._resumed_at, **self._clocks(), log=log))
        self._saved_at = time.perf_counter()
        self._save_seconds, self._saves = self._save_seconds + self._saved_at - start, self._saves + 1

    def log(
        self,
        step: int,
        metrics: Mapping[str, float],
        show: Sequence[str],
        completions: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Log `metrics` for `step` (1-based), and replies as rows; the ones named in `show` appear beside the progress bar.

        Of several processes the main one writes, and tells the trackers.
        """
        if not distributed.is_main():
            return
        self._log.log(step, self._clocks() | dict(metrics), completions)
        if completions:
            self._progress.show(step, completions)
        self._progress.update(step, "  ".join(f"{name} {metrics[name]:.4g}" for name in show if name in metrics))

    def finish(self, results: Mapping[str, Any]) -> None:
        """Write `stage.json` and remove the checkpoints. Call it after everything else of the stage is on disk."""
        if not distributed.is_main():
            return
        summary = {
            "stage": self.name,
            "config": self._origin["config"],
            "started": self._started,
            **self._clocks(),
            "resumed_at": self._resumed_at,
            "saving": {"checkpoints": self._saves, "seconds": self._save_seconds},
            "command": command_line(),
            "versions": versions(),
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "processes": distributed.count(),
            **zero.described(),
            "parameters": self.parameters,
            "data": dict(self.data),
            "inputs": self._origin["inputs"],
            "results": dict(results),
        }
        write_json(self.out / SUMMARY, summary)
        clear(self.out)


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def command_line() -> str:
    """The command that started this process, its program without the directory."""
    program, *words = sys.argv
    return shlex.join([Path(program).name, *words])


def versions() -> dict[str, Any]:
    """What the numbers of a run depend on beside its config."""
    import transformers

    return {
        "rlhf_fast": rlhf_fast.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "build": rlhf_fast.build_info(),
    }
