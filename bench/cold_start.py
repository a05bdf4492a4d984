"""Seconds from a new process to the first log-probs, ours and TRL 1.16's: python -m bench.cold_start

torch is imported before the clock starts. On the CPU TRL's functions run in PyTorch: its Triton kernel, which a GPU compiles at
the first call, is imported at most. So compared here are import and first call on the CPU; ours compiles nothing on a GPU either.

Needs the environments of `make parity`. Writes bench/results/cold-start.json and .md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile

from bench import contenders

RUNS = 7
CALL = "logits, ids = torch.randn(2, 8, 32000), torch.zeros(2, 8, dtype=torch.long)"
CONTENDERS = {
    "rlhf_fast": (None, "import rlhf_fast", "rlhf_fast.gather_logprobs(logits, ids, with_entropy=True)"),
    "rlhf_fast, with TRL patched": (
        "trl-1.16",
        "import rlhf_fast; rlhf_fast.patch('trl', quiet=True); import trl.trainer.utils",
        "trl.trainer.utils.selective_log_softmax_and_entropy(logits, ids)",
    ),
    "trl.trainer.utils": (
        "trl-1.16",
        "import trl.trainer.utils",
        "trl.trainer.utils.selective_log_softmax_and_entropy(logits, ids)",
    ),
    "trl.kernels, with Triton": ("trl-1.16-triton", "import trl.kernels.logprob_entropy", None),
}


def seconds(python: str, imports: str, call: str | None) -> list[float | None]:
    """Import and first call, timed inside a new process that keeps nothing on disk."""
    script = (
        f"import json, time, torch; {CALL}\nstart = time.perf_counter()\n{imports}\nimported = time.perf_counter()\n"
        f"{call or 'pass'}\nprint(json.dumps([imported - start, time.perf_counter() - imported]))"
    )
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [python, "-c", script],
            cwd=contenders.ROOT,
            env={
                "PATH": "/usr/bin:/bin",
                "OMP_NUM_THREADS": "1",
                "TRITON_CACHE_DIR": cache,
                "HOME": cache,
                "HF_HUB_OFFLINE": "1",
            },
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    imported, called = json.loads(done.stdout.splitlines()[-1])
    return [imported, called if call else None]


def main() -> None:
    argparse.ArgumentParser(prog="python -m bench.cold_start", description=__doc__.splitlines()[0]).parse_args()
    found = {}
    for name, (environment, imports, call) in CONTENDERS.items():
        python = contenders.peer_python(environment) if environment else sys.executable
        runs = [seconds(python, imports, call) for _ in range(1 + RUNS)][1:]  # the first one reads the disk
        found[name] = [[run[i] for run in runs if run[i] is not None] for i in (0, 1)]

    def cell(values: list[float]) -> str:
        return f"{contenders.median(values):.2g} ({contenders.spread(values)})" if values else "-"

    rows = [[name, cell(imports), cell(calls)] for name, (imports, calls) in found.items()]
    text = "\n".join(
        [
            f"{contenders.machine()}, 1 thread; commit {contenders.commit()}",
            "",
            f"Seconds in a new process that has imported torch: median of {RUNS} after one that reads the disk, least and most.",
            "",
            contenders.table(["what", "import", "first call, 16 x 32,000"], rows),
        ]
    )
    contenders.write(
        "cold-start", {"machine": contenders.machine(), "commit": contenders.commit(), "seconds": found}, text
    )


if __name__ == "__main__":
    main()
