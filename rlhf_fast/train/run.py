"""All three stages in a row: base model → SFT → reward model → PPO → evaluation → report, in one directory.

Everything a user can get wrong is checked before the first file is written and the first step is trained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_fast.train import loop, ppo, reward, sft
from rlhf_fast.train.checkpoint import claim_output, read_json, save_model, write_json
from rlhf_fast.train.config import build, dump_yaml, flatten, keys, load_yaml, option, part, required, validate
from rlhf_fast.train.data import (
    Demonstration,
    Preference,
    read_demonstrations,
    read_preferences,
    read_prompts,
    split_heldout,
    train_tokenizer,
)
from rlhf_fast.train.evaluate import Judge, compare_policies
from rlhf_fast.train.loop import say
from rlhf_fast.train.model import create_llama, load_policy
from rlhf_fast.train.ppo import PPOConfig
from rlhf_fast.train.report import write_report
from rlhf_fast.train.reward import RewardConfig
from rlhf_fast.train.sft import SFTConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHARED = tuple(key.name for key in keys(loop.StageConfig))

# The stages' own defaults are those published for pretrained models of a billion parameters. A small model that
# starts from random weights needs rates a hundred times higher and more passes over its few rows.
FROM_SCRATCH: dict[str, Any] = {
    "sft": {
        "train_on_prompt": True,
        "num_train_epochs": 8,
        "batch_size": 8,
        "learning_rate": 2e-3,
        "warmup_steps": 20,
        "weight_decay": 0.1,
    },
    "reward": {"num_train_epochs": 2, "batch_size": 16, "learning_rate": 3e-4},
    "ppo": {
        "total_episodes": 2048,
        "batch_size": 64,
        "num_mini_batches": 2,
        "learning_rate": 1e-4,
        "kl_coef": 0.1,
        "max_prompt_tokens": 128,
    },
}


@dataclass(frozen=True)
class RunConfig:
    """SFT, reward model and PPO in a row from one preference file."""

    data: str = required("preference file: JSONL, plain or gzipped", group="files")
    output_dir: str = required("new directory for everything the run makes")
    model: str | None = option(None, "directory (or Hugging Face name) to start from; none: a small new Llama")
    bad_rows: str = option("stop", "what to do with rows that cannot be used", choices=("stop", "skip"))
    heldout_fraction: float = option(
        0.2, "share of prompts that no stage trains on; results are measured on them", above=0, maximum=0.9
    )
    split_seed: int = option(0, "chooses which prompts are held out")
    eval_prompts: int = option(512, "at most so many held-out prompts are answered to compare policies", minimum=1)

    vocab_size: int = option(2048, "tokens of its byte-level BPE tokenizer", minimum=259, group="new model")
    hidden_size: int = option(128, "width", minimum=2)
    num_layers: int = option(2, "layers", minimum=1)
    num_heads: int = option(4, "attention heads", minimum=1)
    context_length: int = option(256, "most tokens of prompt and reply together", minimum=8)

    seed: int = option(0, "seed of everything random but the split", minimum=0, group="machine")
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    dtype: str = option("float32", "type of weights and activations", choices=("float32", "bfloat16"))
    threads: int = option(0, "CPU threads; 0: 1 for a model below 5 million parameters, else torch's choice", minimum=0)
    checks: bool = option(True, loop.CHECKS)

    sft: SFTConfig = part(SFTConfig, "supervised fine-tuning", filled=SHARED)  # noqa: RUF009 (part returns a field)
    reward: RewardConfig = part(RewardConfig, "reward model", filled=SHARED)  # noqa: RUF009
    ppo: PPOConfig = part(PPOConfig, "PPO", filled=(*SHARED, "reward_model"))  # noqa: RUF009


def configure(yaml_path: str | Path | None, flags: Mapping[str, Any]) -> RunConfig:
    """The config of a run: stage defaults < `FROM_SCRATCH` unless a model is given < YAML < flags."""
    given = (load_yaml(yaml_path) if yaml_path is not None else {}) | dict(flags)
    return build(RunConfig, yaml_path, flags, base=FROM_SCRATCH if given.get("model") is None else None)


def describe_from_scratch() -> str:
    """The settings that a new model gets in place of the other defaults, as lines of help."""
    lines = [f"  --{name} {value}" for name, value in flatten(FROM_SCRATCH).items()]
    return "\n".join(["", "without --model these values take the place of the defaults:", *lines])


def run(
    config: RunConfig,
    *,
    make_pairs: Callable[[Path], str | Path] | None = None,
    judge: Judge | None = None,
    claimed: bool = False,
) -> Path:
    """Run all stages and return the output directory, report included.

    make_pairs: turns the directory of the SFT model into a preference file; `data` then only needs demonstrations.
    judge: scores the replies of both policies; None lets the reward model judge, which the report points out.
    claimed: the caller has claimed `output_dir` and put inputs of its own there.
    UserError, before anything is written: a bad config, unusable data or model, an output directory in use.
    """
    validate(config)
    out = Path(config.output_dir) if claimed else claim_output(config.output_dir)
    device = loop.pick_device(config.device)
    train, _ = read_split(config, read_preferences if make_pairs is None else read_demonstrations, config.data)
    model, tokenizer = base_model(config, train)
    for stage in (config.sft, config.reward, config.ppo):
        validate(stage_config(config, stage))
        check_context(stage, model, tokenizer)
    ppo.check(stage_config(config, config.ppo), None, judge)

    out.mkdir(parents=True, exist_ok=True)
    dump_yaml(config, out / "config.yaml")
    start = config.model
    if start is None:
        start = out / "base"
        save_model(start, model, tokenizer)
        say(f"new model: {model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    del model

    sft_dir = sft.train(stage_config(config, config.sft, model=start, output_dir=out / "sft"))
    pairs = config.data if make_pairs is None else make_pairs(sft_dir)
    reward_dir = reward.train(stage_config(config, config.reward, model=sft_dir, data=pairs, output_dir=out / "reward"))
    guide = {"reward_model": reward_dir} if config.ppo.reward is None else {}
    ppo_dir = ppo.train(stage_config(config, config.ppo, model=sft_dir, output_dir=out / "ppo", **guide), judge=judge)
    say("evaluation: both policies answer the held-out prompts")
    _, prompts = read_split(config, read_prompts, config.data)
    _, preferences = read_split(config, read_preferences, pairs)
    evaluation = compare_policies(
        sft_dir,
        ppo_dir,
        list(dict.fromkeys(row.prompt for row in prompts))[: config.eval_prompts],
        judge,
        reward_dir=reward_dir,
        preferences=preferences,
        kl=read_json(ppo_dir / "stage.json")["results"].get("objective/kl"),
        max_prompt_tokens=config.ppo.max_prompt_tokens,
        response_length=config.ppo.response_length,
        temperature=config.ppo.temperature,
        seed=config.seed,
        device=str(device),
    )
    write_json(out / "evaluation.json", evaluation)
    write_report(out)
    return out


def read_split(config: RunConfig, read: Callable, path: str | Path) -> tuple[list, list]:
    """(training rows, held-out rows) of a data file, by the split that every stage of the run makes."""
    rows, _, _ = read(path, bad_rows=config.bad_rows)
    return split_heldout(rows, fraction=config.heldout_fraction, seed=config.split_seed)


def base_model(
    config: RunConfig, rows: Sequence[Preference | Demonstration]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that SFT starts from: the given one, or a new Llama with a tokenizer made from the training rows."""
    if config.model is not None:
        return load_policy(config.model, dtype=config.dtype)
    tokenizer = train_tokenizer((text for row in rows for text in texts(row)), config.vocab_size)
    model = create_llama(
        tokenizer,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        context_length=config.context_length,
        seed=config.seed,
    )
    return model, tokenizer


def texts(row: Preference | Demonstration) -> list[str]:
    return [row.prompt, row.response] if isinstance(row, Demonstration) else [row.prompt, row.chosen, row.rejected]


def check_context(stage: Any, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """UserError if a stage's replies leave no room for a prompt in the model's context."""
    replies = stage.response_length if isinstance(stage, PPOConfig) else stage.max_response_tokens
    loop.Encoder(model, tokenizer, max_prompt_tokens=stage.max_prompt_tokens, max_response_tokens=replies)


def stage_config(config: RunConfig, stage: Any, **paths: str | Path) -> Any:
    """A stage's config with the keys that the run decides filled in."""
    shared = {name: getattr(config, name) for name in SHARED if name != "model"}
    rewarded = isinstance(stage, PPOConfig) and stage.reward is None
    places = {"model": "base"} | ({"reward_model": "reward"} if rewarded else {})
    return dataclasses.replace(stage, **shared | places | {name: str(path) for name, path in paths.items()})
