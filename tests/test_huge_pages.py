"""Large outputs are advised to be huge pages: their first write costs more than computing them otherwise."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Prints, for a small and a large output, the flags that Linux keeps for the mapping they lie in.
SCRIPT = """
import torch, rlhf_fast
held = []  # so that no memory is used again
for tokens in (1 << 10, 1 << 23):
    held.append(rlhf_fast.gae(torch.randn(1, tokens), torch.randn(1, tokens)))
    middle = held[-1][0].data_ptr() + 2 * tokens
    inside = False
    for line in open("/proc/self/smaps"):
        key = line.split()[0]
        if "-" in key and not key.endswith(":"):
            first, last = (int(x, 16) for x in key.split("-"))
            inside = first <= middle < last
        elif inside and key == "VmFlags:":
            print("hg" in line.split())
"""


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads Linux's /proc")
@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this kernel has no transparent huge pages"
)
@pytest.mark.parametrize("value, large", [(None, "True"), ("1", "True"), ("0", "False")])
def test_large_outputs_ask_for_huge_pages(monkeypatch, value, large):
    monkeypatch.delenv("RLHF_FAST_HUGE_PAGES", raising=False)
    if value is not None:
        monkeypatch.setenv("RLHF_FAST_HUGE_PAGES", value)
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", large]
