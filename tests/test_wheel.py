"""What is shipped: the source archive, the symbols of the library, the rules that a wheel must pass, its messages on a machine
that lacks something. Building the wheels (`make wheel`) and installing them (`make matrix`) takes minutes: not done here."""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest

import rlhf_fast
from release import matrix, smoke, wheel

ROOT = Path(__file__).parents[1]
LIBRARY = next(Path(rlhf_fast.__file__).parent.glob("_C*.so"))
needs_binutils = pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf (binutils) is not installed")


def python(code: str, cwd: Path, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, env={**os.environ, **env}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path):
    """A copy of what a build reads; building writes into it."""
    folder = tmp_path / "checkout"
    skipped = shutil.ignore_patterns("__pycache__", "*.so", "results")
    for name in ("csrc", "rlhf_fast", "tests", "bench", "release"):
        shutil.copytree(ROOT / name, folder / name, ignore=skipped)
    for name in ("setup.py", "pyproject.toml", "README.md", "MANIFEST.in", "Makefile", "requirements.txt"):
        shutil.copy2(ROOT / name, folder)
    return folder


def test_the_source_archive_holds_every_source_wherever_it_is_made(checkout, tmp_path):
    """Without nvcc too: setuptools alone would leave out the CUDA sources there."""
    command = [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=checkout, env={**os.environ, "RLHF_FAST_CUDA": "0"}, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    sources = {str(p.relative_to(ROOT)) for room in ("csrc", "tests/emulate") for p in (ROOT / room).glob("*.*")}
    assert {"csrc/ops_cuda.cu", "csrc/device.h", "tests/cases.py", "release/requirements.txt", "Makefile"} <= names
    assert sources <= names and not any(n.endswith((".so", ".o", ".pyc")) for n in names)


@needs_binutils
def test_the_library_uses_torch_through_its_stable_interface_alone():
    assert wheel.library_faults(LIBRARY) == []
    used = wheel.run("readelf", "--dyn-syms", "-W", LIBRARY)
    assert "aoti_torch_empty_strided" in used and "_ZN3c10" not in used and "_ZN2at" not in used


@needs_binutils
def test_a_wheel_that_is_not_fit_is_refused_with_every_reason(tmp_path, monkeypatch):
    source = tmp_path / "bad.cpp"
    source.write_text("namespace c10 { void warn(int); } void f() { c10::warn(1); }")
    library = tmp_path / "bad.so"
    subprocess.run(
        ["g++", "-shared", "-fPIC", str(source), "-o", str(library), "-Wl,--no-as-needed", "-lcrypt"], check=True
    )
    bad = tmp_path / "rlhf_fast-0.1.0-cp311-cp311-linux_x86_64.whl"
    with zipfile.ZipFile(bad, "w") as archive:
        archive.write(library, "rlhf_fast/_C.so")
        archive.writestr("tests/__init__.py", "")
    monkeypatch.setattr(wheel, "LIMIT", 1000)
    text = "\n".join(wheel.faults(bad))
    for fault in (
        "bytes, more than 1,000",
        "no manylinux tag",
        "holds tests",
        "needs libcrypt.so.1",
        "does not need libtorch.so",
    ):
        assert fault in text
    assert "uses _ZN3c104warnEi, outside the stable ABI" in text


def test_nvcc_is_found_as_a_package(checkout, tmp_path):
    nvcc = tmp_path / "site" / "nvidia" / "cu13" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); import setup; print(setup.find_nvcc())"
    assert python(code, checkout, CUDA_HOME="/nowhere", PATH="/nowhere") == str(nvcc)
    assert python("import setup; print(setup.find_nvcc())", checkout, CUDA_HOME="/nowhere", PATH="/nowhere") == "None"


def test_kernels_compiled_for_another_python_are_linked_unless_a_source_is_newer(checkout, tmp_path):
    objects = tmp_path / "objects"
    code = "import setup; e = setup.extension(); print(*e.sources, *e.extra_objects)"
    env = {"RLHF_FAST_OBJECTS": str(objects), "RLHF_FAST_CUDA": "0"}
    every = "csrc/module.cpp csrc/ops_cpu.cpp"
    assert python(code, checkout, **env) == every
    objects.mkdir()
    (objects / "ops_cpu.o").touch()
    assert python(code, checkout, **env) == f"csrc/module.cpp {objects}/ops_cpu.o"
    os.utime(checkout / "csrc" / "gae.h", (time.time() + 60,) * 2)
    assert python(code, checkout, **env) == every


def test_the_runner_builds_for_the_pythons_that_the_project_names():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    runner = project["tool"]["cibuildwheel"]
    assert runner["build"].split() == [f"cp3{minor}-*" for minor in wheel.PYTHONS]
    assert project["project"]["requires-python"] == f">=3.{wheel.PYTHONS[0]}"
    for command in (runner["before-build"], runner["test-command"]):
        assert (ROOT / command.partition("{project}/")[2]).exists()
    assert runner["linux"]["repair-wheel-command"].startswith("python -m release.wheel repair ")
    pinned = (ROOT / "release" / "requirements.txt").read_text()
    both = [
        line
        for line in (ROOT / "requirements.txt").read_text().splitlines()
        if line.split("==")[0] in ("torch", "pybind11")
    ]
    assert len(both) == 2 and all(line in pinned for line in both)


@pytest.mark.parametrize("check", [smoke.check_old_torch, smoke.check_stream, smoke.check_driver])
def test_a_machine_that_lacks_something_is_told_what(check):
    said = check()
    if said in ("no CUDA in this wheel", "a GPU is here", "not asked"):
        pytest.skip(said)
    assert said


def test_the_matrix_says_what_failed_and_what_was_not_to_be_had(monkeypatch):
    def broken(folder, python, *packages):
        raise SystemExit("disk full")

    row = matrix.Row.parse("2.10.0+cpu/3.10")
    monkeypatch.setattr(matrix, "wheel_for", lambda python: Path("a.whl"))
    monkeypatch.setattr(matrix, "environment", broken)
    monkeypatch.setattr(matrix, "is_found", lambda python, torch: False)
    absent = matrix.play(row, Path("python3.10"), keep=False)
    monkeypatch.setattr(matrix, "is_found", lambda python, torch: True)
    failed = matrix.play(row, Path("python3.10"), keep=False)
    assert failed["import"] == "FAILED: disk full"
    good = {"import": "0.1 s", "torch": "2.14.1 13.0", "CUDA stream": "bound (13.0): ...", "seconds": "9"}
    rows = {row: absent, matrix.Row("2.9.1", "3.10"): failed, matrix.Row("newest", "3.11"): good}
    text = matrix.render(rows, {f"3.{minor}": Path() for minor in (10, 11, 12, 13)})
    assert "| 3.10 | 2.10.0+cpu | not had |" in text and "| 3.10 | 2.9.1 | FAILED |" in text
    assert "| 3.11 | 2.14.1 13.0 | 0.1 s |" in text
    assert "not had: torch 2.10.0+cpu on Python 3.10: pip finds no torch==2.10.0+cpu" in text
    assert "not had: Python 3.14: no interpreter" in text and "not had: a GPU" in text
    with pytest.raises(argparse.ArgumentTypeError):
        matrix.Row.parse("2.10/3.10")


def test_the_matrix_tries_the_oldest_the_pinned_and_the_newest_torch():
    rows = matrix.all_rows(["3.10", "3.13"])
    pairs = [("2.10.0+cpu", "3.10"), ("2.10.0", "3.10"), ("2.10.0", "3.13"), ("newest", "3.10"), ("newest", "3.13")]
    assert {(r.torch, r.python) for r in rows} >= {*pairs, ("2.9.1", "3.10")} and len(rows) == 7
