"""What a stage leaves behind beside its model: `log.jsonl`, TensorBoard events, a progress bar, `stage.json`."""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TextIO, TypeVar

import torch

import rlhf_fast
from rlhf_fast.train import distributed
from rlhf_fast.train.checkpoint import SUMMARY, finite_json, remove_partials, write_file, write_json
from rlhf_fast.train.config import to_dict
from rlhf_fast.train.loop import StageConfig, say
from rlhf_fast.train.resume import Checkpoints, Record, State, clear, sources

LINE_EVERY = 30.0  # seconds between progress lines where there is no terminal
MOST_TIME_SAVING = 0.01  # share of a stage's time

Batch = TypeVar("Batch")


class RunLog:
    """`log.jsonl` (one object per logged step, flushed at once) and the same numbers for TensorBoard.

    It begins with `text`, the log of the first `done` steps; whatever else a killed process logged is forgotten.
    """

    def __init__(self, directory: Path, text: bytes = b"", done: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / "log.jsonl"
        with write_file(self._path) as partial:
            partial.write_bytes(text)
        self._file = self._path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=done + 1)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        line = {"step": step} | {name: finite_json(float(value)) for name, value in metrics.items()}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)

    def text(self) -> bytes:
        """What `log.jsonl` holds."""
        return self._path.read_bytes()

    def close(self) -> None:
        os.fsync(self._file.fileno())
        self._file.close()
        self._board.close()


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

    def close(self) -> None:
        if self._bar:
            self._bar.stop()


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
            "machine": {"device": str(self.device), "threads": torch.get_num_threads()} | versions(),
        }
        self._checkpoints = Checkpoints(self.out, self.state, self._origin, self.config.keep_checkpoints)
        with ExitStack() as stack:
            if distributed.is_main():
                stack.enter_context(self._checkpoints.locked())
                remove_partials(self.out, *filter(Path.is_dir, self.out.iterdir()))
            log = distributed.main_first(self._restore)
            if distributed.is_main():
                self._log = RunLog(self.out, log, self.state.step)
                stack.callback(self._log.close)
                self._progress = Progress(self.name, self.total_steps, before=self.state.step)
                stack.callback(self._progress.close)
            self._stack = stack.pop_all()
        self._saved_at, self._save_seconds, self._saves = time.perf_counter(), 0.0, 0
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

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

    def log(self, step: int, metrics: Mapping[str, float], show: Sequence[str]) -> None:
        """Log `metrics` for `step` (1-based); the ones named in `show` appear beside the progress bar."""
        if not distributed.is_main():
            return
        self._log.log(step, self._clocks() | dict(metrics))
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
