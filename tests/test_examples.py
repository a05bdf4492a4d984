"""The example and its diff: few lines, and the same curves."""

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def history(script: Path, monkeypatch) -> list[dict[str, float]]:
    """What a few updates report: tiny ones, with replies that end."""
    monkeypatch.setitem(sys.modules, "ppo_rlhf", None)  # dataclass fields look their module up
    example = runpy.run_path(str(script), run_name="ppo_rlhf")
    return example["train"](example["Args"](updates=4, batch_size=32, vocab=16, hidden=32, response_length=12))


def test_the_diff_changes_ten_lines_at_most_and_no_curve(tmp_path, monkeypatch):
    diff = (EXAMPLES / "ppo_rlhf.diff").read_text()
    assert len(re.findall(r"^\+(?!\+\+)", diff, re.MULTILINE)) <= 10
    shutil.copytree(EXAMPLES, tmp_path / "examples")
    subprocess.run(["git", "apply", "examples/ppo_rlhf.diff"], cwd=tmp_path, check=True)
    fused = tmp_path / "examples" / "ppo_rlhf.py"
    assert "rlhf_fast" in fused.read_text()
    plain, ours = history(EXAMPLES / "ppo_rlhf.py", monkeypatch), history(fused, monkeypatch)
    for a, b in zip(plain, ours, strict=True):
        assert b == pytest.approx(a, rel=1e-4, abs=1e-4)
    assert min(row["length"] for row in plain) < 12, "no reply ended early, so the mask was not tested"
