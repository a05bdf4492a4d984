import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from bench import gpu, report

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


def timing(case: str, size: str, who: str, median: float) -> dict:
    """As pytest-benchmark writes it."""
    info = {
        "case": case,
        "size": size,
        "who": who,
        "bytes": 9000,
        "copy": 1e9,
        "peak": 4 << 20 if who == "eager" else 1 << 20,
        "inputs": 2 << 20,
        "error": 1e-6,
    }
    stats = {"median": median, "q1": median * 0.9, "q3": median * 1.1}
    return {"group": f"{case} {size}", "extra_info": info, "stats": stats}


def test_it_writes_json_table_and_plots_to_one_folder(tmp_path, monkeypatch):
    found = tmp_path / "last.json"
    kinds = [f"{case} {kind}" for case in report.PASSES for kind in ("float32", "bfloat16")]
    sides = {"rlhf_fast": 1e-5, "eager": 2e-5}
    rows = [timing(case, f"1x2x{v}", who, t) for case in kinds for v in (82, 32000) for who, t in sides.items()]
    found.write_text(json.dumps({"benchmarks": rows}))
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "machine", lambda: {"gpu": "NVIDIA H100 (80 GB)", "torch": "2.13"})
    steps = [{"step": "tests", "outcome": "passed", "seconds": 3.0, "last_line": "9 passed"}]
    assert gpu.record(steps, found) == 0
    assert gpu.record([*steps, {**steps[0], "outcome": "failed (1)"}], found) == 1
    folder = tmp_path / "gpu-nvidia-h100-80-gb"
    plots = {f"{what}-{kind}.svg" for what in ("bandwidth", "memory") for kind in ("float32", "bfloat16")}
    assert {path.name for path in folder.iterdir()} == {"result.json", "table.md", *plots}
    assert json.loads((folder / "result.json").read_text())["rows"][0]["ratio"] == pytest.approx(2)
    table = (folder / "table.md").read_text()
    assert "copy 1 GB/s" in table and "| tests | passed | 3 | 9 passed |" in table
    assert "| logprobs float32 | 1x2x82 | 10.0 | eager | 2.0x | 1.6-2.4 | 0.9 | 90% | 1.0 | 4.0 |" in table
    assert gpu.record(steps, tmp_path / "none.json") == 1, "nothing was measured"


def test_the_plots_say_what_was_measured():
    kinds = [f"{case} float32" for case in report.PASSES]
    sides = {"rlhf_fast": 1e-5, "eager": 2e-5}
    rows = report.ratios(
        [timing(case, f"1x2x{v}", who, t) for case in kinds for v in (82, 500) for who, t in sides.items()]
    )
    drawn = report.of_logprobs(rows, "a GPU")
    assert set(drawn) == {"bandwidth-float32.svg", "memory-float32.svg"}, "nothing was measured in bfloat16"
    for svg in drawn.values():
        assert all(tag in svg for tag in ("prefers-color-scheme", "<polyline", "vocabulary"))
        ElementTree.fromstring(svg)
    assert "logprobs: from 90% to 90%" in drawn["bandwidth-float32.svg"]
    assert (
        "ours: from 0.5 to 0.5" in drawn["memory-float32.svg"] and "eager: from 2 to 2" in drawn["memory-float32.svg"]
    )


def test_of_a_vocabulary_measured_twice_the_result_with_more_updates_counts():
    def one(*seconds: float) -> dict:
        return {"cpu_seconds": list(seconds), "peak_bytes": 1 << 30}

    some = {"machine": "M", "settings": {"ppo_epochs": 4, "threads": 1}}
    few = {
        **some,
        "contenders": {"82": {"rlhf_fast": one(9.0)}, "500": {"rlhf_fast": one(3.0), "trl-1.12": {"failed": "no"}}},
    }
    many = {**some, "contenders": {"82": {"rlhf_fast": one(1.0, 2.0, 4.0)}}}
    for results in ([few, many], [many, few]):
        assert "rlhf_fast: from 2 to 3" in report.of_updates(results)["ppo-update-time.svg"]
    assert report.of_updates([]) == {}
