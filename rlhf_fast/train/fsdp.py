"""FSDP2: each process keeps a share of every model, its gradient and the optimizer's moments, and a whole block while it runs.

`accelerate launch --use_fsdp --fsdp_version 2` asks for it; the same variables do so under torchrun (ACCELERATE_USE_FSDP=true,
FSDP_VERSION=2). All is done by torch's `fully_shard` (Zhao et al. 2023, arXiv 2304.11277), all parameters are sharded.

The losses are made of the head's whole weight, outside of the model's own forward pass. So the whole of it, body and head, is
run as a forward pass of the model (see `run`): embeddings, last norm and head are one group, that of the root, which torch
keeps whole from there to the end of the backward pass, while blocks are gathered one after the other.

A pass is one of all processes together: each gathers the weights from all. What one process does more often than another
would wait for ever, hence `keep_step` and `missing`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor, nn

from rlhf_fast.train import distributed
from rlhf_fast.train.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Result = TypeVar("Result")

ASKED, VERSION = "ACCELERATE_USE_FSDP", "FSDP_VERSION"
BLOCKS, RESHARD = "FSDP_TRANSFORMER_CLS_TO_WRAP", "FSDP_RESHARD_AFTER_FORWARD"
# What accelerate launch can be told beside it: what is done here, and what gives it otherwise.
ONLY = {
    "FSDP_OFFLOAD_PARAMS": (
        "false",
        "weights stay on the device; start more processes, or train an adapter (lora_rank)",
    ),
    "FSDP_AUTO_WRAP_POLICY": ("TRANSFORMER_BASED_WRAP", "transformer blocks are what is gathered at a time"),
    "FSDP_ACTIVATION_CHECKPOINTING": ("false", "give gradient_checkpointing to the stage"),
    "FSDP_IGNORED_MODULES": ("None", "all parameters are sharded"),
}
METHOD = "_run"  # of a sharded model, known to torch as a forward pass


def asked() -> bool:
    """Whether the launcher was told to shard models."""
    return distributed.flag(ASKED)


def on() -> bool:
    """Whether models are sharded: asked for, and there are several processes."""
    return asked() and distributed.count() > 1


def described() -> dict[str, str]:
    """What changes how sums are rounded, for a run that is continued; nothing where neither is on."""
    sharded = {"sharding": "FSDP2"} if on() else {}
    return sharded | ({"mixed_precision": "bf16"} if distributed.mixed_precision() else {})


def check() -> None:
    """UserError: FSDP was asked for in a way that is not supported."""
    if not asked():
        return
    version = os.environ.get(VERSION, "1")
    if version != "2":
        raise UserError(
            f"FSDP version {version} was asked for and 2 is needed; give --fsdp_version 2 to accelerate launch"
        )
    if (reshards := os.environ.get(RESHARD, "true").lower()) not in ("true", "false"):
        raise UserError(f"{RESHARD.lower()} must be true (as ZeRO 3) or false (as ZeRO 2) with FSDP 2, got {reshards}")
    for variable, (done, advice) in ONLY.items():
        value = os.environ.get(variable, done)
        if value.lower() != done.lower():
            raise UserError(f"{variable.lower()} {value} was asked for and only {done} is supported: {advice}")
    # It tells transformers to leave the weights of all but one process empty, also those that are never sharded.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"


# ------------------------------------------------------------------------------------------------------- models


def spread(model: PreTrainedModel) -> PreTrainedModel:
    """Give every process the main one's weights of `model` and, where FSDP is on, let each keep its share alone; itself.

    To be called once parameters are known to be trained or frozen, and before an optimizer is made of them. UserError: an
    architecture that does not name its blocks.
    """
    distributed.agree(model)
    if not on():
        return model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    options = {"mesh": init_device_mesh(model.device.type, (distributed.count(),))}
    if distributed.mixed_precision():
        # Autocast alone would keep a narrow copy of every block until the backward pass; these are gathered narrow.
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in _blocks(model):
        fully_shard(block, **options, reshard_after_forward=_reshards())
    fully_shard(model, **options)
    for module in _groups(model):
        # Each process divides by what the whole batch counts, so gradients are summed; by SUM, which gloo has, too.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    # Log-probs are a view of an op's output, which nobody overwrites; logits may be, and the root needs no hook on its output:
    # it is whole by then, and its gradient is summed when the backward pass ends.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    setattr(model, METHOD, MethodType(lambda self, function: function(), model))
    register_fsdp_forward_method(model, METHOD)
    # The memory for whole weights is made at the first pass, as that asks for it: not in inference mode, whose tensors no
    # backward pass could use, and not while an adapter is switched off.
    with torch.no_grad():
        run(model, lambda: None)
        with whole(model):
            pass
    return model


def _blocks(model: PreTrainedModel) -> list[nn.Module]:
    named = os.environ.get(BLOCKS, "")
    names = {name.strip() for name in named.split(",") if name.strip()} or set(model._no_split_modules or ())
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    if not blocks:
        raise UserError(
            f"FSDP finds no {' or '.join(sorted(names)) or 'blocks'} in {type(model).__name__}; name the class of its blocks "
            "with --fsdp_transformer_layer_cls_to_wrap"
        )
    return blocks


def _reshards() -> bool:
    return os.environ.get(RESHARD, "true").lower() == "true"


def is_sharded(model: object) -> bool:
    return hasattr(model, METHOD)


def _groups(model: nn.Module) -> list[nn.Module]:
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


_running: WeakSet[nn.Module] = WeakSet()


def run(model: nn.Module, function: Callable[[], Result]) -> Result:
    """function(), as a forward pass of `model`: what it calls of the model, body or head, finds whole weights there.

    Its tensors that need a gradient are to be returned, and nothing of the model be read but through them later on.
    """
    if not is_sharded(model) or model in _running:
        return function()
    _running.add(model)
    try:
        return getattr(model, METHOD)(function)
    finally:
        _running.discard(model)
        if not torch.is_grad_enabled():
            # torch waits for a backward pass to let them go; the next pass would read what the optimizer has since changed.
            _let_go(model)


def entry(model: nn.Module) -> Callable[..., Any]:
    """The model, to be called inside of `run`: with its hooks, but for those of torch that `run` has gone through already."""
    return model.forward if is_sharded(model) else model


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """All weights of `model` at once in every process, as long as this lasts; without gradient.

    For sampling, where processes take unequally many steps and each would gather all weights: it costs the memory of one
    whole model instead.
    """
    if not is_sharded(model):
        yield
        return
    groups = _groups(model)
    try:
        for module in groups:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        yield
    finally:
        _let_go(model)
        for module in groups:
            if module is not model:
                module.set_reshard_after_forward(_reshards(), recurse=False)


def _let_go(model: nn.Module) -> None:
    for module in _groups(model):
        module.reshard()


# ------------------------------------------------------------------------------------------------------ tensors


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor of which each process has a share, to all, which call this together; itself if it is whole."""
    return tensor.full_tensor() if distributed.is_share(tensor) else tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether all of it is, the shares of other processes too, which call this together. bool() of a share sees that alone."""
    return bool(full(tensor.isfinite().all()))


def like(own: Tensor, tensor: Tensor) -> Tensor:
    """`tensor`, which every process has as a whole, in shares as `own` is; without a word between processes."""
    if not distributed.is_share(own):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


def full_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors of a state on the host of the main process, tied ones once; nothing elsewhere. All processes call it."""
    found: dict[int, Tensor] = {}
    for tensor in {id(tensor): tensor for tensor in state.values()}.values():
        one = full(tensor.detach())
        if distributed.is_main():
            found[id(tensor)] = one.cpu()
    return {name: found[id(tensor)] for name, tensor in state.items() if found}


# ------------------------------------------------------------------------------------------------------ in step


def missing(passes: int) -> int:
    """By how many the passes of some process are more than the `passes` of this one; all call it."""
    return distributed.behind(passes) if on() else 0
