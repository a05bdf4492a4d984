"""All stages in a row: base model → SFT → reward model → PPO, or DPO → evaluation → report, in one directory.

Everything a user can get wrong is checked before the first file is written and the first step is trained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_fast.train import dpo, loop, ppo, reward, sft
from rlhf_fast.train.chat import CHATML, TURN, TURN_END, Chat
from rlhf_fast.train.checkpoint import (
    LOCK,
    WEIGHTS,
    claim_output,
    locked,
    remove_partials,
    save_model,
    stage_summary,
    write_file,
    write_json,
)
from rlhf_fast.train.config import (
    build,
    dump_yaml,
    flatten,
    keys,
    load_yaml,
    option,
    part,
    required,
    section_name,
    to_dict,
    validate,
)
from rlhf_fast.train.data import (
    Conversation,
    Demonstration,
    Preference,
    read_demonstrations,
    read_preferences,
    read_prompts,
    split_heldout,
    train_tokenizer,
)
from rlhf_fast.train.dpo import DPOConfig
from rlhf_fast.train.evaluate import Judge, compare_policies
from rlhf_fast.train.loop import say
from rlhf_fast.train.model import create_llama, load_policy
from rlhf_fast.train.ppo import PPOConfig
from rlhf_fast.train.report import PAGE, write_report
from rlhf_fast.train.resume import compare, tidy
from rlhf_fast.train.reward import RewardConfig
from rlhf_fast.train.sft import SFTConfig
from rlhf_fast.train.trackers import REPORT_TO
from rlhf_fast.train.trackers import check as check_trackers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CONFIG, EVALUATION = "config.yaml", "evaluation.json"
STAGES = ("sft", "reward", "ppo", "dpo")
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
    "dpo": {"num_train_epochs": 1, "batch_size": 16, "learning_rate": 1e-4},
}


@dataclass(frozen=True)
class RunConfig:
    """SFT, then a reward model and PPO, or DPO, from one preference file."""

    data: str = required("preferences: JSONL (plain or gzipped) or Parquet file, or hub:OWNER/NAME", group="files")
    output_dir: str = required("new directory for everything the run makes, or that of the run to continue")
    model: str | None = option(None, "directory (or Hugging Face name) to start from; none: a small new Llama")
    algorithm: str = option(
        "ppo",
        "what learns from the preferences: ppo (also grpo and rloo, see ppo.advantage) from a reward model, or dpo from the "
        "pairs themselves; the reward model then only judges",
        choices=("ppo", "dpo"),
    )
    bad_rows: str = option("stop", "what to do with rows that cannot be used", choices=("stop", "skip"))
    chat_template: str | None = option(None, loop.CHAT_TEMPLATE)
    system_prompt: str | None = option(None, loop.SYSTEM_PROMPT)
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
    report_to: str = option("tensorboard", REPORT_TO, several=True, check=check_trackers, group="trackers")
    resume: bool = option(True, loop.RESUME, group="checkpoints")
    save_every: float = option(30.0, loop.SAVE_EVERY, minimum=0)
    keep_checkpoints: int = option(2, loop.KEEP_CHECKPOINTS, minimum=1)

    sft: SFTConfig = part(SFTConfig, "supervised fine-tuning", filled=SHARED)  # noqa: RUF009 (part returns a field)
    reward: RewardConfig = part(RewardConfig, "reward model", filled=SHARED)  # noqa: RUF009
    ppo: PPOConfig = part(PPOConfig, "PPO", filled=(*SHARED, "reward_model"))  # noqa: RUF009
    dpo: DPOConfig = part(DPOConfig, "DPO", filled=SHARED)  # noqa: RUF009


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
    prepare: Callable[[], None] | None = None,
    make_pairs: Callable[[Path], str | Path] | None = None,
    judge: Judge | None = None,
) -> Path:
    """Run all stages, or what a killed process left of them, and return the output directory, report included.

    prepare: makes the inputs that the config names, once the output directory is taken; leaves alone what is there.
    make_pairs: turns the directory of the SFT model into a preference file; `data` then only needs demonstrations. It is
    called again when a run is continued, and has to return the same file.
    judge: scores the replies of both policies; None lets the reward model judge, which the report points out.
    UserError, before anything is written: a bad config, unusable data or model, an output directory in use.
    """
    validate(config)
    out, finished = claim(config)
    if finished:
        _stages(config, config.model or out / "base", make_pairs, judge)
        tidy(out)
        say(f"run: finished in {out}, nothing is left to do")
        return out
    with ExitStack() as stack:
        if prepare is not None:
            stack.enter_context(taken(config, out))
            prepare()
        loop.pick_device(config.device)
        read = read_preferences if make_pairs is None else read_demonstrations
        start, fresh = config.model or out / "base", config.model is None and not (out / "base" / WEIGHTS).is_file()
        if fresh:
            model, tokenizer = new_model(config, read_split(config, read, config.data)[0])
        chat = Chat.of(config, start, tokenizer if fresh else None)
        read_split(config, read, config.data, chat)
        if not fresh:
            model, tokenizer = load_policy(start, dtype=config.dtype, chat=chat)
        for stage in (config.sft, *([config.reward] if needs_reward(config, judge) else []), last_stage(config)):
            validate(stage_config(config, stage))
            loop.check_installed(stage, section_name(type(stage)))
            check_context(stage, model, tokenizer)
        if config.algorithm == "ppo":
            ppo.check(stage_config(config, config.ppo), config.ppo.reward, judge)
        else:
            dpo.check(config.dpo)

        if prepare is None:
            stack.enter_context(taken(config, out))
        if fresh:
            save_model(start, model, tokenizer)
            say(f"new model: {model.num_parameters():,} parameters, {len(tokenizer)} tokens")
        del model
        _stages(config, start, make_pairs, judge)
    return out


def _stages(
    config: RunConfig,
    start: str | Path,
    make_pairs: Callable[[Path], str | Path] | None,
    judge: Judge | None,
) -> None:
    """Whatever is left of the stages, the evaluation and the report; each stage sees to it that it is still the same one."""
    out = Path(config.output_dir)
    sft_dir = sft.train(stage_config(config, config.sft, model=start, output_dir=out / "sft"))
    pairs = config.data if make_pairs is None else make_pairs(sft_dir)
    reward_dir = None
    if needs_reward(config, judge):
        places = {"model": sft_dir, "data": pairs, "output_dir": out / "reward"}
        reward_dir = reward.train(stage_config(config, config.reward, **places))
    if config.algorithm == "ppo":
        places = {"model": sft_dir, "output_dir": out / "ppo"}
        places |= {"reward_model": reward_dir} if config.ppo.reward is None else {}
        trained = ppo.train(stage_config(config, config.ppo, **places), judge=judge)
        sampling = {key: getattr(config.ppo, key) for key in ("response_length", "temperature", "stop_token")}
    else:
        trained = dpo.train(stage_config(config, config.dpo, model=sft_dir, data=pairs, output_dir=out / "dpo"))
        sampling = {"response_length": config.dpo.max_response_tokens}
    if complete(out):
        return
    if not (out / EVALUATION).is_file():
        say("evaluation: both policies answer the held-out prompts")
        _, prompts = read_split(config, read_prompts, config.data, Chat.of(config, sft_dir))
        _, preferences = read_split(config, read_preferences, pairs, Chat.of(config, sft_dir))
        evaluation = compare_policies(
            sft_dir,
            trained,
            list(dict.fromkeys(row.prompt for row in prompts))[: config.eval_prompts],
            judge,
            reward_dir=reward_dir,
            preferences=preferences,
            kl=stage_summary(trained)["results"].get("objective/kl"),
            max_prompt_tokens=last_stage(config).max_prompt_tokens,
            **sampling,
            seed=config.seed,
            device=str(loop.pick_device(config.device)),
        )
        write_json(out / EVALUATION, evaluation)
    write_report(out)


def complete(out: Path) -> bool:
    """Whether the evaluation is there, and its report: a process may be killed between them."""
    evaluation, page = out / EVALUATION, out / PAGE
    return evaluation.is_file() and page.is_file() and page.stat().st_mtime_ns >= evaluation.stat().st_mtime_ns


def last_stage(config: RunConfig) -> PPOConfig | DPOConfig:
    return config.ppo if config.algorithm == "ppo" else config.dpo


def needs_reward(config: RunConfig, judge: Judge | None) -> bool:
    """Whether a reward model is trained: to be optimised, or to judge where nobody else does."""
    return judge is None or (config.algorithm == "ppo" and config.ppo.reward is None)


def claim(config: RunConfig) -> tuple[Path, bool]:
    """The directory to write to, not made yet, and whether the run is finished there.

    UserError if the directory holds anything but a run with the same keys. Those of the stages are left to the stages: one
    that has not begun may still be changed.
    """
    out = Path(config.output_dir)
    if not config.resume or not (out / CONFIG).is_file():
        return claim_output(out), False
    now, before = ({k: v for k, v in x.items() if k not in STAGES} for x in (to_dict(config), load_yaml(out / CONFIG)))
    compare({"config": now}, {"config": before}, out)
    return out, complete(out)


@contextmanager
def taken(config: RunConfig, out: Path) -> Iterator[None]:
    """Make the output directory, or tidy it up, and keep other processes away; `config.yaml` marks it as this run's."""
    out.mkdir(parents=True, exist_ok=True)
    with locked(out / LOCK):
        remove_partials(out, out / "base")
        with write_file(out / CONFIG) as partial:
            dump_yaml(config, partial)
        yield


def read_split(config: RunConfig, read: Callable, path: str | Path, chat: Chat | None = None) -> tuple[list, list]:
    """(training rows, held-out rows) of a data file, by the split that every stage of the run makes."""
    rows, _, _ = read(path, bad_rows=config.bad_rows, chat=chat)
    return split_heldout(rows, fraction=config.heldout_fraction, seed=config.split_seed)


def new_model(
    config: RunConfig, rows: Sequence[Preference | Demonstration]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """What SFT starts from where no model is given: a new Llama with a tokenizer made from the training rows.

    Where these are conversations, it writes them in ChatML, or in the template that the config names.
    """
    talks = any(isinstance(row.prompt, Conversation) for row in rows)
    own = talks and config.chat_template is None
    marks = {"turn_marks": (TURN, TURN_END)} if own else {}
    tokenizer = train_tokenizer((text for row in rows for text in texts(row)), config.vocab_size, **marks)
    if own:
        tokenizer.chat_template = CHATML
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
    prompt = [x.content for x in row.prompt.messages] if isinstance(row.prompt, Conversation) else [row.prompt]
    return [*prompt, *([row.response] if isinstance(row, Demonstration) else [row.chosen, row.rejected])]


def check_context(stage: Any, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """UserError if a stage's replies leave no room for a prompt in the model's context."""
    replies = stage.response_length if isinstance(stage, PPOConfig) else stage.max_response_tokens
    loop.Encoder(model, tokenizer, max_prompt_tokens=stage.max_prompt_tokens, max_response_tokens=replies)


def stage_config(config: RunConfig, stage: Any, **paths: str | Path) -> Any:
    """A stage's config with the keys that the run decides filled in."""
    shared = {name: getattr(config, name) for name in SHARED if name != "model"}
    places = {"model": "base"} | ({"reward_model": "reward"} if isinstance(stage, PPOConfig) else {})
    return dataclasses.replace(stage, **shared | places | {name: str(path) for name, path in paths.items()})
