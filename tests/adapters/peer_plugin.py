"""A pytest plugin that peer_tests.py puts among a library's own tests: stand-ins for packages that need a GPU, and the patch."""

import importlib
import importlib.machinery
import inspect
import os
import sys

import pytest
import stubs  # tests/adapters/stubs.py, which lies beside this file then

LIBRARY = os.environ["PEER_LIBRARY"]
calls = 0


@pytest.fixture(autouse=True)
def _calls_of_ours(record_property):
    """How often our functions went to an op in this test, for its report."""
    before = calls
    yield
    record_property("calls", str(calls - before))


def patch() -> None:
    import rlhf_fast
    from rlhf_fast.adapters import _patch

    adapter = importlib.import_module(f"rlhf_fast.adapters.{LIBRARY}")
    for name, value in list(vars(adapter).items()):
        if inspect.isfunction(value) and value.__module__.startswith("rlhf_fast.ops"):
            setattr(adapter, name, counted(value))
    rlhf_fast.patch(LIBRARY)
    of_files = {}
    for swap in _patch._active[LIBRARY].swaps:
        of_files.setdefault(os.path.realpath(sys.modules[swap.replacement.module].__file__), []).append(swap)
    execute = importlib.machinery.SourceFileLoader.exec_module

    def exec_module(self, module):
        """Some of OpenRLHF's tests load a copy of a file under a name of their own: ours goes into that, too."""
        execute(self, module)
        for swap in of_files.get(os.path.realpath(self.path), ()):
            owner = module
            *classes, name = swap.replacement.name.split(".")
            for each in classes:
                owner = getattr(owner, each)
            setattr(owner, name, swap.ours)

    importlib.machinery.SourceFileLoader.exec_module = exec_module


def counted(function):
    def call(*args, **kwargs):
        global calls
        calls += 1
        return function(*args, **kwargs)

    return call


stubs.stub(LIBRARY)
if os.environ["PEER_PATCHED"] == "1":
    patch()
