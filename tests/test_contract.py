"""What every op promises beyond its numbers: registrations that torch can check, tracing without a graph break, gradients in
double precision, and a clear refusal of every bad call."""

import inspect
import os
import random
import subprocess
import sys

import pytest
import torch

import rlhf_fast
from rlhf_fast.ops import _common
from tests.cases import OPS, Call

B, T, V = 3, 5, 11

# Ops whose packed form has shapes and gradients of its own to check.
PACKED = [
    "shape_rewards",
    "gae",
    "masked_mean",
    "ppo_policy_loss",
    "ppo_value_loss",
    "ppo_loss_from_logits",
    "linear_ppo_loss",
]
EXAMPLES = [*OPS, *(f"{name} packed" for name in PACKED)]


def example(name: str, dtype=torch.float32, requires_grad=True) -> Call:
    generator = torch.Generator().manual_seed(0)

    def real(*shape):
        return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_(requires_grad)

    def constant(*shape):
        return real(*shape).detach()

    mask = torch.rand(B, T, generator=generator) < 0.7
    labels = torch.randint(0, V, (B, T), generator=generator)
    n = B * T
    packed = {"cu_seqlens": torch.tensor([0, 4, 4, n], dtype=torch.int32)}
    return {
        "shape_rewards packed": lambda: Call(
            (real(B), real(n), real(n), mask.flatten()), {"kl_coef": 0.1, "estimator": "k3", **packed}
        ),
        "gae packed": lambda: Call((real(n), real(n), mask.flatten()), {"bootstrap": real(B), **packed}),
        "masked_mean packed": lambda: Call((real(n), mask.flatten()), packed),
        "ppo_policy_loss packed": lambda: Call(
            (real(n), real(n), real(B), mask.flatten()), {"aggregate": "seq-mean-token-mean", **packed}
        ),
        "ppo_value_loss packed": lambda: Call(
            (real(n), real(n), real(n), mask.flatten()), {"aggregate": "seq-mean-token-sum-norm", **packed}
        ),
        "gather_logprobs": lambda: Call((real(B, T, V), labels), {"with_entropy": True, "mask": mask, "softcap": 3.0}),
        "linear_logprobs": lambda: Call(
            (real(B, T, 4), real(V, 4), labels),
            {"bias": real(V), "with_entropy": True, "mask": mask, "softcap": 3.0, "chunk_tokens": 4},
        ),
        "linear_ppo_loss": lambda: Call(
            (real(B, T, 4), real(V, 4), labels, constant(B, T) - 2.5, constant(B), mask),
            {
                "bias": real(V),
                "entropy_coef": 0.1,
                "ref_logprobs": constant(B, T) - 2.5,
                "kl_coef": 0.1,
                "temperature": 0.7,
                "chunk_tokens": 4,
            },
        ),
        "linear_ppo_loss packed": lambda: Call(
            (real(n, 4), real(V, 4), labels.flatten(), constant(n) * 0.1 - 2.5, constant(n), mask.flatten()),
            {"aggregate": "seq-mean-token-mean", **packed},
        ),
        "kept_logprobs": lambda: Call(
            (real(B, T, V), labels),
            {
                "kept": torch.stack([labels, (labels + 3) % V, labels, labels * 0 - 1, (labels + 1) % V], -1),
                "with_entropy": True,
            },
        ),
        "kl_penalty": lambda: Call((real(B, T), real(B, T)), {"estimator": "k3", "mask": mask}),
        "shape_rewards": lambda: Call((real(B), real(B, T), real(B, T), mask), {"kl_coef": 0.1, "estimator": "k3"}),
        "gae": lambda: Call((real(B, T), real(B, T), mask), {"bootstrap": real(B), "returns_lam": 0.5}),
        "masked_mean": lambda: Call((real(B, T), mask), {"dim": 1}),
        "masked_whiten": lambda: Call((real(B, T), mask), {"shift_mean": False}),
        "ppo_policy_loss": lambda: Call((real(B, T), real(B, T), real(B, T), mask), {"dual_clip": 2.0}),
        "ppo_value_loss": lambda: Call((real(B, T), real(B, T), real(B, T), mask), {}),
        "ppo_loss_from_logits": lambda: Call(
            (real(B, T, V), labels, constant(B, T) - 2.5, constant(B), mask),
            {"entropy_coef": 0.1, "ref_logprobs": constant(B, T) - 2.5, "kl_coef": 0.1, "temperature": 0.7},
        ),
        "ppo_loss_from_logits packed": lambda: Call(
            (real(n, V), labels.flatten(), constant(n) * 0.1 - 2.5, constant(n), mask.flatten()),
            {
                "importance_sampling_level": "sequence",
                "aggregate": "seq-mean-token-mean",
                "entropy_coef": 0.1,
                **packed,
            },
        ),
        "reward_pair_loss": lambda: Call((real(B), real(B)), {"margin": real(B), "center_coef": 0.01}),
        "group_advantages": lambda: Call((real(4 * B),), {"group_size": 4, "leave_one_out": True}),
        "dpo_loss": lambda: Call((real(B), real(B), real(B), real(B)), {"beta": 0.5, "label_smoothing": 0.1}),
        "kl_divergence": lambda: Call(
            (real(B, T, V), real(B, T, V).detach()), {"mask": mask, "temperature": real(B, T).detach().abs() + 0.5}
        ),
    }[name]()


def tensors_of(result):
    return (
        [result]
        if isinstance(result, torch.Tensor)
        else [t for part in (result.values() if isinstance(result, dict) else result) for t in tensors_of(part)]
    )


def kernels_called(name: str, call: Call, monkeypatch) -> dict:
    """The operators that a call goes through, forward and backward, each with the arguments that it got last."""
    seen = {}
    original = _common.Kernel.__call__
    monkeypatch.setattr(
        _common.Kernel, "__call__", lambda self, *args: (seen.update({self: args}), original(self, *args))[1]
    )
    outputs = [t for t in tensors_of(OPS[name].function(*call.args, **call.kwargs)) if t.requires_grad]
    if outputs:
        torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])
    monkeypatch.undo()
    return seen


@pytest.mark.parametrize("example_name", EXAMPLES)
def test_registrations_hold_under_opcheck(example_name, monkeypatch):
    """opcheck on every operator behind the op, forward and backward, with the arguments that the public function gives it."""
    name, call = example_name.split()[0], example(example_name)
    seen = kernels_called(name, call, monkeypatch)
    for inplace in {"inplace", "inplace_backward"} & set(inspect.signature(OPS[name].function).parameters):
        logits = call.args[0].detach().clone().requires_grad_() * 1
        call = Call((logits, *call.args[1:]), {**call.kwargs, inplace: True})
        seen.update({k: v for k, v in kernels_called(name, call, monkeypatch).items() if k.name != name})
    assert name in {kernel.name for kernel in seen}
    for kernel, args in seen.items():
        if "backward" in kernel.name or "inplace" in kernel.name:  # no formula of its own
            args = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
        torch.library.opcheck(kernel.overload(), args)


@pytest.mark.parametrize("through", ["function", "operator"])
@pytest.mark.parametrize("example_name", EXAMPLES)
def test_a_second_derivative_is_an_error_and_never_a_wrong_number(example_name, through, monkeypatch):
    """With a constant upstream too: a gradient penalty that came out as a constant would silently do nothing."""
    name, call = example_name.split()[0], example(example_name, torch.float64)
    leaves = [v for v in (*call.args, *call.kwargs.values()) if isinstance(v, torch.Tensor) and v.requires_grad]
    kernel, args = next((k, a) for k, a in kernels_called(name, call, monkeypatch).items() if k.name == name)

    def outputs_of_a_call():
        if through == "function":
            outputs = tensors_of(OPS[name].function(*call.args, **call.kwargs))
        else:
            outputs = tensors_of(kernel.overload()(*args))
        return [t for t in outputs if t.requires_grad]

    outputs = outputs_of_a_call()
    message = f"{name}: the op has no second derivative"
    if not outputs:
        pytest.skip(f"{name} has no derivative at all")
    for gradient in torch.autograd.grad([t.sum() for t in outputs], leaves, create_graph=True):
        if name == "masked_mean":  # linear: its gradient really is a constant
            assert not gradient.requires_grad
            continue
        with pytest.raises(RuntimeError, match=message):
            torch.autograd.grad(gradient.square().sum(), leaves, allow_unused=True)
        with pytest.raises(RuntimeError, match=message):
            (outputs[0].sum() + gradient.square().sum()).backward(retain_graph=True)
    outputs = outputs_of_a_call()  # some allow one backward pass
    upstream = [torch.ones_like(t).requires_grad_() for t in outputs]
    for gradient in torch.autograd.grad(outputs, leaves, upstream, create_graph=True):
        with pytest.raises(RuntimeError, match=message):
            torch.autograd.grad(gradient.square().sum(), upstream, allow_unused=True)


def called_anew(function):
    """The function, called again for each backward pass."""

    class Anew(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            ctx.save_for_backward(*inputs)
            return function(*inputs)

        @staticmethod
        def backward(ctx, *gradients):
            inputs = [t.detach().requires_grad_() for t in ctx.saved_tensors]
            with torch.enable_grad():
                return torch.autograd.grad(function(*inputs), inputs, gradients)

    return Anew.apply


@pytest.mark.parametrize("name", EXAMPLES)
def test_gradients_in_double_precision(name):
    call, op = example(name, torch.float64), OPS[name.split()[0]]
    places = [i for i, a in enumerate(call.args) if a.requires_grad]
    keys = [k for k, v in call.kwargs.items() if isinstance(v, torch.Tensor) and v.requires_grad]

    def function(*inputs):
        args, kwargs = list(call.args), dict(call.kwargs)
        for i, value in zip(places, inputs, strict=False):
            args[i] = value
        kwargs.update(zip(keys, inputs[len(places) :], strict=True))
        return tuple(t for t in tensors_of(op.function(*args, **kwargs)) if t.requires_grad)

    if name.split()[0] in (
        "ppo_loss_from_logits",
        "linear_ppo_loss",
    ):  # gradcheck goes backward through one call several times
        function = called_anew(function)
    assert torch.autograd.gradcheck(function, (*(call.args[i] for i in places), *(call.kwargs[k] for k in keys)))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_compiles_without_a_graph_break(name, backend):
    call, op = example(name), OPS[name.split()[0]]
    leaves = [v for v in (*call.args, *call.kwargs.values()) if isinstance(v, torch.Tensor) and v.requires_grad]

    def run(function):
        outputs = [t for t in tensors_of(function(*call.args, **call.kwargs)) if t.requires_grad]
        return outputs, torch.autograd.grad([t.sum() for t in outputs], leaves)

    for kernel in vars(inspect.getmodule(op.function)).values():
        if isinstance(kernel, _common.Kernel):
            kernel._bound = None  # as before the first eager call
    torch._dynamo.reset()
    compiled = torch.compile(op.function, fullgraph=True, backend=backend)
    for got, want in zip(run(compiled), run(op.function), strict=True):
        torch.testing.assert_close(list(got), list(want))


def test_two_ops_compile_together_with_what_stands_between():
    torch._dynamo.reset()
    call = example("gather_logprobs")

    def loss(logits, labels, old, advantages):
        logprobs = rlhf_fast.gather_logprobs(logits * 2, labels, inplace_backward=True)
        return rlhf_fast.ppo_policy_loss(logprobs, old, advantages)[0]

    old, advantages = torch.randn(2, B, T, generator=torch.Generator().manual_seed(1))
    results = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        logits = call.args[0].detach().clone().requires_grad_()
        value = function(logits, call.args[1], old, advantages)
        value.backward()
        results.append((value.detach(), logits.grad))
    torch.testing.assert_close(results[0], results[1])


# ---------------------------------------------------------------------------------------------------------------------
# Bad calls


def t(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


ints = t(2, 3, dtype=torch.int64)
offsets = torch.tensor([0, 2, 5])
BAD = [
    ("gather_logprobs", (None, ints), {}, TypeError, "`logits` must be a tensor, got NoneType"),
    ("gather_logprobs", (t(2, 3, 5), None), {}, TypeError, "`labels` must be a tensor, got NoneType"),
    ("gather_logprobs", (t(2, 3, 5), [1, 2]), {}, TypeError, "`labels` must be a tensor, got list"),
    (
        "gather_logprobs",
        (t(2, 3, 5, dtype=torch.int32), ints),
        {},
        TypeError,
        "`logits` must be float32, bfloat16, float16 or float64, got Int",
    ),
    ("gather_logprobs", (t(2, 3, 5), t(2, 3)), {}, TypeError, "`labels` must be int64 or int32, got Float"),
    (
        "gather_logprobs",
        (t(2, 3, 5), t(2, 4, dtype=torch.int64)),
        {},
        ValueError,
        r"`labels` has shape \[2, 4\].*`logits` is \[2, 3, 5\]",
    ),
    ("gather_logprobs", (t(), ints), {}, ValueError, r"`logits` must be \[..., V\]"),
    ("gather_logprobs", (t(2, 3, 0), ints), {}, ValueError, "empty vocabulary"),
    ("gather_logprobs", (t(2, 3, 5), ints - 1), {}, ValueError, "`labels` holds -1 at flat position 0"),
    (
        "gather_logprobs",
        (t(2, 3, 5), ints),
        {"temperature": 0.0},
        ValueError,
        "`temperature` must be finite and above 0, got 0.0",
    ),
    (
        "gather_logprobs",
        (t(2, 3, 5), ints),
        {"temperature": float("nan")},
        ValueError,
        "`temperature` must be finite.*got nan",
    ),
    (
        "gather_logprobs",
        (t(2, 3, 5), ints),
        {"temperature": t(2, 3)},
        ValueError,
        "`temperature` holds 0 at flat position 0; it must be finite and above 0",
    ),
    ("gather_logprobs", (t(2, 3, 5), ints), {"temperature": "1"}, TypeError, "`temperature` must be a number, got str"),
    (
        "gather_logprobs",
        (t(2, 3, 5), ints),
        {"temperature": t(3) + 1},
        ValueError,
        r"`temperature` has shape \[3\].*\[2, 3\]",
    ),
    (
        "gather_logprobs",
        (t(2, 3, 5), ints),
        {"softcap": -1.0},
        ValueError,
        "`softcap` must be finite and above 0, got -1.0",
    ),
    (
        "gather_logprobs",
        (t(2, 3, 5), ints),
        {"logit_scale": 0},
        ValueError,
        "`logit_scale` must be finite and above 0, got 0.0",
    ),
    (
        "gather_logprobs",
        (t(2, 3, 5), ints),
        {"mask": t(2, 4)},
        ValueError,
        r"`mask` has shape \[2, 4\] but must have the shape of `labels`, \[2, 3\]",
    ),
    ("gather_logprobs", (t(2, 3, 5), ints), {"mask": t(2, 3).requires_grad_()}, ValueError, "`mask` requires grad"),
    (
        "gather_logprobs",
        (t(2, 3, 5), ints),
        {"mask": t(2, 3, dtype=torch.complex64)},
        TypeError,
        "`mask` must be bool, integer or floating point",
    ),
    (
        "gather_logprobs",
        (t(2, 3, 5), ints),
        {"ignore_index": 1.0},
        TypeError,
        "`ignore_index` must be an integer, got float",
    ),
    (
        "gather_logprobs",
        (t(2, 3, 5), ints),
        {"with_entropy": 1},
        TypeError,
        "`with_entropy` must be True or False, got int",
    ),
    ("gather_logprobs", (t(2, 3, 5), ints), {"kept": [0]}, TypeError, "`kept` must be a tensor, got list"),
    (
        "gather_logprobs",
        (t(2, 3, 5), ints),
        {"kept": t(2, 3, 4)},
        TypeError,
        "`kept` must be int64 or int32, got Float",
    ),
    (
        "gather_logprobs",
        (t(2, 3, 5), ints),
        {"kept": ints},
        ValueError,
        r"`kept` has shape \[2, 3\] but must have that of `labels` and one dimension more; `labels` is \[2, 3\]",
    ),
    (
        "gather_logprobs",
        (t(2, 3, 5), ints),
        {"kept": t(2, 3, 513, dtype=torch.int64)},
        ValueError,
        "`kept` holds 513 ids a row; at most 512 are supported",
    ),
    (
        "gather_logprobs",
        (t(2, 3, 5), ints),
        {"kept": torch.tensor([0, 5]).expand(2, 3, 2)},
        ValueError,
        "`kept` holds 5 at flat position 1; an id must be below 5, or negative for padding",
    ),
    (
        "gather_logprobs",
        (t(2, 3, 5), ints),
        {"kept": ints.unsqueeze(-1) - 1},
        ValueError,
        "`kept` must keep a token for each label, and at flat position 0 of `labels` it holds padding only",
    ),
    (
        "kl_penalty",
        (t(2), t(3)),
        {},
        ValueError,
        r"`ref_logprobs` has shape \[3\] but must have the shape of `logprobs`, \[2\]",
    ),
    (
        "kl_penalty",
        (t(2, dtype=torch.int64), t(2)),
        {},
        TypeError,
        "`logprobs` must be floating point, got torch.int64",
    ),
    ("kl_penalty", (t(2), t(2)), {"log_ratio_clip": 0.0}, ValueError, "`log_ratio_clip` must be finite and above 0"),
    (
        "kl_penalty",
        (t(2), t(2)),
        {"output_clip": float("inf")},
        ValueError,
        "`output_clip` must be finite and above 0, got inf",
    ),
    (
        "shape_rewards",
        (t(3), t(2, 4), t(2, 4), t(2, 4)),
        {"kl_coef": 0.1},
        ValueError,
        r"`scores` must be \[B\] = \[2\], got shape \[3\]",
    ),
    (
        "shape_rewards",
        (t(2), t(2, 4), t(2, 4), None),
        {"kl_coef": 0.1},
        TypeError,
        "`mask` must be a tensor, got NoneType",
    ),
    (
        "shape_rewards",
        (t(2), t(2, 4), t(2, 4), t(2, 4)),
        {"kl_coef": -0.1},
        ValueError,
        "`kl_coef` must be finite and at least 0, got -0.1",
    ),
    (
        "shape_rewards",
        (t(2), t(4), t(4), t(4)),
        {"kl_coef": 0.1},
        ValueError,
        r"`logprobs` must be \[B, T\], got shape \[4\]",
    ),
    ("gae", (t(4), t(4)), {}, ValueError, r"`rewards` must be \[B, T\], got shape \[4\]"),
    (
        "gae",
        (t(2, 4), t(2, 5)),
        {},
        ValueError,
        r"`values` has shape \[2, 5\] but must have the shape of `rewards`, \[2, 4\]",
    ),
    (
        "gae",
        (t(2, 4), t(2, 4)),
        {"gamma": 1.5},
        ValueError,
        "`gamma` must be finite and at least 0 and at most 1, got 1.5",
    ),
    (
        "gae",
        (t(2, 4), t(2, 4)),
        {"lam": t(3)},
        ValueError,
        r"`lam` must hold one value a sequence, \[2\], got shape \[3\]",
    ),
    ("gae", (t(2, 4), t(2, 4)), {"gaps": "skip"}, ValueError, "`gaps` must be one of 'carry', 'decay', got 'skip'"),
    ("gae", (t(2, 4), t(2, 4)), {"bootstrap": t(4)}, ValueError, "`bootstrap` must hold one value a sequence"),
    (
        "gae",
        (t(2, 4), t(2, 4)),
        {"cu_seqlens": t(3, dtype=torch.int32)},
        ValueError,
        r"`rewards` must be \[N\] beside `cu_seqlens`",
    ),
    ("gae", (t(4), t(4)), {"cu_seqlens": t(3)}, TypeError, "`cu_seqlens` must be int32 or int64, got Float"),
    ("gae", (t(2, 4), t(2, 4)), {"whiten": None}, TypeError, "`whiten` must be True or False"),
    ("masked_mean", (t(2, 4), t(2, 5)), {}, ValueError, r"`mask` has shape \[2, 5\]"),
    ("masked_mean", (t(2, 4), t(2, 4)), {"dim": True}, TypeError, "`dim` must be an integer or None"),
    ("masked_whiten", (t(2, 4), t(2, 4)), {"eps": -1e-8}, ValueError, "`eps` must be finite and at least 0"),
    ("ppo_policy_loss", (t(4), t(4), t(4)), {}, ValueError, r"`logprobs` must be \[B, T\], got shape \[4\]"),
    ("ppo_policy_loss", (t(2, 4), t(2, 4), t(4)), {}, ValueError, r"`advantages` has shape \[4\]"),
    (
        "ppo_policy_loss",
        (t(2, 4), t(2, 4), t(2, 4)),
        {"clip_low": -0.2},
        ValueError,
        "`clip_low` must be finite and at least 0",
    ),
    (
        "ppo_policy_loss",
        (t(2, 4), t(2, 4), t(2, 4)),
        {"clip_low": None},
        TypeError,
        "`clip_low` must be a number, got NoneType",
    ),
    (
        "ppo_policy_loss",
        (t(2, 4), t(2, 4), t(2, 4)),
        {"dual_clip": 0.5},
        ValueError,
        "`dual_clip` must be finite and above 1, got 0.5",
    ),
    (
        "ppo_policy_loss",
        (t(2, 4), t(2, 4), t(2, 4)),
        {"aggregate": "mean"},
        ValueError,
        "`aggregate` must be one of 'token-mean'",
    ),
    (
        "ppo_policy_loss",
        (t(2, 4), t(2, 4), t(2, 4)),
        {"normalizer": 0},
        ValueError,
        "`normalizer` must be finite and above 0, got 0.0",
    ),
    (
        "ppo_policy_loss",
        (t(2, 4), t(2, 4), t(2, 4)),
        {"normalizer": t(2)},
        ValueError,
        r"`normalizer` must hold one number, got shape \[2\]",
    ),
    (
        "ppo_policy_loss",
        (t(2, 4), t(2, 4), t(2, 4)),
        {"loss_type": "gspo"},
        ValueError,
        "`loss_type` must be one of 'ppo', 'cispo', got 'gspo'",
    ),
    (
        "ppo_policy_loss",
        (t(2, 4), t(2, 4), t(2, 4)),
        {"importance_sampling_level": None},
        ValueError,
        "`importance_sampling_level` must be one of 'token', 'sequence', got None",
    ),
    (
        "ppo_policy_loss",
        (t(2, 4), t(2, 4), t(2, 4)),
        {"loss_type": "cispo", "dual_clip": 3.0},
        ValueError,
        "`dual_clip` must be None with loss_type='cispo', which bounds every ratio, got 3.0",
    ),
    (
        "ppo_policy_loss",
        (t(5), t(5), t(3)),
        {"cu_seqlens": offsets},
        ValueError,
        r"`advantages` has shape \[3\] but must have the shape of `logprobs`, \[5\]",
    ),
    (
        "ppo_policy_loss",
        (t(2, 4), t(2, 4), t(2, 4)),
        {"cu_seqlens": offsets},
        ValueError,
        r"`logprobs` must be \[N\] beside `cu_seqlens`, got shape \[2, 4\]",
    ),
    ("ppo_policy_loss", (t(4), t(4), t(4)), {"cu_seqlens": offsets}, ValueError, "must end at N = 4, got 5"),
    (
        "ppo_policy_loss",
        (t(5), t(5), t(5)),
        {"cu_seqlens": [0, 5]},
        TypeError,
        "`cu_seqlens` must be a tensor, got list",
    ),
    (
        "ppo_value_loss",
        (t(5), t(5), t(5)),
        {"cu_seqlens": t(2)},
        TypeError,
        "`cu_seqlens` must be int32 or int64, got Float",
    ),
    ("ppo_value_loss", (t(5), t(5), t(5)), {"cu_seqlens": offsets + 1}, ValueError, "must start at 0, got 1"),
    ("ppo_value_loss", (t(5), t(5), t(5)), {"cu_seqlens": offsets.flip(0)}, ValueError, "must start at 0, got 5"),
    (
        "masked_mean",
        (t(5), t(5)),
        {"cu_seqlens": offsets, "dim": 0},
        ValueError,
        "`dim` must be None beside `cu_seqlens`",
    ),
    ("masked_mean", (t(5), t(5)), {"cu_seqlens": ints}, ValueError, r"`cu_seqlens` must be \[sequences \+ 1\]"),
    (
        "shape_rewards",
        (t(3), t(5), t(5), t(5)),
        {"kl_coef": 0.1, "cu_seqlens": offsets},
        ValueError,
        r"`scores` must be \[B\] = \[2\], got shape \[3\]",
    ),
    (
        "shape_rewards",
        (t(2), t(5), t(5), t(5)),
        {"kl_coef": 0.1, "cu_seqlens": torch.tensor([0, 6, 5])},
        ValueError,
        "`cu_seqlens` must not decrease, got 6 then 5 at position 2",
    ),
    (
        "ppo_loss_from_logits",
        (t(2, 3, 5), ints, t(2, 3).requires_grad_(), t(2, 3)),
        {},
        ValueError,
        "`old_logprobs` requires grad, but no gradient flows to it; pass old_logprobs.detach\\(\\)",
    ),
    (
        "ppo_loss_from_logits",
        (t(2, 3, 5), ints, t(2, 3), t(2, 3).requires_grad_()),
        {},
        ValueError,
        "`advantages` requires grad",
    ),
    (
        "ppo_loss_from_logits",
        (t(2, 3, 5), ints, t(2, 3), t(2, 3)),
        {"ref_logprobs": t(2, 3).requires_grad_()},
        ValueError,
        "`ref_logprobs` requires grad",
    ),
    (
        "ppo_loss_from_logits",
        (t(2, 3, 5), ints, t(2, 3), t(2, 3)),
        {"kl_coef": 0.1},
        ValueError,
        "`ref_logprobs` must be given where `kl_coef` is not 0, got None and 0.1",
    ),
    (
        "ppo_loss_from_logits",
        (t(2, 3, 5).requires_grad_(), ints, t(2, 3), t(2, 3)),
        {"inplace": True},
        ValueError,
        "`inplace` needs logits that an op made; these are a leaf that requires grad",
    ),
    (
        "ppo_loss_from_logits",
        (t(2, 3, 5), ints - 1, t(2, 3), t(2, 3)),
        {},
        ValueError,
        "`labels` holds -1 at flat position 0; a label must be in",
    ),
    (
        "ppo_loss_from_logits",
        (t(6, 5), ints.flatten(), t(6), t(6)),
        {},
        ValueError,
        r"`labels` must be \[B, T\], got shape \[6\]",
    ),
    (
        "ppo_loss_from_logits",
        (t(2, 3, 5), ints, t(2, 3), t(5)),
        {},
        ValueError,
        r"`advantages` has shape \[5\] but must have the shape of `labels`, \[2, 3\]",
    ),
    ("ppo_value_loss", (t(2, 4), t(2, 4), t(2, 3)), {}, ValueError, r"`returns` has shape \[2, 3\]"),
    ("ppo_value_loss", (t(2, 4), t(2, 4), t(2, 4)), {"clip": -1}, ValueError, "`clip` must be finite and at least 0"),
    (
        "reward_pair_loss",
        (t(2), t(3)),
        {},
        ValueError,
        r"`rejected` has shape \[3\] but must have the shape of `chosen`, \[2\]",
    ),
    ("reward_pair_loss", (t(2, 1), t(2, 1)), {}, ValueError, r"`chosen` must be \[B\], got shape \[2, 1\]"),
    ("reward_pair_loss", (t(2), t(2)), {"margin": 1.0}, TypeError, "`margin` must be a tensor, got float"),
    (
        "group_advantages",
        (t(6), 4),
        {},
        ValueError,
        "`rewards` must hold a multiple of `group_size`, 4, got 6 values",
    ),
    ("group_advantages", (t(6), 1), {}, ValueError, "`group_size` must be at least 2, got 1"),
    ("group_advantages", (t(6), True), {}, TypeError, "`group_size` must be an integer, got bool"),
    ("group_advantages", (t(6), 2.0), {}, TypeError, "`group_size` must be an integer, got float"),
    ("group_advantages", (t(2, 3), 3), {}, ValueError, r"`rewards` must be \[B\], got shape \[2, 3\]"),
    (
        "group_advantages",
        (t(6, dtype=torch.bool), 2),
        {},
        TypeError,
        "`rewards` must be floating point, got torch.bool",
    ),
    (
        "group_advantages",
        (t(6), 2),
        {"scale": "group"},
        ValueError,
        "`scale` must be one of 'std', 'none', 'batch', got 'group'",
    ),
    ("group_advantages", (t(6), 2), {"eps": -1.0}, ValueError, "`eps` must be finite and at least 0, got -1.0"),
    ("group_advantages", (t(6), 2), {"leave_one_out": 1}, TypeError, "`leave_one_out` must be True or False, got int"),
    ("kl_divergence", (t(2, 3), None), {}, TypeError, "`ref_logits` must be a tensor, got NoneType"),
    ("kl_divergence", (t(2, 3), t(2, 4)), {}, ValueError, r"`ref_logits` has shape \[2, 4\].*`logits`, \[2, 3\]"),
    ("kl_divergence", (t(2, 3), ints), {}, TypeError, "`ref_logits` must be float32, .* got Long"),
    ("kl_divergence", (t(2, 3), t(2, 3).requires_grad_()), {}, ValueError, "`ref_logits` requires grad"),
    ("kl_divergence", (t(2, 0), t(2, 0)), {}, ValueError, "`logits` must not have an empty vocabulary"),
    (
        "kl_divergence",
        (t(2, 3), t(2, 3)),
        {"temperature": -1.0},
        ValueError,
        "`temperature` must be finite and above 0",
    ),
    (
        "kl_divergence",
        (t(2, 3), t(2, 3)),
        {"temperature": t(2)},
        ValueError,
        "`temperature` holds 0 at flat position 0; it must be finite and above 0",
    ),
    (
        "kl_divergence",
        (t(2, 3), t(2, 3)),
        {"mask": t(3)},
        ValueError,
        r"`mask` has shape \[3\] but must have the shape of `logits` without its last dimension",
    ),
    ("dpo_loss", (t(2), t(2), t(2), t(3)), {}, ValueError, r"`ref_rejected` has shape \[3\].*`chosen`, \[2\]"),
    ("dpo_loss", (t(2, 1), t(2, 1), t(2, 1), t(2, 1)), {}, ValueError, r"`chosen` must be \[B\], got shape \[2, 1\]"),
    ("dpo_loss", (t(2), t(2), None, t(2)), {}, TypeError, "`ref_chosen` must be a tensor, got NoneType"),
    ("dpo_loss", (t(2), t(2), t(2), t(2)), {"beta": 0}, ValueError, "`beta` must be finite and above 0, got 0.0"),
    (
        "dpo_loss",
        (t(2), t(2), t(2), t(2)),
        {"label_smoothing": 0.5},
        ValueError,
        "`label_smoothing` must be below 0.5, got 0.5",
    ),
    (
        "dpo_loss",
        (t(2), t(2), t(2), t(2)),
        {"label_smoothing": 0.1, "loss_type": "hinge"},
        ValueError,
        "`label_smoothing` must be 0 where `loss_type` is 'hinge', got 0.1",
    ),
    (
        "dpo_loss",
        (t(2), t(2), t(2), t(2)),
        {"loss_type": "simpo"},
        ValueError,
        "`loss_type` must be one of 'sigmoid', 'robust', 'hinge', 'ipo', got 'simpo'",
    ),
]


@pytest.mark.parametrize(
    ("name", "args", "kwargs", "kind", "message"), BAD, ids=[f"{b[0]}-{i}" for i, b in enumerate(BAD)]
)
def test_bad_calls_name_the_argument_and_what_it_must_be(name, args, kwargs, kind, message):
    with pytest.raises(kind, match=message) as caught:
        OPS[name].function(*args, **kwargs)
    text = str(caught.value)
    assert text.startswith(f"{name}: ") and "csrc" not in text and "\n" not in text


def test_a_device_without_a_kernel_is_named():
    kernel = rlhf_fast.ops._common.Kernel("masked_mean")
    sparse = torch.zeros(1, 1).to_sparse()
    with pytest.raises(ValueError, match="masked_mean: this build of rlhf_fast has no kernel for tensors on cpu"):
        kernel(sparse, sparse, None)


@pytest.mark.parametrize("name", OPS)
def test_docstrings_give_shapes_returns_and_errors(name):
    text = inspect.getdoc(OPS[name].function)
    for part in ("Args:", "Returns:", "Raises:", "float32"):
        assert part in text
    parameters = inspect.signature(OPS[name].function).parameters
    assert all(p in text for p in parameters)
    reference = inspect.signature(OPS[name].reference).parameters
    assert [p for p in parameters if p not in ("inplace", "inplace_backward")] == list(reference)


def test_importing_leaves_the_process_alone():
    """No flush-to-zero from fast-math start-up code, no thread count changed, no second import of anything heavy."""
    code = (
        "import torch; n = torch.get_num_threads(); import rlhf_fast, sys; "
        "assert torch.get_num_threads() == n and float(torch.tensor(1e-40) * 1) > 0; "
        "assert 'transformers' not in sys.modules and 'matplotlib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_whoever_watches_the_dispatcher_sees_the_ops():
    """Eager calls go past it where nobody does: dispatch modes (activation checkpointing) and the profiler must."""
    rewards = torch.randn(2, 3)
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Watch():
        rlhf_fast.gae(rewards, rewards)
    assert "rlhf_fast.gae.default" in seen
    with torch.profiler.profile() as profile:
        rlhf_fast.gae(rewards, rewards)
    assert "rlhf_fast::gae" in {event.name for event in profile.events()}


@pytest.mark.parametrize("name", ["gather_logprobs", "gae", "ppo_policy_loss"])
def test_the_way_past_the_dispatcher_and_the_way_through_it_agree(name, monkeypatch):
    call = example(name)
    leaves = [v for v in (*call.args, *call.kwargs.values()) if isinstance(v, torch.Tensor) and v.requires_grad]
    results = []
    for direct in (True, False):
        if not direct:
            monkeypatch.setattr(_common, "_dispatch_modes", lambda: 1)
        outputs = tensors_of(OPS[name].function(*call.args, **call.kwargs))
        gradients = torch.autograd.grad([t.sum() for t in outputs if t.requires_grad], leaves)
        results.append([*outputs, *gradients])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_only_the_dispatcher_understands_goes_through_it():
    lazily_negated = torch.randn(2, 3, dtype=torch.complex64).conj().imag
    values = torch.randn(2, 3)
    assert lazily_negated.is_neg()
    got, want = rlhf_fast.gae(lazily_negated, values), rlhf_fast.gae(lazily_negated.clone(), values)
    assert torch.equal(got[0], want[0])


def test_calls_give_their_memory_back():
    """Handles of tensors pass between Python and C++ by hand: one forgotten keeps its tensor alive."""

    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    if not os.path.exists("/proc/self/statm"):
        pytest.skip("no /proc here")
    labels, size = torch.zeros(64, dtype=torch.int64), 64 * 16_384 * 4

    def call():
        logits = torch.randn(64, 16_384).requires_grad_()
        rlhf_fast.gather_logprobs(logits, labels, mask=torch.ones(64)).sum().backward()
        rewards = logits.detach().view(64, -1)
        rlhf_fast.gae(rewards, rewards, torch.ones(rewards.shape))
        with pytest.raises(ValueError, match="must have the shape"):
            rlhf_fast.gae(rewards, rewards[:1])

    for _ in range(3):
        call()
    before = resident()
    for _ in range(20):
        call()
    assert resident() - before < 10 * size


def test_random_calls_are_repeatable():
    for name, op in OPS.items():
        calls = [op.draw(random.Random(7)) for _ in range(2)]
        assert str(calls[0]) == str(calls[1]), name
