import inspect
import os
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_fast import gather_logprobs, linear_logprobs
from rlhf_fast.ops import linear
from rlhf_fast.ops.linear import WORKSPACE, linear_logprobs_reference
from tests.cases import EPS, assert_close


def draw(*batch, width=16, vocab=100, dtype=torch.float32, seed=0, device="cpu"):
    """hidden, weight, labels."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*batch, width, generator=generator).to(dtype).to(device)
    weight = (torch.randn(vocab, width, generator=generator) * 1.5 / width**0.5).to(dtype).to(device)
    return hidden, weight, torch.randint(0, vocab, batch, generator=generator).to(device)


def outcome(function, hidden, weight, labels, dtype=None, **options):
    """Outputs and the gradients of hidden and weight, for upstream gradients that differ from token to token."""
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (hidden, weight)]
    result = function(*leaves, labels, **options)
    outputs = list(result) if isinstance(result, tuple) else [result]
    upstream = [torch.linspace(-1, 2 + i, o.numel()).view(o.shape).to(o) for i, o in enumerate(outputs)]
    return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, leaves, upstream)]


@pytest.fixture
def small_workspace(monkeypatch):
    """Tiles of 256 ids and 4 or so tokens."""
    monkeypatch.setattr(linear, "WORKSPACE", {"cpu": 4 * 256 * 4, "cuda": 4 * 256 * 4})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [None, 1, 3])
def test_tiles_give_what_the_whole_gives(dtype, chunk, small_workspace, device):
    hidden, weight, labels = draw(2, 5, vocab=2000, dtype=dtype, device=device)
    options = {"with_entropy": True, "temperature": 0.7, "mask": torch.arange(10, device=device).view(2, 5) % 3}
    assert linear.tile(hidden.view(10, 16), weight, chunk or 0)[1] < 2000
    got = outcome(linear_logprobs, hidden, weight, labels, chunk_tokens=chunk, **options)
    want = outcome(linear_logprobs_reference, hidden, weight, labels, torch.float64, **options)
    for i, (mine, theirs) in enumerate(zip(got, want, strict=True)):
        assert_close(f"{i}", mine, theirs, 8.0 + 24.0 * (i > 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_are_never_rounded_to_16_bits(dtype, device):
    hidden, weight, labels = draw(64, width=64, vocab=300, dtype=dtype, device=device)
    exact = linear_logprobs_reference(hidden.double(), weight.double(), labels)
    rounded = gather_logprobs(torch.nn.functional.linear(hidden, weight), labels)
    error, usual = ((t.double() - exact).abs().max() for t in (linear_logprobs(hidden, weight, labels), rounded))
    assert error < 1e-5 < 100 * error < usual


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_gradients_are_rounded_once_whatever_the_tiles(dtype, monkeypatch):
    hidden, weight, labels = draw(500, vocab=700, dtype=dtype)
    exact = outcome(linear_logprobs_reference, hidden, weight, labels, torch.float64)
    for workspace in (WORKSPACE, {"cpu": 256 * 4 * 30}):
        monkeypatch.setattr(linear, "WORKSPACE", workspace)
        got = outcome(linear_logprobs, hidden, weight, labels, chunk_tokens=500 if workspace is WORKSPACE else 7)
        for mine, want in zip(got[1:], exact[1:], strict=True):
            # Half a unit of the last place of each number, and what float32 sums of 500 or 700 terms lose.
            unit = torch.maximum(want.abs(), mine.double().abs()).log2().floor().exp2() * EPS[dtype] / 2
            assert ((mine.double() - want).abs() <= 0.51 * 2 * unit + 2e-5).all()


def test_the_log_probs_are_bit_for_bit_those_of_the_logits():
    hidden, weight, labels = draw(3, 5)
    expected = gather_logprobs(hidden.view(15, 16) @ weight.t(), labels.view(15), with_entropy=True)
    for mine, theirs in zip(linear_logprobs(hidden, weight, labels, with_entropy=True), expected, strict=True):
        assert mine.view(15).equal(theirs)


def test_the_backward_pass_has_the_logits_of_the_forward_pass(small_workspace, monkeypatch):
    seen = []
    original = linear.Tiles.logits
    monkeypatch.setattr(
        linear.Tiles,
        "logits",
        lambda self, *args: (seen.append(original(self, *args).clone()), original(self, *args))[1],
    )
    hidden, weight, labels = draw(11, vocab=600, dtype=torch.bfloat16)
    outcome(linear_logprobs, hidden, weight, labels)
    half = len(seen) // 2
    assert half > 4 and all(a.equal(b) for a, b in zip(seen[:half], seen[half:], strict=True))


def test_threads_do_not_change_the_bits():
    hidden, weight, labels = draw(300, vocab=5003)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(outcome(linear_logprobs, hidden, weight, labels, with_entropy=True))
        # Those of our kernels; torch's product promises nothing, and keeps it to a few units of the last place.
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    finally:
        torch.set_num_threads(threads)


# ---------------------------------------------------------------------------------------------------------------------
# What it costs


class Watch(TorchDispatchMode):
    """The largest tensor that came to be, and the operations of all products."""

    def __init__(self):
        super().__init__()
        self.bytes, self.multiplications = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if function in (torch.ops.aten.mm.out, torch.ops.aten.addmm_.default):
            a, b = args[-2:]
            self.multiplications += a.shape[0] * a.shape[1] * b.shape[1]
        for t in result if isinstance(result, tuple | list) else [result]:
            if isinstance(t, torch.Tensor):
                self.bytes = max(self.bytes, t.numel() * t.element_size())
        return result


def watched(hidden, weight, labels, mask=None, chunk=0, needs=(True, True, False)) -> Watch:
    """The op's two halves, seen from within: a mode that is on when the op is called sees the op alone."""
    rest, numbers = (None, labels, None, mask), (1.0, 0.0, 1.0, -100)
    with Watch() as seen:
        logprobs, _, stats = linear._logprobs(hidden, weight, *rest, *numbers, False, chunk, False)
        linear._gradients(torch.ones_like(logprobs), None, hidden, weight, *rest, stats, *numbers, chunk, *needs)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "width", "vocab"), [(2100, 4, 20_000), (70_000, 2, 700), (3, 500, 40_000)])
def test_no_tensor_is_larger_than_the_workspace(tokens, width, vocab, dtype, monkeypatch):
    workspace = 8 << 20
    monkeypatch.setattr(linear, "WORKSPACE", {"cpu": workspace})
    hidden, weight, labels = draw(tokens, width=width, vocab=vocab, dtype=dtype)
    largest = max(workspace, *(4 * t.numel() for t in (hidden, weight)))  # the gradients are as large as the inputs
    for chunk in (0, 100, 10**9):
        assert watched(hidden, weight, labels, chunk=chunk, needs=(True, True, True)).bytes <= largest
    if workspace < 4 * tokens * vocab:
        assert watched(hidden, weight, labels).bytes > workspace // 4


def test_what_is_frozen_or_does_not_count_costs_no_product():
    hidden, weight, labels = draw(8, width=4, vocab=50)
    one = hidden.numel() * len(weight)
    for needs, products in (((1, 1, 0), 4), ((1, 0, 0), 3), ((0, 1, 1), 3), ((0, 0, 1), 2)):
        assert watched(hidden, weight, labels, needs=needs).multiplications == products * one
    mask = torch.tensor([1, 0, 0, 0, 0, 0, 0, 1])
    assert watched(hidden, weight, labels, mask).multiplications == 4 * one * 2 // 8
    labels[1:] = -100
    assert watched(hidden, weight, labels, mask).multiplications == 4 * one // 8
    assert watched(hidden, weight, labels, mask * 0).multiplications == 0


PEAK = """
import resource, sys, torch
import rlhf_fast
torch.set_num_threads(1)
hidden, weight = torch.randn(1500, 8, requires_grad=True), torch.randn(int(sys.argv[1]), 8, requires_grad=True)
labels = torch.zeros(1500, dtype=torch.long)
rlhf_fast.linear_logprobs(hidden[:2], weight[:9], labels[:2]).sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rlhf_fast.linear_logprobs(hidden, weight, labels).sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_peak_memory_does_not_grow_with_the_vocabulary():
    """400 MB of logits, and once more that of gradients, are never there: 64 MiB are, with the weight's gradient of 2 MB."""
    run = subprocess.run(
        [sys.executable, "-c", PEAK, "66000"], capture_output=True, text=True, check=True, env=os.environ
    )
    assert int(run.stdout) < 120_000


# ---------------------------------------------------------------------------------------------------------------------


def test_tokens_that_do_not_count_are_not_read_where_nobody_may_look(device, monkeypatch):
    """A GPU computes masked tokens and drops them: what stands there may not reach the weight's gradient."""
    hidden, weight, labels = draw(2, 6, device=device)
    labels[0, 1] = -100
    mask = torch.ones(2, 6, device=device)
    mask[1, :3] = 0
    want = outcome(linear_logprobs, hidden, weight, labels, mask=mask)
    spoilt = hidden.clone()
    spoilt[0, 1] = spoilt[1, :3] = torch.nan
    monkeypatch.setattr(linear, "waits", lambda t: True)
    got = outcome(linear_logprobs, spoilt, weight, labels, mask=mask)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert not got[1][0, 1].any() and not got[1][1, :3].any()


def test_labels_are_refused_before_there_is_a_product(small_workspace, monkeypatch):
    monkeypatch.setattr(linear, "product", lambda *args: pytest.fail("a product"))
    hidden, weight, labels = draw(5, vocab=600)
    labels[3] = 600
    with pytest.raises(
        ValueError, match=r"linear_logprobs: `labels` holds 600 at flat position 3; a label must be in \[0, 600\)"
    ):
        linear_logprobs(hidden, weight, labels)


def test_tied_weights_get_both_gradients():
    _, weight, labels = draw(6, vocab=30)
    grads = []
    for tied in (True, False):
        table, head = weight.clone().requires_grad_(), weight.clone().requires_grad_()
        linear_logprobs(table[labels], table if tied else head, labels).sum().backward()
        grads.append(table.grad if tied else table.grad + head.grad)
    torch.testing.assert_close(*grads)


def test_nothing_that_counts_gives_zeros_that_can_be_differentiated():
    for labels, mask in ((torch.full((3,), -100), None), (torch.zeros(3, dtype=torch.long), torch.zeros(3))):
        hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
        logprobs, entropy = linear_logprobs(hidden, weight, labels, mask=mask, with_entropy=True)
        assert not logprobs.any() and not entropy.any()
        (logprobs.sum() + entropy.sum()).backward()
        assert not hidden.grad.any() and not weight.grad.any()
    empty = linear_logprobs(torch.zeros(2, 0, 4), weight, torch.zeros(2, 0, dtype=torch.long))
    assert empty.shape == (2, 0)


@pytest.mark.parametrize("inside", [True, False])
def test_autocast_casts_as_linear_does(inside):
    """Its products are of 16-bit factors; the logits are float32 all the same. The backward pass may run inside it."""
    hidden, weight, labels = draw(5, vocab=30)
    weight.requires_grad_()
    narrow = weight.detach().bfloat16().requires_grad_()
    want = linear_logprobs(hidden.bfloat16(), narrow, labels)
    want.sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        got = linear_logprobs(hidden, weight, labels)
        if inside:
            got.sum().backward()
    if not inside:
        got.sum().backward()
    assert got.equal(want) and got.dtype == torch.float32
    assert weight.grad.dtype == torch.float32 and weight.grad.equal(narrow.grad.float())
    with torch.autocast("cpu", torch.bfloat16):  # as torch.nn.functional.linear, which leaves float64 alone
        assert linear_logprobs(hidden.double(), weight.double(), labels).dtype == torch.float64


def test_weights_that_are_no_plain_tensors_are_refused():
    from torch.distributed.tensor import DTensor, Replicate, init_device_mesh
    from torch.testing._internal.two_tensor import TwoTensor

    hidden, weight, labels = draw(3, vocab=9)
    with pytest.raises(TypeError, match="linear_logprobs: `weight` must be a plain tensor, got a TwoTensor"):
        linear_logprobs(hidden, TwoTensor(weight, weight), labels)
    packed = torch.zeros(9 * 16 // 2, 1, dtype=torch.uint8)  # bitsandbytes' four bits a number
    with pytest.raises(TypeError, match=r"`weight` must be float32, bfloat16, float16 or float64, got torch\.uint8"):
        linear_logprobs(hidden, packed, labels)
    torch.distributed.init_process_group(
        "fake", store=torch.testing._internal.distributed.fake_pg.FakeStore(), rank=0, world_size=1
    )
    try:
        spread = DTensor.from_local(weight, init_device_mesh("cpu", (1,)), [Replicate()])
        with pytest.raises(TypeError, match=r"linear_logprobs: `weight` is a DTensor.*full_tensor"):
            linear_logprobs(hidden, spread, labels)
    finally:
        torch.distributed.destroy_process_group()


WRONG = [
    ("hidden", {"hidden": None}, TypeError),
    ("hidden", {"hidden": torch.zeros(3, 4, dtype=torch.long)}, TypeError),
    ("weight", {"weight": torch.zeros(9, 5)}, ValueError),
    ("weight", {"weight": torch.zeros(0, 4)}, ValueError),
    ("weight", {"weight": torch.zeros(9, 4, dtype=torch.bfloat16)}, TypeError),
    ("weight", {"weight": torch.zeros(9, 4, device="meta")}, ValueError),
    ("bias", {"bias": torch.zeros(8)}, ValueError),
    ("labels", {"labels": torch.zeros(4, dtype=torch.long)}, ValueError),
    ("labels", {"labels": torch.zeros(3)}, TypeError),
    ("labels", {"labels": torch.tensor([0, 9, 1])}, ValueError),
    ("mask", {"mask": torch.ones(2)}, ValueError),
    ("temperature", {"temperature": 0.0}, ValueError),
    ("temperature", {"temperature": torch.ones(2)}, ValueError),
    ("softcap", {"softcap": -1.0}, ValueError),
    ("logit_scale", {"logit_scale": float("nan")}, ValueError),
    ("ignore_index", {"ignore_index": 1.5}, TypeError),
    ("with_entropy", {"with_entropy": 1}, TypeError),
    ("chunk_tokens", {"chunk_tokens": 0}, ValueError),
    ("chunk_tokens", {"chunk_tokens": 2.0}, TypeError),
]


@pytest.mark.parametrize(("name", "change", "kind"), WRONG)
def test_wrong_arguments_are_named(name, change, kind):
    good = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(9, 4), "labels": torch.zeros(3, dtype=torch.long)}
    with pytest.raises(kind, match=f"`{name}`"):
        linear_logprobs(**good | change)


def test_the_keywords_are_those_of_gather_logprobs():
    theirs = set(inspect.signature(gather_logprobs).parameters) - {"logits", "labels", "kept", "inplace_backward"}
    assert theirs <= set(inspect.signature(linear_logprobs).parameters)
