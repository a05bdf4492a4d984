"""What a stage leaves behind beside its model: `log.jsonl`, TensorBoard events, a progress bar, `stage.json`."""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TextIO

import torch

import rlhf_fast
from rlhf_fast.train.checkpoint import finite_json, write_json
from rlhf_fast.train.config import to_dict

LINE_EVERY = 30.0  # seconds between progress lines where there is no terminal


class RunLog:
    """`log.jsonl` (one object per logged step, flushed at once) and the same numbers for TensorBoard."""

    def __init__(self, directory: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        directory.mkdir(parents=True, exist_ok=True)
        self._file = (directory / "log.jsonl").open("a", encoding="utf-8")
        self._board = SummaryWriter(str(directory / "tensorboard"))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        line = {"step": step} | {name: finite_json(float(value)) for name, value in metrics.items()}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        os.fsync(self._file.fileno())
        self._file.close()
        self._board.close()


class Progress:
    """A bar with speed and time left on a terminal; elsewhere a line at the start, at the end and now and then."""

    def __init__(self, title: str, total: int, stream: TextIO | None = None) -> None:
        self._title, self._total, self._stream = title, total, stream or sys.stderr
        self._started, self._last_line = time.monotonic(), -math.inf
        self._bar = _rich_bar(self._stream) if self._stream.isatty() else None
        if self._bar:
            self._bar.start()
            self._task = self._bar.add_task(title, total=total, shown="")

    def update(self, done: int, shown: str) -> None:
        """`done` of `total` steps; `shown` are the numbers to print beside it."""
        now = time.monotonic()
        speed = done / max(now - self._started, 1e-9)
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
    """One run of one stage: `with Stage(...) as stage`, `stage.log(...)` at each step, `stage.finish(...)` at the end.

    `out` is made on entry, and so must have been claimed. `stage.json` is written by `finish`, last of all:
    its presence means that the stage is complete.
    """

    name: str
    config: Any
    out: Path
    total_steps: int
    parameters: int
    device: torch.device
    data: Mapping[str, Any] = field(default_factory=dict)

    def __enter__(self) -> Stage:
        self._wall, self._cpu, self._started = time.perf_counter(), time.process_time(), datetime.now(timezone.utc)
        self._log = RunLog(self.out)
        self._progress = Progress(self.name, self.total_steps)
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.close()
        self._log.close()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._wall

    def log(self, step: int, metrics: Mapping[str, float], show: Sequence[str]) -> None:
        """Log `metrics` for `step` (1-based); the ones named in `show` appear beside the progress bar."""
        clock = {"seconds": self.seconds, "cpu_seconds": time.process_time() - self._cpu}
        self._log.log(step, clock | dict(metrics))
        self._progress.update(step, "  ".join(f"{name} {metrics[name]:.4g}" for name in show if name in metrics))

    def finish(self, results: Mapping[str, Any]) -> None:
        """Write `stage.json`. Call it after everything else of the stage is on disk."""
        summary = {
            "stage": self.name,
            "config": to_dict(self.config),
            "started": self._started.isoformat(timespec="seconds"),
            "seconds": self.seconds,
            "cpu_seconds": time.process_time() - self._cpu,
            "command": command_line(),
            "versions": versions(),
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "parameters": self.parameters,
            "data": dict(self.data),
            "results": dict(results),
        }
        write_json(self.out / "stage.json", summary)


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
