"""The machine code of the CUDA kernels in the built library: no spills, 16-byte loads, nothing worse than the baseline."""

from pathlib import Path

import pytest

import rlhf_fast
from bench import machine_code


def instructions(text):
    """'LDG.128', 'BRA 0' (to the instruction with that number), '@BRA 0' (perhaps)."""
    code = []
    for n, part in enumerate(text.split(", ")):
        name, *target = part.split()
        code.append(
            machine_code.Instruction(n, name.startswith("@"), name.lstrip("@"), int(target[0]) if target else None)
        )
    return code


def kernel(code, **changes):
    fields = {
        "name": "gae_kernel<256, float>",
        "architecture": "9.0",
        "registers": 64,
        "stack": 0,
        "shared": 0,
        "threads": 256,
    }
    return machine_code.Kernel(**{**fields, **changes}, code=instructions(code))


def test_the_hot_path_is_the_way_with_the_most_arithmetic():
    # 0: load, 1: jump over the narrow load of row ends, 3-4: arithmetic that one branch skips, 5: again
    code = "LDG.E.128, @BRA 3, LDG.E.U16, @BRA 5, FFMA, @BRA 0, EXIT"
    assert [i.address for i in kernel(code).main_loop] == [0, 1, 3, 4, 5]
    assert kernel(code).wide_loads == 1 and not kernel(code).faults()


def test_of_two_loops_the_one_with_wide_loads_is_the_main_one():
    loop = kernel("LDG.E, FADD, FADD, @BRA 0, LDG.E.128, FADD, @BRA 4, EXIT").main_loop
    assert [i.address for i in loop] == [4, 5, 6]


@pytest.mark.parametrize(
    ("code", "changes", "fault"),
    [
        ("LDG.E, FADD, @BRA 0, LDG.E.128, EXIT", {}, "loads no 16 bytes at a time"),
        ("LDG.E.128, @BRA 0, STL, EXIT", {}, "1 spill instructions"),
        ("LDG.E.128, @BRA 0, EXIT", {"stack": 8}, "stack frame of 8 bytes"),
    ],
)
def test_what_it_refuses(code, changes, fault):
    (found,) = kernel(code, **changes).faults()
    assert fault in found


def test_worse_than_the_baseline():
    then = machine_code.summary([kernel("LDG.E.128, LDG.E.128, @BRA 0, EXIT")])
    now = kernel("LDG.E.128, LDG.E, @BRA 0, EXIT", registers=80)
    fewer_blocks, fewer_loads = machine_code.worse([now], {"kernels": then})
    assert "3 blocks a multiprocessor at 80 registers, 4 at 64" in fewer_blocks
    assert "1 16-byte loads in its loop, 2 before" in fewer_loads


def test_the_built_library(capsys):
    architectures = [a.removesuffix("+PTX") for a in rlhf_fast.build_info()["cuda_architectures"]]
    if not architectures:
        pytest.skip("the library was built without CUDA")
    if missing := machine_code.missing_tools():
        pytest.skip(f"{' and '.join(missing)} not found")
    library = next(Path(rlhf_fast.__file__).parent.glob("_C*.so"))
    status = machine_code.main(
        ["--library", str(library), "--arch", "9.0" if "9.0" in architectures else architectures[0]]
    )
    assert status == 0, capsys.readouterr().out
