"""One rank of test_vocab_parallel.py: every rank draws the same calls, takes its slice, and has the whole to compare with.

python -m torch.distributed.run --standalone --nproc-per-node 2 -m tests.vocab_parallel_ranks
"""

import contextlib
import datetime
import itertools
import math
import random

import torch
import torch.distributed as dist

from rlhf_fast import gather_logprobs, vocab_parallel_logprobs
from rlhf_fast.ops import _common
from tests import emulate
from tests.cases import OPS, assert_close, units_of

DRAWS = 30


def cuts_of(rng: random.Random, vocab: int, ranks: int) -> list[int]:
    """Where the slices start, and V: equal, at multiples of the CPU's blocks, anywhere, some empty."""
    if rng.random() < 0.25 and vocab % ranks == 0:
        return list(range(0, vocab + 1, max(1, vocab // ranks)))
    inner = [
        rng.choice([rng.randrange(vocab + 1), 0, vocab, 2048 * rng.randrange(vocab // 2048 + 1)])
        for _ in range(ranks - 1)
    ]
    return [0, *sorted(inner), vocab]


def run(function, logits, labels, upstream, **kwargs):
    leaf = logits.detach().clone().requires_grad_()
    outputs = function(leaf, labels, **kwargs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward(outputs, upstream[: len(outputs)])
    return [o.detach() for o in outputs], leaf.grad


def same(a, b) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def everywhere(value: bool) -> bool:
    """Whether it holds on every rank: one that fails alone would leave the others waiting."""
    holds = torch.tensor(float(value))
    dist.all_reduce(holds, dist.ReduceOp.MIN)
    return bool(holds)


def random_calls(rank: int, ranks: int) -> None:
    rng = random.Random(f"vocab parallel {ranks}")
    for n in range(DRAWS):
        call = OPS["gather_logprobs"].draw(rng)
        (logits, labels), kwargs = call.args, call.kwargs
        vocab = logits.shape[-1]
        cuts = cuts_of(rng, vocab, ranks)
        order = rng.sample(range(ranks), ranks) if rng.random() < 0.2 else list(range(ranks))
        mine = slice(cuts[order[rank]], cuts[order[rank] + 1])
        generator = torch.Generator().manual_seed(n)
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        upstream = [torch.randn(labels.shape, generator=generator, dtype=wide) for _ in range(2)]
        want, want_gradient = run(gather_logprobs, logits, labels, upstream, **kwargs)
        equal = (
            cuts == [r * (vocab // ranks) for r in range(ranks)] + [vocab]
            and order == sorted(order)
            and vocab % ranks == 0
        )
        start = None if equal and rng.random() < 0.7 else mine.start
        got, gradient = run(
            vocab_parallel_logprobs,
            logits[..., mine],
            labels,
            upstream,
            vocab_start=start,
            inplace_backward=n % 3 == 0,
            **kwargs,
        )
        units = 2 * units_of("gather_logprobs", call)
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            assert_close(f"output {i} of {call} cut at {cuts}", a, b, units)
            every = [torch.empty_like(a) for _ in range(ranks)]
            dist.all_gather(every, a.contiguous())
            assert all(same(a, b) for b in every), f"output {i} of {call}: other bits on another rank"
        assert_close(f"gradient of {call} cut at {cuts}", gradient, want_gradient[..., mine], units + 1)
        if vocab in {b - a for a, b in itertools.pairwise(cuts)}:
            pairs = [*zip(got, want, strict=True), (gradient, want_gradient[..., mine])]
            assert all(same(a, b) for a, b in pairs), f"{call}: one rank has all, and other bits"


def special_calls(rank: int, ranks: int) -> None:
    generator = torch.Generator().manual_seed(5)
    logits, labels = (
        torch.randn(2 * ranks, 6 * ranks, generator=generator),
        torch.arange(2 * ranks) * 3,
    )  # a label in each slice
    upstream = [torch.randn(2 * ranks, generator=generator) for _ in range(2)]
    mine = slice(6 * rank, 6 * rank + 6)
    for nothing in (
        slice(0, 6),
        slice(6 * ranks - 6, None),
        slice(6 * ranks - 3, None),
    ):  # a slice of -inf; the vocabulary's padding
        whole = logits.clone()
        whole[:, nothing] = -math.inf
        known = whole.gather(1, labels.unsqueeze(1)).squeeze(1) > -math.inf
        wanted = torch.where(known, labels, -100)
        want, want_gradient = run(gather_logprobs, whole, wanted, upstream, with_entropy=True)
        got, gradient = run(vocab_parallel_logprobs, whole[:, mine], wanted, upstream, with_entropy=True)
        for a, b in [*zip(got, want, strict=True), (gradient, want_gradient[:, mine])]:
            assert torch.isfinite(a).all()
            torch.testing.assert_close(a, b, rtol=0, atol=4e-7)


def refusals(rank: int, ranks: int) -> None:
    """On every rank alike, and nothing is left waiting."""
    logits = torch.zeros(3, 4)
    cases = [
        (
            logits,
            {"vocab_start": 5 * rank},
            torch.zeros(3, dtype=torch.int64),
            "must follow one another from 0 on, but are",
        ),
        (logits, {"vocab_start": 0}, torch.zeros(3, dtype=torch.int64), r"in the order of the ranks, [0, 4), [0, 4)"),
        (logits, {}, torch.tensor([0, 4 * ranks, 1]), f"`labels` holds {4 * ranks} at flat position 1"),
        (logits, {"vocab_start": 4 * rank}, torch.tensor([0, 1, -3]), "`labels` holds -3 at flat position 2"),
        (logits[:, :0], {}, torch.zeros(3, dtype=torch.int64), "must not have an empty vocabulary on every rank"),
    ]
    for slice_of, kwargs, labels, text in cases:
        message = ""
        try:
            vocab_parallel_logprobs(slice_of, labels, **kwargs)
        except ValueError as error:
            message = str(error)
        assert everywhere(message.startswith("vocab_parallel_logprobs: ") and text in message), f"{text}: {message}"
    skipped = torch.tensor([0, 99, -100])
    assert vocab_parallel_logprobs(logits, skipped, mask=torch.tensor([1, 0, 1]))[1:].tolist() == [0, 0]


def one_collective() -> None:
    leaf = torch.randn(4, 8).requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        logprobs, entropy = vocab_parallel_logprobs(leaf, torch.arange(4), with_entropy=True)
        (logprobs.sum() + entropy.sum()).backward()
    collectives = [e.name for e in profile.events() if e.name.startswith("gloo:")]
    assert len(collectives) == 1 and "gather" in collectives[0], collectives


def compiled(rank: int, ranks: int) -> None:
    logits = torch.randn(2, 5, generator=torch.Generator().manual_seed(rank))
    labels, results = torch.tensor([0, 5 * ranks - 1]), []
    for function in (
        vocab_parallel_logprobs,
        torch.compile(vocab_parallel_logprobs, backend="aot_eager", fullgraph=True),
    ):
        leaf = logits.clone().requires_grad_()
        logprobs = function(leaf, labels)
        logprobs.sum().backward()
        results.append((logprobs.detach(), leaf.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def groups(rank: int, ranks: int) -> None:
    logits, labels = torch.randn(3, 8, generator=torch.Generator().manual_seed(rank)), torch.tensor([0, 7, 3])
    alone = [dist.new_group([r]) for r in range(ranks)]  # every rank makes every group
    assert torch.equal(vocab_parallel_logprobs(logits, labels, group=alone[rank]), gather_logprobs(logits, labels))
    message = ""
    try:
        vocab_parallel_logprobs(logits, labels, group=alone[(rank + 1) % ranks])
    except (TypeError, ValueError) as error:
        message = str(error)
    assert "`group` must" in message, message


def main() -> None:
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=120))
    torch.set_num_threads(1)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for kernels in (None, emulate.load()):
        with _common.namespace(kernels) if kernels else contextlib.nullcontext():
            random_calls(rank, ranks)
            special_calls(rank, ranks)
            refusals(rank, ranks)
            one_collective()
    groups(rank, ranks)
    compiled(rank, ranks)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
