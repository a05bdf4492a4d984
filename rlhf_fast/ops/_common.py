"""What every op needs around its kernel: options checked, errors made readable, masks and dtypes brought to one form.

Shapes, dtypes of tensors and devices are checked in C++, once for both devices (csrc/device.h). Those errors arrive as
RuntimeError with a source path in front; `kernel` raises them again as the ValueError or TypeError they are.
"""

import math
import numbers
import re
from collections.abc import Callable, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from rlhf_fast._C import direct_call

_REFUSAL = re.compile(r"\[rlhf_fast:(ValueError|TypeError)\] (.*?)\[end\]", re.DOTALL)
_NO_KERNEL = "Could not run 'rlhf_fast::"

# The library's namespace. The tests set it to the one in which the CUDA kernels run on the CPU.
_namespace = "rlhf_fast"


@contextmanager
def namespace(name: str):
    """Route every op to another operator library of the same schemas: the emulated CUDA kernels of the test suite."""
    global _namespace
    previous, _namespace = _namespace, name
    try:
        yield
    finally:
        _namespace = previous


# Leaves out the Python autograd kernel of torch.library, 5 us a call, where no gradient is asked for or a Function takes it.
_below_autograd = getattr(torch._C, "_AutoDispatchBelowAutograd", nullcontext)

# What stands between a call and its kernel, and must be asked: each as a function that is false in plain eager mode. They are
# not public: where this torch lacks one, every call goes through the dispatcher.
_tracing = getattr(torch._C, "_get_tracing_state", None)
_profiling = getattr(torch.autograd, "_profiler_enabled", None)
_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", None)
_transforms = torch._C._are_functorch_transforms_active
is_compiling = torch.compiler.is_compiling
is_grad_enabled = torch.is_grad_enabled
_LETTERS = {"Tensor": "T", "Optional[Tensor]": "O", "float": "F", "int": "I", "bool": "B"}


def _direct_call(name: str, overload, hidden: int = 0):
    """The op as a call past the dispatcher, less its last `hidden` outputs; None where this torch lacks what that takes."""
    handles = getattr(torch._C, "_aoti", None)
    to_handle = getattr(handles, "unsafe_alloc_void_ptr_from_tensor", None)
    from_handles = getattr(handles, "alloc_tensors_by_stealing_from_void_ptrs", None)  # the singular form leaks
    if None in (to_handle, from_handles, _tracing, _profiling, _dispatch_modes):
        return None
    signature = "".join(_LETTERS[str(a.type)] for a in overload._schema.arguments)
    plain = (Tensor, torch.nn.Parameter)
    outputs = len(overload._schema.returns)
    return direct_call(name, signature, outputs, outputs - hidden, to_handle, from_handles, Tensor.is_neg, plain)


class Kernel:
    """An op of the library, `torch.ops.rlhf_fast.<name>`, with its errors made readable and, in eager mode, a short way to it.

    What `register` gives an op is registered with torch.library, which serves torch.compile and direct calls of
    `torch.ops`. The same formulas as an autograd.Function cost half as much a call, so eager calls go through that, and past
    the dispatcher wherever nothing (a mode, a transform, a profiler, a tensor subclass) is there to see the call.

    A call returns the op's outputs but for the last ones, which only its gradient reads: as many as `register` was told, or
    `hidden`. Each costs a microsecond. `function` is the public function that errors speak of, where one op serves several.
    """

    def __init__(self, name: str, function: str | None = None, *, hidden: int | None = None):
        self.name = name
        self.function = function or name
        self._asked_hidden = hidden
        self._bound: str | None = None  # the namespace of what follows
        self._overload: Any = None
        self._function: Any = None  # the call that makes its gradient
        self._direct: Any = None
        self._direct_visible: Any = None  # without the hidden outputs
        self._hidden = 0
        self._tensors: tuple[int, ...] = ()  # where the tensors that have a gradient stand among the arguments
        self._options = 0  # where the arguments after the last of those begin

    def overload(self):
        if self._bound is not _namespace:
            self._bind()
        return self._overload

    def _bind(self):
        self._overload = found = getattr(getattr(torch.ops, _namespace), self.name).default
        self._function = _functions.get(self.name)
        leading = found._schema.arguments[: _differentiable.get(self.name)]
        self._tensors = tuple(i for i, a in enumerate(leading) if "Tensor" in str(a.type))
        self._options = 1 + max(self._tensors)
        self._hidden = self._number_hidden()
        self._direct = self._direct_visible = None
        if _namespace == "rlhf_fast":
            in_python = _implementations.get(self.name)
            if in_python:
                self._direct = in_python[1]
                self._direct_visible = lambda *args: self._visible(in_python[1](*args))
            else:
                self._direct = _direct_call(self.name, found)
                self._direct_visible = _direct_call(self.name, found, self._hidden)
        self._bound = _namespace

    def _number_hidden(self):
        return _hidden.get(self.name, 0) if self._asked_hidden is None else self._asked_hidden

    def _visible(self, outputs):
        return outputs[: -self._hidden] if self._hidden else outputs

    def below_autograd(self, args):
        """The op without its gradient; all its outputs."""
        if self._direct is not None and not (_dispatch_modes() or _profiling() or _tracing()):
            outputs = self._direct(*args)
            if outputs is not NotImplemented:
                return outputs
        with _below_autograd():
            return self._overload(*args)

    def __call__(self, *args):
        try:
            if is_compiling():  # what follows is more than it can trace
                outputs = getattr(getattr(torch.ops, _namespace), self.name).default(*args)
                hidden = self._number_hidden()
                return outputs[:-hidden] if hidden else outputs
            return self.eager(args)
        except (RuntimeError, NotImplementedError) as error:
            refusal = _REFUSAL.search(str(error))
            if refusal:
                kind = ValueError if refusal.group(1) == "ValueError" else TypeError
                raise kind(refusal.group(2).replace(f"{self.name}: ", f"{self.function}: ", 1)) from None
            if _NO_KERNEL in str(error):
                devices = sorted({str(a.device) for a in args if isinstance(a, Tensor)})
                raise ValueError(
                    f"{self.function}: this build of rlhf_fast has no kernel for tensors on {', '.join(devices)}; "
                    "rlhf_fast.build_info()['cuda'] says whether CUDA was built in"
                ) from None
            raise

    def eager(self, args):
        """The call where torch.compile is not at work, its errors as they come."""
        if self._bound is not _namespace:
            self._bind()
        if _transforms():
            return self._visible(self._overload(*args))
        if self._function is not None and is_grad_enabled():
            for i in self._tensors:
                if args[i] is not None and args[i].requires_grad:
                    return self._function(*args[: self._options], (self, args))
        # As below_autograd: another call costs what a call without a gradient can be seen to cost.
        if self._direct_visible is not None and not (_dispatch_modes() or _profiling() or _tracing()):
            outputs = self._direct_visible(*args)
            if outputs is not NotImplemented:
                return outputs
        with _below_autograd():
            return self._visible(self._overload(*args))


_implementations: dict[str, tuple[str, Callable]] = {}
_functions: dict[str, Callable] = {}
_hidden: dict[str, int] = {}
_differentiable: dict[str, int | None] = {}
_registrations: dict[str, tuple[Callable, Callable | None, Callable | None]] = {}
_public_names: dict[str, str] = {}


def define(schema: str, implementation: Callable) -> None:
    """An op of the library that is written in Python, around torch's products and other ops; `register` comes after it.

    The implementation is called below autograd, on any device; its outputs may not share memory with its inputs.
    """
    _implementations[schema.partition("(")[0]] = schema, implementation


def register(
    name: str,
    fake: Callable,
    *,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
    backward_eager: Callable | None = None,
    hidden: int = 0,
    differentiable: int | None = None,
    function: str | None = None,
) -> None:
    """Give an op its shapes under tracing and, where it has one, its gradient (once differentiable).

    `backward_eager` takes the place of `backward` in eager calls: one that may write over what the forward pass made, of
    which the public function gives nothing away. The last `hidden` outputs are for the gradient alone, have none themselves, and
    eager calls give the formulas no gradients of them. Only the first `differentiable` inputs may have a gradient, or all
    tensors. `function` is the public function that errors speak of, where its name is not the op's.
    """
    _public_names[name] = function or name
    _hidden[name] = hidden
    _differentiable[name] = differentiable
    in_graphs = None if backward is None else first_derivative_only(name, backward)
    _registrations[name] = (fake, _marking(setup_context, hidden), in_graphs)
    _register_in("rlhf_fast", name)
    if backward is not None:
        _functions[name] = _function(name, setup_context, first_derivative_only(name, backward_eager or backward))


def _marking(setup_context: Callable | None, hidden: int) -> Callable | None:
    """A graph sees the hidden outputs, and must know that they have no gradient."""
    if not hidden or setup_context is None:
        return setup_context

    def run(ctx, inputs, output):
        ctx.mark_non_differentiable(*output[-hidden:])
        setup_context(ctx, inputs, output)  # which may mark more

    return run


def first_derivative_only(name: str, formula: Callable) -> Callable:
    """The formula, its results refusing to be differentiated.

    torch's once_differentiable refuses only where the upstream gradient requires grad. A gradient penalty has a constant one:
    its gradients would come out as constants, and the penalty would silently do nothing.
    """

    def run(ctx, *gradients):
        if not is_grad_enabled():  # no create_graph
            return formula(ctx, *gradients)
        causes = [t for t in (*gradients, *ctx.saved_tensors) if t is not None and t.requires_grad]
        with torch.no_grad():
            results = formula(ctx, *gradients)
        if not causes:
            return results
        results = list(results) if isinstance(results, tuple | list) else [results]
        places = [i for i, r in enumerate(results) if r is not None]
        for i, r in zip(places, _Refusal.apply(name, len(places), *(results[i] for i in places), *causes), strict=True):
            results[i] = r
        return tuple(results)

    return run


class _Refusal(torch.autograd.Function):
    """Passes `count` tensors on, made from the others in a way that has no derivative."""

    @staticmethod
    def forward(ctx, name, count, *tensors):
        ctx.name = name
        return tuple(t.detach() for t in tensors[:count])

    @staticmethod
    def backward(ctx, *gradients):
        raise RuntimeError(f"{ctx.name}: the op has no second derivative")


def _function(name: str, setup_context: Callable, formula: Callable) -> Callable:
    """The op with its gradient, called with (its tensors, (kernel, all inputs)): each input costs a call time.

    torch drops the None that the formula has for each other input, if there is one for what stands in their place.
    """
    last = getattr(torch.ops.rlhf_fast, name).default._schema.arguments[-1]

    def one_more(ctx, *gradients):
        return *formula(ctx, *gradients), None

    class EagerFunction(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            kernel, inputs = inputs[-1]
            outputs = kernel.below_autograd(inputs)
            setup_context(ctx, inputs, outputs)
            return kernel._visible(outputs)

        backward = staticmethod(one_more if "Tensor" in str(last.type) else formula)

    # What torch calls at each backward asks which kind of Function this is before it does the same.
    if backward_class := getattr(EagerFunction, "_backward_cls", None):
        backward_class.apply = EagerFunction.backward
    # Function.apply first asks each input for traces of a functorch transform. Under one, a call does not come here.
    return super(torch.autograd.Function, EagerFunction).apply


def _register_in(library: str, name: str) -> None:
    fake, setup_context, backward = _registrations[name]
    if name in _implementations:
        schema, implementation = _implementations[name]
        torch.library.define(f"{library}::{name}", schema.removeprefix(name))
        torch.library.impl(f"{library}::{name}", "default", implementation)
    torch.library.register_fake(f"{library}::{name}", _on_one_device(library, name, fake))
    if backward is not None:
        torch.library.register_autograd(f"{library}::{name}", backward, setup_context=setup_context)


def _on_one_device(library: str, name: str, fake: Callable) -> Callable:
    """Meta tensors beside real ones come here rather than to a kernel, whose check would refuse them."""

    def checked(*args):
        places = [i for i, a in enumerate(args) if isinstance(a, Tensor)]
        first = args[places[0]].device
        other = next((i for i in places if args[i].device != first), None)
        if other is not None:
            schema = getattr(getattr(torch.ops, library), name).default._schema.arguments
            names = [schema[i].name.removesuffix("_rows") for i in (other, places[0])]
            raise ValueError(
                f"{_public_names[name]}: `{names[0]}` is on {args[other].device.type} and `{names[1]}` on {first.type}; "
                "they must be on one device"
            )
        return fake(*args)

    return checked


def register_all(library: str) -> None:
    """Register every op's fake kernel and gradient in another operator library of the same schemas."""
    for name in _registrations:
        _register_in(library, name)


# ---------------------------------------------------------------------------------------------------------------------
# Arguments


_strided = torch.strided


def need_tensor(op: str, name: str, value: Any) -> Tensor:
    if type(value) is not Tensor and not isinstance(value, Tensor):  # isinstance asks a metaclass
        raise TypeError(f"{op}: `{name}` must be a tensor, got {type(value).__name__}")
    if value.layout is not _strided or value.is_nested or value.is_quantized:
        kind = (
            "nested" if value.is_nested else "quantized" if value.is_quantized else str(value.layout)[len("torch.") :]
        )
        raise TypeError(f"{op}: `{name}` must be a dense tensor, got a {kind} one")
    return value


def optional_tensor(op: str, name: str, value: Any) -> Tensor | None:
    return None if value is None else need_tensor(op, name, value)


def need_mask(op: str, value: Any) -> Tensor:
    mask = need_tensor(op, "mask", value)
    if mask.requires_grad:
        raise ValueError(f"{op}: `mask` requires grad, but no gradient flows to a mask; pass mask.detach()")
    return mask


def optional_mask(op: str, value: Any) -> Tensor | None:
    return None if value is None else need_mask(op, value)


def optional_offsets(op: str, value: Any) -> Tensor | None:
    return None if value is None else need_tensor(op, "cu_seqlens", value)


def needs_gradient(tensor: Tensor) -> bool:
    """Whether a backward pass may ask for its gradient, which the forward pass then prepares."""
    return tensor.requires_grad and torch.is_grad_enabled()


def number(
    op: str,
    name: str,
    value: Any,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    above: float | None = None,
    none: float | None = None,
) -> float:
    """A finite number in [low, high], above `above`. None stands for `none` where that is given."""
    if type(value) is float and low <= value <= high and (above is None or value > above) and value - value == 0:
        return value
    if value is None and none is not None:
        return none
    # numpy's numbers are Real; its arrays, strings and bools are not.
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        raise TypeError(
            f"{op}: `{name}` must be a number{' or None' if none is not None else ''}, got {type(value).__name__}"
        )
    try:
        value = float(value)
    except OverflowError:  # an int with more than 308 digits
        value = math.inf if value > 0 else -math.inf
    if not (math.isfinite(value) and low <= value <= high and (above is None or value > above)):
        bounds = []
        if above is not None:
            bounds.append(f"above {above:g}")
        elif low > -math.inf:
            bounds.append(f"at least {low:g}")
        if high < math.inf:
            bounds.append(f"at most {high:g}")
        raise ValueError(f"{op}: `{name}` must be {' and '.join(['finite', *bounds])}, got {value}")
    return value


def integer(op: str, name: str, value: Any, *, none: bool = False) -> int:
    """An int64; numpy's integers count. `none` says in the error that None would do as well."""
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, numbers.Integral)):
        raise TypeError(f"{op}: `{name}` must be an integer{' or None' if none else ''}, got {type(value).__name__}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{op}: `{name}` must fit in 64 bits, got an integer of {int(value).bit_length()} bits")
    return int(value)


def flag(op: str, name: str, value: Any) -> bool:
    if value is not True and value is not False:
        raise TypeError(f"{op}: `{name}` must be True or False, got {type(value).__name__}")
    return value


def choice(op: str, name: str, value: Any, choices: Mapping[str, Any]) -> Any:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{op}: `{name}` must be one of {', '.join(repr(c) for c in choices)}, got {value!r}")
    return choices[value]


def need_real(op: str, name: str, value: Any) -> None:
    if not need_tensor(op, name, value).is_floating_point():
        raise TypeError(f"{op}: `{name}` must be floating point, got {value.dtype}")


def as_reals(op: str, **tensors: Any) -> list[Tensor]:
    """The named tensors in one dtype: float64 if any is, float32 otherwise (bf16 and fp16 are widened, exactly)."""
    dtype = torch.float32
    for name, value in tensors.items():
        need_real(op, name, value)
        if value.dtype is torch.float64:
            dtype = torch.float64
    return [t if t.dtype is dtype else t.to(dtype) for t in tensors.values()]


def without_gradient(op: str, name: str, value: Any) -> Tensor:
    if need_tensor(op, name, value).requires_grad:
        raise ValueError(f"{op}: `{name}` requires grad, but no gradient flows to it; pass {name}.detach()")
    return value


def constants(op: str, name: str, value: Any, dtype: torch.dtype) -> Tensor:
    """A tensor of numbers that no gradient flows to, in `dtype`."""
    value = without_gradient(op, name, value)
    if value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{op}: `{name}` must be floating point or integer, got {value.dtype}")
    return value.to(dtype)


def real_constants(op: str, **tensors: Any) -> list[Tensor]:
    """The named floating-point tensors that no gradient flows to, in float64 (exactly)."""
    for name, value in tensors.items():
        need_real(op, name, value)
    return [constants(op, name, value, torch.float64) for name, value in tensors.items()]


AGGREGATES = {
    "token-mean": 0,
    "token-sum": 1,
    "seq-mean-token-sum": 2,
    "seq-mean-token-mean": 3,
    "seq-mean-token-sum-norm": 4,
}


def normalizer_of(op: str, value: Any) -> tuple[Tensor | None, float]:
    """(tensor, NaN) or (None, number); (None, NaN) for none. A tensor is read on its device, never here."""
    if value is None:
        return None, math.nan
    if isinstance(value, Tensor):
        return need_tensor(op, "normalizer", value).detach(), math.nan
    return None, number(op, "normalizer", value, above=0.0)


def aggregate_reference(loss: Tensor, weight: Tensor, aggregate: str, normalizer: Any) -> Tensor:
    """Per-token `loss` [B, T] with `weight` [B, T] to one number, in plain torch (verl's agg_loss, core_algos.py)."""
    loss = torch.where(weight != 0, weight * loss, 0.0)
    tokens = weight.sum(-1)
    rows = loss.sum(-1)
    if aggregate == "seq-mean-token-mean":
        rows = torch.where(tokens != 0, rows / tokens.where(tokens != 0, torch.ones_like(tokens)), rows)
    if normalizer is None:
        normalizer = {"token-mean": weight.sum(), "token-sum": 1.0}.get(aggregate, (tokens != 0).sum())
    divisor = torch.as_tensor(normalizer, dtype=loss.dtype, device=loss.device).reshape(())
    if aggregate == "seq-mean-token-sum-norm":
        divisor = divisor * loss.shape[-1]
    return torch.where(divisor != 0, rows.sum() / divisor.where(divisor != 0, torch.ones_like(divisor)), rows.sum() * 0)


def weights_reference(mask: Tensor | None, like: Tensor) -> Tensor:
    """The mask as weights: bool and integers count 0 or 1, floating-point values are kept."""
    if mask is None:
        return torch.ones_like(like)
    if mask.is_floating_point():
        return mask.to(like.dtype)
    return (mask != 0).to(like.dtype)


def padded_reference(cu_seqlens: Tensor, mask: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Packed tensors [N], and the mask before them, in the padded form [B, T] that the longest sequence asks for.

    What is one a row ([B, 1]) stays. Padding carries no weight.
    """
    lengths = cu_seqlens.diff().tolist()
    weight = torch.ones_like(tensors[0]) if mask is None else weights_reference(mask, tensors[0])

    def padded(t):
        if t.dim() == 2 or not lengths:
            return t.reshape(len(lengths), -1)
        return torch.nn.utils.rnn.pad_sequence(list(t.split(lengths)), batch_first=True)

    return tuple(padded(t) for t in (weight, *tensors))
