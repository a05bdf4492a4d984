"""Builds rlhf_fast._C: the CPU kernels always, the CUDA kernels where nvcc is found. Nothing is downloaded.

RLHF_FAST_CUDA=0|1     leave CUDA out, or insist on it
TORCH_CUDA_ARCH_LIST   GPU architectures, e.g. "9.0" or "8.0 9.0+PTX"
MAX_JOBS               compiler processes at a time
RLHF_FAST_OBJECTS      a folder that keeps the compiled kernels: they are the same for every Python, and are compiled once
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

try:
    import pybind11
    import torch
    from torch.utils import cpp_extension
except ImportError as error:
    sys.exit(
        f"rlhf_fast is compiled against the torch it runs with, and {error.name} is missing here. Install torch, pybind11 and "
        "ninja first, then: pip install --no-build-isolation ."
    )

ROOT = Path(__file__).parent
VERSION = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE).group(1)
OBJECTS = Path(os.environ["RLHF_FAST_OBJECTS"]).resolve() if os.environ.get("RLHF_FAST_OBJECTS") else None
OUR_FOLDERS = [ROOT, Path(torch.__file__).parents[1]]  # not named in messages
OLDEST_TORCH = (2, 10)
# The machine code of a major version's first GPU runs on all of it. That of 8.9 would be that of 8.6 bit for bit, and both are
# 8.0's but for the order of instructions and at most 3 registers: not worth half a megabyte of the wheel each.
ARCHITECTURES = "8.0 9.0 10.0 12.0+PTX"
COMMON_FLAGS = [
    "-O3",
    "-std=c++17",
    f"-DTORCH_TARGET_VERSION=0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}000000000000",  # runs on this torch and later
]
CUDA_FLAGS = [
    *COMMON_FLAGS,
    "-DUSE_CUDA",
    "--threads=0",
    "--compress-mode=size",
    "--expt-relaxed-constexpr",
    "-Xcompiler=-fvisibility=hidden",
    "-Xcompiler=-Os",  # the host's part checks arguments and launches
    *(f"-Xcompiler=-fmacro-prefix-map={folder}/=" for folder in OUR_FOLDERS),
]


def find_nvcc():
    """In CUDA_HOME, on the PATH, or as the package nvidia-cuda-nvcc, which brings no CUDA_HOME."""
    package = importlib.util.find_spec("nvidia")
    packaged = [f"{folder}/cu13/bin" for folder in package.submodule_search_locations] if package else []
    folders = [f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin", os.environ.get("PATH", ""), *packaged]
    return shutil.which("nvcc", path=os.pathsep.join(folders))


def first_line(command, pattern):
    """The first match of `pattern` in what `command` prints, or None where it cannot run."""
    try:
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    match = re.search(pattern, text)
    return match.group(1) if match else None


def gencode(architecture):
    number = architecture.removesuffix("+PTX").replace(".", "")
    if not re.fullmatch(r"\d+[af]?", number):
        sys.exit(f"TORCH_CUDA_ARCH_LIST holds {architecture!r}; it takes compute capabilities such as 9.0 or 12.0+PTX")
    code = f"[sm_{number},compute_{number}]" if architecture.endswith("+PTX") else f"sm_{number}"
    return f"-gencode=arch=compute_{number},code={code}"


def cuda_build(nvcc):
    """Compiler and linker flags, include and library folders of the CUDA half."""
    home = os.environ.get("CUDA_HOME") or str(Path(nvcc).resolve().parent.parent)
    cpp_extension.CUDA_HOME = home  # torch leaves it None whenever torch itself is a CPU build
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST", ARCHITECTURES).replace(";", " ").split()
    return {
        "architectures": architectures,
        "compile": [*CUDA_FLAGS, *map(gencode, architectures)],
        # The CUDA runtime is static: a shared one ties the library to torch's CUDA major version.
        "link": [
            "-Wl,-Bstatic",
            "-lcudart_static",
            "-Wl,-Bdynamic",
            "-lrt",
            "-ldl",
            "-lpthread",
            "-Wl,--exclude-libs,ALL",
        ],
        "include": [f"{home}/include"],
        "library": [f"{home}/lib64", f"{home}/lib"],
    }


def write_config(folder, cuda_version, architectures):
    """build_config.h, from which _C.build_info() answers."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler.split()[0]) is None:
        sys.exit(
            f"rlhf_fast needs a C++17 compiler and {compiler!r} was not found. Install one (Debian and Ubuntu: apt install g++; "
            "Fedora: dnf install gcc-c++), or set CXX."
        )
    version = first_line([*compiler.split(), "--version"], r"(.+)")
    lines = {
        "RLHF_FAST_VERSION": VERSION,
        "RLHF_FAST_COMPILER": version or compiler,
        "RLHF_FAST_TORCH": torch.__version__,
        "RLHF_FAST_CUDA_VERSION": cuda_version or "",
        "RLHF_FAST_CUDA_ARCHITECTURES": " ".join(architectures),
    }
    text = "#pragma once\n" + "".join(f'#define {name} "{value}"\n' for name, value in lines.items())
    target = folder / "build_config.h"
    folder.mkdir(parents=True, exist_ok=True)
    if not target.exists() or target.read_text() != text:  # an unchanged file does not rebuild
        target.write_text(text)


def extension():
    if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
        sys.exit(f"rlhf_fast needs torch {'.'.join(map(str, OLDEST_TORCH))} or later; this is {torch.__version__}")
    nvcc = find_nvcc()
    wanted = os.environ.get("RLHF_FAST_CUDA", "1" if nvcc else "0")
    if wanted not in ("0", "1"):
        sys.exit(f"RLHF_FAST_CUDA is {wanted!r}; it takes 0 or 1")
    if wanted == "1" and nvcc is None:
        sys.exit("RLHF_FAST_CUDA=1 but nvcc was not found: set CUDA_HOME, or RLHF_FAST_CUDA=0 for a build without CUDA")

    sources = ["csrc/module.cpp", "csrc/ops_cpu.cpp"]
    cuda = {"architectures": [], "link": [], "include": [], "library": []}
    flags = {
        "cxx": [
            *COMMON_FLAGS,
            "-g0",
            "-fvisibility=hidden",
            "-Wno-psabi",  # vectors of 64 bytes stay inside inlined functions
            "-fopenmp-simd",  # SIMD pragmas without the OpenMP runtime: threads are torch's own
            "-fno-math-errno",
            "-fno-trapping-math",  # never -ffast-math: inf and NaN have meanings here
            # Copies of loops, a tenth of the code and of a wheel of 5 MB. No loop that counts asks about options as it goes.
            "-fno-unswitch-loops",
            "-fno-ipa-cp-clone",
            "-fno-split-loops",
            "-fno-tree-loop-distribution",
            *(f"-fmacro-prefix-map={folder}/=" for folder in OUR_FOLDERS),
        ]
    }
    if wanted == "1":
        cuda = cuda_build(nvcc)
        sources.append("csrc/ops_cuda.cu")
        flags["nvcc"] = cuda["compile"]
    generated = ROOT / "build" / "generated"
    write_config(
        generated,
        first_line([nvcc, "--version"], r"release ([\d.]+)") if wanted == "1" else None,
        cuda["architectures"],
    )
    compiled = [OBJECTS / f"{Path(source).stem}.o" for source in sources[1:]] if OBJECTS else []
    newest = max(path.stat().st_mtime for path in (ROOT / "csrc").iterdir())
    if compiled and all(path.exists() and path.stat().st_mtime > newest for path in compiled):
        sources = sources[:1]
    else:
        compiled = []
    return cpp_extension.CppExtension(
        "rlhf_fast._C",
        sources,
        extra_objects=[str(path) for path in compiled],
        depends=[str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").glob("*.h"))],
        include_dirs=[pybind11.get_include(), str(generated), *cuda["include"]],
        library_dirs=cuda["library"],
        # First, since torch's libraries export parts of the libstdc++ they were built with: taken from there, these symbols
        # have no version, and the loader and auditwheel cannot tell a system that is too old.
        libraries=["stdc++"],
        extra_compile_args=flags,
        # libtorch.so must be among the needed libraries: otherwise the weak CUDA stream symbol stays unbound in CUDA builds
        # of torch.
        extra_link_args=[*cuda["link"], "-Wl,--no-as-needed", "-ltorch", "-Wl,--strip-all"],
    )


class Build(cpp_extension.BuildExtension):
    def build_extension(self, ext):
        super().build_extension(ext)
        if OBJECTS and not ext.extra_objects:
            OBJECTS.mkdir(parents=True, exist_ok=True)
            for path in Path(self.build_temp).rglob("ops_*.o"):
                shutil.copy2(path, OBJECTS)


if __name__ == "__main__":  # bench/machine_code.py imports the flags
    setup(ext_modules=[extension()], cmdclass={"build_ext": Build})
