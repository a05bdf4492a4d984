"""Contenders that need a process and perhaps an environment of their own: CPU-seconds, wall time, peak memory.

One command starts them one after another, each under a limit on its memory, and keeps what each wrote in build/bench/: a run cut
short goes on where it stopped as long as neither the code nor the settings have changed. Standard library only, because the
environment of a peer holds no more of this project than its source.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
KEPT = ROOT / "build" / "bench"
GIB, MB = 1 << 30, 1 << 20
Result = dict[str, object]


# ------------------------------------------------------------------------------------------ inside a contender


def memory(name: str) -> int:
    """Bytes of this process as Linux counts them: VmRSS (now) or VmHWM (peak)."""
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) << 10


def forget_peak() -> int:
    """Start the peak anew from what is resident now, which is returned."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


@dataclass
class Laps:
    """CPU-seconds of this process and wall seconds of one round after another."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    def start(self) -> None:
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    def lap(self) -> None:
        cpu, wall = time.process_time(), time.perf_counter()
        self.cpu.append(cpu - self._cpu)
        self.wall.append(wall - self._wall)
        self._cpu, self._wall = cpu, wall

    def after(self, warm_up: int) -> Result:
        return {"cpu_seconds": self.cpu[warm_up:], "wall_seconds": self.wall[warm_up:], "warm_up": self.cpu[:warm_up]}


# ------------------------------------------------------------------------------------------ around the contenders


def peer_python(name: str) -> str:
    """The interpreter of a peer's environment; made with `make peers`."""
    python = ROOT / "build" / "peers" / name / "bin" / "python"
    if not python.exists():
        sys.exit(f"{python.relative_to(ROOT)} is missing: `make peers` installs what bench/peers/{name}.txt pins")
    return str(python)


def run(module: str, contender: str, settings: Mapping[str, object], *, python: str, memory_gib: float) -> Result:
    """What `python -m module contender SETTINGS FILE` wrote into FILE, or how it failed."""
    key = {"module": module, "contender": contender, "settings": dict(settings), "code": code()}
    kept = KEPT / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]}.json"
    label = f"{contender} {' '.join(f'{name}={value}' for name, value in settings.items())}"
    if kept.exists():
        print(f"-- {label}: kept from {kept.relative_to(ROOT)}", flush=True)
        return json.loads(kept.read_text())["result"]
    print(f"-- {label}", flush=True)
    KEPT.mkdir(parents=True, exist_ok=True)
    written = kept.with_suffix(".part")
    threads = str(settings.get("threads", 1))
    done = subprocess.run(
        [python, "-m", module, "--contender", contender, json.dumps(dict(settings)), str(written)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (int(memory_gib * GIB),) * 2),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode == 0:
        result = json.loads(written.read_text())
        written.unlink()
    else:
        last = next((line for line in reversed(done.stdout.splitlines()) if line.strip()), "no output")
        result = {"failed": f"exit {done.returncode}: {last.strip()[:300]}", "memory_gib": memory_gib}
        print(done.stdout[-2000:], flush=True)
    result["load_average"] = os.getloadavg()[0]
    if "failed" not in result:
        kept.write_text(json.dumps(key | {"result": result}, indent=1) + "\n")
    return result


def code() -> str:
    """The commit, what differs from it, and the compiled library: what a kept result is valid for."""
    changes = git("diff", "HEAD", "--", "bench", "rlhf_fast", "csrc")
    library = [f"{path.name} {path.stat().st_mtime_ns}" for path in sorted((ROOT / "rlhf_fast").glob("_C*.so"))]
    return f"{git('rev-parse', 'HEAD')} {hashlib.sha256((changes + str(library)).encode()).hexdigest()[:12]}"


def git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def commit() -> str:
    dirty = " (dirty)" if git("status", "--porcelain", "--", "bench", "rlhf_fast", "csrc") else ""
    return git("rev-parse", "HEAD")[:12] + dirty


def machine() -> str:
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{cpu[1] if cpu else platform.machine()}, {os.cpu_count()} cores"


# --------------------------------------------------------------------------------------------------------- tables


def median(values: list[float]) -> float:
    return statistics.median(values)


def spread(values: list[float]) -> str:
    return f"{min(values):.3g}-{max(values):.3g}"


def versions(part: object) -> str:
    """Every version that the contenders in a result reported."""

    def known(part: object) -> Result:
        inner = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
        found = {key: value for one in inner for key, value in known(one).items()}
        return found | part["versions"] if isinstance(part, dict) and "versions" in part else found

    return ", ".join(f"{name} {version}" for name, version in known(part).items())


def table(columns: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [columns, ["---"] * len(columns), *rows])


def write(name: str, result: Result, text: str) -> None:
    """bench/results/NAME.json with every number and NAME.md with the table."""
    target = RESULTS / f"{name}.json"
    target.write_text(json.dumps(result, indent=1) + "\n")
    target.with_suffix(".md").write_text(text + "\n")
    print(f"\n{text}\n\nwritten: {target.relative_to(ROOT)}, {target.with_suffix('.md').name}")
