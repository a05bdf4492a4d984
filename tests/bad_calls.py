"""Wrong calls of every op, made from its signature: each good call with one argument made wrong in one way.

    python -m tests.bad_calls 0/2 1     the first of two shares of all calls, every call of it

prints one JSON line before and one after each call, so that a crash names the call. A call is refused as it must be where it
raises ValueError or TypeError with one line that starts with the op's name, names the argument in backticks, says what came
and what is needed, and holds no path of the build.
"""

import inspect
import json
import math
import random
import re
import sys
import types
import typing
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal

import numpy as np
import torch
from torch import Tensor

from tests.cases import OPS, Call
from tests.test_contract import example

SHARED = 300  # calls a signature's argument is made wrong in are drawn until this many good calls were looked at
BASES = 10


@dataclass(frozen=True)
class BadCall:
    name: str
    argument: str
    what: str
    call: Call
    backward: bool = False

    def __str__(self):
        return f"{self.name}: `{self.argument}` {self.what}: {self.call}"


# What is not wrong although it is made like something wrong: (op or None for all, argument, what).
RIGHT = [
    (None, "temperature", "0-dim"),
    (None, "normalizer", "0-dim"),
    (None, "normalizer", "row 0 of it"),
    (None, "normalizer", "1 dimension more"),
    (None, "normalizer", "1 dimension more at the end"),
    (None, "normalizer", "1 dimension less"),
    (None, "normalizer", "requires grad"),
    ("ppo_policy_loss", "advantages", "1 dimension less"),
    ("ppo_policy_loss", "advantages", "row 0 of it"),
    ("ppo_policy_loss", "advantages", "1 dimension more at the end"),
    ("ppo_policy_loss", "advantages", "1 more in dimension 1"),  # [B, 0] beside T = 1
    ("ppo_loss_from_logits", "advantages", "1 dimension less"),
    ("ppo_loss_from_logits", "advantages", "row 0 of it"),
    ("ppo_loss_from_logits", "advantages", "1 dimension more at the end"),
    ("ppo_loss_from_logits", "advantages", "1 more in dimension 1"),
    ("linear_ppo_loss", "advantages", "1 dimension less"),
    ("linear_ppo_loss", "advantages", "row 0 of it"),
    ("linear_ppo_loss", "advantages", "1 dimension more at the end"),
    ("linear_ppo_loss", "advantages", "1 more in dimension 1"),
    (None, "entropy_coef", "-1"),  # a penalty
    (None, "entropy_coef", "-1e30"),
    (None, "entropy_coef", "numpy -1"),
    ("group_advantages", "rewards", "on meta"),  # shapes alone
    ("group_advantages", "rewards", "nothing in it"),
    (None, "kept", "nothing in it"),  # where every label is ignored
    (None, "weight", "1 more in dimension 0"),  # a larger vocabulary, or a smaller one that has the labels
    (None, "weight", "1 less in dimension 0"),
    (None, "cu_seqlens", "1 less in dimension 0"),  # where the last sequence is empty
]


def is_right(name: str, argument: str, what: str, value) -> bool:
    if name == "kept_logprobs" and argument == "kept" and what.endswith(f"in dimension {value.dim() - 1}"):
        return True  # any number of ids will do
    if argument == "temperature" and what in ("1 dimension less", "row 0 of it") and value.dim() == 1:
        return True  # one number
    return any(op in (None, name) and a == argument and w == what for op, a, w in RIGHT)


def kinds_of(parameter: inspect.Parameter) -> set:
    """The types that an argument may have, from its annotation."""
    annotation = parameter.annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return set(typing.get_args(annotation))
    return {annotation}


NOT_A_VALUE = {
    "a list": [1.0, 2.0],
    "a tuple": (1, 2),
    "a dict": {"a": 1},
    "an object": object(),
    "bytes": b"1",
    "a string": "1",
    "a complex number": 1j,
    "a numpy array": np.ones(3, np.float32),
    "a function": len,
    "a class": torch.Tensor,
}
NUMBERS = {
    "NaN": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
    "-1": -1,
    "-1e30": -1e30,
    "numpy NaN": np.float32("nan"),
    "numpy -1": np.int64(-1),
    "an int beyond float64": 10**400,
    "True": True,
    "numpy True": np.bool_(True),
    "a Decimal": Decimal("0.5"),
    "numpy string": np.str_("0.5"),
}


def wrong_tensors(argument: str, value: Tensor) -> Iterator[tuple[str, object]]:
    real, label = value.is_floating_point(), argument in ("labels", "cu_seqlens", "kept")
    any_dtype = argument == "mask"
    yield "1 dimension more", value.unsqueeze(0)
    yield "1 dimension more at the end", value.unsqueeze(-1)
    if value.dim() > 0:
        yield "0-dim", value.new_ones(())
    if value.dim() > 0 and value.numel() > 0:
        yield "1 dimension less", value.select(-1, 0)
        yield "row 0 of it", value[0]
        for d in range(value.dim() - (argument == "logits")):
            yield f"1 more in dimension {d}", torch.cat([value, value.narrow(d, 0, 1)], d)
            if value.shape[d] != 2 or argument != "normalizer":
                yield f"1 less in dimension {d}", value.narrow(d, 0, value.shape[d] - 1)
        yield "nothing in it", value[:0]
    yield "complex", value.to(torch.complex64)
    yield "complex double", value.to(torch.complex128)
    if real and not any_dtype and argument not in ("temperature", "lam", "returns_lam", "normalizer"):
        for dtype in (torch.int64, torch.int32, torch.uint8, torch.bool):
            yield str(dtype), value.nan_to_num().to(dtype)
    if label:
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.int16, torch.uint8, torch.bool):
            yield str(dtype), value.to(dtype)
    if argument in ("temperature", "lam", "returns_lam", "normalizer"):
        yield "torch.bool", value.to(torch.bool)
    yield "on meta", value.to("meta")
    if torch.cuda.is_available():
        yield "on cuda", value.to("cuda")
    if value.dim() > 0:
        yield "sparse", value.to_sparse()
    if value.dim() == 2:
        yield "sparse rows", value.to_sparse_csr()
    if real:
        dense = value.detach().contiguous()
        if value.dtype == torch.float32:
            yield "quantized", torch.quantize_per_tensor(dense.nan_to_num(0.0, 1.0, -1.0), 0.1, 0, torch.qint8)
            if value.dim() > 0 and value.numel() > 0:
                yield "mkldnn", dense.to_mkldnn()
        if value.dim() > 1:
            yield "nested", torch.nested.nested_tensor(list(dense.unbind()))
    if real and argument in ("mask", "temperature", "lam", "returns_lam"):
        yield "requires grad", value.detach().clone().requires_grad_()
    if argument == "mask" and value.dim() > 0:
        yield "requires grad as float64", value.to(torch.float64, copy=True).requires_grad_()


def with_value(value: Tensor, content) -> Tensor:
    value = value.clone()
    value.view(-1)[value.numel() // 2] = content
    return value


def wrong_contents(argument: str, value: Tensor, kwargs: dict) -> Iterator[tuple[str, object]]:
    if value.numel() == 0:
        return
    if argument == "labels":
        kwargs["mask"] = None
        vocab = kwargs["logits"].shape[-1] if "logits" in kwargs else kwargs["weight"].shape[0]
        for content in (vocab, -1, -(2**31), 2**31 - 1):
            yield f"holding {content}", with_value(value, content)
    if argument in ("temperature", "lam", "returns_lam") and value.dim():
        for content in (-1.0, math.nan, math.inf, -math.inf, *([0.0] if argument == "temperature" else [1.5])):
            yield f"holding {content}", with_value(value, content)
    if argument == "cu_seqlens":
        yield "starting at 1", value + 1
        yield "ending early", torch.cat([value[:-1], value[-1:] - 1])
        yield "ending late", torch.cat([value[:-1], value[-1:] + 1])
        yield "falling", torch.cat([value[:-1], value[-1:] + 5, value[-1:]])
        yield "negative", torch.cat([value[:1], value[:1] - 3, value[1:]])


def wrong_values(name: str, parameter: inspect.Parameter, kwargs: dict) -> Iterator[tuple[str, object, dict]]:
    """(what is wrong, the value, the other arguments) of one argument."""
    argument, kinds = parameter.name, kinds_of(parameter)
    value = kwargs.get(argument)
    for what, wrong in NOT_A_VALUE.items():
        if not (isinstance(wrong, str) and str in kinds):
            yield what, wrong, kwargs
    if type(None) not in kinds:
        yield "None", None, kwargs
    if Tensor in kinds:
        if float not in kinds:
            yield "a number", 1.5, kwargs
            yield "a bool", True, kwargs
        if isinstance(value, Tensor):
            for what, wrong in wrong_tensors(argument, value):
                yield what, wrong, kwargs
            others = dict(kwargs)
            for what, wrong in wrong_contents(argument, value, others):
                yield what, wrong, others
            if argument == "logits":
                yield "of an empty vocabulary", value[..., :0], kwargs
    if float in kinds:
        yield from ((what, wrong, kwargs) for what, wrong in NUMBERS.items())
        if Tensor not in kinds:
            yield "a tensor", torch.tensor(0.5), kwargs
    if int in kinds and float not in kinds:
        for what, wrong in {
            "1.0": 1.0,
            "True": True,
            "2^70": 2**70,
            "-2^70": -(2**70),
            "a tensor of one": torch.tensor([1, 2]),
        }.items():
            yield what, wrong, kwargs
        if argument == "dim":
            yield "99", 99, kwargs
            yield "-99", -99, kwargs
    if bool in kinds:
        for what, wrong in {
            "0": 0,
            "1": 1,
            "1.0": 1.0,
            "numpy True": np.bool_(True),
            "a tensor": torch.tensor(True),
        }.items():
            yield what, wrong, kwargs
    if str in kinds:
        given = parameter.default if isinstance(parameter.default, str) else str(value)
        for wrong in ("nope", "", given.upper(), given + " ", 1, 0.5, torch.tensor(1)):
            if wrong != value:
                yield repr(wrong), wrong, kwargs


def good_calls(name: str) -> list[dict]:
    """The op's example in three dtypes, then random calls that between them give every argument a value."""
    signature = inspect.signature(OPS[name].function)

    def bound(call: Call) -> dict:
        return dict(signature.bind(*call.args, **call.kwargs).arguments)

    bases = [
        bound(example(name, dtype, requires_grad=dtype == torch.float32)) for dtype in (torch.float32, torch.float64)
    ]
    seen = {k for base in bases for k, v in base.items() if v is not None}
    rng = random.Random(f"bad calls {name}")
    drawn = [bound(OPS[name].draw(rng)) for _ in range(SHARED)]
    drawn = [
        b
        for b in drawn
        if all(v.numel() > 1 and v.numel() < 5000 for v in b.values() if isinstance(v, Tensor) and v.dim())
    ]
    for base in drawn:
        new = {k for k, v in base.items() if isinstance(v, Tensor)} - seen
        if new:
            bases.append(base)
            seen |= new
    return bases + [b for b in drawn if not any(b is other for other in bases)][: BASES - len(bases)]


def bad_calls() -> Iterator[BadCall]:
    for name, op in OPS.items():
        parameters = inspect.signature(op.function).parameters
        seen = set()
        for kwargs in good_calls(name):
            for argument, parameter in parameters.items():
                for what, wrong, others in wrong_values(name, parameter, kwargs):
                    bad = BadCall(name, argument, what, Call((), {**others, argument: wrong}))
                    if not is_right(name, argument, what, kwargs.get(argument)) and str(bad) not in seen:
                        seen.add(str(bad))
                        yield bad
        good = good_calls(name)[0]
        yield BadCall(name, "nonsense", "unexpected", Call((), {**good, "nonsense": 1}))
        for argument, parameter in parameters.items():
            if parameter.default is inspect.Parameter.empty:
                yield BadCall(name, argument, "missing", Call((), {k: v for k, v in good.items() if k != argument}))
    if "gather_logprobs" in OPS:
        yield from bad_targets()


def bad_targets() -> Iterator[BadCall]:
    """Logits that a backward pass may not write over: rows that share memory, or a last stride other than 1."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        base = torch.randn(200, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_() * 1
        for what, logits in {
            "expanded rows": base[:11].expand(4, 11),
            "expanded batch": base[:33].view(1, 3, 11).expand(5, 3, 11),
            "expanded inside": base[:33].view(3, 1, 11).expand(3, 5, 11),
            "overlapping rows": base.as_strided((4, 11), (5, 1)),
            "overlapping batch": base.as_strided((3, 4, 11), (11, 11, 1)),
            "last stride 2": base.as_strided((4, 11), (22, 2)),
        }.items():
            labels = torch.zeros(logits.shape[:-1], dtype=torch.int64)
            call = Call((), {"logits": logits, "labels": labels, "inplace_backward": True})
            yield BadCall("gather_logprobs", "inplace_backward", what, call, backward=True)


def complaint(bad: BadCall) -> str | None:
    """What is amiss in how the call is refused, or None."""
    function = OPS[bad.name].function
    try:
        result = function(**bad.call.kwargs)
        if bad.backward:
            result.sum().backward()
    except (ValueError, TypeError) as error:
        text = str(error)
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    else:
        return "accepted"
    if bad.what in ("unexpected", "missing"):  # Python's own
        return None if function.__name__ in text and bad.argument in text else text
    # Two arguments that do not fit each other: either may be named.
    shapes = isinstance(bad.call.kwargs[bad.argument], Tensor)
    named = inspect.signature(function).parameters if shapes else [bad.argument]
    wanted = [
        text.startswith(f"{function.__name__}: "),
        any(f"`{argument}`" in text for argument in named),
        re.search(r"must|need|no gradient", text),
        re.search(r"got|has|holds|is|requires|are", text),
        "\n" not in text and "csrc" not in text and ".h:" not in text and ".cpp" not in text and len(text) < 400,
    ]
    return None if all(wanted) else text


def main(share: str, every: str) -> None:
    warnings.simplefilter("ignore")  # torch's, of sparse and nested tensors
    index, shares = map(int, share.split("/"))
    for number, bad in enumerate(bad_calls()):
        if number % int(every) == 0 and number // int(every) % shares == index:
            print(json.dumps({"call": str(bad)}), flush=True)
            print(json.dumps({"complaint": complaint(bad)}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
