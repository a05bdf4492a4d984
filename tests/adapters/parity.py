"""Every replaced function beside the installed library's own, on random inputs: python -m tests.adapters.parity [ENVIRONMENT ...]

One table: function, inputs, worst difference of values and of gradients (relative to max(1, |theirs|)), and where the two
differ on purpose. Each library runs in an environment of its own, build/peers/<environment>, which `make parity` makes;
tests/adapters/parity_<library>.py says what is compared, in `cases()`.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from rlhf_fast.adapters import _patch
from rlhf_fast.adapters._patch import differences
from tests.adapters.stubs import stub

ROOT = Path(__file__).parents[2]
ENVIRONMENTS = {
    "trl-1.12": "trl",
    "trl-1.16": "trl",
    "trl-1.16-triton": "trl",
    "verl-0.9": "verl",
    "openrlhf-0.11": "openrlhf",
    "nemo-rl": "nemo_rl",
}
# NeMo-RL is installed from a checkout of its repository alone: bench/peers/nemo-rl.txt.
BY_DEFAULT = [name for name in ENVIRONMENTS if name != "nemo-rl"]
INPUTS = 500


class Draw:
    """Random arguments. The same seed draws the same."""

    def __init__(self, seed: int):
        self.random = Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def one_of(self, *choices: Any) -> Any:
        return self.random.choice(choices)

    def size(self, most: int, least: int = 1) -> int:
        return self.random.randint(least, most)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
        x = torch.randn(shape, generator=self.generator) * scale
        return x.to(dtype).requires_grad_(grad)

    def integers(self, end: int, *shape: int) -> Tensor:
        return torch.randint(end, shape, generator=self.generator)

    def mask(self, *shape: int, least: int = 0, gaps: bool = True) -> Tensor:
        """bool: rows padded at the end, empty rows, with `gaps` also holes, all of it empty at times; `least` are kept in all."""
        kind = self.one_of("padded", "full", "gaps", "sparse", "empty")
        length = self.integers(shape[-1] + 1, *shape[:-1], 1)
        kept = torch.arange(shape[-1]).expand(shape) < length
        if kind == "full":
            kept = torch.ones(shape, dtype=torch.bool)
        elif kind in ("gaps", "sparse") and gaps:
            kept = kept & (torch.rand(shape, generator=self.generator) < (0.7 if kind == "gaps" else 0.1))
        elif kind == "empty":
            kept = torch.zeros(shape, dtype=torch.bool)
        kept = kept.clone()
        for place in self.random.sample(range(kept.numel()), max(0, least - int(kept.sum()))):
            kept.view(-1)[place] = True
        return kept if int(kept.sum()) >= least else torch.ones(shape, dtype=torch.bool)


@dataclass(frozen=True)
class Case:
    """Both functions on the arguments that `draw` draws, and how far apart they may be."""

    function: str
    original: Callable
    ours: Callable
    draw: Callable[[Draw], tuple]  # positional arguments
    remark: str = ""
    tolerance: float = 1e-5
    gradient_tolerance: float = 1e-5
    inputs: int = INPUTS

    def row(self) -> dict:
        worst, failures = [0.0, 0.0], []
        for seed in range(self.inputs):
            try:
                found = differences(self.original, self.ours, *self.draw(Draw(seed)))
            except AssertionError as error:
                found = math.inf, math.inf
                failures.append(f"seed {seed}: {error}")
            worst = [max(pair) for pair in zip(worst, found, strict=True)]
            if found[0] > self.tolerance or found[1] > self.gradient_tolerance:
                failures.append(f"seed {seed}: values {found[0]:.1e}, gradients {found[1]:.1e}")
        return self._row(*(f"{x:.1e}" for x in worst), self.remark, failures)

    def _row(self, value: str, gradient: str, remark: str, failures: list[str]) -> dict:
        cells = [self.function, str(self.inputs), value, gradient, remark]
        return {"cells": cells, "failures": [f"{self.function}: {f}" for f in failures[:3]]}


@dataclass(frozen=True)
class Difference:
    """Where ours is not the original, on purpose. `holds` asserts what each of them does, and may return a number to state."""

    function: str
    remark: str  # "{}" stands for the greatest number that `holds` returned
    holds: Callable[[Draw], float | None]
    inputs: int = INPUTS
    verdict: str = "differs"

    def row(self) -> dict:
        greatest, failures = 0.0, []
        for seed in range(self.inputs):
            try:
                greatest = max(greatest, self.holds(Draw(seed)) or 0.0)
            except AssertionError as error:
                failures.append(f"{self.function}: {self.remark}: does not hold, seed {seed}: {error}")
        cells = [self.function, str(self.inputs), self.verdict, "", self.remark.format(f"{greatest:.2g}")]
        return {"cells": cells, "failures": failures[:3]}


def truth(function: Callable, count: int = 1, first: int = 0) -> Callable:
    """The library's function with `count` of its arguments in float64: without its rounding."""
    end = first + count
    return lambda *args, **kwargs: function(
        *args[:first], *(x.double() for x in args[first:end]), *args[end:], **kwargs
    )


def bfloat16(draw: Callable[[Draw], tuple], count: int = 1, first: int = 0) -> Callable[[Draw], tuple]:
    """`count` of the drawn arguments in bf16."""

    def drawn(source):
        args = list(draw(source))
        for i in range(first, first + count):
            args[i] = args[i].detach().bfloat16().requires_grad_(args[i].requires_grad)
        return tuple(args)

    return drawn


def installed(library: str, importers: list[str], train: Callable[[Draw], Any], remark: str) -> list[Difference]:
    """The patch itself: `train` is the library's own code, which reaches our functions in the places where patch put them.

    `importers` are modules that import the originals by name.
    """

    def held() -> dict[tuple[str, ...], Any]:
        """What stands where, in the library's modules, in the registries in them and in its classes."""
        found = {}
        for name, module in list(sys.modules.items()):
            if name.partition(".")[0] != library:
                continue
            for key, value in list(vars(module).items()):
                found[name, key] = value
                inside = value if type(value) is dict else vars(value) if isinstance(value, type) else {}
                found |= {(name, key, str(k)): v for k, v in list(inside.items())}
        return found

    def same(before: dict) -> bool:
        now = held()
        return all(now[place] is value for place, value in before.items() if not place[-1].startswith("__"))

    def there_and_back(draw: Draw) -> float:
        for name in importers:
            importlib.import_module(name)
        seed = draw.size(10**6)
        theirs = train(Draw(seed))
        before = held()
        with _patch.patch(library, quiet=True):
            swaps = {id(swap.original): swap for swap in _patch._active[library].swaps}
            places = [place for place, value in before.items() if id(value) in swaps]
            now = held()
            assert all(now[place] is swaps[id(before[place])].ours for place in places)
            assert not [place for place, value in now.items() if id(value) in swaps]
            for name in importers:
                assert any(place[0] == name for place in places), f"{name} imports nothing that was replaced"
            mine = train(Draw(seed))
        assert same(before)
        value, _ = differences(lambda: theirs, lambda: mine)
        assert value < 1e-5, value
        return len(places)

    def unknown(draw: Draw) -> None:
        before = held()
        with mock.patch.object(importlib.metadata, "version", lambda name: "0.0.1"):
            try:
                _patch.patch(library)
            except RuntimeError as error:
                known = importlib.import_module(f"rlhf_fast.adapters.{library}").VERSIONS
                assert all(version in str(error) for version in ("0.0.1", *known))
            else:
                raise AssertionError("version 0.0.1 was not refused")
        assert same(before) and library not in _patch._active

    where = f"in {{}} places, by name in {len(importers)} modules; all put back"
    return [
        Difference("patch", f"{where}; {remark}", there_and_back, 20, verdict="holds"),
        Difference("patch", "an unknown version is refused, nothing replaced", unknown, 1, verdict="holds"),
    ]


def rows_here(library: str) -> dict:
    """In the environment of the library: what `main` prints."""
    torch.set_num_threads(1)
    stub(library)
    adapter = importlib.import_module(f"rlhf_fast.adapters.{library}")
    version = importlib.metadata.version(adapter.LIBRARY)
    rows = [case.row() for case in importlib.import_module(f"tests.adapters.parity_{library}").cases()]
    return {"library": f"{adapter.LIBRARY} {version}", "torch": torch.__version__, "rows": rows}


def python_of(environment: str) -> Path:
    return ROOT / "build" / "peers" / environment / "bin" / "python"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.adapters.parity", description=__doc__.splitlines()[0])
    parser.add_argument("environments", nargs="*", choices=[*ENVIRONMENTS, []], help="default: all but nemo-rl")
    parser.add_argument("--here", metavar="LIBRARY", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        print(json.dumps(rows_here(options.here)))
        return
    failures = []
    print("| library | function | inputs | values | gradients | remarks |\n| --- | --- | --- | --- | --- | --- |")
    for environment in options.environments or BY_DEFAULT:
        python = python_of(environment)
        if not python.exists():
            failures.append(f"{environment}: not installed, so nothing was compared: make parity")
            continue
        command = [str(python), "-m", "tests.adapters.parity", "--here", ENVIRONMENTS[environment]]
        # Triton's kernels run on the CPU by its interpreter, which only this variable turns on.
        variables = {"PYTHONPATH": "", "TRITON_INTERPRET": str(int(environment.endswith("-triton")))}
        done = subprocess.run(command, cwd=ROOT, env=os.environ | variables, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            failures.append(f"{environment}: ended with {done.returncode}")
            continue
        result = json.loads(done.stdout.splitlines()[-1])
        for row in result["rows"]:
            print("| " + " | ".join([result["library"], *row["cells"]]) + " |", flush=True)
            failures += [f"{environment}: {f}" for f in row["failures"]]
    if failures:
        sys.exit("\n".join(["", *failures]))


if __name__ == "__main__":
    main()
