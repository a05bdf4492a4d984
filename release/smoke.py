"""Whether the installed wheel works with the torch beside it: python release/smoke.py [--calls 20]

Runs in the environment of a user (with pytest and setuptools), on the installed package alone: the source folder is not imported,
only the tests are. Prints a line for each check and one JSON object; exits 1 where a check fails. Without a GPU, what CUDA code
can be asked is whether it finds torch's stream, and what it says of a machine without a driver.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Runs the CUDA kernel of an op on CPU tensors; reading them takes a GPU, but no launch gets that far.
CUDA_KERNEL = """
import torch, rlhf_fast
from rlhf_fast.ops.gae import _gae
x = torch.zeros(2, 3)
seen = {}
original = type(_gae).eager
type(_gae).eager = lambda self, args: (seen.update({self: args}), original(self, args))[1]
rlhf_fast.gae(x, x)
keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
try:
    _gae.overload().redispatch(keys, *seen[_gae])
except Exception as error:
    print(str(error).splitlines()[0])
else:
    print("a kernel ran")
"""
# The functions of a torch with CUDA and a GPU: what follows is the launch itself.
PRETEND = """
extern "C" {
int aoti_torch_get_current_cuda_stream(int, void** stream) { *stream = nullptr; return 0; }
int aoti_torch_create_device_guard(int, void** guard) { *guard = nullptr; return 0; }
int aoti_torch_delete_device_guard(void*) { return 0; }
}
"""


def output_of(code: str, **env: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env})
    return (done.stdout.strip() or done.stderr.strip()).splitlines()[-1]


def check_import() -> str:
    import torch

    start = time.perf_counter()
    import rlhf_fast

    seconds = time.perf_counter() - start
    assert Path(rlhf_fast.__file__).parents[1] != ROOT, "this is the source folder, not the installed wheel"
    info = rlhf_fast.build_info()
    assert info["torch"] == torch.__version__ and info["version"] == rlhf_fast.__version__
    return f"{seconds:.2f} s"


def check_ops(calls: int) -> str:
    """Random calls, outputs and gradients, against the float64 references; on the GPU too where there is one."""
    import torch

    from tests.cases import OPS, examine

    worst = 0.0
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        for name, op in OPS.items():
            rng = random.Random(f"smoke {name}")
            for _ in range(calls):
                worst = max(worst, examine(name, op.draw(rng), device).output_error)
    return f"{len(OPS)} x {calls} on {', '.join(devices)}: {worst:.1f} eps"


def check_contract(which: str) -> str:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--tb=line",
        "-p",
        "no:cacheprovider",
        "tests/test_contract.py",
        "-k",
        which,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    return done.stdout.strip().splitlines()[-1].split(" in ")[0]


def check_stream() -> str:
    """The weak symbol of the CUDA stream is bound in a torch with CUDA, and is known to be absent in one without."""
    import torch

    import rlhf_fast

    if rlhf_fast.build_info()["cuda"] is None:
        return "no CUDA in this wheel"
    if torch.cuda.is_available():
        return "a GPU is here"
    said = output_of(CUDA_KERNEL)
    if torch.version.cuda is None:
        assert said.endswith("rlhf_fast: the imported torch has no CUDA support[end]"), said
        return "absent, and says so"
    assert "no CUDA support" not in said and "a kernel ran" not in said, said
    assert "rlhf_fast" not in said or "driver" in said, said
    return f"bound ({torch.version.cuda}): {said[-60:]}"


def check_driver() -> str:
    """Past torch's own checks, a machine without a driver that is new enough is told so."""
    import torch

    import rlhf_fast

    if rlhf_fast.build_info()["cuda"] is None:
        return "no CUDA in this wheel"
    if torch.cuda.is_available() or shutil.which("g++") is None:
        return "not asked"
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "pretend.cpp"), Path(folder, "pretend.so")
        source.write_text(PRETEND)
        subprocess.run(["g++", "-shared", "-fPIC", source, "-o", library], check=True)
        said = output_of(CUDA_KERNEL, LD_PRELOAD=str(library))
    assert "rlhf_fast: the NVIDIA driver is too old for CUDA" in said, said
    return "says what it needs"


def check_old_torch() -> str:
    """A torch too old is named before anything is loaded."""
    import rlhf_fast

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "torch.py").write_text('__version__ = "2.9.1+cu128"')
        site = Path(rlhf_fast.__file__).parents[1]
        said = output_of(f"import sys; sys.path[:0] = [{folder!r}, {str(site)!r}]; import rlhf_fast")
    assert (
        said == "ImportError: rlhf_fast needs torch 2.10 or later, and this is torch 2.9.1+cu128: pip install -U torch"
    ), said
    return "refused"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=20)
    calls = parser.parse_args().calls
    checks = {
        "import": check_import,
        "ops": lambda: check_ops(calls),
        "opcheck": lambda: check_contract("opcheck"),
        "compile": lambda: check_contract("compile"),
        "CUDA stream": check_stream,
        "no driver": check_driver,
        "torch 2.9": check_old_torch,
    }
    results, failed = {}, []
    sys.path.pop(0)  # this folder
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "tests", Path(folder, "tests"))
        os.chdir(folder)
        sys.path.insert(0, folder)
        for name, check in checks.items():
            try:
                results[name] = check()
            except Exception as error:
                failed.append(name)
                results[name] = f"FAILED: {type(error).__name__}: {error}"
            print(f"{name}: {results[name]}", flush=True)
    print(json.dumps({"failed": failed, "results": results}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
