import inspect
import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import rlhf_fast
from rlhf_fast import gather_logprobs, linear_logprobs
from rlhf_fast.ops.linear import WORKSPACE, linear_logprobs_reference
from tests.cases import EPS, draw_gather_logprobs

H = 7


def draw(seed, dtype=torch.float32, bias=True):
    """A call of `linear_logprobs` whose labels, mask and options are those of a random call of `gather_logprobs`."""
    rng = random.Random(seed)
    call = draw_gather_logprobs(rng)
    shape = call.args[1].shape
    generator = torch.Generator().manual_seed(seed)
    vocab = call.args[0].shape[-1]
    hidden = torch.randn(*shape, H, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(vocab, H, generator=generator, dtype=torch.float64).to(dtype)
    b = torch.randn(vocab, generator=generator, dtype=torch.float64).to(dtype) if bias else None
    labels = call.args[1].where(call.args[1] == -100, call.args[1] % vocab)
    return (hidden, weight, labels), {**call.kwargs, "bias": b, "chunk_tokens": rng.choice([None, 1, 2, 3])}


def outcome(function, args, kwargs, dtype=None):
    hidden, weight, labels = args
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (hidden, weight)]
    bias = kwargs["bias"]
    if bias is not None:
        leaves.append(bias.detach().to(dtype or bias.dtype).requires_grad_())
    result = function(*leaves[:2], labels, **kwargs | {"bias": leaves[2] if bias is not None else None})
    outputs = list(result) if isinstance(result, tuple) else [result]
    generator = torch.Generator().manual_seed(5)
    loss = sum((o * torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype)).sum() for o in outputs)
    return outputs, torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("seed", range(120))
def test_values_and_gradients_are_those_of_the_whole_product(seed):
    args, kwargs = draw(seed, bias=seed % 2 == 0)
    got, want = outcome(linear_logprobs, args, kwargs), outcome(linear_logprobs_reference, args, kwargs, torch.float64)
    # The product is float32, so a logit is off by some epsilons of its own size before the op begins.
    for mine, theirs in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("seed", range(30))
def test_chunks_have_the_values_of_gather_logprobs_in_float64(seed):
    args, kwargs = draw(seed, torch.float64)
    got, want = outcome(linear_logprobs, args, kwargs), outcome(linear_logprobs_reference, args, kwargs)
    for mine, theirs in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_gradients_of_the_weight_are_rounded_once_whatever_the_chunks(dtype):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(500, 16, generator=generator).to(dtype)
    weight, labels = (
        torch.randn(64, 16, generator=generator).to(dtype),
        torch.randint(0, 64, (500,), generator=generator),
    )
    gradients = {}
    for chunk in (500, 7):
        leaf = weight.clone().requires_grad_()
        linear_logprobs(hidden, leaf, labels, chunk_tokens=chunk).sum().backward()
        gradients[chunk] = leaf.grad
    whole, parts = (gradients[chunk].double() for chunk in (500, 7))
    assert ((whole - parts).abs() <= EPS[dtype] * whole.abs().clamp(min=1)).all()
    logits = torch.nn.functional.linear(hidden, weight).float().requires_grad_()
    gather_logprobs(logits, labels).sum().backward()
    exact = logits.grad.double().t() @ hidden.double()
    assert ((parts - exact).abs() <= 0.51 * EPS[dtype] * exact.abs().clamp(min=1) + 500 * EPS[dtype] / 8).all()


def test_the_log_probs_are_bit_for_bit_those_of_the_logits():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(3, 5, 16, generator=generator), torch.randn(100, 16, generator=generator)
    labels = torch.randint(0, 100, (3, 5), generator=generator)
    expected = gather_logprobs(torch.nn.functional.linear(hidden, weight), labels, with_entropy=True)
    for mine, theirs in zip(linear_logprobs(hidden, weight, labels, with_entropy=True), expected, strict=True):
        assert mine.equal(theirs)


class Largest(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.numel, self.products = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        self.products += function in (
            torch.ops.aten.mm.default,
            torch.ops.aten.addmm.default,
            torch.ops.aten.addmm_.default,
        )
        for t in result if isinstance(result, tuple | list) else [result]:
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.numel())
        return result


def backward(hidden, weight, labels, **options):
    with Largest() as seen:
        linear_logprobs(hidden, weight, labels, **options).sum().backward()
    return seen


def test_no_tensor_is_larger_than_the_workspace():
    tokens, vocab = 2100, 20_000
    hidden = torch.randn(tokens, 4, requires_grad=True)
    weight = torch.randn(vocab, 4, requires_grad=True)
    seen = backward(hidden, weight, torch.zeros(tokens, dtype=torch.long))
    assert WORKSPACE["cpu"] // 8 < 4 * seen.numel <= WORKSPACE["cpu"] < 4 * tokens * vocab
    assert backward(hidden, weight, torch.zeros(tokens, dtype=torch.long), chunk_tokens=100).numel == 100 * vocab


def test_what_is_frozen_or_does_not_count_costs_no_product():
    hidden, weight = torch.randn(8, 4), torch.randn(50, 4)
    labels = torch.zeros(8, dtype=torch.long)
    counts = {
        (h, w): backward(hidden.clone().requires_grad_(h), weight.clone().requires_grad_(w), labels).products
        for h, w in ((True, True), (True, False), (False, True))
    }
    assert counts == {(True, True): 4, (True, False): 3, (False, True): 3}
    mask = torch.tensor([1, 0, 0, 0, 0, 0, 0, 1])
    assert backward(hidden.requires_grad_(), weight, labels, mask=mask).numel < len(hidden) * len(weight)


def test_nothing_that_counts_gives_zeros_that_can_be_differentiated():
    for labels, mask in ((torch.full((3,), -100), None), (torch.zeros(3, dtype=torch.long), torch.zeros(3))):
        hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
        logprobs, entropy = linear_logprobs(hidden, weight, labels, mask=mask, with_entropy=True)
        assert not logprobs.any() and not entropy.any()
        (logprobs.sum() + entropy.sum()).backward()
        assert not hidden.grad.any() and not weight.grad.any()
    empty = linear_logprobs(torch.zeros(2, 0, 4), weight, torch.zeros(2, 0, dtype=torch.long))
    assert empty.shape == (2, 0)


def test_gradcheck():
    (hidden, weight, labels), _ = draw(3, torch.float64)
    options = {"softcap": 3.0, "logit_scale": 0.7, "temperature": 0.9, "with_entropy": True, "chunk_tokens": 2}
    hidden, weight = torch.randn(5, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    labels, bias = torch.tensor([0, 5, -100, 2, 3]), torch.randn(6, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    assert torch.autograd.gradcheck(lambda h, w, b: linear_logprobs(h, w, labels, bias=b, **options), leaves)


def test_autocast_is_that_of_linear():
    hidden, weight, labels = torch.randn(5, 8), torch.randn(30, 8, requires_grad=True), torch.arange(5)
    with torch.autocast("cpu", torch.bfloat16):
        got = linear_logprobs(hidden, weight, labels)
        expected = gather_logprobs(torch.nn.functional.linear(hidden, weight), labels)
    assert got.equal(expected) and got.dtype == torch.float32
    got.sum().backward()
    assert weight.grad.dtype == torch.float32


def test_compiles_as_a_whole():
    hidden, weight, labels = torch.randn(6, 8), torch.randn(30, 8), torch.arange(6)

    def both(function):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        out = function(h, w, labels, chunk_tokens=4)
        out.sum().backward()
        return out, h.grad, w.grad

    compiled = both(torch.compile(linear_logprobs, fullgraph=True))
    for mine, theirs in zip(compiled, both(linear_logprobs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


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


def test_a_second_derivative_is_refused():
    hidden = torch.randn(3, 4, requires_grad=True)
    out = linear_logprobs(hidden, torch.randn(9, 4), torch.arange(3)).sum()
    (gradient,) = torch.autograd.grad(out, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_logprobs: the op has no second derivative"):
        (out + gradient.square().sum()).backward()  # a gradient penalty


def test_the_keywords_are_those_of_gather_logprobs():
    theirs = set(inspect.signature(gather_logprobs).parameters) - {"logits", "labels", "kept", "inplace_backward"}
    assert theirs <= set(inspect.signature(rlhf_fast.linear_logprobs).parameters)
