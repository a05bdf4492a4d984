"""A library's own tests with and without our functions in it: python -m tests.adapters.peer_tests ENVIRONMENT TREE [FILE ...]

TREE is a checkout of the library, a bare git repository of which HEAD is taken, or the site-packages of an environment, where the
wheel brings its tests along (OpenRLHF's, some of verl's); its tests run, in a copy, against the library installed in
build/peers/<environment>. Printed is how many passed, failed and were skipped both ways, how many ran through an op of ours, and
every test that came out differently. Exit code 1 where one did that DIFFERENT does not explain. A test that needs a GPU or a
model that offline_<library>.py does not make fails or is skipped both ways and shows nothing.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.adapters.parity import ENVIRONMENTS, ROOT, python_of

# The tests of what is replaced, and of what runs on it.
FILES = {
    "trl-1.12": [
        "tests/test_utils.py",
        "tests/experimental/test_ppo_trainer.py",
        "tests/test_dpo_trainer.py",
        "tests/experimental/test_orpo_trainer.py",
        "tests/experimental/test_tpo_trainer.py",
    ],
    "trl-1.16": ["tests/test_utils.py", "tests/test_grpo_trainer.py", "tests/test_rloo_trainer.py"],
    "verl-0.9": [
        "tests/models/test_fused_kernels_ulysses_sp_on_cpu.py",
        "tests/trainer/ppo/test_core_algos_on_cpu.py",
        "tests/trainer/ppo/test_dynamic_policy_losses_on_cpu.py",
        "tests/trainer/ppo/test_loss_aggregation_on_cpu.py",
        "tests/trainer/ppo/test_metric_utils_on_cpu.py",
        "tests/trainer/ppo/test_reinforce_pp_multiturn_on_cpu.py",
        "tests/trainer/ppo/test_rollout_corr.py",
        "tests/trainer/ppo/test_rollout_corr_integration.py",
        "tests/trainer/ppo/test_value_loss_normalization_on_cpu.py",
        "tests/trainer/test_multi_trajectories_advantage_on_cpu.py",
        "tests/utils/test_torch_functional.py::test_masked_mean",
        "tests/workers/test_distillation_topk_symmetry_on_cpu.py",
    ],
    "openrlhf-0.11": ["tests"],
    "nemo-rl": [
        "tests/unit/algorithms/test_advantage_estimator.py",
        "tests/unit/algorithms/test_loss_functions.py",
        "tests/unit/algorithms/test_ppo.py",
        "tests/unit/algorithms/test_utils.py",
    ],
}
# Their tests load files of the library by their path from the tests.
BY_PATH = ("openrlhf-0.11",)
# Tests that come out differently on purpose: a regular expression of their names, and the reason.
FLOAT32 = "16-bit logits: the test asks for a 16-bit result, ours is float32"
TRL = {
    r"entropy_from_logits_2_dims\[dtype[23]-": FLOAT32,
    r"selective_log_softmax(_multi_index)?\[.*dtype[23]\]": FLOAT32,
}
DIFFERENT = {"trl-1.12": TRL, "trl-1.16": TRL}


def outcomes(environment: str, tree: Path, files: list[str], *, patched: bool) -> tuple[dict[str, str], int]:
    """What each test did, "passed", "failed" or "skipped", by its name, and how many of them ran through an op of ours."""
    library = ENVIRONMENTS[environment]
    report = tree / f"{patched}.xml"
    command = [str(python_of(environment)), "-m", "pytest", "-q", "--continue-on-collection-errors"]
    command += [f"--junitxml={report}", "-o", "junit_family=xunit1", "-p", "peer_plugin"]
    for name in ("peer_plugin", "stubs"):
        shutil.copy(ROOT / "tests" / "adapters" / f"{name}.py", tree)
    hub = ROOT / "tests" / "adapters" / f"offline_{library}.py"
    if hub.exists():
        shutil.copy(hub, tree / "offline_hub.py")
        command += ["-p", "offline_hub"]
    path = os.pathsep.join(filter(None, [str(tree), os.environ.get("PYTHONPATH")]))
    variables = {"PEER_LIBRARY": library, "PEER_PATCHED": str(int(patched)), "PYTHONPATH": path}
    variables |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HUB_CACHE": str(tree / "hub")}
    done = subprocess.run([*command, *files], cwd=tree, env=os.environ | variables, capture_output=True, text=True)
    if not report.exists():
        sys.exit(f"{' '.join(command)} wrote no report:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    found, through = {}, 0
    for case in ElementTree.parse(report).iter("testcase"):
        marks = {child.tag for child in case}
        name = f"{case.get('classname')}::{case.get('name')}"
        found[name] = "failed" if marks & {"failure", "error"} else "skipped" if "skipped" in marks else "passed"
        through += any(p.get("name") == "calls" and p.get("value") != "0" for p in case.iter("property"))
    return found, through


def copy_tests(source: Path, target: Path, environment: str) -> None:
    if (source / "tests").is_dir():
        shutil.copytree(source / "tests", target / "tests")
    else:
        archive = subprocess.run(
            ["git", "-C", str(source), "archive", "HEAD", "tests"], stdout=subprocess.PIPE, check=True
        )
        subprocess.run(["tar", "x", "-C", str(target)], input=archive.stdout, check=True)
    (target / "rlhf_fast").symlink_to(ROOT / "rlhf_fast")
    if environment in BY_PATH:
        library = ENVIRONMENTS[environment]
        (installed,) = python_of(environment).parents[1].glob(f"lib/python*/site-packages/{library}")
        (target / library).symlink_to(installed)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.adapters.peer_tests", description=__doc__.splitlines()[0])
    parser.add_argument("environment", choices=list(FILES))
    parser.add_argument("tree", type=Path)
    parser.add_argument("files", nargs="*", help="default: the tests of what is replaced")
    options = parser.parse_args()
    files = options.files or FILES[options.environment]
    with TemporaryDirectory() as directory:
        copy_tests(options.tree, Path(directory), options.environment)
        (plain, _), (patched, through) = (
            outcomes(options.environment, Path(directory), files, patched=patched) for patched in (False, True)
        )
    print(f"{options.environment}: {' '.join(files)}\n\n| | passed | failed | skipped |\n| --- | --- | --- | --- |")
    for name, found in (("as it is", plain), ("patched", patched)):
        count = Counter(found.values())
        print(f"| {name} | {count['passed']} | {count['failed']} | {count['skipped']} |")
    print(f"\n{through} of them ran through an op of ours.")
    if "passed" not in plain.values() or not through:
        sys.exit(
            "no test passed as it is, or none ran through ours, so nothing was shown: are the tests of this version?"
        )
    unexplained = []
    for name in sorted(plain.keys() | patched.keys()):
        before, after = plain.get(name, "missing"), patched.get(name, "missing")
        if before != after:
            why = next((w for p, w in DIFFERENT.get(options.environment, {}).items() if re.search(p, name)), None)
            print(f"{name}: {before}, patched {after}: {why or 'UNEXPLAINED'}")
            unexplained += [name] * (why is None)
    if unexplained:
        sys.exit(1)


if __name__ == "__main__":
    main()
