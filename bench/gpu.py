"""What only a machine with an NVIDIA GPU can say, in one command of at most nine minutes: python -m bench.gpu [--minutes 9]

Builds for the GPU that is there, runs every CUDA test, then the benchmarks, then a few tests under compute-sanitizer where it is
installed (memcheck, racecheck, initcheck, synccheck). The share column sets the bytes that must move, at our median, against
what a plain copy of 1 GiB reaches in the same run; times include the launch and a synchronisation.

Writes bench/results/gpu-<name>.json and .md. A step that fails is in both and makes the exit status 1; a step for which no time
is left is in both too.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
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


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of the median of 20 copies of 1 GiB."""
    source = torch.randint(0, 255, (1 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(23):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        target.copy_(source)
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return 2 * source.numel() / statistics.median(times[3:])


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


def render(result: dict) -> str:
    copied = result["copy_bytes_per_second"]
    lines = [
        ", ".join(f"{key} {value}" for key, value in result["machine"].items()),
        f"copy {copied / 1e9:.0f} GB/s",
        "",
    ]
    lines += ["| step | outcome | seconds | |", "| --- | --- | --- | --- |"]
    lines += [f"| {s['step']} | {s['outcome']} | {s['seconds']:.0f} | {s['last_line']} |" for s in result["steps"]]
    lines += [
        "",
        "| case | size | ours, us | of copy | peer | ratio | spread |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {r['case']} | {r['size']} | {r['ours_us']:.1f} | {r['gb_s'] * 1e9 / copied:.0%} | {r['peer']} "
        f"| {r['ratio']:.1f}x | {r['low']:.1f}-{r['high']:.1f} |"
        for r in result["rows"]
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="limit for everything (default: 9)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(f"bench.gpu needs an NVIDIA GPU and a torch with CUDA; torch {torch.__version__} sees no GPU here")
    major, minor = torch.cuda.get_device_capability()
    env = {**os.environ, "RLHF_FAST_CUDA": "1", "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"}
    steps, python = Steps(options.minutes * 60, env), sys.executable
    found, measured = RESULTS / "last.json", 150  # seconds for the benchmarks
    found.unlink(missing_ok=True)
    if steps.run("build", [python, "setup.py", "-q", "build_ext", "--inplace"]):
        tests = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_*.py"))
        steps.run("tests", [python, "-m", "pytest", "-q", *tests, "-k", "cuda"], keep=measured)
        bench = [
            python,
            "-m",
            "pytest",
            "bench",
            "-c",
            "bench/pytest.ini",
            f"--benchmark-json={found}",
            "--benchmark-quiet",
        ]
        steps.run("benchmarks", bench)
        for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
            if sanitizer := shutil.which("compute-sanitizer"):
                command = [sanitizer, "--tool", tool, "--error-exitcode", "9", python, "-m", "pytest", "-q"]
                steps.run(tool, [*command, "tests/test_logprob.py", "tests/test_gae.py", "-k", SANITIZED])
            else:
                steps.done.append(
                    {"step": tool, "outcome": "compute-sanitizer not found", "seconds": 0, "last_line": ""}
                )
    rows = []
    if found.exists() and found.stat().st_size:
        from bench.report import ratios  # imports the library that the first step built

        rows = ratios(json.loads(found.read_text())["benchmarks"])
    result = {"machine": machine(), "copy_bytes_per_second": copy_bandwidth(), "steps": steps.done, "rows": rows}
    target = RESULTS / f"gpu-{re.sub('[^a-z0-9]+', '-', result['machine']['gpu'].lower()).strip('-')}.json"
    target.write_text(json.dumps(result, indent=1) + "\n")
    target.with_suffix(".md").write_text(render(result))
    print(f"\n{render(result)}\nwritten: {target.relative_to(ROOT)}, {target.with_suffix('.md').name}")
    return 0 if rows and all(s["outcome"] in ("passed", "compute-sanitizer not found") for s in steps.done) else 1


if __name__ == "__main__":
    sys.exit(main())
