"""`patch` on a small library made for it: nothing here needs a peer."""

import importlib
import importlib.metadata
import sys
import types

import pytest
import torch

import rlhf_fast
from rlhf_fast.adapters import _patch
from rlhf_fast.adapters._patch import Replacement, assert_same, differences

MAIN = """
import functools
import torch

REGISTRY = {}

def register(f):
    REGISTRY["double"] = f
    return f

@register
def double(x, factor=2.0):
    return x * factor

def half(x):
    return x / 2

class Model:
    def forward(self, x):
        return x + 1

    @staticmethod
    def scale(x):
        return 3 * x

    @classmethod
    def make(cls, x):
        return x
"""
USER = """
from little.main import double as twice, half
from little import main
"""


class OwnDouble:
    """What our side offers: the same results by other means."""

    def double(x, factor=2.0):
        return factor * x

    def half(x):
        return 0.5 * x

    def forward(self, x):
        return 1 + x

    def scale(x):
        return x * 3


def check(original, ours):
    assert_same(original, ours, torch.randn(3, requires_grad=True))


def check_method(original, ours):
    assert_same(lambda x: original(None, x), lambda x: ours(None, x), torch.randn(3, requires_grad=True))


def replacements():
    return [
        Replacement("little.main", "double", OwnDouble.double, check),
        Replacement("little.main", "half", OwnDouble.half, check),
        Replacement("little.main", "Model.forward", OwnDouble.forward, check_method),
        Replacement("little.main", "Model.scale", OwnDouble.scale, check),
    ]


def load(name, source, **attributes):
    module = types.ModuleType(name)
    vars(module).update(attributes)
    sys.modules[name] = module
    exec(source, vars(module))
    return module


@pytest.fixture
def little(monkeypatch):
    """The library, imported by a user, and its adapter."""
    before = set(sys.modules)
    package = load("little", "", __path__=[])
    package.main = load("little.main", MAIN)
    load("user", USER)
    adapter = types.ModuleType("rlhf_fast.adapters.little")
    adapter.LIBRARY, adapter.VERSIONS, adapter.replacements = "little", ("1.0", "1.1"), replacements
    monkeypatch.setattr(_patch, "_adapter", lambda library: adapter)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.1+local")
    yield types.SimpleNamespace(main=sys.modules["little.main"], user=sys.modules["user"], adapter=adapter)
    rlhf_fast.unpatch("little")
    for name in set(sys.modules) - before:
        del sys.modules[name]


def snapshot(little):
    places = (vars(little.main), vars(little.user), little.main.REGISTRY, vars(little.main.Model))
    return [{k: v for k, v in place.items() if not k.startswith("__")} for place in places]


def test_replaces_wherever_the_original_is_held_and_puts_it_back(little, capsys):
    before = snapshot(little)
    rlhf_fast.patch("little")
    line = capsys.readouterr().err
    assert (
        line.count("\n") == 1 and "little 1.1" in line and "double, half, Model.forward, Model.scale (7 places)" in line
    )
    assert little.main.double is little.user.twice is little.main.REGISTRY["double"] is OwnDouble.double
    assert little.user.half is OwnDouble.half
    assert little.main.Model().forward(1) == 2 and little.main.Model.forward is OwnDouble.forward
    assert little.main.Model().scale(2) == 6 and little.main.Model.scale is OwnDouble.scale
    rlhf_fast.unpatch("little")
    assert snapshot(little) == before


def test_a_module_imported_under_the_patch_gets_the_original_back_and_the_users_own_import_of_ours_stays(little):
    own = load("own", "", double=OwnDouble.double)
    rlhf_fast.patch("little")
    late = load("late", USER)
    assert late.twice is OwnDouble.double
    rlhf_fast.unpatch("little")
    assert late.twice is little.main.double is not OwnDouble.double
    assert own.double is OwnDouble.double


def test_context_manager_and_nested_use(little):
    before = snapshot(little)
    with rlhf_fast.patch("little") as outer:
        assert little.main.double is OwnDouble.double and "little 1.1: double, half" in repr(outer)
        with rlhf_fast.patch("little"):
            assert little.main.double is OwnDouble.double
        assert little.main.double is OwnDouble.double, "the inner block undoes nothing"
    assert snapshot(little) == before
    rlhf_fast.patch("little")
    with rlhf_fast.patch("little"):
        pass
    assert little.main.double is OwnDouble.double
    rlhf_fast.unpatch("little")
    rlhf_fast.unpatch("little")
    assert snapshot(little) == before
    with pytest.raises(KeyError), rlhf_fast.patch("little"):
        raise KeyError
    assert snapshot(little) == before


def test_a_block_left_late_does_not_undo_a_later_patch(little):
    first = rlhf_fast.patch("little")
    rlhf_fast.unpatch("little")
    rlhf_fast.patch("little")
    first.__exit__(None, None, None)
    assert little.main.double is OwnDouble.double


def test_what_was_put_over_ours_meanwhile_stays(little):
    rlhf_fast.patch("little")
    little.user.half = mine = lambda x: x
    rlhf_fast.unpatch("little")
    assert little.user.half is mine and little.main.half is not OwnDouble.half


def wrong_value(x):
    return x * 0.5001


def wrong_gradient(x):
    return x.detach() / 2 + 0 * x


def wrong_shape(x):
    return (x / 2)[:1]


def wrong_name(y):
    return y / 2


def wrong_default(x, more):
    return x / 2


def raises(x):
    raise TypeError("no such thing")


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (wrong_value, "values differ by"),
        (wrong_gradient, "gradients differ by"),
        (wrong_shape, r"shapes \[\[3\]\], ours \[\[1\]\]"),
        (wrong_name, r"takes \(x\), ours \(y\)"),
        (wrong_default, r"takes \(x\), ours \(x, more\)"),
        (raises, "no such thing"),
    ],
)
def test_a_function_that_differs_is_refused_before_anything_is_replaced(little, function, said):
    before = snapshot(little)
    bad = Replacement("little.main", "half", function, check)
    little.adapter.replacements = lambda: [replacements()[0], bad]
    with pytest.raises(RuntimeError, match=rf"little\.main\.half.*little 1\.1.*{said}.*nothing was replaced"):
        rlhf_fast.patch("little")
    assert snapshot(little) == before
    little.adapter.replacements = replacements
    rlhf_fast.patch("little")


@pytest.mark.parametrize("name", ["nothing", "Model.nothing", "Nothing.forward"])
def test_a_name_that_is_gone_is_refused(little, name):
    before = snapshot(little)
    little.adapter.replacements = lambda: [*replacements(), Replacement("little.main", name, OwnDouble.half, check)]
    with pytest.raises(RuntimeError, match=rf"has no little\.main\.{name} here"):
        rlhf_fast.patch("little")
    assert snapshot(little) == before


def test_a_failure_in_the_middle_undoes_the_beginning(little, monkeypatch):
    before = snapshot(little)
    put = _patch._Place.put
    calls = []

    def failing(place, value):
        calls.append(place)
        if len(calls) == 4:
            raise MemoryError
        put(place, value)

    monkeypatch.setattr(_patch._Place, "put", failing)
    with pytest.raises(MemoryError):
        rlhf_fast.patch("little")
    assert len(calls) > 4 and snapshot(little) == before


def test_unknown_version_names_the_known_ones(little, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.0")
    with pytest.raises(
        RuntimeError, match=r"little 2\.0 is installed.*tested with 1\.0, 1\.1 alone; nothing was replaced"
    ):
        rlhf_fast.patch("little")


def test_a_library_that_is_not_installed(little, monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ModuleNotFoundError, match="little is not installed"):
        rlhf_fast.patch("little")


@pytest.mark.parametrize("function", [rlhf_fast.patch, rlhf_fast.unpatch])
@pytest.mark.parametrize("name", ["nothing", "_patch", "", None])
def test_unknown_library_names_the_known_ones(function, name):
    with pytest.raises(ValueError, match=r"`library` must be one of .*'trl'.*, got"):
        function(name)


def test_the_check_runs_in_plain_surroundings(little):
    seen = {}

    def look(original, ours):
        seen.update(grad=torch.is_grad_enabled(), inference=torch.is_inference_mode_enabled(), draw=torch.rand(2))
        seen.update(product=(torch.ones(2, 2) @ torch.ones(2, 2)).dtype)

    little.adapter.replacements = lambda: [Replacement("little.main", "half", OwnDouble.half, look)]
    state = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
        rlhf_fast.patch("little", quiet=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert (
        seen["grad"]
        and not seen["inference"]
        and seen["draw"].device.type == "cpu"
        and seen["product"] == torch.float32
    )


def test_quiet(little, capsys):
    rlhf_fast.patch("little", quiet=True)
    assert capsys.readouterr().err == ""


def test_differences():
    x = torch.tensor([1.0, 100.0, float("nan"), float("inf")])
    assert differences(lambda x: x, lambda x: x, x) == (0.0, 0.0)
    assert differences(lambda x: x, lambda x: x + torch.tensor([0.5, 1, 0, 0]), x)[0] == 0.5
    assert differences(lambda x: x, lambda x: x.nan_to_num(nan=0.0), x)[0] == float("inf")
    y = torch.tensor([3.0, 4.0], requires_grad=True)
    assert differences(lambda y: {"a": (y, 1.0)}, lambda y: {"a": [y.mul_(1), 1]}, y) == (0.0, 0.0), "y is copied"
    assert differences(lambda y: y.detach(), lambda y: y, y)[1] > 1, "a gradient of ours alone"
    assert y.tolist() == [3.0, 4.0]
