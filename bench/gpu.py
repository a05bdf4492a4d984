"""What only a machine with an NVIDIA GPU can say, in one command of at most nine minutes: python -m bench.gpu [--minutes 9]

Builds for the GPU that is there, runs every CUDA test, then the benchmarks, then a few tests under compute-sanitizer where it is
installed (memcheck, racecheck, initcheck, synccheck). Times include the launch and a synchronisation; what the columns and plots
mean, bench/report.py says.

Writes result.json, table.md and the plots to bench/results/gpu-<name>/. A step that fails is in both and makes the exit status 1;
a step for which no time is left is in both too.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

from bench import machine_code

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
BENCHMARKS, SANITIZERS = 150, 100  # seconds kept for them while what comes before runs
SANITIZED = "cuda and (alignment or paper or replaces or packed or whiten)"


class Steps:
    """Commands in their order, within one limit of time; what became of each."""

    def __init__(self, seconds: float, env: dict[str, str]):
        self.end, self.env = time.monotonic() + seconds, env
        self.done: list[dict] = []

    def run(self, name: str, command: list[str], keep: float = 0) -> bool:
        """`keep`: seconds to leave for the steps after this one."""
        left, start = self.end - time.monotonic() - keep, time.monotonic()
        print(f"-- {name}", flush=True)
        if left <= 0:
            outcome, text = "no time left", ""
        else:
            try:
                process = subprocess.run(
                    command,
                    cwd=ROOT,
                    env=self.env,
                    timeout=left,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
                outcome, text = (
                    "passed" if process.returncode == 0 else f"failed ({process.returncode})",
                    process.stdout,
                )
            except subprocess.TimeoutExpired as error:
                outcome, text = f"stopped after {left:.0f} s", (error.stdout or b"").decode(errors="replace")
        last = next((line for line in reversed(text.splitlines()) if line.strip()), "")
        self.done.append({"step": name, "outcome": outcome, "seconds": time.monotonic() - start, "last_line": last})
        if outcome != "passed":
            print(text[-4000:])
        print(f"   {outcome}: {last}", flush=True)
        return outcome == "passed"


def first_line(command: list[str]) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def machine() -> dict[str, str]:
    dirty = " (dirty)" if first_line(["git", "status", "--porcelain"]) != "unknown" else ""
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
        "torch": torch.__version__,
        "commit": first_line(["git", "rev-parse", "--short=12", "HEAD"]) + dirty,
    }


def render(result: dict, table: str) -> str:
    lines = [", ".join(f"{key} {value}" for key, value in result["system"].items())]
    lines += [f"copy {result['copy_bytes_per_second'] / 1e9:.0f} GB/s"] if result["rows"] else []
    lines += ["", "| step | outcome | seconds | |", "| --- | --- | --- | --- |"]
    lines += [f"| {s['step']} | {s['outcome']} | {s['seconds']:.0f} | {s['last_line']} |" for s in result["steps"]]
    return "\n".join([*lines, "", table]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="limit for everything (default: 9)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(f"bench.gpu needs an NVIDIA GPU and a torch with CUDA; torch {torch.__version__} sees no GPU here")
    major, minor = torch.cuda.get_device_capability()
    env = {**os.environ, "RLHF_FAST_CUDA": "1", "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"}
    steps, python = Steps(options.minutes * 60, env), sys.executable
    found = RESULTS / "last.json"
    found.unlink(missing_ok=True)
    if steps.run("build", [python, "setup.py", "-q", "build_ext", "--inplace"]):
        tests = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_*.py"))
        steps.run("tests", [python, "-m", "pytest", "-q", *tests, "-k", "cuda"], keep=BENCHMARKS + SANITIZERS)
        bench = [python, "-m", "pytest", "bench", "-c", "bench/pytest.ini", "--benchmark-quiet"]
        bench += ["--benchmark-max-time=0.2"]  # seconds a row: what a GPU needs is settled soon
        steps.run("benchmarks", [*bench, f"--benchmark-json={found}"], keep=SANITIZERS)
        for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
            if sanitizer := machine_code.find_tool("compute-sanitizer"):
                command = [sanitizer, "--tool", tool, "--error-exitcode", "9", python, "-m", "pytest", "-q"]
                steps.run(tool, [*command, "tests/test_logprob.py", "tests/test_gae.py", "-k", SANITIZED])
            else:
                steps.done.append(
                    {"step": tool, "outcome": "compute-sanitizer not found", "seconds": 0, "last_line": ""}
                )
    return record(steps.done, found)


def record(steps: list[dict], found: Path) -> int:
    """Writes the folder; 0 where every step passed."""
    from bench import report  # imports the library that the first step built

    system = machine()
    result = {"machine": system["gpu"], "system": system, "steps": steps, "rows": []}
    if found.exists() and found.stat().st_size:
        benchmarks = json.loads(found.read_text())["benchmarks"]
        result["rows"] = report.ratios(benchmarks)
        result["copy_bytes_per_second"] = benchmarks[0]["extra_info"]["copy"]
    folder = RESULTS / f"gpu-{re.sub('[^a-z0-9]+', '-', system['gpu'].lower()).strip('-')}"
    drawn = report.write(report.of_logprobs(result["rows"], system["gpu"]), folder)
    text = render(result, report.render(result["rows"]))
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / "table.md").write_text(text)
    names = ["result.json", "table.md", *(path.name for path in drawn)]
    print(f"\n{text}\nwritten to {folder.relative_to(ROOT)}: {', '.join(names)}")
    return 0 if result["rows"] and all(s["outcome"] in ("passed", "compute-sanitizer not found") for s in steps) else 1


if __name__ == "__main__":
    sys.exit(main())
