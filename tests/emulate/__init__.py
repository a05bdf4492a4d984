"""Builds and loads the emulated CUDA kernels (emulate.cpp) as the operator library rlhf_fast_emulated."""

import functools
import os
from pathlib import Path

from torch.utils import cpp_extension

from rlhf_fast.ops import _common

LIBRARY = "rlhf_fast_emulated"
HERE = Path(__file__).parent


@functools.cache
def load() -> str:
    """Compile on first use (about half a minute; kept in build/), load, and give the ops fakes and gradients.

    With RLHF_FAST_SANITIZE=1 the kernels run under AddressSanitizer and UndefinedBehaviorSanitizer; the sanitizers' runtime
    must then be preloaded, as `make emulate` does.
    """
    sanitize = os.environ.get("RLHF_FAST_SANITIZE") == "1"
    folder = HERE.parents[1] / "build" / ("emulate-sanitized" if sanitize else "emulate")
    folder.mkdir(parents=True, exist_ok=True)
    flags = ["-std=c++17", "-fopenmp-simd", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    # -fno-sanitize=vptr: torch is built without the type information that check needs.
    checks = ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=undefined", "-g", "-O1"]
    cpp_extension.load(
        LIBRARY,
        [str(HERE / "emulate.cpp")],
        extra_cflags=[*flags, *(checks if sanitize else ["-O2"])],
        extra_ldflags=["-fsanitize=address,undefined"] if sanitize else [],
        build_directory=str(folder),
        is_python_module=False,
    )
    _common.register_all(LIBRARY)
    return LIBRARY
