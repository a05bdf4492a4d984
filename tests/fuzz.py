"""N random calls of every op against the float64 references, on the CPU kernels and half as many on the emulated CUDA kernels.

    python -m tests.fuzz 20000              all ops, a new seed (`make fuzz N=20000`)
    python -m tests.fuzz 20000 --seed 7     these calls again
    python -m tests.fuzz 0 --repeat "7 gae cpu 12 31"       one call again, as a failure names it

Outputs and gradients are compared on every call. Every fourth call is also asked for the same bits from a row alone and in its
batch, and padded and packed; every twentieth for the same bits on one and two threads. Prints the number of calls made once a
minute and one table at the end, and exits 1 where a call failed.
"""

import argparse
import collections
import contextlib
import multiprocessing
import random
import signal
import sys
import time

import torch
from torch import Tensor

from rlhf_fast.ops import _common
from tests import emulate
from tests.cases import OPS, Call, Outcome, as_keywords, assert_close, examine, inputs_of, on, run, variant

CHUNK = 200  # calls of one task; its random generator is its own, so that any call can be repeated
INVARIANCES_EVERY = 4
THREADS_EVERY = 20  # takes long: rows enough for two threads
DEVICES = {"cpu": 1, "emulated": 2, **({"cuda": 1} if torch.cuda.is_available() else {})}  # one in so many calls
# A row of these depends on nothing outside itself: its bits may not either.
ROW_BY_ROW = ("gather_logprobs", "kl_penalty", "kl_divergence", "shape_rewards", "gae")
MAX_FAILURES = 20
SAY_EVERY = 60  # seconds
MAX_PADDED = 10_000  # tokens


def ones(i: int, out: Tensor) -> Tensor:
    return torch.ones_like(out)


def plain(name: str, call: Call, device: str) -> Outcome:
    return run(OPS[name].function, call, inputs_of(name, call), on(device), ones)


def assert_same(what: str, got: Outcome, want: Outcome, part=lambda t: t) -> None:
    """`got` is bit for bit that part of `want`."""
    pairs = [(f"output {i}", g, w) for i, (g, w) in enumerate(zip(got.outputs, want.outputs, strict=True))]
    pairs += [(f"gradient of {k}", g, want.gradients[k]) for k, g in got.gradients.items()]
    for where, g, w in pairs:
        w = part(w)
        assert g.shape == w.shape and bool(((g == w) | (g.isnan() & w.isnan())).all()), f"{where} has other bits {what}"


def assert_threads_agree(name: str, kwargs: dict) -> None:
    """On rows enough that two threads share them."""
    rows = rows_of(name, kwargs)
    if not rows:
        return
    many = 1 + 70_000 // max(1, max(v.numel() for v in kwargs.values() if isinstance(v, Tensor)))
    call = Call((), change_rows(kwargs, rows, lambda v: torch.cat([v] * many)))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(plain(name, call, "cpu"))
    finally:
        torch.set_num_threads(before)
    assert_same("on two threads", results[1], results[0])


def rows_of(name: str, kwargs: dict) -> int:
    """The number of rows, where every tensor has one entry a row; 0 where rows cannot be told apart."""
    tensors = [v for k, v in kwargs.items() if isinstance(v, Tensor) and k != "normalizer"]
    if "weight" in kwargs:  # a head: torch's product promises no bits
        return 0
    if "ref_logits" in kwargs:  # a single row of logits is no row of each
        tensors += [kwargs["logits"][..., 0]]
    if kwargs.get("cu_seqlens") is not None or len({t.shape[:1] for t in tensors}) != 1 or tensors[0].dim() == 0:
        return 0
    return tensors[0].shape[0]


def change_rows(kwargs: dict, rows: int, change) -> dict:
    def has_rows(key, value):
        return key not in ("normalizer", "weight", "bias") and isinstance(value, Tensor) and value.shape[:1] == (rows,)

    return {k: change(v) if has_rows(k, v) else v for k, v in kwargs.items()}


def assert_rows_stand_alone(name: str, kwargs: dict, device: str) -> None:
    rows = rows_of(name, kwargs)
    if name not in ROW_BY_ROW or rows < 2 or kwargs.get("whiten"):
        return
    whole = plain(name, Call((), kwargs), device)
    for row in {0, rows - 1}:
        part = slice(row, row + 1)
        alone = change_rows(kwargs, rows, lambda v, part=part: v[part])
        assert_same("beside other rows", plain(name, Call((), alone), device), whole, lambda t, part=part: t[part])


def assert_packed_is_padded(name: str, kwargs: dict, device: str) -> None:
    offsets = kwargs.get("cu_seqlens")
    # Padding lets a bootstrap value decay on its way to the last token; packing has no padding.
    if offsets is None or (kwargs.get("bootstrap") is not None and kwargs.get("gaps") == "decay"):
        return
    lengths = offsets.diff().tolist()
    # seq-mean-token-sum-norm divides by the width of the padded form: that of the longest sequence.
    wider = 0 if kwargs.get("aggregate") == "seq-mean-token-sum-norm" else 3
    tokens, width = sum(lengths), max(lengths, default=0) + wider
    if tokens == len(lengths):  # tokens and sequences cannot be told apart by size
        return
    if len(lengths) * width > MAX_PADDED:  # minutes of padding, of many empty sequences beside a long one
        return
    inside = torch.arange(width) < torch.tensor(lengths).unsqueeze(1)

    def pad(value: Tensor) -> Tensor:
        padded = torch.full(
            (*inside.shape, *value.shape[1:]), float("nan") if value.is_floating_point() else 0, dtype=value.dtype
        )
        padded[inside] = value
        return padded

    mask = kwargs.get("mask")
    mask = torch.ones(tokens, dtype=torch.bool) if mask is None else mask
    padded = change_rows({k: v for k, v in kwargs.items() if k != "cu_seqlens"}, tokens, pad)
    if isinstance(padded.get("temperature"), Tensor):  # refused on the CPU where it is not above 0
        padded["temperature"] = padded["temperature"].nan_to_num(nan=1.0)
    padded["mask"] = torch.zeros(inside.shape, dtype=mask.dtype).masked_scatter(inside, mask.contiguous())
    if name == "masked_mean":
        padded["dim"] = -1
    packed, unpacked = plain(name, Call((), kwargs), device), plain(name, Call((), padded), device)

    def tokens_of(t: Tensor) -> Tensor:
        return t[inside.to(t.device)] if t.shape[:2] == inside.shape else t

    if name in ROW_BY_ROW and not kwargs.get("whiten"):
        assert_same("padded", packed, unpacked, tokens_of)
        return
    for i, (p, u) in enumerate(zip(packed.outputs, unpacked.outputs, strict=True)):
        assert_close(f"packed output {i}", p, tokens_of(u), 2 * OPS[name].units)


def examine_closely(name: str, call: Call, device: str, number: int) -> Outcome:
    """The call against its reference and, by its number, in other company."""
    outcome, kwargs = examine(name, call, device), as_keywords(name, call)
    if number % INVARIANCES_EVERY == 0:
        assert_rows_stand_alone(name, kwargs, device)
        assert_packed_is_padded(name, kwargs, device)
    if number % THREADS_EVERY == 0 and device == "cpu" and _common._namespace == "rlhf_fast":
        assert_threads_agree(name, kwargs)
    return outcome


# ---------------------------------------------------------------------------------------------------------------------


def kernels(device: str):
    return _common.namespace(emulate.load()) if device == "emulated" else contextlib.nullcontext()


def play(task: tuple) -> tuple[str, str, dict, list[str]]:
    """One chunk of calls: {(variant, output dtype): [calls, worst output error, worst gradient error]}, and the failures."""
    seed, name, device, chunk, count, only = task
    torch.set_num_threads(1)
    rng = random.Random(f"{seed} {name} {device} {chunk}")
    worst, failures = collections.defaultdict(lambda: [0, 0.0, 0.0]), []
    with kernels(device):
        for number in range(count):
            call = OPS[name].draw(rng)
            if only is not None and number != only:
                continue
            where = "cuda" if device == "cuda" else "cpu"
            try:
                outcome = examine_closely(name, call, where, number)
            except Exception as error:
                text = f"{type(error).__name__}: {error}"[:2000]
                failures.append(f'--repeat "{seed} {name} {device} {chunk} {number}"\n  {name}({call})\n  {text}')
                continue
            row = worst[variant(call), str(outcome.outputs[0].dtype)[6:]]
            row[0] += 1
            row[1] = max(row[1], outcome.output_error)
            row[2] = max(row[2], outcome.gradient_error)
    return name, device, dict(worst), failures


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextlib.contextmanager
def _until_interrupted():
    """Ends at Ctrl-C; a second one would lose what the first one is to show."""
    try:
        yield
    except KeyboardInterrupt:
        _ignore_interrupts()


def calls_of(totals: dict[tuple, list]) -> int:
    return sum(row[0] for row in totals.values())


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("calls", type=int)
    parser.add_argument("--seed", default=str(time.time_ns() % 10**9))
    parser.add_argument("--ops", nargs="+", default=list(OPS), choices=list(OPS))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeat", metavar='"SEED OP DEVICE CHUNK CALL"')
    given = parser.parse_args()
    if given.repeat:
        seed, name, device, chunk, number = given.repeat.split()
        *_, failures = play((seed, name, device, int(chunk), int(number) + 1, int(number)))
        print("\n".join(failures) or "passed")
        return len(failures)

    started = said = time.perf_counter()
    emulate.load()  # compiled once, not in each process
    tasks = []
    for name in given.ops:
        for device, share in DEVICES.items():
            calls = given.calls // share
            for chunk in range(-(-calls // CHUNK)):
                tasks.append((given.seed, name, device, chunk, min(CHUNK, calls - chunk * CHUNK), None))
    random.Random(0).shuffle(tasks)  # slow ops among fast ones, so that the processes end together
    totals, failures = collections.defaultdict(lambda: [0, 0.0, 0.0]), []
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background processes ignore it
    context = multiprocessing.get_context("spawn")
    with context.Pool(given.processes, _ignore_interrupts) as pool, _until_interrupted():
        for name, device, worst, failed in pool.imap_unordered(play, tasks):  # Ctrl-C shows what was done until then
            for (kind, dtype), (calls, output, gradient) in worst.items():
                row = totals[name, kind, device, dtype]
                row[:] = row[0] + calls, max(row[1], output), max(row[2], gradient)
            failures += failed
            if time.perf_counter() - said > SAY_EVERY:
                said = time.perf_counter()
                print(f"{calls_of(totals)} calls of {sum(task[4] for task in tasks)}", file=sys.stderr)
            if len(failures) >= MAX_FAILURES:
                break
    print(f"seed {given.seed}; worst errors in epsilons of the output's dtype, relative to max(1, |reference|)")
    print(f"{'op':<26}{'kernels':<10}{'dtype':<9}{'calls':>8}{'outputs':>10}{'gradients':>11}")
    order = {name: i for i, name in enumerate(OPS)}
    for (name, kind, device, dtype), row in sorted(totals.items(), key=lambda item: (order[item[0][0]], item[0][1:])):
        print(f"{name + ' ' * bool(kind) + kind:<26}{device:<10}{dtype:<9}{row[0]:>8}{row[1]:>10.3f}{row[2]:>11.3f}")
    print(f"{calls_of(totals)} calls in {time.perf_counter() - started:.0f} s, {len(failures)} failed")
    for failure in failures[:MAX_FAILURES]:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
