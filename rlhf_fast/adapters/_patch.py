"""Our functions in the place of an installed library's own, and its own back again.

An adapter module says for which versions of its library it was tested, what it replaces, and how the two are compared:

    LIBRARY = "trl"                # the distribution's name
    VERSIONS = ("1.12.0",)         # or () for a library that is not released
    def replacements() -> list[Replacement]: ...

`patch` compares every replacement with its original on small tensors, here and now, before it installs the first.
"""

import importlib
import importlib.metadata
import inspect
import math
import pkgutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Replacement:
    """One function, method or class of a library, and what stands in for it.

    `module` is where it is defined and `name` its name there, "f", "Class" or "Class.method". `function` takes every argument
    that the original takes, by the same names in the same order; further ones need defaults. `check` compares the original with
    ours, both as they are called, and says in an AssertionError how they differ (`assert_same` does).
    """

    module: str
    name: str
    function: Callable
    check: Callable[[Callable, Callable], None]

    @property
    def path(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True)
class _Place:
    """Where a function is held: under a key of a module's namespace, of a registry in a module, or of a class."""

    owner: Any
    key: Any

    @property
    def identity(self) -> tuple[int, Any]:
        return id(self.owner), self.key

    def get(self) -> Any:
        return (self.owner if isinstance(self.owner, dict) else vars(self.owner)).get(self.key)

    def put(self, value: Any) -> None:
        if isinstance(self.owner, dict):
            self.owner[self.key] = value
        else:
            setattr(self.owner, self.key, value)


@dataclass
class _Swap:
    """One replacement, found: the original as its place holds it (a staticmethod as such), and ours in the same wrapping."""

    replacement: Replacement
    place: _Place
    original: Any
    ours: Any


@dataclass
class _Installed:
    library: str
    version: str
    swaps: list[_Swap]
    places: list[tuple[_Place, _Swap]]
    users_own: set[tuple[int, Any]]  # places that held a function of ours before, for reasons of their own

    @property
    def names(self) -> str:
        return ", ".join(s.replacement.name for s in self.swaps)


_active: dict[str, _Installed] = {}
_lock = threading.RLock()


class Patch:
    """What `patch` returns. As a context manager it leaves the library as it was at the call."""

    def __init__(self, installed: _Installed, first: bool):
        self._installed, self._first = installed, first

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, *_: object) -> None:
        with _lock:
            if self._first and _active.get(self._installed.library) is self._installed:
                unpatch(self._installed.library)

    def __repr__(self) -> str:
        return f"<rlhf_fast.patch of {self._installed.library} {self._installed.version}: {self._installed.names}>"


def patch(library: str, *, quiet: bool = False) -> Patch:
    """Replace the functions of an installed library with ours, for this process, until `unpatch` or the end of a `with` block.

        rlhf_fast.patch("trl")             # or
        with rlhf_fast.patch("trl"): ...

    Replaced is what rlhf_fast.adapters.<library> lists, in the module that defines it, in every module that has imported it by
    name and in the library's registries. What holds a function in another way (an instance, a closure, functools.partial) keeps
    the original: patch before trainers are built, and in every process (Ray workers have their own). Each function is first
    compared with its original, values and gradients, on small tensors on the CPU; the random state is left alone.

    A library that is patched already stays so, and a `with` block inside another undoes nothing.

    Args:
        library: "trl", "openrlhf", "verl" or "nemo_rl".
        quiet: do not print the line that says what was replaced (on stderr).

    Raises:
        ValueError: no adapter has that name.
        ModuleNotFoundError: the library is not installed.
        RuntimeError: its version is not one of those the adapter was tested with, or a function of ours differs from the
            installed one. Nothing is replaced then.
    """
    adapter = _adapter(library)
    with _lock:
        if library in _active:
            return Patch(_active[library], first=False)
        version = _known_version(adapter)
        swaps = [_find(adapter, r) for r in adapter.replacements()]
        for swap in swaps:
            _compare(adapter, version, swap)
        installed = _active[library] = _install(library, version, swaps)
    if not quiet:
        print(
            f"rlhf_fast: replaced in {adapter.LIBRARY} {version}: {installed.names} ({len(installed.places)} places); "
            f"rlhf_fast.unpatch({library!r}) undoes it",
            file=sys.stderr,
        )
    return Patch(installed, first=True)


def unpatch(library: str) -> None:
    """Put back every function that `patch` replaced, also in modules imported since. Nothing to do where it did not.

    A place in which something else has been put meanwhile is left as it is.

    Raises:
        ValueError: no adapter has that name.
    """
    _adapter(library)
    with _lock:
        installed = _active.pop(library, None)
        if installed is not None:
            _undo(installed)


def _adapter(library: str) -> ModuleType:
    import rlhf_fast.adapters as package

    known = sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))
    if library not in known:
        raise ValueError(f"patch: `library` must be one of {', '.join(map(repr, known))}, got {library!r}")
    return importlib.import_module(f"rlhf_fast.adapters.{library}")


def _known_version(adapter: ModuleType) -> str:
    try:
        version = importlib.metadata.version(adapter.LIBRARY).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        raise ModuleNotFoundError(f"patch: {adapter.LIBRARY} is not installed, so there is nothing to patch") from None
    if version not in adapter.VERSIONS:
        raise RuntimeError(
            f"patch: {adapter.LIBRARY} {version} is installed, and the replacements were tested with "
            f"{', '.join(adapter.VERSIONS)} alone; nothing was replaced. The functions of {adapter.__name__} can be called "
            "by themselves"
        )
    return version


def _find(adapter: ModuleType, replacement: Replacement) -> _Swap:
    try:
        owner: Any = importlib.import_module(replacement.module)
        *classes, key = replacement.name.split(".")
        for name in classes:
            owner = getattr(owner, name)
        original = vars(owner)[key]
    except (ImportError, AttributeError, KeyError) as error:
        raise RuntimeError(
            f"patch: {adapter.LIBRARY} has no {replacement.path} here ({type(error).__name__}: {error}); nothing was replaced"
        ) from error
    wrapping = type(original) if isinstance(original, (staticmethod, classmethod)) else lambda function: function
    place = _Place(vars(owner) if isinstance(owner, ModuleType) else owner, key)
    return _Swap(replacement, place, original, wrapping(replacement.function))


def _compare(adapter: ModuleType, version: str, swap: _Swap) -> None:
    original, ours = (
        x.__func__ if isinstance(x, (staticmethod, classmethod)) else x for x in (swap.original, swap.ours)
    )
    try:
        _same_arguments(original, ours)
        with _plain_surroundings():
            swap.replacement.check(original, ours)
    except Exception as error:
        raise RuntimeError(
            f"patch: ours differs from {swap.replacement.path} as installed with {adapter.LIBRARY} {version}: "
            f"{error or type(error).__name__}; nothing was replaced"
        ) from error


def _same_arguments(original: Callable, ours: Callable) -> None:
    theirs, mine = (list(inspect.signature(f).parameters.values()) for f in (original, ours))
    names = [p.name for p in theirs]
    rest = mine[len(theirs) :]
    assert [p.name for p in mine[: len(theirs)]] == names and all(p.default is not p.empty for p in rest), (
        f"it takes ({', '.join(names)}), ours ({', '.join(p.name for p in mine)})"
    )


@contextmanager
def _plain_surroundings() -> Iterator[None]:
    """Gradients on, autocast off, tensors on the CPU, and the caller's random state untouched."""
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast("cpu", enabled=False))
        stack.enter_context(torch.device("cpu"))
        torch.manual_seed(0)
        yield


def _holders(swaps: list[_Swap], held: str) -> Iterator[tuple[_Place, _Swap]]:
    """Every place, in a module or a registry of the library, that holds the `held` ("original" or "ours") of a swap."""
    wanted = {id(getattr(s, held)): s for s in swaps if isinstance(s.place.owner, dict)}
    packages = {s.replacement.module.partition(".")[0] for s in swaps}
    seen = set()
    for name, module in list(sys.modules.items()):
        package = name.partition(".")[0]
        if not isinstance(module, ModuleType) or package == "rlhf_fast":
            continue
        spaces = [vars(module)]
        if package in packages:
            spaces += [value for value in spaces[0].values() if type(value) is dict]
        for space in spaces:
            if id(space) in seen:
                continue
            seen.add(id(space))
            for key, value in list(space.items()):
                if id(value) in wanted:
                    yield _Place(space, key), wanted[id(value)]


def _install(library: str, version: str, swaps: list[_Swap]) -> _Installed:
    users_own = {place.identity for place, _ in _holders(swaps, "ours")}
    places = [(s.place, s) for s in swaps if not isinstance(s.place.owner, dict)] + list(_holders(swaps, "original"))
    done = []
    try:
        for place, swap in places:
            done.append((place, swap))
            place.put(swap.ours)
    except BaseException:
        for place, swap in done:
            if place.get() is swap.ours:
                place.put(swap.original)
        raise
    return _Installed(library, version, swaps, places, users_own)


def _undo(installed: _Installed) -> None:
    late = [(p, s) for p, s in _holders(installed.swaps, "ours") if p.identity not in installed.users_own]
    for place, swap in installed.places + late:
        if place.get() is swap.ours:
            place.put(swap.original)


# ---------------------------------------------------------------------------------------------------------------------
# Comparing


def assert_same(original: Callable, ours: Callable, *args: Any, tolerance: float = 1e-5, **kwargs: Any) -> None:
    """AssertionError unless both give the same values and gradients for these arguments, by `differences`."""
    value, gradient = differences(original, ours, *args, **kwargs)
    assert value <= tolerance, f"its values differ by {value:.1e}"
    assert gradient <= tolerance, f"its gradients differ by {gradient:.1e}"


def differences(original: Callable, ours: Callable, *args: Any, **kwargs: Any) -> tuple[float, float]:
    """The worst difference of the results and of the gradients, relative to max(1, |original|), inf where one is NaN alone.

    Both get copies, so they may write into their arguments. Results may be tensors, numbers, and tuples, lists or dicts of them;
    gradients are those of all tensor arguments that require grad, by an uneven upstream gradient of every result. dtypes of
    results are not compared: ours are float32 where a library rounds to bf16.
    """
    theirs, mine = (_results_and_gradients(f, args, kwargs) for f in (original, ours))
    return _worst("results", theirs[0], mine[0]), _worst("gradients", theirs[1], mine[1])


def _worst(what: str, theirs: list[Tensor], mine: list[Tensor]) -> float:
    shapes = [[list(t.shape) for t in ts] for ts in (theirs, mine)]
    assert shapes[0] == shapes[1], f"its {what} have the shapes {shapes[0]}, ours {shapes[1]}"
    worst = 0.0
    for a, b in zip(theirs, mine, strict=True):
        a, b = a.detach().double(), b.detach().double()
        error = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs() / a.abs().clamp(min=1.0))
        if error.numel():
            worst = max(worst, error.nan_to_num(nan=math.inf, posinf=math.inf).max().item())
    return worst


def _results_and_gradients(function: Callable, args: tuple, kwargs: dict) -> tuple[list[Tensor], list[Tensor]]:
    leaves = []

    def given(value):
        if not isinstance(value, Tensor):
            return value
        copy = value.detach().clone()
        if value.requires_grad:
            leaves.append(copy.requires_grad_())
            copy = copy.clone()  # not a leaf: it may be written to
        return copy

    results = list(_tensors(function(*map(given, args), **{k: given(v) for k, v in kwargs.items()})))
    loss = sum(
        (r * (r.detach().new_ones(r.numel()).cumsum(0).cos() + 2).view(r.shape)).sum()
        for r in results
        if r.requires_grad
    )
    if not isinstance(loss, Tensor):
        return results, [torch.zeros_like(x) for x in leaves]
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    return results, [torch.zeros_like(x) if g is None else g for g, x in zip(gradients, leaves, strict=True)]


def _tensors(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, (bool, int, float)):
        yield torch.tensor(float(result), dtype=torch.float64)
    elif isinstance(result, Mapping):
        for key in sorted(result):
            yield from _tensors(result[key])
    elif isinstance(result, (tuple, list)):
        for item in result:
            yield from _tensors(item)
