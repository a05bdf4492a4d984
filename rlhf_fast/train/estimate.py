"""What a stage would need, before it begins: memory for its models, and the time that a small piece of it takes, times all.

Weights, gradients and the optimizer's moments are counted on models without memory, so that one too large for the machine is
counted as well. If they fit, a few rows are trained for a moment: what autograd then keeps for the backward pass is counted a
tensor at a time, and the clock is read. Rates are 0 meanwhile and nothing is written.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_fast.ops.linear import WORKSPACE
from rlhf_fast.train import loop, lora
from rlhf_fast.train.errors import UserError
from rlhf_fast.train.model import add_head_bias, check_directory, quiet_transformers

TRIAL_ROWS = 8
MOMENTS = 2  # AdamW's, of the type of the parameter or a byte each
AVERAGE, FLOAT32 = "average of the policy", 4
MIB, MEBIBYTE = "MiB", 1 << 20

# (name, key of its directory, whether it has a scalar head, whether it is trained) of what a stage holds in memory.
Part = tuple[str, str, bool, bool]
PARTS: dict[str, tuple[Part, ...]] = {
    "sft": (("model", "model", False, True),),
    "reward": (("model", "model", True, True), ("policy, to sample from", "model", False, False)),
    "dpo": (("model", "model", False, True),),
    "ppo": (
        ("policy", "model", False, True),
        (AVERAGE, "model", False, False),
        ("reference", "model", False, False),
        ("value", "reward_model", True, True),
        ("reward", "reward_model", True, False),
    ),
}


@dataclass(frozen=True)
class Held:
    """One model in memory: its parameters, those that are trained, and the bytes of all and of the trained ones."""

    name: str
    parameters: int
    trained: int
    weights: int
    gradients: int


def held(stage: str, config: Any) -> list[Held]:
    """The models that `stage` would hold, counted without loading them. UserError: a directory without a model's config."""
    found = []
    for name, key, scalar, is_trained in PARTS[stage]:
        if stage == "ppo" and not _takes_part(name, config):
            continue
        starts_anew = name == "value" and config.value_init == "zeros"
        directory = config.model if starts_anew else getattr(config, key, None) or config.model
        model = _without_memory(directory, scalar, config)
        if name == AVERAGE:
            own = lora.trained(lora.attach(model, config))  # in float32 at least; what is not trained is the policy's
            parameters = sum(p.numel() for p in own)
            found.append(Held(name, parameters, 0, parameters * max(model.dtype.itemsize, FLOAT32), 0))
            continue
        parameters = lora.trained(lora.attach(model, config)) if is_trained else []
        numbers = (sum(p.numel() for p in model.parameters()), sum(p.numel() for p in parameters))
        found.append(Held(name, *numbers, *map(_bytes, (model.parameters(), parameters))))
    return found


def _takes_part(name: str, config: Any) -> bool:
    if name == AVERAGE:
        return config.ema_decay is not None
    if name == "reference":
        return not config.lora_rank  # else the policy is its own
    if name == "value":
        return config.advantage == "gae"
    return name != "reward" or config.reward_model is not None


def _without_memory(name_or_dir: str | Path, scalar: bool, config: Any) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    check_directory(name_or_dir)
    try:
        with quiet_transformers(), torch.device("meta"):
            settings = AutoConfig.from_pretrained(name_or_dir, **({"num_labels": 1} if scalar else {}))
            auto = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
            model = auto.from_config(settings, dtype=getattr(torch, config.dtype))
            if scalar:
                add_head_bias(model)
            return model
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"model {name_or_dir} cannot be counted: {error}") from None


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on the device; on the CPU what Linux would give without swapping."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


# ------------------------------------------------------------------------------------------------------- a trial


class SavedTensors:
    """Counts the bytes that autograd keeps for backward passes at a time, each storage once, those of `models` not at all."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        self._own = {tensor.untyped_storage().data_ptr() for model in models for tensor in model.parameters()}
        self._counts: dict[int, int] = {}
        self._now = self.peak = 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda kept: kept.tensor):
            yield

    def _keep(self, tensor: Tensor) -> _Kept:
        return _Kept(tensor, self)

    def add(self, tensor: Tensor, sign: int) -> None:
        storage = tensor.untyped_storage()
        place = storage.data_ptr()
        if place in self._own:
            return
        before = self._counts.get(place, 0)
        self._counts[place] = before + sign
        if before == (0 if sign > 0 else 1):
            self._now += sign * storage.nbytes()
            self.peak = max(self.peak, self._now)


class _Kept:
    """A saved tensor that says when autograd lets go of it."""

    def __init__(self, tensor: Tensor, counter: SavedTensors) -> None:
        self.tensor, self._counter = tensor, counter
        counter.add(tensor, 1)

    def __del__(self) -> None:
        self._counter.add(self.tensor, -1)


def seconds_of(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """The time that `work` takes, and what it returns."""
    _wait(device)
    start = time.perf_counter()
    result = work()
    _wait(device)
    return time.perf_counter() - start, result


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Trial:
    """What a few rows took: seconds of their gradient and of an optimizer step, and bytes kept for the backward pass."""

    gradient_seconds: float
    step_seconds: float
    saved: int


def try_out(
    models: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    gradient: Callable[[], Any],
    device: torch.device,
) -> Trial:
    """Add the gradient of a few rows, step with a rate of 0, and look at what that takes. The second time counts."""
    counter = SavedTensors(list(models.values()))
    with counter.counting():
        gradient()
    optimizer.zero_grad(set_to_none=True)
    gradient_seconds, _ = seconds_of(gradient, device)
    options = {"rate": 0.0, "max_grad_norm": 0.0, "where": "dry run"}
    loss = {"loss": torch.zeros((), device=device)}
    step_seconds, _ = seconds_of(lambda: loop.clip_and_step(optimizer, models, loss, **options), device)
    return Trial(gradient_seconds, step_seconds, counter.peak)


# ------------------------------------------------------------------------------------------------------ a report


def begin(stage: str, config: Any, device: torch.device) -> bool:
    """Print what the models of a stage take; False: more than is free, so that nothing can be tried out."""
    models, free = held(stage, config), free_memory(device)
    rows = _model_rows(models, config.optimizer == loop.ADAMW_8BIT)
    _print(f"{stage} on {device}, {config.dtype}, nothing is written", _head(models), rows)
    total = sum(size for _, size in rows)
    if total > free:
        print(f"  does not fit: {_mib(total)} {MIB} without activations, {_mib(free)} {MIB} are free")
        return False
    return True


def _head(models: Sequence[Held]) -> list[str]:
    return [f"{m.name}: {m.parameters:,} parameters, {m.trained:,} of them trained" for m in models]


def _model_rows(models: Sequence[Held], eight_bit: bool) -> list[tuple[str, int]]:
    rows = [(f"weights of the {m.name}", m.weights) for m in models]
    gradients = sum(m.gradients for m in models)
    moments = MOMENTS * (sum(m.trained for m in models) if eight_bit else gradients)
    return [*rows, ("gradients", gradients), ("moments of the optimizer", moments)]


def _print(title: str, lines: Sequence[str], rows: Sequence[tuple[str, int]]) -> None:
    print(title)
    for line in lines:
        print(f"  {line}")
    for name, size in rows:
        print(f"  {name:<44}{_mib(size):>12} {MIB}")


def _mib(size: float) -> str:
    return f"{size / MEBIBYTE:,.1f}"


def tile_of_logits(tokens: int, vocabulary: int, device: torch.device) -> int:
    """Bytes of the logits that exist at a time, of so many tokens, where none are made as a whole."""
    return min(WORKSPACE[device.type], 4 * tokens * vocabulary)


def kv_cache(model: nn.Module, tokens: int) -> int:
    """Bytes of keys and values of so many tokens while they are generated; full attention in every layer is assumed."""
    c = model.config.get_text_config()
    heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
    width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    return 2 * c.num_hidden_layers * heads * width * tokens * model.dtype.itemsize


def finish(
    stage: str, config: Any, device: torch.device, memory: Mapping[str, int], times: Mapping[str, float]
) -> None:
    """Print what was tried out: memory beside the models', and seconds; the last of `times` is the whole stage."""
    rows = _model_rows(held(stage, config), config.optimizer == loop.ADAMW_8BIT)
    total = sum(size for _, size in rows) + sum(memory.values())
    free = free_memory(device)
    _print("while it trains", [], [*memory.items(), ("in all", total), (f"free on {device}, the models loaded", free)])
    for name, seconds in times.items():
        print(f"  {name:<44}{seconds:>12.3g} s")


def passes(
    stage: str,
    config: Any,
    models: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    lengths: Sequence[int],
    batches: Sequence[Sequence[int]],
    gradient: Callable[[list[int]], Any],
    *,
    sequences: int,
    device: torch.device,
) -> None:
    """Try out a stage that passes over rows, and print what it would need.

    lengths: tokens of each row; batches: the rows of each update; gradient: adds that of some rows; sequences: in a row.
    """
    limits = (config.micro_batch_size, config.micro_batch_tokens)
    parts = [loop.micro_batches(rows, lengths, *limits, sequences=sequences) for rows in batches]
    rows = parts[0][-1][-TRIAL_ROWS:]
    trial = try_out(models, optimizer, lambda: gradient(rows), device)

    def tokens(part: Sequence[int]) -> int:
        return sequences * len(part) * max(lengths[row] for row in part)

    per_token = trial.gradient_seconds / tokens(rows)
    largest, all_tokens = max(tokens(p) for ps in parts for p in ps), sum(tokens(p) for ps in parts for p in ps)
    memory = {f"activations of {largest:,} tokens": trial.saved * largest // tokens(rows)}
    model = next(iter(models.values()))
    if (head := model.get_output_embeddings()) is not None and not config.full_logits:
        memory["logits, a tile at a time"] = tile_of_logits(largest, head.weight.shape[0], device)
    update = per_token * all_tokens / len(batches) + trial.step_seconds
    times = {
        f"gradient of {len(rows)} rows, measured": trial.gradient_seconds,
        "step of the optimizer, measured": trial.step_seconds,
        "one update": update,
        f"all {len(batches):,} updates, looks at held-out rows apart": update * len(batches),
    }
    finish(stage, config, device, memory, times)


def rollouts(
    config: Any,
    models: Any,
    optimizer: torch.optim.Optimizer,
    play: Callable[[int], Any],
    gradient: Callable[[Any, list[int]], Any],
    *,
    prompt_tokens: int,
    updates: int,
    group: int,
    device: torch.device,
) -> None:
    """Try out PPO, and print what it would need.

    play: the experience of so many rollouts; gradient: adds that of some rows of it; prompt_tokens: of the longest prompt;
    group: rollouts that belong together.
    """
    count = min(config.batch_size, group * max(1, 2 * TRIAL_ROWS // group))
    play(group)  # warm
    play_seconds, batch = seconds_of(lambda: play(count), device)
    rows = list(range(count))
    trial = try_out(models.trained, optimizer, lambda: gradient(batch, rows), device)

    width = prompt_tokens + config.response_length
    tried = batch.scored.rollout.ids.numel()
    micro = config.micro_batch_size or config.batch_size // config.num_mini_batches
    if config.micro_batch_tokens:
        micro = min(micro, max(1, config.micro_batch_tokens // width))
    vocabulary = models.policy.get_output_embeddings().weight.shape[0]
    memory = {
        f"activations of {micro * width:,} tokens, at most": trial.saved * micro * width // tried,
        "keys and values while replies are sampled": kv_cache(models.policy, config.batch_size * width),
        "logits of the next token": 4 * config.batch_size * vocabulary,
    }
    if not config.full_logits:
        memory["logits, a tile at a time"] = tile_of_logits(micro * config.response_length, vocabulary, device)
    share, passed = config.batch_size / count, config.num_ppo_epochs * config.batch_size / count
    update = play_seconds * share + trial.gradient_seconds * passed
    update += trial.step_seconds * config.num_ppo_epochs * config.num_mini_batches
    times = {
        f"{count} replies and their scores, measured": play_seconds,
        "their gradient, measured": trial.gradient_seconds,
        "step of the optimizer, measured": trial.step_seconds,
        "one update, if the rest takes as long a reply": update,
        f"all {updates:,} updates": update * updates,
    }
    finish("ppo", config, device, memory, times)
