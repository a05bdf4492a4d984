import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line():
    done = subprocess.run([sys.executable, "-m", "bench.gpu"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert (
        done.stderr.strip().startswith("bench.gpu needs an NVIDIA GPU") and len(done.stderr.strip().splitlines()) == 1
    )


def test_steps_keep_what_failed_and_what_had_no_time(tmp_path):
    steps = gpu.Steps(60, {})
    assert steps.run("good", [sys.executable, "-c", "print('one'); print('two')"])
    assert not steps.run("bad", [sys.executable, "-c", "raise SystemExit(3)"])
    assert not steps.run("late", [sys.executable, "-c", ""], keep=100)
    assert [(s["outcome"], s["last_line"]) for s in steps.done] == [
        ("passed", "two"),
        ("failed (3)", ""),
        ("no time left", ""),
    ]


def test_the_table_gives_shares_of_the_copy():
    row = {
        "case": "c",
        "size": "1x2",
        "peer": "eager",
        "ours_us": 10.0,
        "ratio": 2.0,
        "low": 1.5,
        "high": 2.5,
        "gb_s": 900.0,
    }
    steps = [{"step": "tests", "outcome": "passed", "seconds": 3.0, "last_line": "9 passed"}]
    text = gpu.render({"machine": {"gpu": "G"}, "copy_bytes_per_second": 1e12, "steps": steps, "rows": [row]})
    assert "| c | 1x2 | 10.0 | 90% | eager | 2.0x | 1.5-2.5 |" in text and "copy 1000 GB/s" in text
