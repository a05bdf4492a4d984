"""The emulator of CUDA kernels (tests/emulate): its primitives are CUDA's, and it shows the faults it is there to show."""

import os
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent / "emulate" / "primitives.cpp"
ORDERS = ["forward", "reverse", "shuffled"]


@pytest.fixture(scope="module", params=["", "-DCUDA_ON_CPU_PORTABLE"], ids=["native", "portable"])
def program(request, tmp_path_factory):
    target = tmp_path_factory.mktemp("emulate") / "primitives"
    command = [*os.environ.get("CXX", "g++").split(), "-std=c++17", "-O1", *request.param.split(), str(SOURCE)]
    # The sanitizers of `make emulate` are for the kernels: preloaded into a compiler, they look for its leaks.
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    subprocess.run([*command, "-o", str(target)], check=True, env=environment)

    def run(what, order):
        return subprocess.run(
            [str(target), what], capture_output=True, text=True, env={**environment, "CUDA_ON_CPU_ORDER": order}
        )

    return run


@pytest.mark.parametrize("order", ORDERS)
def test_primitives_are_those_of_cuda(program, order):
    done = program("primitives", order)
    assert done.returncode == 0, done.stdout


def test_a_missing_barrier_changes_the_result_in_some_order(program):
    right = sum(range(96))
    assert any(int(program("racy", order).stdout) != right for order in ORDERS)


def test_a_missing_wait_for_the_cluster_changes_the_result_in_some_order(program):
    assert any(int(program("racy-cluster", order).stdout) != 1 + 2 + 3 + 4 for order in ORDERS)


def test_threads_at_different_barriers_are_a_deadlock_and_the_next_kernel_runs(program):
    done = program("stuck", "forward")
    assert done.stdout.startswith("deadlock") and done.returncode == 0, done.stdout
