"""The contract: what goes wrong in at least one peer, as one row each, run for every op that it can touch, on every device.

A row has the inputs, what is required of them, and where they fail elsewhere. Its function makes the calls; `examine` holds
outputs and gradients against the float64 reference, and the row asserts what it demands beyond that. Rows over `every` or
`taking` apply to an op as soon as it is in OPS.
"""

import functools
import inspect
import math
import os
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

import rlhf_fast
from rlhf_fast.ops import _common
from tests.cases import AGGREGATES, OPS, Call, Outcome, assert_close, examine, inputs_of, on, randn, run


@dataclass(frozen=True)
class Row:
    inputs: str
    required: str
    fails_in: str
    ops: list[str]
    prove: Callable[[str, str], None]


CONTRACT: list[Row] = []


def row(inputs: str, required: str, fails_in: str, ops: list[str]):
    def add(prove):
        CONTRACT.append(Row(inputs, required, fails_in, ops, prove))
        return prove

    return add


def taking(argument: str) -> list[str]:
    return [name for name, op in OPS.items() if argument in inspect.signature(op.function).parameters]


every = list(OPS)
logprobs_only = ["gather_logprobs"]
products = [name for name in every if name.startswith("linear_")]  # torch's product has other bits for other layouts


# ---------------------------------------------------------------------------------------------------------------------
# Making and comparing calls


def keywords(name: str, call: Call) -> Call:
    """The same call by keyword alone, its tensors contiguous."""
    bound = inspect.signature(OPS[name].function).bind(*call.args, **call.kwargs).arguments
    return Call((), {k: v.contiguous() if isinstance(v, Tensor) else v for k, v in bound.items()})


def changed(call: Call, **kwargs) -> Call:
    return Call((), {**call.kwargs, **kwargs})


def draws(name: str, count: int, where=lambda kwargs: True, tries=3000) -> list[Call]:
    """The first `count` random calls of the op that `where` wants."""
    rng, found = random.Random(f"contract {name}"), []
    for _ in range(tries):
        call = keywords(name, OPS[name].draw(rng))
        if where(call.kwargs):
            found.append(call)
            if len(found) == count:
                return found
    if not found:
        pytest.skip(f"{name} draws no such call")
    return found


def token_shape(kwargs: dict) -> torch.Size:
    """The shape of a mask for these arguments."""
    given = kwargs.get("mask", kwargs.get("labels"))
    return (next(v for v in kwargs.values() if isinstance(v, Tensor)) if given is None else given).shape


def small(kwargs) -> bool:
    return 0 < math.prod(token_shape(kwargs)) < 5000


def masked(call: Call, mask: Tensor) -> Call:
    return changed(call, mask=mask)


def ones(i: int, out: Tensor) -> Tensor:
    return torch.ones_like(out)


def plain(name: str, call: Call, device: str, upstream: Callable | None = ones) -> Outcome:
    """Outputs and gradients without the reference."""
    return run(OPS[name].function, call, inputs_of(name, call), on(device), upstream)


@functools.cache
def differentiable(name: str) -> bool:
    return any(out.requires_grad for out in plain(name, draws(name, 1, small)[0], "cpu").outputs)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | (a.isnan() & b.isnan())).all())


def assert_same_bits(got: Outcome, want: Outcome):
    for i, (a, b) in enumerate(zip(got.outputs, want.outputs, strict=True)):
        assert same_bits(a, b), f"output {i}"
    assert got.gradients.keys() == want.gradients.keys()
    for place, g in got.gradients.items():
        assert same_bits(g, want.gradients[place]), f"gradient of {place}"


def runs_cuda_kernels(device: str) -> bool:
    return device == "cuda" or _common._namespace != "rlhf_fast"


def logits_and_labels(*batch, vocab=50, dtype=torch.float32, seed=0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*batch, vocab, generator=generator) * 3
    return {"logits": logits.to(dtype), "labels": torch.randint(0, vocab, batch, generator=generator)}


def logprob_call(*batch, **kwargs) -> Call:
    options = {k: kwargs.pop(k) for k in list(kwargs) if k not in ("vocab", "dtype", "seed")}
    return Call((), {**logits_and_labels(*batch, **kwargs), "with_entropy": True, **options})


def tokens(*shape, seed=0, scale=1.0) -> Tensor:
    return randn(random.Random(seed), *shape, scale=scale)


# ---------------------------------------------------------------------------------------------------------------------
# Masks, empty batches, packing


@row(
    "the mask keeps nothing",
    "outputs and gradients 0, still differentiable",
    "TRL 1.12 and OpenRLHF 0.11.2: 0/0; verl 0.9.1 masked_var raises",
    taking("mask"),
)
def _(name, device):
    for call in draws(name, 12):
        for dtype in (torch.bool, torch.float32):
            outcome = examine(name, masked(call, torch.zeros(token_shape(call.kwargs), dtype=dtype)), device)
            assert all(bool((out == 0).all()) for out in outcome.outputs)
            assert any(out.requires_grad for out in outcome.outputs) == differentiable(name)
            assert all(bool((g == 0).all()) for g in outcome.gradients.values())


@row(
    "no row or no token", "right shapes, finite, differentiable", "torch.stack of an empty loop (verl, TRL GAE)", every
)
def _(name, device):
    for call in draws(name, 12, lambda kwargs: 0 in token_shape(kwargs)):
        outcome = examine(name, call, device)
        assert all(bool(torch.isfinite(out).all()) for out in outcome.outputs)
        assert any(out.requires_grad for out in outcome.outputs) == differentiable(name)


@row(
    "anything off the mask",
    "never read: the same bits, gradient 0 there",
    "mask * x with NaN or inf in padding: OpenRLHF 0.11.2, TRL 1.12, ROLL#447",
    taking("mask"),
)
def _(name, device):
    def partly(kwargs):
        mask = kwargs.get("mask")
        return mask is not None and mask.numel() > 1 and 0 < int((mask != 0).sum()) < mask.numel()

    for call in draws(name, 10, partly):
        off = call.kwargs["mask"] == 0
        spoilt = dict(call.kwargs)
        for key, value in call.kwargs.items():
            if key in ("mask", "temperature") or not isinstance(value, Tensor) or value.shape[: off.dim()] != off.shape:
                continue
            spoilt[key] = value.clone()
            spoilt[key][off] = math.nan if value.is_floating_point() else 10**6
        got, want = plain(name, Call((), spoilt), device), plain(name, call, device)
        assert_same_bits(got, want)
        for key, g in got.gradients.items():
            if g.shape[: off.dim()] == off.shape:
                assert bool((g.cpu()[off] == 0).all()), key


@row(
    "masks of every dtype",
    "the same bits; any nonzero integer keeps",
    "mask * loss with int64 masks other than 0 and 1",
    taking("mask"),
)
def _(name, device):
    dtypes = [
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
    ]
    for call in draws(name, 3, lambda kwargs: math.prod(token_shape(kwargs)) > 1):
        keep = tokens(*token_shape(call.kwargs)) > 0
        want = plain(name, masked(call, keep), device)
        for dtype in dtypes:
            assert_same_bits(plain(name, masked(call, keep.to(dtype)), device), want)
        assert_same_bits(plain(name, masked(call, keep.to(torch.int64) << 32), device), want)
        assert_same_bits(plain(name, masked(call, -keep.to(torch.int8)), device), want)


@row("fractional mask weights", "multiply", "`mask != 0` or bool(): NeMo-RL's sample_mask * token_mask", taking("mask"))
def _(name, device):
    for call in draws(name, 6, lambda kwargs: math.prod(token_shape(kwargs)) > 1):
        weight = torch.rand(token_shape(call.kwargs), generator=torch.Generator().manual_seed(0)) * 2
        weight[weight < 0.5] = 0
        outcome = examine(name, masked(call, weight), device)
        if name in ("gather_logprobs", "kl_penalty"):
            whole = plain(name, masked(call, (weight != 0)), device)
            for part, out in zip(outcome.outputs, whole.outputs, strict=True):
                wide = torch.where(weight != 0, weight.double() * out.detach().double().cpu(), 0.0)
                assert_close("weighted", part, wide, 2)


@row(
    "sequences of length 0 in cu_seqlens",
    "own no token and change nothing",
    "cu_seqlens readers that take offset + 1 as a token",
    taking("cu_seqlens"),
)
def _(name, device):
    def has_empty(kwargs):
        offsets = kwargs.get("cu_seqlens")
        return offsets is not None and bool((offsets.diff() == 0).any()) and int(offsets[-1]) > 0

    for call in draws(name, 6, has_empty):
        examine(name, call, device)
        other = torch.int32 if call.kwargs["cu_seqlens"].dtype == torch.int64 else torch.int64
        want = plain(name, call, device)
        assert_same_bits(plain(name, changed(call, cu_seqlens=call.kwargs["cu_seqlens"].to(other)), device), want)


@row(
    "shift by one in a packed row",
    "a sequence's last token predicts nothing",
    "torch.roll over the pack (OpenRLHF 0.11.2), torchtitan#3347",
    logprobs_only,
)
def _(name, device):
    lengths = [4, 1, 6]
    given = logits_and_labels(sum(lengths), vocab=33)
    shifted = given["labels"].roll(-1)
    ends = torch.tensor(lengths).cumsum(0)
    shifted[ends - 1] = -100
    packed = plain(name, Call((), {"logits": given["logits"], "labels": shifted}), device)
    assert bool((packed.outputs[0][ends - 1] == 0).all()) and bool((packed.gradients["logits"][ends - 1] == 0).all())
    for end, length in zip(ends.tolist(), lengths, strict=True):
        part = {k: v[end - length : end] for k, v in given.items()}
        alone = plain(name, Call((), {"logits": part["logits"][:-1], "labels": part["labels"][1:]}), device)
        assert same_bits(packed.outputs[0][end - length : end - 1], alone.outputs[0])
        assert same_bits(packed.gradients["logits"][end - length : end - 1], alone.gradients["logits"])


# ---------------------------------------------------------------------------------------------------------------------
# Memory layout and size


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same values laid out in other ways, as far as the shape has room for them."""
    views = {"off 16-byte alignment": torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)}
    if x.dim() > 0:
        views["last stride 2"] = torch.stack([x, torch.zeros_like(x)], -1)[..., 0]
    if x.dim() > 1:
        views["transposed"] = x.transpose(0, -1).contiguous().transpose(0, -1)
        views["sliced"] = torch.cat([x, x.new_zeros(*x.shape[:-2], 2, x.shape[-1])], -2)[..., : x.shape[-2], :]
    if x.dim() > 2:
        views["batch transposed"] = x.transpose(0, 1).contiguous().transpose(0, 1)
    return views


@row(
    "any strides and alignment",
    "the bits of the contiguous call",
    "Liger 0.8.5 GRPO and verl's Triton kernel (contiguous only), trlx#583, trl#3681",
    every,
)
def _(name, device):
    for call in draws(name, 8, lambda kwargs: math.prod(token_shape(kwargs)) > 0):
        want = plain(name, call, device)
        views = {k: layouts(v) for k, v in call.kwargs.items() if isinstance(v, Tensor)}
        for layout in sorted({kind for of in views.values() for kind in of}):
            kwargs = {k: views[k].get(layout, v) if k in views else v for k, v in call.kwargs.items()}
            for k in views:
                kwargs[k] = kwargs[k].to(device) if device != "cpu" else kwargs[k]
            got = run(OPS[name].function, Call((), kwargs), inputs_of(name, call), lambda t: t, ones)
            if name not in products:
                assert_same_bits(got, want)
                continue
            for a, b in zip(
                [*got.outputs, *got.gradients.values()], [*want.outputs, *want.gradients.values()], strict=True
            ):
                assert_close(layout, a, b, OPS[name].units + OPS[name].more_by_product)


@row("expanded inputs", "the bits of their copies", "backward kernels that write through stride 0", every)
def _(name, device):
    for call in draws(name, 4, lambda kwargs: math.prod(token_shape(kwargs)) > 0 and len(token_shape(kwargs)) > 0):
        first = token_shape(call.kwargs)[0]
        tensors = {
            k: v
            for k, v in call.kwargs.items()
            if isinstance(v, Tensor) and v.dim() and v.shape[0] == first and k != "cu_seqlens"
        }
        expanded = {k: v[:1].expand(v.shape) for k, v in tensors.items()}
        got = plain(name, changed(call, **expanded), device)
        assert_same_bits(got, plain(name, changed(call, **{k: v.contiguous() for k, v in expanded.items()}), device))


@row(
    "logits[:, :-1] and the response's slice",
    "read in place: no copy forward or backward",
    "trlx#583: 8 GB copied",
    logprobs_only,
)
def _(name, device):
    given = logits_and_labels(3, 9, vocab=257, dtype=torch.bfloat16)
    logits, labels = given["logits"].to(device), given["labels"].to(device)

    def copies(x, y):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            out = rlhf_fast.gather_logprobs(x, y)
            gradient = torch.autograd.grad(out, leaf, torch.ones_like(out))[0]
        return [e.key for e in profile.key_averages() if e.key in ("aten::clone", "aten::contiguous")], out, gradient

    for part in (slice(None, -1), slice(-5, -1), slice(2, None, 3)):
        leaf, y = logits.clone().requires_grad_(), labels[:, part].contiguous()
        copied, out, gradient = copies(leaf[:, part], y)
        assert copied == []
        want = plain(name, Call((), {"logits": logits[:, part].contiguous(), "labels": y}), device)
        assert same_bits(out, want.outputs[0]) and same_bits(gradient[:, part], want.gradients["logits"])
        gradient[:, part] = 0
        assert not gradient.any()
    leaf = torch.stack([logits, logits], -1).requires_grad_()
    assert copies(leaf[..., 0], labels)[0]  # a last stride of 2 costs a copy, and is seen


@row(
    "offsets beyond 2^31",
    "64-bit: right forward, backward and in place",
    "int32 offsets: T V passes 2^31 at 14,134 tokens of V = 151,936",
    logprobs_only,
)
def _(name, device):
    vocab, far = 64, 2**31 + 8192
    if device == "cuda":
        storage = torch.empty(far + vocab, dtype=torch.bfloat16, device=device)
    else:  # 4.3 GB of a file of which only the touched pages exist
        with tempfile.NamedTemporaryFile() as file:
            storage = torch.from_file(file.name, shared=True, size=far + vocab, dtype=torch.bfloat16)
    given = logits_and_labels(2, vocab=vocab, dtype=torch.bfloat16)
    logits, labels = given["logits"].to(device), given["labels"].to(device)
    storage[:vocab], storage[far:] = logits[0], logits[1]
    want = plain(name, Call((), {"logits": logits, "labels": labels, "with_entropy": True}), device)
    for strides, shape in (((far, 1), (2, vocab)), ((far, vocab, 1), (2, 1, vocab))):
        view = storage.as_strided(shape, strides)
        y = labels.view(shape[:-1])
        x = view.detach().requires_grad_()
        logprobs, entropy = rlhf_fast.gather_logprobs(x, y, with_entropy=True)
        assert torch.equal(logprobs.flatten(), want.outputs[0]) and torch.equal(entropy.flatten(), want.outputs[1])
        gradient = torch.ops.rlhf_fast.gather_logprobs_backward if _common._namespace == "rlhf_fast" else None
        if gradient is not None:  # what autograd calls: its result is dense, so that no 4 GB gradient is made
            stats = torch.ops.rlhf_fast.gather_logprobs(view, y, None, None, 1.0, 0.0, 1.0, -100, True, False)[2]
            up = torch.ones_like(logprobs).detach()
            got = gradient(up, up, view, y, None, None, stats, 1.0, 0.0, 1.0, -100)
            assert torch.equal(got.reshape(2, vocab), want.gradients["logits"])
    view = storage.as_strided((2, vocab), (far, 1)).requires_grad_()
    logprobs, entropy = rlhf_fast.gather_logprobs(
        view * 1 if device == "cuda" else view, labels, with_entropy=True, inplace_backward=True
    )
    (logprobs.sum() + entropy.sum()).backward()
    if device != "cuda":
        assert torch.equal(view.detach(), want.gradients["logits"])


@row(
    "more tokens than 2^31",
    "64-bit indices",
    "int32 token indices",
    [n for n in ("masked_mean", "ppo_policy_loss") if n in OPS],
)
def _(name, device):
    if os.environ.get("RLHF_FAST_SLOW") != "1":
        pytest.skip("half a minute, three on the emulator; RLHF_FAST_SLOW=1 runs it")
    n = 2**31 + 4096

    def blank(dtype):  # numpy's zeros take no memory until they are written, torch's do
        return (
            torch.zeros(1, n, dtype=dtype, device="cuda")
            if device == "cuda"
            else torch.from_numpy(np.zeros((1, n), str(dtype)[6:]))
        )

    x, mask = blank(torch.float32), blank(torch.uint8)
    mask[0, [5, -3]] = 1
    x[0, 5], x[0, -3] = 1.0, 2.0
    if name == "masked_mean":
        assert rlhf_fast.masked_mean(x, mask) == 1.5
        return
    zeros = blank(torch.float32)
    loss, stats = rlhf_fast.ppo_policy_loss(zeros, zeros, x, mask)
    assert loss == -1.5 and stats["tokens"] == 2


# The emulator's grids have no limit, and so many blocks take long there.
MANY, EMULATED_MANY = 66_000, 1_000
MANY_ROWS = {
    "gather_logprobs": lambda n: logprob_call(n, vocab=4),
    "masked_mean": lambda n: Call((), {"x": tokens(n, 3), "mask": tokens(n, 3, seed=1) > 0, "dim": 1}),
    "gae": lambda n: Call((), {"rewards": tokens(n, 2), "values": tokens(n, 2, seed=1)}),
    "shape_rewards": lambda n: Call(
        (),
        {"scores": tokens(n), "logprobs": tokens(n, 2), "ref_logprobs": tokens(n, 2, seed=1)}
        | {"mask": tokens(n, 2, seed=2) > 0, "kl_coef": 0.1},
    ),
    "ppo_policy_loss": lambda n: Call((), loss_inputs("ppo_policy_loss", n, 1)),
    "ppo_value_loss": lambda n: Call((), loss_inputs("ppo_value_loss", n, 1)),
    "ppo_loss_from_logits": lambda n: Call((), loss_inputs("ppo_loss_from_logits", n, 1)),
}


@row(
    "more than 65535 rows",
    "right",
    "Liger 0.8.5 GRPO: grid (B, L) fails from L = 65536; triton#3299",
    [name for name in MANY_ROWS if name in OPS],
)
def _(name, device):
    emulated = runs_cuda_kernels(device) and device != "cuda"
    examine(name, MANY_ROWS[name](EMULATED_MANY if emulated and name != "gather_logprobs" else MANY), device)


# ---------------------------------------------------------------------------------------------------------------------
# Upstream gradients


@row(
    "upstream gradient expanded or 65536",
    "as the reference gives",
    "contiguous-only backward kernels; fp16 loss scalers",
    every,
)
def _(name, device):
    for call in draws(name, 6, small):
        examine(name, call, device, lambda i, out: torch.ones((), dtype=out.dtype, device=out.device).expand(out.shape))
        one = examine(name, call, device, ones)
        for place, g in plain(name, call, device, lambda i, out: torch.full_like(out, 65536.0)).gradients.items():
            if g.dtype != torch.float16:  # which overflows, as it must
                assert_close(f"gradient of {place}", g.double() / 65536, one.gradients[place].double(), 0)


@row(
    "upstream gradient of one output alone",
    "the other counts as 0",
    "verl#2484: entropy beside an in-place log-prob",
    [n for n in ("gather_logprobs", "gae") if n in OPS],
)
def _(name, device):
    for call in draws(name, 6, lambda kwargs: small(kwargs) and kwargs.get("with_entropy", True)):
        for used in (0, 1):
            examine(name, call, device, lambda i, out, used=used: torch.ones_like(out) if i == used else None)


@row(
    "upstream gradient inf",
    "not finite wherever the gradient is not 0, no crash",
    "host-side checks of grad_output: Liger 0.8.5 `grad_output != 1`",
    every,
)
def _(name, device):
    for call in draws(name, 4, small):
        finite = plain(name, call, device)
        got = plain(name, call, device, lambda i, out: torch.full_like(out, math.inf))
        for place, g in got.gradients.items():
            assert not bool(torch.isfinite(g[finite.gradients[place] != 0]).any())


# ---------------------------------------------------------------------------------------------------------------------
# Logits and labels


@row(
    "labels at ignore_index",
    "0 and no gradient",
    "TRL 1.16 reads out of bounds at -100 unless row_mask is given",
    logprobs_only,
)
def _(name, device):
    for index in (-100, 0, 3, -1):
        call = logprob_call(3, 5, vocab=17, ignore_index=index)
        call.kwargs["labels"][0, 0] = call.kwargs["labels"][2, 4] = index
        ignored = call.kwargs["labels"] == index
        outcome = examine(name, call, device)
        assert all(bool((out.cpu()[ignored] == 0).all()) for out in outcome.outputs)
        assert bool((outcome.gradients["logits"].cpu()[ignored] == 0).all())


@row(
    "labels int32 and strided",
    "the bits of contiguous int64",
    "TRL 1.16 and flash-attn index kernels: contiguous int64",
    logprobs_only,
)
def _(name, device):
    call = logprob_call(4, 6, vocab=29)
    want = plain(name, call, device)
    labels = call.kwargs["labels"]
    for view in (
        labels.int(),
        labels.T.contiguous().T,
        torch.stack([labels, labels], -1)[..., 0],
        labels.int().T.contiguous().T,
    ):
        assert_same_bits(plain(name, changed(call, labels=view), device), want)


@row(
    "labels outside the vocabulary",
    "ValueError on the CPU, NaN in that row on CUDA, no read out of bounds",
    "flash-attn, verl and TRL kernels read out of bounds; Liger syncs",
    logprobs_only,
)
def _(name, device):
    for bad, dtype in (
        (17, torch.int64),
        (-1, torch.int64),
        (2**31 - 1, torch.int32),
        (2**62, torch.int64),
        (-(2**63), torch.int64),
    ):
        call = logprob_call(2, 3, vocab=17)
        want = plain(name, call, device)
        labels = call.kwargs["labels"].to(dtype)
        labels[1, 2] = bad
        broken = changed(call, labels=labels)
        if not runs_cuda_kernels(device):
            with pytest.raises(
                ValueError, match=rf"`labels` holds {bad} at flat position 5; a label must be in \[0, 17\)"
            ):
                plain(name, broken, device)
            continue
        got = plain(name, broken, device)
        assert got.outputs[0][1, 2].isnan() and got.gradients["logits"][1, 2].isnan().all()
        for tensor, other in ((got.outputs[0], want.outputs[0]), (got.gradients["logits"], want.gradients["logits"])):
            assert same_bits(tensor.flatten(0, 1)[:5], other.flatten(0, 1)[:5])


@row(
    "-inf logits",
    "add 0 to the entropy, gradient exactly 0",
    "TRL 1.16, verl 0.9.1 (eager and Triton): NaN entropy; VeOmni#720",
    logprobs_only,
)
def _(name, device):
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        call = logprob_call(6, vocab=3000, dtype=dtype)
        logits, labels = call.kwargs["logits"], call.kwargs["labels"]
        logits[0, :2100] = -math.inf  # the whole first block of every reader
        logits[1, 1:] = -math.inf  # one token is left
        logits[2, ::2] = -math.inf
        logits[3, -1] = -math.inf
        logits[4] = -math.inf  # none is left: NaN, as in torch
        labels[:4] = torch.tensor([2500, 0, 7, 11])
        labels[5] = 9
        logits[5, 9] = -math.inf  # the label itself: log 0
        outcome = examine(name, call, device)
        assert outcome.outputs[0][5] == -math.inf and bool(torch.isfinite(outcome.outputs[1][[0, 1, 2, 3, 5]]).all())
        gradient = outcome.gradients["logits"].cpu()
        good = torch.tensor([0, 1, 2, 3])
        assert bool((gradient[good][logits[good] == -math.inf] == 0).all())
        assert bool(torch.isfinite(gradient[[0, 1, 2, 3, 5]]).all())


@row(
    "a row far below or above 0",
    "as exact as around 0",
    "verl 0.9.1 Triton: maximum seeded with 0, lse = -inf below about -87",
    logprobs_only,
)
def _(name, device):
    for offset in (-3e4, -200.0, 200.0, 3e4):
        call = logprob_call(3, vocab=100)
        examine(name, changed(call, logits=call.kwargs["logits"] + offset), device)
    for value in (-3e38, 3e38):  # all equal: a uniform distribution
        outcome = examine(name, changed(call, logits=torch.full((3, 100), value)), device)
        assert_close("entropy", outcome.outputs[1].cpu(), torch.full((3,), math.log(100)), 4)


@row("inf or NaN in one row", "NaN there, every other row untouched", "batch-wide maxima and atomics", logprobs_only)
def _(name, device):
    for value in (math.inf, math.nan):
        for column in (0, 5, 69):
            call = logprob_call(3, 50, vocab=70)
            want = plain(name, call, device)
            logits = call.kwargs["logits"].clone()
            logits[1, 4, column] = value
            got = plain(name, changed(call, logits=logits), device)
            pairs = zip([*got.outputs, got.gradients["logits"]], [*want.outputs, want.gradients["logits"]], strict=True)
            for a, b in pairs:
                assert a[1, 4].isnan().all()
                a, b = a.detach().clone(), b.detach()
                a[1, 4] = b[1, 4]
                assert same_bits(a, b)


@row(
    "a vocabulary no multiple of 8",
    "right, aligned or not, with the same bits",
    "verl#2899; CCE and quack want multiples",
    logprobs_only,
)
def _(name, device):
    for vocab in (1, 2, 7, 9, 2047, 2049, 32_001, 50_257, 151_671):
        for dtype in (torch.bfloat16, torch.float32):
            call = logprob_call(2, vocab=vocab, dtype=dtype, seed=vocab)
            outcome = examine(name, call, device, ones)
            for row_number in (0, 1):
                alone = {k: v[row_number] for k, v in call.kwargs.items() if isinstance(v, Tensor)}
                alone["logits"] = torch.cat([alone["logits"].new_zeros(1), alone["logits"]])[1:]
                got = plain(name, changed(call, **alone), device)
                assert all(same_bits(a, b[row_number]) for a, b in zip(got.outputs, outcome.outputs, strict=True))
                assert same_bits(got.gradients["logits"], outcome.gradients["logits"][row_number])


@row(
    "bf16 logits at V = 151936",
    "log-prob within 1e-5 of float64, never above 0",
    "eager bf16: off by .068; verl#2656 and maxtext#5231: log-probs above 0",
    logprobs_only,
)
def _(name, device):
    call = logprob_call(4, vocab=151_936, dtype=torch.bfloat16)
    logits, labels = call.kwargs["logits"], call.kwargs["labels"]
    exact = logits.double().log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    got = plain(name, call, device).outputs[0].cpu()
    assert (got.double() - exact).abs().max() <= 1e-5
    eager = logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    assert (eager.double() - exact).abs().max() > 1e-3
    logits[:, 0], labels[:] = 40.0, 0  # all but certain
    outcome = examine(name, call, device)
    assert bool((outcome.outputs[0] <= 0).all()) and bool((outcome.outputs[1] >= 0).all())


@row(
    "temperature, softcap and scale",
    "gradients have every factor; temperature <= 0 refused",
    "trl#4159 and verl#6110: temperature left out; TRL 1.12 adds 1e-7",
    logprobs_only,
)
def _(name, device):
    per_token = torch.rand(3, 5, generator=torch.Generator().manual_seed(0)) + 0.5
    for temperature in (1.0, 0.7, 2.0, per_token, per_token.double(), per_token.bfloat16(), torch.tensor(0.7)):
        for softcap in (None, 5.0):
            for scale in (1.0, 0.0625, 1.5):
                call = logprob_call(3, 5, vocab=97, temperature=temperature, softcap=softcap, logit_scale=scale)
                examine(name, call, device)
    for temperature in (0, 0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="`temperature` must be finite and above 0"):
            plain(name, logprob_call(3, 5, temperature=temperature), device)
    if not runs_cuda_kernels(device):
        per_token[1, 2] = 0.0
        with pytest.raises(ValueError, match="`temperature` holds 0 at flat position 7"):
            plain(name, logprob_call(3, 5, temperature=per_token), device)


# ---------------------------------------------------------------------------------------------------------------------
# Ratios, clamps and ties


def pair(*log_ratios, dtype=torch.float32) -> dict:
    new = torch.tensor([log_ratios], dtype=dtype)
    return {"logprobs": new, "old_logprobs": torch.zeros_like(new)}


@row("a ratio beyond fp16", "finite: the arithmetic is wide", "exp(12) is inf in fp16: trl#878", ["ppo_policy_loss"])
def _(name, device):
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for sign in (1.0, -1.0):
            call = Call(
                (), {**pair(12.0, 19.0, -12.0, dtype=dtype), "advantages": torch.full((1, 3), sign, dtype=dtype)}
            )
            outcome = examine(name, call, device)
            assert all(
                bool(torch.isfinite(t).all())
                for t in (*outcome.outputs[:8], outcome.gradients["old_logprobs"].float())
                if dtype != torch.float16
            )
            assert bool(torch.isfinite(outcome.outputs[0]))


@row(
    "the log-ratio clamp",
    "gradient 0 beyond it, whole on it; infinite log-ratios held",
    "no clamp: TRL 1.12, NeMo-RL",
    ["ppo_policy_loss"],
)
def _(name, device):
    ratios = (20.0, 20.5, -20.0, -20.5, 0.5, -0.5, 0.625)
    for sign in (1.0, -1.0):
        for clip in (20.0, 0.5):
            given = {**pair(*ratios), "advantages": torch.full((1, len(ratios)), sign), "log_ratio_clip": clip}
            outcome = examine(name, Call((), given), device)
            beyond = torch.tensor([[abs(r) > clip for r in ratios]])
            assert bool((outcome.gradients["logprobs"].cpu()[beyond] == 0).all())
    given = {**pair(-math.inf, 199.0), "advantages": torch.tensor([[1.0, -1.0]])}
    outcome = plain(name, Call((), given), device)
    assert bool(torch.isfinite(outcome.outputs[0])) and bool(torch.isfinite(outcome.gradients["logprobs"]).all())


@row(
    "the clamps of KL estimators",
    "gradient 0 beyond a clamp, whole on it",
    "OpenRLHF 0.11.2 +-10, verl 0.9.1 in +-20 and out +-10, NeMo-RL detaches",
    ["kl_penalty"],
)
def _(name, device):
    d = torch.tensor([0.0, 0.5, -0.5, 0.75, -0.75, 10.0, -10.0, 20.0, -20.0, 25.0, -25.0, 90.0, -90.0])
    for estimator in ("k1", "k2", "k3", "abs", "k1+", "k3+"):
        for log_ratio_clip in (None, 0.5, 20.0):
            for output_clip in (None, 0.5, 10.0):
                given = {"logprobs": d, "ref_logprobs": torch.zeros_like(d), "estimator": estimator}
                outcome = examine(
                    name, Call((), {**given, "log_ratio_clip": log_ratio_clip, "output_clip": output_clip}), device
                )
                if log_ratio_clip is not None and "+" not in estimator:
                    assert bool((outcome.gradients["logprobs"].cpu()[d.abs() > log_ratio_clip] == 0).all())


@row(
    "ratio 1, advantage 0, ties at a bound",
    "the gradient that torch.max and torch.clamp give",
    "hand-written backward kernels that take one branch",
    ["ppo_policy_loss"],
)
def _(name, device):
    for low, high in ((0.2, 0.2), (0.0, 0.0), (1.0, 0.0)):  # at 0 the ratio of 1 stands on the bound
        for dual in (None, 1.5):
            given = {**pair(*[0.0] * 3, 0.5, -0.5, 0.5, -0.5), "clip_low": low, "clip_high": high, "dual_clip": dual}
            examine(
                name, Call((), {**given, "advantages": torch.tensor([[1.0, -1.0, 0.0, 0.0, 0.0, 2.0, -2.0]])}), device
            )
    loss = plain(name, Call((), {**pair(0.0, 0.0), "advantages": torch.tensor([[3.0, -1.0]])}), device)
    assert loss.outputs[0] == -1 and torch.equal(loss.gradients["logprobs"].cpu(), torch.tensor([[-1.5, 0.5]]))


@row(
    "value ties",
    "half of the gradient through the clipped branch",
    "hand-written backward kernels that take one branch",
    ["ppo_value_loss"],
)
def _(name, device):
    given = {  # v and its clipped twin equally far from the return; on the bound; at the old value; at the return
        "values": torch.tensor([[1.0, 0.5, 0.0, 2.0, -0.5]]),
        "old_values": torch.tensor([[0.0, 0.0, 0.0, 2.0, 0.0]]),
        "returns": torch.tensor([[0.75, 3.0, 1.0, 2.0, -3.0]]),
    }
    for clip in (0.5, 0.0, None):
        outcome = examine(name, Call((), {**given, "clip": clip, "aggregate": "token-sum"}), device, ones)
        if clip == 0.5:
            assert outcome.gradients["values"][0, 0] == 0.5 * 0.25


@row(
    "pairs a thousand apart",
    "loss and gradient exact, no overflow",
    "OpenRLHF 0.11.2 LogExpLoss: log(1 + exp(1000)) is inf",
    ["reward_pair_loss"],
)
def _(name, device):
    given = {"chosen": torch.tensor([-1000.0, 1000.0, 0.0, 3e4]), "rejected": torch.tensor([0.0, 0.0, 0.0, -3e4])}
    outcome = examine(name, Call((), given), device, ones)
    assert torch.equal(outcome.gradients["chosen"].cpu(), torch.tensor([-0.25, 0.0, -0.125, 0.0]))


# ---------------------------------------------------------------------------------------------------------------------
# Losses over micro-batches


def loss_inputs(name: str, rows=6, length=9) -> dict:
    if name == "ppo_loss_from_logits":
        given = logits_and_labels(rows, length, vocab=11)
        near = given["logits"].log_softmax(-1).gather(-1, given["labels"].unsqueeze(-1)).squeeze(-1)
        return {
            **given,
            "old_logprobs": near + tokens(rows, length, scale=0.3),
            "advantages": tokens(rows, length, seed=1),
        }
    if name == "linear_ppo_loss":
        given = loss_inputs("ppo_loss_from_logits", rows, length)
        weight = tokens(11, 4, seed=2)  # least squares: logits near those that the old log-probs are of
        hidden = given.pop("logits") @ torch.linalg.pinv(weight).t()
        return {"hidden": hidden, "weight": weight, **given}
    keys = list(inspect.signature(OPS[name].function).parameters)[:3]
    return {k: tokens(rows, length, seed=i, scale=0.3) for i, k in enumerate(keys)}


@row(
    "micro-batches with a global normalizer",
    "sum to the full batch, loss and gradient",
    "mean of means: TRL's and verl's gradient-accumulation bugs",
    taking("normalizer"),
)
def _(name, device):
    given = {k: v.to(device) for k, v in loss_inputs(name).items()}
    first = next(iter(given))
    mask = torch.rand(6, 9, generator=torch.Generator().manual_seed(1)).to(device) < 0.7
    mask[4] = False
    for aggregate in AGGREGATES:
        count = {"token-mean": mask.sum(), "token-sum": None}.get(aggregate, mask.any(1).sum())

        leaf = given[first].clone().requires_grad_()

        def loss_of(rows, normalizer, aggregate=aggregate, leaf=leaf):
            inputs = {k: v if k == "weight" else v[rows] for k, v in {**given, first: leaf}.items()}
            return OPS[name].function(**inputs, mask=mask[rows], aggregate=aggregate, normalizer=normalizer)[0]

        full = loss_of(slice(None), None)
        (whole,) = torch.autograd.grad(full, leaf)
        losses = [loss_of(rows, count) for rows in (slice(0, 1), slice(1, 4), slice(4, 5), slice(5, 6))]
        (parts,) = torch.autograd.grad(losses, leaf)
        more = 10 if name in products else 1
        torch.testing.assert_close(sum(losses), full, rtol=1e-6 * more, atol=1e-6 * more)
        torch.testing.assert_close(parts, whole, rtol=1e-6 * more, atol=1e-7 * more)


@row(
    "normalizers on the device",
    "any number type and one-element shape, the bits of the number",
    "`.item()` a micro-batch: NeMo-RL 19, verl 0.9.1 three",
    taking("normalizer"),
)
def _(name, device):
    given = loss_inputs(name)
    for aggregate in AGGREGATES:
        call = Call((), {**given, "aggregate": aggregate})
        want = plain(name, changed(call, normalizer=17), device)
        for dtype in (torch.int32, torch.int64, torch.float32, torch.float64):
            for shape in ((), (1,), (1, 1)):
                got = plain(name, changed(call, normalizer=torch.full(shape, 17, dtype=dtype)), device)
                assert_same_bits(got, want)


# ---------------------------------------------------------------------------------------------------------------------
# Rewards and advantages


@row(
    "a score on the last kept token",
    "gaps or not; a row without a token drops it, gradient 0",
    "OpenRLHF 0.11.2: an all-zero mask puts it in the last column; miles#1827",
    ["shape_rewards"],
)
def _(name, device):
    mask = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0]])
    zeros = torch.zeros(4, 4)
    given = {
        "scores": torch.tensor([1.0, 2.0, 3.0, 4.0]),
        "logprobs": zeros,
        "ref_logprobs": zeros,
        "mask": mask,
        "kl_coef": 0.1,
    }
    outcome = examine(name, Call((), given), device, ones)
    want = torch.tensor([[0.0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 3], [0, 4, 0, 0]])
    assert torch.equal(outcome.outputs[0].cpu(), want)
    assert torch.equal(outcome.gradients["scores"].cpu(), torch.tensor([1.0, 0.0, 1.0, 1.0]))


@row(
    "gaps, bootstrap, lambda 0 and 1, one token",
    "the float64 loop, rounded once",
    "OpenRLHF 0.11.2 and verl 0.9.1 differ by .064 on gaps; ROLL#447",
    ["gae"],
)
def _(name, device):
    for length in (1, 2, 33, 260):
        mask = tokens(2, length, seed=3) > -0.5
        for lam in (0.0, 0.95, 1.0):
            for gaps in ("carry", "decay"):
                for bootstrap in (None, tokens(2, seed=4)):
                    given = {"rewards": tokens(2, length), "values": tokens(2, length, seed=1), "mask": mask}
                    call = Call((), {**given, "gamma": 0.99, "lam": lam, "gaps": gaps, "bootstrap": bootstrap})
                    examine(name, call, device)
                    if length <= 33:
                        examine(name, changed(call, mask=None, gamma=1.0), device)


@row(
    "an episode that ends mid-row",
    "the next one does not reach back",
    "TRL 1.12 and OpenRLHF 0.11.2 have no such end",
    ["gae"],
)
def _(name, device):
    given = {"rewards": tokens(9), "values": tokens(9, seed=1), "cu_seqlens": torch.tensor([0, 4, 9]), "gamma": 0.99}
    whole = examine(name, Call((), given), device)
    for part in (slice(0, 4), slice(4, 9)):
        alone = {"rewards": given["rewards"][None, part], "values": given["values"][None, part], "gamma": 0.99}
        for a, b in zip(plain(name, Call((), alone), device).outputs, whole.outputs, strict=True):
            assert same_bits(a[0], b[part])


@row(
    "32768 tokens with gamma lambda = 1",
    "no drift: rounded once from float64",
    "fp32 scans and cumulative sums: rl-triton 0.1.3, NeMo-RL#4156",
    ["gae"],
)
def _(name, device):
    call = Call((), {"rewards": tokens(1, 32_768), "values": tokens(1, 32_768, seed=1), "gamma": 1.0, "lam": 1.0})
    got = plain(name, call, device)
    # With gamma lambda = 1 the return is the sum of the rewards to come.
    exact = call.kwargs["rewards"].double().flip(1).cumsum(1).flip(1)
    assert_close("returns", got.outputs[1], exact, 0.51)
    assert_close("advantages", got.outputs[0], exact - call.kwargs["values"].double(), 0.51)


@pytest.mark.parametrize(
    ("entry", "name"), [pytest.param(r, n, id=f"{r.inputs}-{n}".replace(" ", "_")) for r in CONTRACT for n in r.ops]
)
def test_contract(entry, name, device):
    entry.prove(name, device)
