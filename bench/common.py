"""How a row of the benchmark is made: one case, ours beside its peers, the same inputs, correctness before timing.

Inputs rotate, so that no cache flatters, and are never zeros. Times are pytest-benchmark's; `bench/report.py` turns them into
ratios within one run, which is all that a shared machine can tell. On one CPU thread the time is the process's own: other work on
the machine then counts only where it takes the memory's bandwidth.
"""

import functools
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from bench.contenders import forget_peak, memory

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROTATE_BYTES = 64 << 20
CLOCK = time.process_time if DEVICE == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
COPIED_BYTES = 1 << 30 if DEVICE == "cuda" else 256 << 20  # beyond every cache


@dataclass(frozen=True)
class Case:
    name: str
    size: str
    inputs: Callable[[torch.Generator], tuple]  # a fresh set of inputs
    contenders: dict[str, Callable]  # name -> function of the inputs; the first is ours
    tolerance: float  # of the contenders' results against each other, absolute and relative
    bytes_moved: int = 0  # the least that must be read and written

    @property
    def id(self) -> str:
        return f"{self.name}-{self.size}"


def rows(cases: list[Case]):
    """Parametrize a benchmark function over every contender of every case."""
    params = [pytest.param(case, who, id=f"{case.id}-{who}") for case in cases for who in case.contenders]
    by_case = pytest.mark.parametrize(("case", "who"), params)
    return lambda function: pytest.mark.benchmark(timer=CLOCK)(by_case(function))


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@functools.cache
def copy_bandwidth() -> float:
    """Bytes a second, read and written, of the median of 20 plain copies: the roof under which a row stands."""
    source = torch.randint(0, 255, (COPIED_BYTES,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    times = []
    for _ in range(23):
        synchronize()
        start = CLOCK()
        target.copy_(source)
        synchronize()
        times.append(CLOCK() - start)
    return 2 * COPIED_BYTES / statistics.median(times[3:])


def peak_of(call: Callable[[], None]) -> int:
    """Bytes that the memory in use rises while it runs. On the CPU what the allocator kept from before is not seen."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    before = forget_peak()
    call()
    return max(memory("VmHWM") - before, 0)


def wide(t: torch.Tensor) -> torch.Tensor:
    """As careful peers take 16-bit numbers: in float32."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def flat(result) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, dict):
        return []
    return [t for part in result for t in flat(part)]


def error_of(results: list[torch.Tensor], case: Case, inputs: tuple) -> float | None:
    """The largest error against the peer in float64, relative to max(1, |its|); None where its inputs would take gigabytes."""
    doubles = [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in inputs]
    if sum(t.numel() * t.element_size() for t in doubles if isinstance(t, torch.Tensor)) > 2 << 30:
        return None
    *_, last = case.contenders.values()
    exact = flat(case.contenders.get("eager", last)(*doubles))
    pairs = [
        (r.double(), e.double()) for r, e in zip(results, exact, strict=False) if r.is_floating_point() and r.numel()
    ]
    return max(((r - e).abs() / e.abs().clamp(min=1)).max().item() for r, e in pairs)


def run(benchmark, case: Case, who: str) -> None:
    function = case.contenders[who]
    generator = torch.Generator(DEVICE).manual_seed(0)

    def inputs() -> tuple:
        with torch.device(DEVICE):  # gigabytes of logits are drawn where they are wanted
            return case.inputs(generator)

    first = inputs()
    ours = next(iter(case.contenders.values()))

    def copies():  # a contender may write over its inputs
        return (t.clone() if isinstance(t, torch.Tensor) else t for t in first)

    results = flat(function(*copies()))
    for a, b in zip(results, flat(ours(*copies())), strict=False):
        torch.testing.assert_close(a.float(), b.float(), rtol=case.tolerance, atol=case.tolerance)
    error = error_of(results, case, tuple(copies()))
    del results
    size = sum(t.numel() * t.element_size() for t in first if isinstance(t, torch.Tensor))
    sets = [first, *(inputs() for _ in range(min(15, ROTATE_BYTES // max(size, 1))))]
    turn = itertools.cycle(sets)
    benchmark.group = case.id

    def call():
        function(*next(turn))
        synchronize()

    for _ in range(3):
        call()
    benchmark.extra_info.update(
        case=case.name,
        size=case.size,
        who=who,
        bytes=case.bytes_moved,
        threads=torch.get_num_threads(),
        copy=copy_bandwidth(),
        peak=peak_of(call),
        inputs=size,
        error=error,
    )
    benchmark(call)


def backward(function: Callable, *, copy: bool = False) -> Callable:
    """Forward and backward with respect to the first input; with `copy`, which peers of a row share, through logits that an op
    made, as a model makes them."""

    def both(x, *rest):
        leaf = x.detach().requires_grad_()
        # A leaf cannot be overwritten; what overwrites its input gets a view of the leaf's memory that is no leaf.
        out = function(leaf.view_as(leaf) if copy else leaf, *rest)
        loss = out[0] if isinstance(out, tuple) else out
        loss.sum().backward()
        return leaf.grad

    return both
