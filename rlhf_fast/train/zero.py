"""DeepSpeed's ZeRO 1 and 2: each process keeps a share of the optimizer's moments, and with 2 of the summed gradient as well.

`accelerate launch --use_deepspeed --zero_stage 2` asks for it, or a config of Accelerate's or DeepSpeed's own that says so.
DeepSpeed (Rajbhandari et al. 2020, arXiv 1910.02054) lays the trained parameters of a model into one tensor, sums gradients,
and gathers weights, of which it keeps a second copy, a share each. The optimizer is that of the loop, of this copy in place of
the parameters: clipping, rates and checkpoints stay the loop's own.

An engine of DeepSpeed's belongs to the parameters of one model, not to the model, whose forward pass it need not see. With ZeRO
2 each backward pass sums gradients, so that all processes take equally many: see `missing`.

A parameter without a gradient counts as one whose gradient is zero, if another of its model has one.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlhf_fast.train import distributed, fsdp
from rlhf_fast.train.config import flatten
from rlhf_fast.train.errors import UserError

ASKED, FILE = "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_CONFIG_FILE"
OLDEST = "0.19.6"  # lets the caller say when gradients are complete, and sums them
SECTION = "zero_optimization."
STAGE, CLIPPING, BF16 = f"{SECTION}stage", "gradient_clipping", "bf16.enabled"
# Keys of DeepSpeed's that accelerate launch has flags for.
FLAGS = {
    STAGE: "ACCELERATE_DEEPSPEED_ZERO_STAGE",
    f"{SECTION}offload_optimizer.device": "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
    f"{SECTION}offload_param.device": "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE",
    CLIPPING: "ACCELERATE_GRADIENT_CLIPPING",
    "gradient_accumulation_steps": "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
}
UNSAID = ("auto", "none", None)  # values that leave a key to others
SWITCHES = {"enabled", "device"}  # of a section
BUCKET = 500_000_000  # DeepSpeed's default
# Keys that DeepSpeed is given as they are: how it communicates, which changes no result but for the order of sums.
PASSED = {
    f"{SECTION}{name}"
    for name in (
        "allgather_bucket_size",
        "allgather_partitions",
        "contiguous_gradients",
        "overlap_comm",
        "reduce_bucket_size",
        "reduce_scatter",
        "round_robin_gradients",
        "use_multi_rank_bucket_allreduce",
    )
}
# What a key may be beside nothing, and what is used instead of other values. The first beginning that fits counts.
ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    STAGE: (
        (1, 2),
        "--use_fsdp --fsdp_version 2 shards weights as ZeRO 3 does, and --multi_gpu shards nothing, as ZeRO 0",
    ),
    "gradient_accumulation_steps": ((1,), "batch_size is that of an update, give micro_batch_size to the stage"),
    "train_batch_size": ((), "leave it auto and give batch_size to the stage"),
    "train_micro_batch_size_per_gpu": ((), "leave it auto and give micro_batch_size to the stage"),
    "optimizer.type": (("AdamW",), "leave the section out, the optimizer is AdamW"),
    "optimizer": ((), "leave it auto and give learning_rate, weight_decay or adam_epsilon to the stage"),
    "scheduler": ((), "leave the section out and give lr_schedule and warmup_steps to the stage"),
    f"{SECTION}offload": (
        (),
        "the optimizer's state stays on the device; start more processes, or train an adapter (lora_rank)",
    ),
    "fp16": ((), "use bf16, which needs no scaling of losses, or none"),
    BF16: ((True,), ""),
}
# Of other stages, of logging, or of checkpoints, which are not DeepSpeed's.
IDLE = (
    f"{SECTION}stage3_",
    f"{SECTION}sub_group_size",
    f"{SECTION}load_from_fp32_weights",
    f"{SECTION}ignore_unused_parameters",
    "steps_per_print",
    "wall_clock_breakdown",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
)


def asked() -> bool:
    """Whether the launcher was told to use DeepSpeed."""
    return distributed.flag(ASKED)


def on() -> bool:
    """Whether the optimizer's state is shared out: asked for, and there are several processes."""
    return asked() and distributed.count() > 1


def described() -> dict[str, str]:
    """What changes how sums are rounded, for a run that is continued: of `fsdp`, or the stage of ZeRO."""
    return fsdp.described() | ({"sharding": f"ZeRO {_config()[STAGE]}"} if on() else {})


# ---------------------------------------------------------------------------------------------- what is asked for


def check(config: Any) -> None:
    """UserError: DeepSpeed was asked for, and it is not installed, or the stage of `config` cannot do what it is to do."""
    if not asked():
        return
    found = _config()
    for key, value in found.items():
        _check_key(key, value, config)
    if found.get(BF16):
        os.environ[distributed.PRECISION] = "bf16"
    if config.dtype != "float32":
        raise UserError(f"DeepSpeed is for weights in float32 and dtype is {config.dtype}; use --mixed_precision bf16")
    if found[STAGE] == 1 and found.get(f"{SECTION}overlap_comm"):
        raise UserError("DeepSpeed: overlap_comm true needs ZeRO 2, got 1; leave it out")
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError("DeepSpeed was asked for and is not installed: pip install deepspeed")
    version = importlib.metadata.version("deepspeed")
    if _numbers(version) < _numbers(OLDEST):
        raise UserError(f"DeepSpeed {version} is installed and {OLDEST} or newer is needed: pip install -U deepspeed")


def _check_key(key: str, value: Any, config: Any) -> None:
    if value is False or key.startswith(IDLE):
        return
    if key in PASSED:
        if not isinstance(value, int | float):
            raise UserError(f"DeepSpeed: {key} must be a number, true or false, got {value!r}")
        return
    if key == CLIPPING:
        if value != config.max_grad_norm:
            raise UserError(
                f"DeepSpeed: {key} {value} was asked for and max_grad_norm of the stage is {config.max_grad_norm}; give both "
                "the same, or leave it to the stage"
            )
        return
    for beginning, (done, advice) in ONLY.items():
        if key.startswith(beginning):
            if value not in done:
                raise UserError(f"DeepSpeed: {key} {value} was asked for and is not supported: {advice}")
            return
    raise UserError(f"DeepSpeed: {key} {value} was asked for and is not supported; leave it out")


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")[:3] if part.isdigit()]


def _config() -> dict[str, Any]:
    """Keys and values of the file that the launcher names, then of its flags; those that say nothing left out."""
    path = os.environ.get(FILE, "none")
    flat = {} if path == "none" else flatten(_switched_on(_read(Path(path))))
    for key, variable in FLAGS.items():
        if flat.get(key, "auto") == "auto" and variable in os.environ:
            flat[key] = _number(os.environ[variable])
    return {STAGE: 2} | {key: value for key, value in flat.items() if value not in UNSAID}


def _switched_on(section: Mapping[str, Any]) -> dict[str, Any]:
    """Without the sections in it that say themselves to be off, whatever else they hold."""
    inner = {name: value for name, value in section.items() if isinstance(value, Mapping)}
    off = [
        name
        for name, value in inner.items()
        if value.keys() & SWITCHES and all(value.get(switch) in (*UNSAID, False) for switch in SWITCHES)
    ]
    return {name: _switched_on(value) if name in inner else value for name, value in section.items() if name not in off}


def _number(text: str) -> float | str:
    try:
        number = float(text)
    except ValueError:
        return text
    return int(number) if number.is_integer() else number


def _read(path: Path) -> dict[str, Any]:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"DeepSpeed's config {path} cannot be read: {error}") from None
    if not isinstance(told, dict):
        raise UserError(f"DeepSpeed's config {path} must hold an object of keys, got {type(told).__name__}")
    return told


# -------------------------------------------------------------------------------------------------- an optimizer

_engines: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


def spread(optimizer: torch.optim.Optimizer, models: Sequence[nn.Module]) -> torch.optim.Optimizer:
    """Let `optimizer`, which has a group for each of `models`, change this process's share of them where ZeRO is on; itself."""
    if not on():
        return optimizer
    for group, model in zip(optimizer.param_groups, models, strict=True):
        engine = _engines[model] = _engine(group["params"])
        group["params"] = [_share(engine)]
    return optimizer


def _engine(parameters: list[nn.Parameter]) -> Any:
    if parameters[0].device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else that of a GPU, if there is one
    import deepspeed

    found = {key.removeprefix(SECTION): value for key, value in _config().items() if key in {STAGE, *PASSED}}
    # A buffer of so many numbers is made whatever the model's size; beyond a share it would take more than ZeRO saves.
    size = max(1, sum(parameter.numel() for parameter in parameters) // distributed.count())
    found["reduce_bucket_size"] = min(found.get("reduce_bucket_size", BUCKET), size)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": found,
        # Each process divides by what the whole batch counts, and says when its gradient is complete.
        "gradient_allreduce_op": "sum",
        "managed_gradient_accumulation": False,
    }
    # It is never stepped: DeepSpeed lays out what it would step.
    base = torch.optim.AdamW(parameters)
    return deepspeed.initialize(
        model=nn.ParameterList(parameters), optimizer=base, config=settings, dist_init_required=False
    )[0]


def _share(engine: Any) -> nn.Parameter:
    return engine.optimizer.single_partition_of_fp32_groups[0]


def missing(passes: int) -> int:
    """By how many the passes of some process, with a backward pass each, are more than those of this one; all call it."""
    return distributed.behind(passes) if on() else fsdp.missing(passes)


def backward(model: nn.Module, loss: Tensor) -> None:
    """Add the gradient of `loss` to that of the parameters of `model`."""
    if model in _engines:
        _engines[model].backward(loss, scale_wrt_gas=False)
    else:
        loss.backward()


def summed(model: nn.Module) -> list[Tensor]:
    """What the optimizer changes of `model`, once its backward passes are through, with the gradient of all processes.

    Its parameters; or the share of this process alone, where ZeRO is on. All call it together, once an update.
    """
    if model not in _engines:
        return list(model.parameters())
    engine = _engines[model]
    zero, share = engine.optimizer, _share(engine)
    if zero.partition_gradients:
        zero.finalize_gradient_accumulation_boundary()
    else:
        zero.set_gradient_accumulation_boundary(True)
        zero.reduce_gradients()
    share.grad = torch.cat([part.flatten() for part in zero.averaged_gradients[0]])
    zero.averaged_gradients[0] = None
    zero.set_gradient_accumulation_boundary(False)
    return [share]


def norm(model: nn.Module, tensors: Sequence[Tensor]) -> Tensor:
    """Of the gradient of `model`, of which this process has `tensors`; all call it together."""
    own = fsdp.full(nn.utils.get_total_norm(tensors))
    if model not in _engines:
        return own
    square = own.double().square()
    dist.all_reduce(square)
    return square.sqrt().to(own.dtype)


def gradient(model: nn.Module, parameter: nn.Parameter) -> Tensor | None:
    """That of all processes, which call this together, after `summed`; a share of it where FSDP is on."""
    if model in _engines and parameter.requires_grad:
        return Part(parameter, _share(_engines[model]).grad).full_tensor()
    return parameter.grad


def gather(models: Sequence[nn.Module]) -> None:
    """Give every process the weights that each has changed a share of."""
    for model in models:
        if model in _engines:
            _engines[model].optimizer.update_lp_params()


def release() -> None:
    """Let gradients be of this process alone from now on, as to search for the row at fault; nothing can be updated any more."""
    for engine in _engines.values():
        engine.destroy()
    _engines.clear()


# ------------------------------------------------------------------------------------------------- its state


class Part:
    """What belongs to `parameter` of a tensor of which each process has a share, as a DTensor is asked for it."""

    def __init__(self, parameter: nn.Parameter, share: Tensor) -> None:
        self._parameter, self._share = parameter, share

    def detach(self) -> Part:
        return self

    def full_tensor(self) -> Tensor:
        """The whole of it; all processes call this together."""
        whole = torch.zeros(self._parameter.shape, dtype=self._share.dtype, device=self._share.device)
        for own, place in self._places():
            whole.flatten()[own] = self._share.detach()[place]
        dist.all_reduce(whole)
        return whole

    def fill(self, whole: Tensor) -> None:
        """Copy what this process has of `whole`."""
        for own, place in self._places():
            self._share[place] = whole.flatten()[own].to(self._share)

    def _places(self) -> Iterator[tuple[slice, slice]]:
        """Where this process's part is in the parameter, and in its share; nowhere, perhaps."""
        if (found := getattr(self._parameter, distributed.PLACE)) is not None:
            addresses = (found.lp_fragment_address, found.hp_fragment_address)
            yield tuple(slice(x.start, x.start + x.numel) for x in addresses)


def _laid_out(optimizer: torch.optim.Optimizer) -> list[tuple[nn.Parameter, list[nn.Parameter]]]:
    """What `optimizer` steps, each with the parameters of a model that it stands for, or itself."""
    whole = {id(_share(engine)): engine.optimizer.bit16_groups[0] for engine in _engines.values()}
    return [(x, whole.get(id(x), [x])) for group in optimizer.param_groups for x in group["params"]]


def parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Those of the models that `optimizer` trains, in its order."""
    return [parameter for _, stands_for in _laid_out(optimizer) for parameter in stands_for]


def state(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Any]]:
    """What `optimizer` keeps for each of the `parameters` by number, if it has stepped it; shares as `Part`."""
    found: list[dict[str, Any]] = []
    for stepped, stands_for in _laid_out(optimizer):
        kept = optimizer.state.get(stepped, {})
        for parameter in stands_for:
            whole = parameter is stepped
            found.append({k: x if whole or x.dim() == 0 else Part(parameter, x) for k, x in kept.items()})
    return {number: kept for number, kept in enumerate(found) if kept}


def load(optimizer: torch.optim.Optimizer, saved: Mapping[int, Mapping[str, Any]]) -> None:
    """Undo `state`, given in whole tensors; without a word between processes."""
    found: dict[int, dict[str, Any]] = {}
    number = 0
    for place, (stepped, stands_for) in enumerate(_laid_out(optimizer)):
        kept = {x: saved[i] for i, x in enumerate(stands_for, number) if i in saved}
        number += len(stands_for)
        if not kept:
            continue
        found[place] = own = dict(next(iter(kept.values())))
        if stepped in kept:
            continue
        for name in [name for name, x in own.items() if x.dim()]:
            own[name] = torch.zeros_like(stepped, requires_grad=False)
            for parameter, values in kept.items():
                Part(parameter, own[name]).fill(values[name])
    optimizer.load_state_dict({"state": found, "param_groups": optimizer.state_dict()["param_groups"]})


def refresh(models: Sequence[nn.Module]) -> None:
    """Take the weights of `models` as they are now for what the optimizer changes."""
    for model in models:
        if model in _engines:
            _engines[model].optimizer.refresh_fp32_params()
