"""Several processes, each with the whole model and its share of every batch: data parallelism as `accelerate launch` starts it.

Every process reads the same data and draws the same batches. Each adds the gradient of its rows, divided by what the whole
batch counts, and the gradients are summed: the update is that of one process, up to rounding, however many there are. So
`batch_size` is that of the update, not of a process. Only the main process writes.
Where FSDP is asked for each process holds a share of the models as well: see `fsdp`; of the optimizer's state alone where
DeepSpeed is: see `zero`.

The launcher's environment is read (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT): torchrun sets the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlhf_fast.train.errors import UserError

Item = TypeVar("Item")

SEED_STEP = 100_003  # between the seeds of processes: Huang et al. 2024, arXiv 2403.17031
# What accelerate launch can be told that is not done here.
REFUSED = {"ACCELERATE_USE_MEGATRON_LM": "Megatron-LM"}
ADVICE = "--use_fsdp --fsdp_version 2 shards models, --use_deepspeed --zero_stage 2 the optimizer's state"
PLACE = "_hp_mapping"  # of a parameter in DeepSpeed's flat tensor
PRECISION = "ACCELERATE_MIXED_PRECISION"


def asked_for() -> int:
    """Processes that the launcher has started."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def flag(variable: str) -> bool:
    """Whether the launcher has set `variable`."""
    return os.environ.get(variable, "false").lower() in ("true", "1")


def mixed_precision() -> bool:
    """Whether the launcher asks for forward passes in bfloat16 over float32 weights. UserError: another precision."""
    precision = os.environ.get(PRECISION, "no").lower()
    if precision not in ("no", "bf16"):
        raise UserError(
            f"accelerate launch was told mixed_precision {precision}; it must be bf16, which needs no scaling of losses, or no"
        )
    return precision == "bf16"


def join(device: str, dtype: str = "float32") -> None:
    """Find the other processes, if there are any. UserError: a way of spreading a model that is not supported."""
    for variable, name in REFUSED.items():
        if flag(variable):
            raise UserError(f"{name} was asked for, and it is not supported: {ADVICE}")
    if mixed_precision() and dtype != "float32":
        raise UserError(f"mixed_precision bf16 is for weights in float32 and dtype is {dtype}; leave out one of both")
    if asked_for() == 1 or count() > 1:
        return
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank())
    dist.init_process_group("nccl" if cuda else "gloo")


def leave() -> None:
    """Take leave of the other processes, once all have come to an end."""
    if count() > 1:
        dist.barrier()
        dist.destroy_process_group()


def count() -> int:
    """Processes that have joined."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if count() > 1 else 0


def local_rank() -> int:
    """The number of this process among those of its machine, which is that of its GPU."""
    return int(os.environ.get("LOCAL_RANK") or 0)


def is_main() -> bool:
    """Whether this is the process that writes and speaks."""
    return rank() == 0


# ----------------------------------------------------------------------------------------------------- objects


def gathered(value: Item) -> list[Item]:
    """The value of each process, in their order, to all of them."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value)
    return values


def from_main(make: Callable[[], Item]) -> Item:
    """What `make` gives in the main process, to all of them; a UserError there is raised in all."""
    if count() == 1:
        return make()
    outcome: list[Any] = [None, None]
    if is_main():
        try:
            outcome[0] = make()
        except UserError as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]


def main_first(work: Callable[[], Item]) -> Item:
    """`work` in the main process, and only then in the others: what it writes there, they read.

    A UserError there is raised in all, which then do nothing.
    """
    results: list[Item] = []
    from_main(lambda: results.append(work()))
    return results[0] if is_main() else work()


# ------------------------------------------------------------------------------------------------------ batches


def share(rows: Sequence[int], lengths: Sequence[int]) -> list[int]:
    """This process's part of `rows`, about as many tokens as any other's; all of them where it is alone."""
    if count() == 1:
        return list(rows)
    return sorted(rows, key=lambda row: lengths[row])[rank() :: count()]


def stretch(number: int) -> slice:
    """This process's part of so many things in a row."""
    return slice(number * rank() // count(), number * (rank() + 1) // count())


def is_share(tensor: Tensor) -> bool:
    """Whether this process has a part of it alone: a DTensor."""
    return hasattr(tensor, "full_tensor")


def behind(number: int) -> int:
    """By how much the number of some process is more than this one's; all call it."""
    return max(gathered(number)) - number


def combined(
    models: Mapping[str, nn.Module],
    stats: Mapping[str, Tensor],
    extremes: Mapping[str, Callable[[list[float]], float]] | None = None,
) -> Mapping[str, Tensor]:
    """Sum the gradients of `models` over all processes, in place, and return the sums of `stats`.

    Those of sharded models have been summed in the backward pass, and DeepSpeed sums its own.

    stats: scalars that are shares of the whole batch; those in `extremes` are its min or max instead. A process without a row
    may have none. Gradients that no process has stay absent.
    """
    if count() == 1:
        return stats
    parameters = [p for model in models.values() for p in model.parameters() if p.requires_grad]
    device = parameters[0].device
    parameters = [p for p in parameters if not is_share(p) and not hasattr(p, PLACE)]
    mine = {name: value.item() for name, value in stats.items()}, [p.grad is not None for p in parameters]
    parts, present = zip(*gathered(mine), strict=True)
    waiting = []
    for parameter, *has in zip(parameters, *present, strict=True):
        if any(has):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            waiting.append(dist.all_reduce(parameter.grad, async_op=True))
    for transfer in waiting:
        transfer.wait()
    names = dict.fromkeys(name for part in parts for name in part)
    values = {name: [part[name] for part in parts if name in part] for name in names}
    return {
        name: torch.tensor((extremes or {}).get(name, sum)(found), dtype=torch.float64, device=device)
        for name, found in values.items()
    }


@torch.no_grad()
def agree(model: nn.Module) -> None:
    """Give every process the weights of the main one, which they should have already: a hub may have changed meanwhile."""
    if count() > 1:
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.data, src=0)
