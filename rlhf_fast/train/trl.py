"""The names of TRL 1.12's `PPOConfig`, its `TrainingArguments` included, as `ppo` reads them: a config moves over.

Most of its names are ours. Of the others, `RENAMED` have the same meaning under another name, `COMBINED` are read together,
`REFUSED` ask for what is not done here, unless they say so themselves, and `IDLE` change nothing that is learned. What a
config does not give keeps the default of this project, not that of TRL.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from rlhf_fast.train import distributed
from rlhf_fast.train.errors import UserError
from rlhf_fast.train.loop import ADAMW_8BIT, say

RENAMED = {
    "sft_model_path": "model",
    "reward_model_path": "reward_model",
    "local_rollout_forward_batch_size": "rollout_micro_batch_size",
    "lr_scheduler_type": "lr_schedule",
    "save_total_limit": "keep_checkpoints",
    "activation_checkpointing": "gradient_checkpointing",
}
PER_DEVICE, ACCUMULATION = "per_device_train_batch_size", "gradient_accumulation_steps"
DEFAULT_PER_DEVICE, DEFAULT_ACCUMULATION = 8, 1  # of TrainingArguments
COMBINED = {
    PER_DEVICE: "batch_size, micro_batch_size",
    ACCUMULATION: "batch_size, micro_batch_size",
    "num_train_epochs": "total_episodes",
    "optim": "optimizer",
    "use_cpu": "device",
    "resume_from_checkpoint": "resume",
}
ADAMW = "adamw"
OPTIMIZERS = {ADAMW: ("adamw_torch", "adamw_torch_fused"), ADAMW_8BIT: ("adamw_8bit", "adamw_bnb_8bit")}
ABSENT = (None, False, "", "no", "none", {}, [])
SHOWN = 8
HIDDEN_STOP = "<STOP_TOKEN>"  # TrainingArguments.to_dict hides every key that ends in _token
WARM_CONSTANT = "constant_with_warmup"  # our constant, which has warmup_steps as well


@dataclass(frozen=True)
class Refused:
    """A name that is refused, with what to do `instead`, unless its value is one of `harmless`."""

    harmless: tuple[Any, ...]
    instead: str


_LAUNCHER = (
    "the launcher shards models: accelerate launch --use_fsdp --fsdp_version 2, or --use_deepspeed --zero_stage 2"
)
REFUSED = {
    "stop_token_id": Refused((None,), "give the text of that token as stop_token"),
    "max_steps": Refused((None, -1), "give total_episodes, which is updates x batch_size"),
    "model_adapter_name": Refused((None,), "lora_rank makes one adapter, which has no name"),
    "ref_adapter_name": Refused((None,), "lora_rank makes one adapter, which has no name"),
    "push_to_hub": Refused((None, False), "nothing is uploaded; use `hf upload` on output_dir"),
    "run_name": Refused((None,), "a run is named after output_dir"),
    "bf16": Refused(
        (None, False), "accelerate launch --mixed_precision bf16 does it; dtype bfloat16 holds the weights in it, too"
    ),
    "fp16": Refused((None, False), "use dtype float32 or bfloat16"),
    "optim_args": Refused(
        (None, ""), "the optimizer's settings are adam_beta1, adam_beta2, adam_epsilon, weight_decay"
    ),
    "optim_target_modules": Refused((None,), "all weights are trained, or with lora_rank an adapter"),
    "lr_scheduler_kwargs": Refused((None, "", {}), "lr_schedule is linear, cosine or constant, after warmup_steps"),
    "warmup_ratio": Refused((None, 0.0), "give warmup_steps, in updates"),
    "label_smoothing_factor": Refused((None, 0.0), "PPO has no labels"),
    "neftune_noise_alpha": Refused((None,), "noise would change the ratio of new to old probabilities"),
    "auto_find_batch_size": Refused(
        (None, False), "give micro_batch_size or micro_batch_tokens, which change no result"
    ),
    "fsdp": Refused((None, False, "", []), _LAUNCHER),
    "deepspeed": Refused((None, ""), _LAUNCHER),
    "parallelism_config": Refused((None,), _LAUNCHER),
    "full_determinism": Refused((None, False), "the seed decides everything on a CPU; on a GPU kernels may round anew"),
    "load_best_model_at_end": Refused((None, False), "give judge and eval_every: guard keeps the policy judged best"),
    "data_seed": Refused((None,), "seed orders the data, too"),
    "overwrite_output_dir": Refused((None, False), "nothing is overwritten; give a new output_dir"),
}

_COMPUTED = "TRL computes it from other names"
_SAVING = "a checkpoint is written every save_every seconds"
_LOGGING = "every update is logged"
_EVALUATION = "TRL's PPO measures nothing there; eval_every with a judge does"
_SPEED = "memory or speed alone"
_LOADING = "prompts are held in memory"
_PROCESSES = "of processes"
_HUB = "nothing is uploaded"
IDLE = {
    **dict.fromkeys(
        ("world_size", "num_total_batches", "local_batch_size", "local_mini_batch_size", "mini_batch_size"), _COMPUTED
    ),
    **dict.fromkeys(
        (
            "save_strategy",
            "save_steps",
            "save_only_model",
            "save_on_each_node",
            "enable_jit_checkpoint",
            "restore_callback_states_from_checkpoint",
            "ignore_data_skip",
        ),
        _SAVING,
    ),
    **dict.fromkeys(
        (
            "logging_dir",
            "logging_strategy",
            "logging_steps",
            "logging_first_step",
            "logging_nan_inf_filter",
            "log_on_each_node",
            "log_level",
            "log_level_replica",
            "disable_tqdm",
            "include_num_input_tokens_seen",
            "project",
            "trackio_space_id",
            "trackio_bucket_id",
            "trackio_static_space_id",
            "debug",
            "skip_memory_metrics",
        ),
        _LOGGING,
    ),
    **dict.fromkeys(
        (
            "do_train",
            "do_eval",
            "do_predict",
            "eval_strategy",
            "eval_steps",
            "eval_delay",
            "per_device_eval_batch_size",
            "prediction_loss_only",
            "eval_on_start",
            "eval_do_concat_batches",
            "eval_use_gather_object",
            "eval_accumulation_steps",
            "include_for_metrics",
            "batch_eval_metrics",
            "bf16_full_eval",
            "fp16_full_eval",
            "metric_for_best_model",
            "greater_is_better",
        ),
        _EVALUATION,
    ),
    **dict.fromkeys(
        (
            "ds3_gather_for_generation",
            "gradient_checkpointing_kwargs",
            "activation_checkpointing_kwargs",
            "torch_compile",
            "torch_compile_backend",
            "torch_compile_mode",
            "torch_empty_cache_steps",
            "use_liger_kernel",
            "liger_kernel_config",
            "use_cache",
            "tf32",
        ),
        _SPEED,
    ),
    **dict.fromkeys(
        (
            "dataset_num_proc",
            "dataloader_drop_last",
            "dataloader_num_workers",
            "dataloader_pin_memory",
            "dataloader_persistent_workers",
            "dataloader_prefetch_factor",
            "dataloader_multiprocessing_context",
            "dataloader_in_order",
            "remove_unused_columns",
            "label_names",
            "group_by_length",
            "train_sampling_strategy",
            "length_column_name",
        ),
        _LOADING,
    ),
    **dict.fromkeys(
        (
            "average_tokens_across_devices",
            "accelerator_config",
            "fsdp_config",
            "ddp_find_unused_parameters",
            "ddp_bucket_cap_mb",
            "ddp_broadcast_buffers",
            "ddp_static_graph",
            "ddp_backend",
            "ddp_timeout",
            "local_rank",
        ),
        _PROCESSES,
    ),
    **dict.fromkeys(
        ("hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision"), _HUB
    ),
}


class Names:
    """The names above, as a config class takes them for its own (`config.Foreign`)."""

    names = frozenset({*RENAMED, *COMBINED, *REFUSED, *IDLE})

    def translate(self, given: Mapping[str, Any], where: str) -> dict[str, Any]:
        """`given` in our names; one line on the terminal says what was read how.

        UserError: a name that cannot be honoured, or a key given under both names.
        """
        foreign = {name: value for name, value in given.items() if name in self.names}
        ours = {name: value for name, value in given.items() if name not in self.names}
        notes: list[str] = []
        _refuse(foreign, where)
        if ours.get("stop_token") == HIDDEN_STOP:
            raise UserError(
                f"{where}: 'stop_token' {HIDDEN_STOP} stands for a text that transformers hides in a dump; give it"
            )
        for name, key in RENAMED.items():
            if foreign.get(name) is not None:
                value = "constant" if foreign[name] == WARM_CONSTANT else foreign[name]
                _take(ours, key, value, name, where, notes)
        _optimizer(foreign, ours, where, notes)
        _batch_sizes(foreign, ours, where, notes)
        _epochs(foreign, ours, where, notes)
        _machine(foreign, ours, where, notes)
        _missing_end(bool(foreign), ours, notes)
        idle = [name for name, value in foreign.items() if name in IDLE and not _among(value, ABSENT)]
        if idle:
            more = f" and {len(idle) - SHOWN} more" if len(idle) > SHOWN else ""
            notes.append(f"without effect here: {', '.join(idle[:SHOWN])}{more}")
        if notes:
            say(f"{where}: names of TRL's PPOConfig: {'; '.join(notes)}")
        return ours

    def help(self) -> str:
        """What `--help` says of them."""
        renamed = [f"  {name} = {key}" for name, key in (RENAMED | COMBINED).items()]
        lines = ["names of TRL 1.12's PPOConfig are read as well, as flags and in YAML; where they differ from ours:"]
        return "\n".join(["", *lines, *renamed])


def _refuse(foreign: Mapping[str, Any], where: str) -> None:
    wrong = [
        f"'{name}' {value!r}: {REFUSED[name].instead}"
        for name, value in foreign.items()
        if name in REFUSED and not _among(value, REFUSED[name].harmless)
    ]
    if wrong:
        raise UserError(f"{where}: names of TRL's PPOConfig that cannot be honoured: {'; '.join(wrong)}")


def _among(value: Any, values: Collection[Any]) -> bool:
    """`value in values`, True and 1 told apart."""
    return any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in values)


def _take(ours: dict[str, Any], key: str, value: Any, name: str, where: str, notes: list[str]) -> None:
    """Set a key of ours; given under both names, it would be a guess which is meant."""
    if ours.get(key) is not None and ours[key] != value:
        raise UserError(f"{where}: '{name}' is TRL's name of '{key}', and both are given; keep one of them")
    ours[key] = value
    notes.append(f"{key} {value} ({name})")


def _optimizer(foreign: Mapping[str, Any], ours: dict[str, Any], where: str, notes: list[str]) -> None:
    if ours.get("gradient_checkpointing", False) is None:  # in a dump, the alias of activation_checkpointing
        del ours["gradient_checkpointing"]
    name = foreign.get("optim")
    if name is None:
        return
    found = next((key for key, names in OPTIMIZERS.items() if name in names), None)
    if found is None:
        names = ", ".join(name for names in OPTIMIZERS.values() for name in names)
        raise UserError(f"{where}: 'optim' {name!r} cannot be honoured: the optimizers are {names}")
    if found != ours.get("optimizer", ADAMW):
        _take(ours, "optimizer", found, "optim", where, notes)


def _batch_sizes(foreign: Mapping[str, Any], ours: dict[str, Any], where: str, notes: list[str]) -> None:
    for key in ("batch_size", "micro_batch_size"):
        if key in ours and ours[key] is None:  # in TRL's own dump, where they are computed later
            del ours[key]
    sizes = {name: foreign[name] for name in (PER_DEVICE, ACCUMULATION) if foreign.get(name) is not None}
    if not sizes:
        return
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{where}: '{name}' must be a whole number of at least 1, got {value!r}")
    micro, processes = sizes.get(PER_DEVICE, DEFAULT_PER_DEVICE), distributed.asked_for()
    named = f"{PER_DEVICE} x {ACCUMULATION}" + (f" x {processes} processes" if processes > 1 else "")
    batch = micro * sizes.get(ACCUMULATION, DEFAULT_ACCUMULATION) * processes
    _take(ours, "batch_size", batch, named, where, notes)
    _take(ours, "micro_batch_size", micro, PER_DEVICE, where, notes)


def _epochs(foreign: Mapping[str, Any], ours: Mapping[str, Any], where: str, notes: list[str]) -> None:
    passes = foreign.get("num_train_epochs")
    if passes is None or passes == 1:
        return
    if ours.get("total_episodes") is not None:
        notes.append("total_episodes decides, not num_train_epochs, as in TRL")
    else:
        raise UserError(
            f"{where}: 'num_train_epochs' {passes!r} cannot be honoured: give total_episodes, which is that many times the "
            "number of training prompts"
        )


def _machine(foreign: Mapping[str, Any], ours: dict[str, Any], where: str, notes: list[str]) -> None:
    if foreign.get("use_cpu"):
        _take(ours, "device", "cpu", "use_cpu", where, notes)
    start = foreign.get("resume_from_checkpoint")
    if isinstance(start, str):
        raise UserError(
            f"{where}: 'resume_from_checkpoint' {start!r} cannot be honoured: a run continues from the newest checkpoint in its "
            "own output_dir; give that"
        )
    if start:
        _take(ours, "resume", True, "resume_from_checkpoint", where, notes)


def _missing_end(moved: bool, ours: dict[str, Any], notes: list[str]) -> None:
    """TRL subtracts `missing_eos_penalty` from the score; here that is one of the ways, and not the default."""
    if "missing_eos_penalty" not in ours or "missing_eos" in ours:
        return
    if ours["missing_eos_penalty"] is None:
        del ours["missing_eos_penalty"]
        ours["missing_eos"] = "none"
        notes.append("missing_eos none (no missing_eos_penalty)")
    elif moved:
        ours["missing_eos"] = "subtract"
        notes.append("missing_eos subtract (what TRL does with missing_eos_penalty)")
    else:
        notes.append("missing_eos_penalty replaces the score; TRL subtracts it, which is missing_eos subtract")
