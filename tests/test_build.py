import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rlhf_fast

ROOT = Path(__file__).parents[1]


def run(code_or_args, **env):
    command = [sys.executable, "-c", code_or_args] if isinstance(code_or_args, str) else [sys.executable, *code_or_args]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **env})


def test_build_info_says_what_was_built():
    info = rlhf_fast.build_info()
    assert info["version"] == rlhf_fast.__version__
    assert f'version = "{rlhf_fast.__version__}"' in (ROOT / "pyproject.toml").read_text()
    assert info["torch"] == torch.__version__
    assert info["cpu_level"] in ("x86-64", "x86-64-v3", "x86-64-v4", "aarch64", "generic")
    assert info["compiler"] and isinstance(info["cuda_architectures"], list)
    assert (info["cuda"] is None) == (info["cuda_architectures"] == [])


def test_a_library_that_does_not_load_gives_one_message_that_says_what_to_do(tmp_path):
    package = tmp_path / "rlhf_fast"
    shutil.copytree(Path(rlhf_fast.__file__).parent, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (package / "_C.py").write_text("raise ImportError('libtorch.so: cannot open shared object file')")
    done = subprocess.run([sys.executable, "-c", "import rlhf_fast"], capture_output=True, text=True, cwd=tmp_path)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1
    assert "libtorch.so: cannot open shared object file" in last and "pip install --no-build-isolation ." in last
    assert "never replaced by eager" in last


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"CXX": "no-such-compiler"}, "needs a C++17 compiler and 'no-such-compiler' was not found"),
        (
            {"RLHF_FAST_CUDA": "1", "CUDA_HOME": "/nowhere", "PATH": str(Path(sys.executable).parent)},
            "RLHF_FAST_CUDA=1 but nvcc was not found",
        ),
        ({"RLHF_FAST_CUDA": "yes"}, "RLHF_FAST_CUDA is 'yes'; it takes 0 or 1"),
    ],
)
def test_a_build_that_cannot_work_says_what_is_missing(env, message):
    done = run(["setup.py", "build_ext", "--dry-run"], **env)
    assert done.returncode != 0
    assert message in done.stderr and "Traceback" not in done.stderr


def test_the_library_needs_libtorch_and_no_cuda_library():
    """libtorch.so binds the CUDA stream symbol; a shared CUDA runtime would tie the wheel to one version of it."""
    if shutil.which("readelf") is None:
        pytest.skip("readelf (binutils) is not installed")
    library = next(Path(rlhf_fast.__file__).parent.glob("_C*.so"))
    needed = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True).stdout
    assert "[libtorch.so]" in needed
    assert "libcudart" not in needed and "libtorch_cuda" not in needed and "libgomp" not in needed


def test_no_path_of_the_build_machine_is_in_the_library():
    library = next(Path(rlhf_fast.__file__).parent.glob("_C*.so"))
    assert str(ROOT / "csrc").encode() not in library.read_bytes()
