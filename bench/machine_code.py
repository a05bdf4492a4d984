"""What the CUDA kernels became: registers, spills, occupancy and 16-byte accesses, read from the machine code. Needs no GPU.

python -m bench.machine_code [--arch 9.0] [--kernel REGEX] [--library FILE] [--update]

Compiles csrc/ops_cuda.cu with the flags of setup.py for each of its architectures, or reads the code in a built library, with
cuobjdump and nvdisasm (of the CUDA toolkit, or pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm). Exits with 1 and the
kernel's name where a kernel

  - has a stack frame or spills a register to it,
  - is one of WIDE and loads no 16 bytes at a time in its main loop,
  - is worse than bench/results/machine_code.json says: fewer blocks fit a multiprocessor, or fewer 16-byte loads in the loop.

The hot path of a loop is the way through it that does the most floating-point arithmetic and, of those, takes the fewest
instructions: it leaves out what only row ends and unaligned rows run. The main loop is the one with the most 16-byte loads on
its hot path.
"""

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[1]
BASELINE = ROOT / "bench" / "results" / "machine_code.json"

# Kernels that memory bounds, and how many arrays of their element type the main loop reads.
WIDE = {
    "gather_logprobs_kernel": 1,
    "gather_logprobs_backward_kernel": 1,
    "gae_kernel": 2,
    "ppo_loss_rows_kernel": 1,
    "ppo_loss_held_rows_kernel": 1,
    "ppo_scale_gradient_kernel": 1,
}
BYTES = {"double": 8, "float": 4, "Half": 2, "BFloat16": 2}

# A multiprocessor: threads, blocks, bytes of shared memory (CUDA programming guide, "Compute capabilities").
# 65,536 registers on all of them, given to a warp in units of 256; every block pays 1 KiB of shared memory to the system.
MULTIPROCESSOR = {
    "8.0": (2048, 32, 164 << 10),
    "8.6": (1536, 16, 100 << 10),
    "8.9": (1536, 24, 100 << 10),
    "9.0": (2048, 32, 228 << 10),
    "10.0": (2048, 32, 228 << 10),
    "12.0": (1536, 24, 100 << 10),
}


@dataclass(frozen=True)
class Instruction:
    address: int
    conditional: bool
    name: str  # with modifiers, such as LDG.E.EF.128
    target: int | None  # of a branch

    @property
    def base(self) -> str:
        return self.name.split(".")[0]

    @property
    def is_wide(self) -> bool:
        return "128" in self.name.split(".")

    @property
    def is_arithmetic(self) -> bool:
        return self.base in ("FADD", "FMUL", "FFMA", "MUFU", "DADD", "DMUL", "DFMA")


def count(code: list[Instruction], base: str, *, wide: bool) -> int:
    return sum(i.base == base and i.is_wide == wide for i in code)


def hot_paths(code: list[Instruction]) -> list[list[Instruction]]:
    """The hot path of every loop."""
    place = {i.address: n for n, i in enumerate(code)}
    goes_on = [i.conditional or i.base not in ("BRA", "EXIT", "RET", "BRX") for i in code]
    jumps = [place.get(i.target) if i.base == "BRA" else None for i in code]
    named = set(jumps)
    # A jump table may lead to any stretch of code that nothing else leads to.
    unnamed = [n for n in range(1, len(code)) if not goes_on[n - 1] and n not in named]
    after: list[list[int]] = []  # the instructions that may come next
    for n, i in enumerate(code):
        ways = [n + 1] if goes_on[n] and n + 1 < len(code) else []
        after.append(ways + ([jumps[n]] if jumps[n] is not None else unnamed if i.base == "BRX" else []))

    # Depth first: an edge to an instruction that is still open closes a loop.
    order, back = [], []
    state, stack = [0] * len(code), [(0, iter(after[0]))]
    while stack:
        n, ways = stack[-1]
        state[n] = 1
        for w in ways:
            if state[w] == 1:
                back.append((n, w))
            elif state[w] == 0:
                stack.append((w, iter(after[w])))
                break
        else:
            state[n] = 2
            order.append(n)
            stack.pop()
    before: list[list[int]] = [[] for _ in code]
    for n, ways in enumerate(after):
        for w in ways if state[n] else ():
            before[w].append(n)

    paths = []
    for head in {h for _, h in back}:
        ends = {n for n, h in back if h == head}
        body, todo = {head}, list(ends)
        while todo:
            if (n := todo.pop()) not in body:
                body.add(n)
                todo += before[n]
        best: dict[int, tuple[int, int, int]] = {}  # arithmetic and -instructions to the loop's end, and the way there
        for n in order:  # what comes after an instruction stands before it
            if n not in body:
                continue
            ways = [w for w in after[n] if w in best and (n, w) not in back]
            ahead = [(*best[w][:2], w) for w in ways] + ([(0, 0, -1)] if n in ends else [])
            if ahead:
                most = max(ahead)
                best[n] = (most[0] + code[n].is_arithmetic, most[1] - 1, most[2])
        path, n = [], head
        while n >= 0 and head in best:
            path.append(code[n])
            n = best[n][2]
        paths.append(path)
    return paths


@dataclass(frozen=True)
class Kernel:
    name: str  # without namespaces and arguments
    architecture: str
    registers: int
    stack: int
    shared: int
    threads: int  # of a block
    code: list[Instruction]

    @property
    def spills(self) -> int:
        return sum(i.base in ("LDL", "STL") for i in self.code)

    @cached_property
    def blocks(self) -> tuple[int, str]:
        """How many blocks a multiprocessor holds, and what there is not enough of for one more."""
        threads, most, shared = MULTIPROCESSOR[self.architecture]
        warps = math.ceil(self.threads / 32)
        a_warp = math.ceil(self.registers * 32 / 256) * 256
        limits = {
            "threads": threads // (warps * 32),
            "blocks": most,
            "registers": 4 * (16384 // a_warp) // warps,  # each quarter of a multiprocessor has its own
            "shared memory": shared // (self.shared + 1024),
        }
        return min((n, why) for why, n in limits.items())

    @cached_property
    def main_loop(self) -> list[Instruction]:
        """The hot path of the main loop; empty in a kernel without a loop."""
        return max(hot_paths(self.code), key=lambda path: (count(path, "LDG", wide=True), -len(path)), default=[])

    @property
    def wide_loads(self) -> int:
        return count(self.main_loop, "LDG", wide=True)

    @property
    def per_element(self) -> float | None:
        """Instructions of the main loop an element of the row."""
        arrays, kind = WIDE.get(self.name.split("<")[0]), re.search(r"(\w+)>$", self.name)
        if not arrays or not kind or not self.wide_loads:
            return None
        return len(self.main_loop) / (self.wide_loads / arrays * 16 / BYTES[kind.group(1)])

    def faults(self) -> list[str]:
        found = []
        if self.stack or self.spills:
            found.append(f"has a stack frame of {self.stack} bytes and {self.spills} spill instructions")
        if self.name.split("<")[0] in WIDE and not self.wide_loads:
            found.append("loads no 16 bytes at a time in its main loop")
        return found


def find_tool(name: str) -> str | None:
    places = [f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin", os.environ.get("PATH", "")]
    places += map(str, Path(sysconfig.get_path("platlib")).glob("nvidia/cu*/bin"))
    return shutil.which(name, path=os.pathsep.join(places))


def missing_tools() -> list[str]:
    return [name for name in ("cuobjdump", "nvdisasm", "c++filt") if find_tool(name) is None]


def output(command: list[str], **options) -> str:
    folder = Path(find_tool("nvdisasm")).parent  # cuobjdump looks for it on the path
    env = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, **options)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command[:3]))} ... failed:\n{done.stderr or done.stdout}")
    return done.stdout


def compile_kernels(architectures: list[str]) -> Path:
    from torch.utils import cpp_extension

    import setup

    nvcc = setup.find_nvcc() or sys.exit("nvcc was not found: set CUDA_HOME, or give a built library with --library")
    target = ROOT / "build" / "machine_code.fatbin"
    target.parent.mkdir(exist_ok=True)
    codes = [setup.gencode(a) for a in architectures]
    include = [f"-I{path}" for path in cpp_extension.include_paths()]
    output(
        [nvcc, "-fatbin", *setup.CUDA_FLAGS, *codes, *include, str(ROOT / "csrc" / "ops_cuda.cu"), "-o", str(target)]
    )
    return target


def short(mangled: list[str]) -> dict[str, str]:
    """Demangled, without namespaces, the return type and the arguments."""
    names = output(["c++filt"], input="\n".join(mangled)).splitlines()
    strip = re.compile(r"(rlhf_fast::cuda::|c10::|^void )")
    return {m: strip.sub("", n).split("(")[0].removesuffix(" ") for m, n in zip(mangled, names, strict=True)}


def read_kernels(binary: Path, architectures: list[str]) -> list[Kernel]:
    kernels = []
    for architecture in architectures:
        dump = [find_tool("cuobjdump"), "-arch", f"sm_{architecture.replace('.', '')}"]
        usage = output([*dump, "-res-usage", str(binary)])
        used = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)
        if not used:
            sys.exit(f"{binary} holds no code for {architecture}")
        elf = output([*dump, "-elf", str(binary)])
        sections = re.split(r"^\.nv\.info\.(?=_Z)", elf, flags=re.MULTILINE)[1:]
        bound = re.compile(r"EIATTR_MAX_THREADS.*?Value:\s+0x([0-9a-f]+)", re.DOTALL)
        threads = {part.split()[0]: int(bound.search(part).group(1), 16) for part in sections}
        line = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?\s*([A-Z][\w.]*)\s*([^;]*);", re.MULTILINE)
        code = {}
        for part in output([*dump, "-sass", str(binary)]).split("Function : ")[1:]:
            code[part.split()[0]] = [
                Instruction(
                    int(address, 16),
                    bool(predicate) or ".DIV" in name or re.match(r"!?U?P\w,", operands) is not None,
                    name,
                    int(to.group(1), 16)
                    if name.startswith("BRA") and (to := re.search(r"0x([0-9a-f]+)", operands))
                    else None,
                )
                for address, predicate, name, operands in line.findall(part)
            ]
        names = short([u[0] for u in used])
        reserved = 1024 if float(architecture) >= 9 else 0  # counted in SHARED there
        for mangled, registers, stack, shared in used:
            kernels.append(
                Kernel(
                    names[mangled],
                    architecture,
                    int(registers),
                    int(stack),
                    max(int(shared) - reserved, 0),
                    threads[mangled],
                    code[mangled],
                )
            )
    return sorted(kernels, key=lambda k: (k.name, float(k.architecture)))


def render(kernels: list[Kernel]) -> str:
    head = "kernel|arch|registers|stack|spills|shared|threads|blocks an SM|limit|16 B ld/st"
    rows = [[*head.split("|"), "loop", "16 B loads", "narrower", "an element"]]  # instructions of the main loop
    for k in kernels:
        wide = f"{count(k.code, 'LDG', wide=True)}/{count(k.code, 'STG', wide=True)}"
        element = f"{k.per_element:.1f}" if k.per_element else ""
        loop = [len(k.main_loop), k.wide_loads, count(k.main_loop, "LDG", wide=False)] if k.main_loop else ["", "", ""]
        cells = [
            k.name,
            k.architecture,
            k.registers,
            k.stack,
            k.spills,
            k.shared,
            k.threads,
            *k.blocks,
            wide,
            *loop,
            element,
        ]
        rows.append([str(c) for c in cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def nvcc_version() -> str | None:
    import setup

    return setup.first_line([setup.find_nvcc() or "nvcc", "--version"], r"release ([\d.]+)")


def summary(kernels: list[Kernel]) -> dict[str, dict]:
    table: dict[str, dict] = {}
    for k in kernels:
        row = {"registers": k.registers, "blocks": k.blocks[0], "wide_loads": k.wide_loads}
        table.setdefault(k.name, {})[k.architecture] = row
    return table


def worse(kernels: list[Kernel], baseline: dict) -> list[str]:
    found = []
    for k in kernels:
        was = baseline["kernels"].get(k.name, {}).get(k.architecture)
        if was and k.blocks[0] < was["blocks"]:
            found.append(
                f"{k.name} on {k.architecture}: {k.blocks[0]} blocks a multiprocessor at {k.registers} registers, "
                f"{was['blocks']} at {was['registers']} before"
            )
        if was and k.wide_loads < was["wide_loads"]:
            found.append(
                f"{k.name} on {k.architecture}: {k.wide_loads} 16-byte loads in its loop, {was['wide_loads']} before"
            )
    return found


def main(arguments: list[str] | None = None) -> int:
    import setup

    every = setup.ARCHITECTURES.replace("+PTX", "").split()
    parser = argparse.ArgumentParser(prog="python -m bench.machine_code", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", action="append", choices=every, help="an architecture (default: all)")
    parser.add_argument("--kernel", default="", help="show only kernels whose name matches this regular expression")
    parser.add_argument("--library", type=Path, help="read this library or object instead of compiling")
    parser.add_argument("--update", action="store_true", help=f"write {BASELINE.relative_to(ROOT)}")
    options = parser.parse_args(arguments)
    if missing := missing_tools():
        sys.exit(f"{' and '.join(missing)} not found; pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    architectures = options.arch or every
    kernels = read_kernels(options.library or compile_kernels(architectures), architectures)
    print(render([k for k in kernels if re.search(options.kernel, k.name)]))
    faults = [f"{k.name} on {k.architecture} {fault}" for k in kernels for fault in k.faults()]
    if options.update:
        if architectures != every:
            sys.exit("--update needs every architecture")
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in summary(kernels).items())
        BASELINE.write_text(f'{{\n "nvcc": {json.dumps(nvcc_version())},\n "kernels": {{\n{lines}\n }}\n}}\n')
    elif BASELINE.exists():
        baseline = json.loads(BASELINE.read_text())
        if baseline["nvcc"] == nvcc_version():
            faults += worse(kernels, baseline)
        else:
            print(f"not compared with {BASELINE.name}: it is of nvcc {baseline['nvcc']}")
    print(f"\n{len(kernels)} kernels on {', '.join(architectures)}: {len(faults) or 'no'} faults")
    print("\n".join(faults))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
