"""The wheels of dist/ in fresh environments, one a row: python -m release.matrix [--rows 2.10.0/3.12 ...] [--keep]

    torch 2.10.0, the oldest     on the first and the last Python that has a wheel in dist/ and an interpreter here; on the first
                                 its CPU build, too, where pip knows an index that has it
    the torch compiled against   on the Python that runs this
    the newest torch             that pip finds, on each Python
    torch 2.9.1                  on the first Python: pip must name the conflict, and importing must refuse

Each row makes an environment in build/matrix/, installs torch and the wheel as a user would, runs release/smoke.py there (import,
ops against references, opcheck, torch.compile, the CUDA stream, messages), and removes it: a CUDA build of torch is 6 GB. A row
that passed is kept as long as neither the wheel nor what tests it changes: a run cut short goes on where it stopped.
Prints one table and what of it was not to be had here, keeps both in build/matrix/table.md, exits 1 where a row fails.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from release.wheel import PINNED, PYTHONS, ROOT, environment, interpreters, run

WORK = ROOT / "build" / "matrix"
OLDEST = "2.10.0"
TOO_OLD = "2.9.1"
NEWEST = "newest"
CHECKS = ["import", "ops", "opcheck", "compile", "CUDA stream", "no driver", "torch 2.9"]


@dataclass(frozen=True)
class Row:
    torch: str
    python: str

    @classmethod
    def parse(cls, text: str) -> "Row":
        if not re.fullmatch(rf"({NEWEST}|\d+\.\d+\.\d+(\+\w+)?)/3\.\d+", text):
            raise argparse.ArgumentTypeError(f"{text!r} is not TORCH/PYTHON, such as {OLDEST}/3.12 or {NEWEST}/3.11")
        return cls(*text.split("/"))


def wheel_for(python: str) -> Path:
    found = sorted((ROOT / "dist").glob(f"*-cp{python.replace('.', '')}-*.whl"), key=lambda p: p.stat().st_mtime)
    return found[-1] if found else sys.exit(f"dist/ holds no wheel for Python {python}: make wheel")


def pythons() -> list[str]:
    """Those with an interpreter here and a wheel in dist/."""
    built = {f"3.{m}" for p in (ROOT / "dist").glob("*.whl") for m in re.findall(r"-cp3(\d+)-", p.name)}
    return [version for version in interpreters() if version in built]


def all_rows(versions: list[str]) -> list[Row]:
    pinned = re.search(r"^torch==(\S+)", PINNED.read_text(), re.MULTILINE).group(1)
    own = f"3.{sys.version_info.minor}"
    first, last = versions[0], versions[-1]
    return [
        Row(f"{OLDEST}+cpu", first),
        *(Row(OLDEST, v) for v in dict.fromkeys([first, last])),
        Row(pinned, own if own in versions else last),
        *(Row(NEWEST, v) for v in versions),
        Row(TOO_OLD, first),
    ]


def smoke(python: Path) -> dict[str, str]:
    done = subprocess.run(
        [python, ROOT / "release" / "smoke.py"],
        capture_output=True,
        text=True,
        cwd=WORK,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        return json.loads(done.stdout.strip().splitlines()[-1])["results"]
    except (IndexError, ValueError, KeyError):
        return {"import": f"FAILED: {done.stderr[-1500:]}"}


def refused(python: Path, wheel: Path) -> dict[str, str]:
    """With a torch that is too old, kept by --no-deps: what `pip check` says of the two together, and what importing says."""
    run(python, "-m", "pip", "install", "-q", "--no-deps", wheel)
    checked = subprocess.run([python, "-m", "pip", "check"], capture_output=True, text=True).stdout
    done = subprocess.run([python, "-c", "import rlhf_fast"], capture_output=True, text=True, cwd=WORK)
    said = (done.stderr.strip().splitlines() or ["imported"])[-1]
    named = re.search(
        rf"^rlhf.fast \S+ has requirement torch>=2\.10, but you have torch {TOO_OLD}", checked, re.MULTILINE
    )
    good = re.match(rf"ImportError: rlhf_fast needs torch 2\.10 or later, and this is torch {TOO_OLD}", said)
    return {"torch 2.9": "refused at import, named by pip" if good and named else f"FAILED: {checked[-800:]} {said}"}


def kept(row: Row) -> Path:
    """Where the results of a row that passed are."""
    tests = [ROOT / "release" / "smoke.py", *sorted((ROOT / "tests").glob("*.py"))]
    what = hashlib.sha256(b"".join(path.read_bytes() for path in (wheel_for(row.python), *tests))).hexdigest()[:12]
    return WORK / "passed" / f"python{row.python}-torch{row.torch}-{what}.json"


def is_found(interpreter: Path, torch: str) -> bool:
    """Whether pip knows a file of it, whatever constraints it works under here."""
    command = [interpreter, "-m", "pip", "install", "-q", "--dry-run", "--no-deps", "--ignore-installed", torch]
    env = {**os.environ, "PIP_CONSTRAINT": os.devnull}
    return (
        "No matching distribution found" not in subprocess.run(command, capture_output=True, text=True, env=env).stderr
    )


def play(row: Row, interpreter: Path, keep: bool) -> dict[str, str]:
    folder = WORK / f"python{row.python}-torch{row.torch}"
    torch = "torch" if row.torch == NEWEST else f"torch=={row.torch}"
    start = time.monotonic()
    try:
        wheel = wheel_for(row.python)
        if row.torch == TOO_OLD:
            python = environment(folder, interpreter, torch, "numpy")
            results = refused(python, wheel)
        else:
            python = environment(folder, interpreter, torch, wheel, "pytest", "setuptools")
            results = smoke(python)
        results["torch"] = run(
            python, "-c", "import torch; print(torch.__version__, torch.version.cuda or 'CPU')"
        ).strip()
    except SystemExit as error:
        results = {"import": f"FAILED: {error}" if is_found(interpreter, torch) else f"not had: pip finds no {torch}"}
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
    return {**results, "seconds": f"{time.monotonic() - start:.0f}"}


def not_had(rows: dict[Row, dict[str, str]], found: dict[str, Path]) -> list[str]:
    """What this machine could not try."""
    missing = [f"Python 3.{minor}: no interpreter" for minor in PYTHONS if f"3.{minor}" not in found]
    missing += [
        f"torch {row.torch} on Python {row.python}: {why.removeprefix('not had: ')}"
        for row, results in rows.items()
        if (why := results.get("import", "")).startswith("not had")
    ]
    if not any(results.get("CUDA stream") == "a GPU is here" for results in rows.values()):
        missing.append("a GPU: no kernel ran on one, and none was met that the wheel holds no code for")
    return missing


def render(rows: dict[Row, dict[str, str]], found: dict[str, Path]) -> str:
    def cell(value: str) -> str:
        return next((word for word in ("FAILED", "not had") if value.startswith(word)), value)

    columns = ["torch", *CHECKS, "seconds"]
    lines = [f"| {' | '.join(['Python', *columns])} |", f"| {' | '.join('---' for _ in ['', *columns])} |"]
    for row, results in rows.items():
        cells = [cell({"torch": row.torch, **results}.get(column, "")) for column in columns]
        lines.append(f"| {' | '.join([row.python, *cells])} |")
    return "\n".join([*lines, "", *(f"not had: {what}" for what in not_had(rows, found))])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m release.matrix", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", type=Row.parse, metavar="TORCH/PYTHON")
    parser.add_argument("--keep", action="store_true", help="keep the environments")
    given = parser.parse_args()
    found = interpreters()
    wanted = given.rows or all_rows(pythons() or sys.exit("dist/ holds no wheel: make wheel"))
    if missing := {row.python for row in wanted} - set(found):
        sys.exit(f"no interpreter of Python {', '.join(sorted(missing))} was found")
    WORK.mkdir(parents=True, exist_ok=True)
    rows: dict[Row, dict[str, str]] = {}
    for row in wanted:
        print(f"-- torch {row.torch} on Python {row.python}", flush=True)
        passed = kept(row)
        rows[row] = json.loads(passed.read_text()) if passed.exists() else play(row, found[row.python], given.keep)
        if not any(said.startswith(("FAILED", "not had")) for said in rows[row].values()):
            passed.parent.mkdir(exist_ok=True)
            passed.write_text(json.dumps(rows[row]))
        print("\n".join(f"   {check}: {said}" for check, said in rows[row].items()), flush=True)
        (WORK / "table.md").write_text(render(rows, found) + "\n")
    print(f"\n{render(rows, found)}")
    return 1 if any(said.startswith("FAILED") for results in rows.values() for said in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
