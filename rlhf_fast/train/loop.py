"""What every training stage needs and none owns: common keys, device, seed, token ids, batches, the update step."""

from __future__ import annotations

import importlib.util
import math
import random
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from rlhf_fast.train import distributed, fsdp, lora, zero
from rlhf_fast.train.config import option, required
from rlhf_fast.train.data import encode_prompt, encode_response
from rlhf_fast.train.errors import NotFinite, UserError
from rlhf_fast.train.model import checkpoint_activations, context_length
from rlhf_fast.train.trackers import REPORT_TO
from rlhf_fast.train.trackers import check as check_trackers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Below this many parameters an op is shorter than the hand-over between threads (measured: two threads up to 38
# times slower than one when the machine has other work).
SMALL_MODEL = 5_000_000
DEFAULT_THREADS = torch.get_num_threads()
SCHEDULES = ("linear", "cosine", "constant")
ADAMW_8BIT = "adamw_8bit"
CLIPPED_BY = "OpenRLHF, verl, NeMo-RL; none in arXiv 2403.17031"
N_PLUS = "arXiv 2403.17031"  # Huang et al. 2024, whose settings are most of the defaults
DATA = (
    "JSONL (plain or gzipped) or Parquet file, or hub:OWNER/NAME[/CONFIG][:SPLIT]; a preference file serves every stage"
)
CHAT_TEMPLATE = "Jinja file with the form of conversations, in place of the tokenizer's own"
SYSTEM_PROMPT = "message of the system for conversations that have none"
CHECKS = "look for faults of models and data before the first step, which takes seconds"
RESUME = "continue what was killed in output_dir; false: refuse a directory in use"
SAVE_EVERY = "seconds between two checkpoints, more where they would take over 1 % of the time; 0: after every update"
KEEP_CHECKPOINTS = "newest checkpoints kept until the stage is finished"
BUCKET_WINDOW = 16  # batches whose rows are sorted by length together


# ------------------------------------------------------------------------------------------------- common keys


@dataclass(frozen=True)
class StageConfig:
    """The keys that every stage has."""

    model: str = required("directory (or Hugging Face name) of the model to start from", group="files")
    data: str = required(DATA)
    output_dir: str = required("new directory for the result, or that of the run to continue")
    bad_rows: str = option("stop", "what to do with rows that cannot be used", choices=("stop", "skip"))
    chat_template: str | None = option(None, CHAT_TEMPLATE)
    system_prompt: str | None = option(None, SYSTEM_PROMPT)
    heldout_fraction: float = option(0.05, "share of prompts that no stage trains on", minimum=0, maximum=0.9)
    split_seed: int = option(0, "chooses which prompts are held out; the same in every stage")
    seed: int = option(0, "seed of everything random", group="machine")
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    dtype: str = option("float32", "type of weights and activations", choices=("float32", "bfloat16"))
    threads: int = option(0, "CPU threads; 0: 1 for a model below 5 million parameters, else torch's choice", minimum=0)
    checks: bool = option(True, CHECKS)
    report_to: str = option("tensorboard", REPORT_TO, several=True, check=check_trackers, group="trackers")
    resume: bool = option(True, RESUME, group="checkpoints")
    save_every: float = option(30.0, SAVE_EVERY, minimum=0)
    keep_checkpoints: int = option(2, KEEP_CHECKPOINTS, minimum=1)


@dataclass(frozen=True)
class TrainConfig(StageConfig):
    """The keys that decide what of a model is trained, and what of it is in memory meanwhile."""

    lora_rank: int = option(
        0,
        "train an adapter of this rank in place of the weights; 0: train the weights",
        minimum=0,
        source="arXiv 2106.09685",
        group="memory",
    )
    lora_alpha: float = option(32.0, "the adapter counts lora_alpha / lora_rank times", above=0, source="TRL 1.16")
    lora_target_modules: str = option(
        "all-linear",
        "layers that get one, names with commas; or all but the head",
        several=True,
        source="arXiv 2305.14314",
    )
    micro_batch_tokens: int = option(
        0, "tokens of a forward pass at most, padding included: few long rows or many short ones; 0: any", minimum=0
    )
    gradient_checkpointing: bool = option(
        False,
        "keep only what goes into each layer and make the rest again for the backward pass",
        source="arXiv 1604.06174",
    )
    optimizer: str = option(
        "adamw",
        "adamw, or with moments of 8 bits (bitsandbytes)",
        choices=("adamw", ADAMW_8BIT),
        source="arXiv 2110.02861",
    )


# ------------------------------------------------------------------------------------------------------ process


def say(line: str) -> None:
    """One line for whoever watches, of all processes together."""
    if distributed.is_main():
        print(line, file=sys.stderr, flush=True)


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU where torch sees one, else the CPU. UserError: a device that torch does not know or see.

    Of several processes each has a GPU of its own.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and distributed.count() > 1:
        name = f"cuda:{distributed.local_rank()}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device '{name}' is not known to torch; use auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device '{name}' was asked for but this torch ({torch.__version__}) sees no GPU; use cpu")
    return device


def seed_everything(seed: int) -> torch.Generator:
    """Seed the global generators and return one more, for the order of the data, that no sampling can disturb."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


def seed_process(seed: int) -> None:
    """Let each process draw numbers of its own from now on, where there are several; the first one's stay as they were."""
    if distributed.rank():
        seed_everything(seed + distributed.SEED_STEP * distributed.rank())


def use_threads(threads: int, *, parameters: int, device: torch.device) -> None:
    """Set the number of CPU threads; 0 means 1 for a small model on the CPU, else torch's default."""
    small = device.type == "cpu" and parameters < SMALL_MODEL
    torch.set_num_threads(threads or (1 if small else DEFAULT_THREADS))
    # Adam's moments of rarely used rows decay into denormals, which are a hundred times slower on x86.
    torch.set_flush_denormal(True)


def check_installed(config: TrainConfig, where: str) -> None:
    """UserError if a key asks for a library that is not here, or means nothing."""
    lora.check(config, where)
    if config.optimizer == ADAMW_8BIT and (fsdp.asked() or zero.asked()):
        raise UserError(
            f"{where}: 'optimizer' {ADAMW_8BIT} does not know the shares of {'FSDP' if fsdp.asked() else 'DeepSpeed'}; use "
            "adamw, which is sharded"
        )
    if config.optimizer == ADAMW_8BIT and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"{where}: 'optimizer' {ADAMW_8BIT} needs bitsandbytes, which is not installed: pip install bitsandbytes"
        )


def made_trainable(model: PreTrainedModel, config: TrainConfig) -> PreTrainedModel:
    """`model` with an adapter, and with its activations checkpointed, as `config` asks; itself."""
    lora.attach(model, config)
    if config.gradient_checkpointing:
        checkpoint_activations(model)
    return model


# ---------------------------------------------------------------------------------------------------- token ids

NO_LIMIT = 10**9


class Encoder:
    """Text to token ids that fit the context of the model, and of any others that will read them; counts what was cut.

    Replies keep up to `max_response_tokens`, prompts up to `max_prompt_tokens` or, if less, what the replies leave of
    the context. UserError if they leave nothing.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_prompt_tokens: int,
        max_response_tokens: int,
        others: Sequence[PreTrainedModel] = (),
    ) -> None:
        context = min(context_length(reader) or NO_LIMIT for reader in (model, *others))
        if max_response_tokens >= context:
            raise UserError(
                f"replies of {max_response_tokens} tokens leave no room for a prompt in the model's context of "
                f"{context} tokens; shorten the replies"
            )
        self._tokenizer = tokenizer
        self.max_prompt_tokens = min(max_prompt_tokens, context - max_response_tokens)
        self.max_response_tokens = max_response_tokens
        self.truncated_prompts = self.truncated_responses = 0

    def prompt(self, text: str) -> list[int]:
        ids = encode_prompt(self._tokenizer, text, NO_LIMIT)
        if len(ids) <= self.max_prompt_tokens:
            return ids
        self.truncated_prompts += 1
        return encode_prompt(self._tokenizer, text, self.max_prompt_tokens)

    def beginning(self) -> list[int]:
        """What stands in front of a text without a prompt."""
        return [] if self._tokenizer.bos_token_id is None else [self._tokenizer.bos_token_id]

    def response(self, text: str) -> list[int]:
        ids = encode_response(self._tokenizer, text, NO_LIMIT)
        self.truncated_responses += len(ids) > self.max_response_tokens
        return ids[: self.max_response_tokens]


# ------------------------------------------------------------------------------------------------------ batches


def length_batches(lengths: Sequence[int], batch_size: int, generator: torch.Generator | None) -> list[list[int]]:
    """Row numbers in batches of similar length, so that little is spent on padding. Every row appears once.

    With a generator: rows are shuffled, sorted by length only within a window of 16 batches, and the batches are
    shuffled. Without: sorted by length throughout (evaluation).
    """
    if generator is None:
        return _split(sorted(range(len(lengths)), key=lambda row: lengths[row]), batch_size)
    rows = torch.randperm(len(lengths), generator=generator).tolist()
    batches = []
    for window in _split(rows, batch_size * BUCKET_WINDOW):
        batches += _split(sorted(window, key=lambda row: lengths[row]), batch_size)
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def epochs(
    lengths: Sequence[int], batch_size: int, count: int, generator: torch.Generator
) -> tuple[list[list[int]], int]:
    """The batches of `count` passes over the rows, one after the other, and how many make a pass."""
    passes = [length_batches(lengths, batch_size, generator) for _ in range(count)]
    return [batch for batches in passes for batch in batches], len(passes[0])


def micro_batches(
    rows: Sequence[int],
    lengths: Sequence[int],
    size: int,
    tokens: int = 0,
    *,
    sequences: int = 1,
    widths: Sequence[Sequence[int]] = (),
) -> list[list[int]]:
    """`rows` in parts of at most `size` (0: one part), shortest first, so that each part can be cut to its longest.

    tokens: and of at most so many tokens with their padding (0: any number); a row that is longer stands alone. In rows
    sorted by length, to fill each part as far as it goes makes as few parts as there can be.
    sequences: in each row. widths: what a part is cut to is the sum of the maxima of these, if they are given, and not that of
    `lengths`.
    """
    parts = _split(sorted(rows, key=lambda row: lengths[row]), size or len(rows) or 1)
    if not tokens:
        return parts
    columns = widths or (lengths,)
    full: list[list[int]] = []
    for part in parts:
        longest = [0] * len(columns)
        filled: list[int] = []
        for row in part:
            longest = [max(most, column[row]) for most, column in zip(longest, columns, strict=True)]
            if filled and (len(filled) + 1) * sequences * sum(longest) > tokens:
                full.append(filled)
                filled, longest = [], [column[row] for column in columns]
            filled.append(row)
        full.append(filled)
    return full


def _split(rows: list[int], size: int) -> list[list[int]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


# --------------------------------------------------------------------------------------------------------- step


class Means:
    """Means of device scalars over the steps since the last look, moved to the host only then."""

    def __init__(self) -> None:
        self._rows: list[dict[str, Tensor]] = []

    def add(self, values: Mapping[str, Tensor]) -> None:
        self._rows.append({name: value.detach() for name, value in values.items()})

    def take(self) -> dict[str, float]:
        """The mean of each name, one transfer in all; forgets what was added."""
        names, rows, self._rows = list(self._rows[0]), self._rows, []
        return dict(zip(names, _table(names, rows).mean(0).tolist(), strict=True))

    def state(self) -> dict[str, list]:
        """What was added since the last look, to be saved."""
        names = list(self._rows[0]) if self._rows else []
        return {"names": names, "rows": _table(names, self._rows).tolist() if self._rows else []}

    def restore(self, state: Mapping[str, list], device: torch.device) -> None:
        """Add what `state` says in place of what was added. TypeError if it is of another form."""
        if not all(isinstance(state[key], list) for key in ("names", "rows")):
            raise TypeError("'means' has another type")
        rows = [torch.tensor([float(x) for x in row], dtype=torch.float64, device=device) for row in state["rows"]]
        self._rows = [dict(zip(state["names"], row.unbind(), strict=True)) for row in rows]


def _table(names: Sequence[str], rows: Sequence[Mapping[str, Tensor]]) -> Tensor:
    return torch.stack([torch.stack([row[name].double() for name in names]) for row in rows])


def learning_rate(step: int, total_steps: int, *, peak: float, schedule: str, warmup_steps: int = 0) -> float:
    """The rate of step 1 … total_steps: linear warm-up, then "linear" or "cosine" towards 0, or "constant"."""
    if step <= warmup_steps:
        return peak * step / (warmup_steps + 1)
    progress = (step - 1 - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * {"linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2, "constant": 1.0}[schedule]


def adamw(
    models: Iterable[nn.Module],
    *,
    weight_decay: float,
    epsilon: float,
    betas: tuple[float, float] = (0.9, 0.999),
    kind: str = "adamw",
) -> torch.optim.Optimizer:
    """AdamW over all parameters of `models` that are trained, a group each; the learning rates are set before every step.

    kind: "adamw", or "adamw_8bit", whose moments are blocks of bytes (Dettmers et al. 2022, arXiv 2110.02861).
    """
    models = list(models)
    groups = [{"params": lora.trained(model)} for model in models]
    settings = {"lr": 0.0, "betas": betas, "eps": epsilon, "weight_decay": weight_decay}
    if kind == ADAMW_8BIT:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, **settings)
    return zero.spread(torch.optim.AdamW(groups, **settings, fused=True), models)


def clip_and_step(
    optimizer: torch.optim.Optimizer,
    models: Mapping[str, nn.Module],
    losses: Mapping[str, Tensor],
    *,
    rate: float | Sequence[float],
    max_grad_norm: float,
    where: str,
) -> dict[str, Tensor]:
    """Clip each model's gradient to `max_grad_norm` (0: never), update all, clear the gradients. Returns the norms.

    rate: the learning rate, or one for each group of the optimizer.
    NotFinite, before any parameter has changed, if a loss or gradient is not finite: it names `where` (stage and
    step) and the tensor.
    """
    changed, norms = {name: zero.summed(model) for name, model in models.items()}, {}
    for name, model in models.items():
        norms[name] = zero.norm(model, [p.grad for p in changed[name] if p.grad is not None])
    if not torch.stack([*losses.values(), *norms.values()]).isfinite().all():
        fault = _first_not_finite(models, losses)
        zero.release()
        raise NotFinite(f"{where}: {fault}; nothing was updated. {NOT_FINITE_ADVICE}")
    for name in models:
        if max_grad_norm > 0:
            nn.utils.clip_grads_with_norm_(changed[name], max_grad_norm, norms[name])
    groups = optimizer.param_groups
    for group, own in zip(groups, rate if isinstance(rate, Sequence) else [rate] * len(groups), strict=True):
        group["lr"] = own
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    zero.gather(list(models.values()))
    return norms


NOT_FINITE_ADVICE = "Lower learning_rate, use dtype float32, and look at the last lines of log.jsonl"


def _first_not_finite(models: Mapping[str, nn.Module], losses: Mapping[str, Tensor]) -> str:
    for name, loss in losses.items():
        if not loss.isfinite():
            return f"the {name} is {loss.item()}"
    for name, model in models.items():
        for parameter_name, parameter in model.named_parameters():
            gradient = zero.gradient(model, parameter)
            if gradient is not None and not fsdp.is_finite(gradient):
                return f"the gradient of {name} parameter {parameter_name} is not finite"
    return "the norm of the gradient is not finite"


# --------------------------------------------------------------------------------------------------- statistics

Z_95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


def wilson_interval(successes: float, n: int) -> tuple[float, float]:
    """95 % score interval for the probability of success after `successes` of `n` independent yes/no trials.

    Wilson (1927). Stays inside [0, 1] and keeps its coverage near 0 and 1 and for small n, where the textbook
    p ± 1.96·sqrt(p(1−p)/n) does not. `n = 0` gives (0, 1): nothing is known.
    """
    if n < 0 or not 0 <= successes <= n:
        raise ValueError(f"wilson_interval: successes must lie in [0, n], got {successes} of {n}")
    if n == 0:
        return 0.0, 1.0
    p, shrink = successes / n, 1 + Z_95**2 / n
    centre = (p + Z_95**2 / (2 * n)) / shrink
    half = Z_95 / shrink * math.sqrt(p * (1 - p) / n + Z_95**2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)
