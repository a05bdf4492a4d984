"""The demo: all stages on a world small enough for a minute or two of one CPU core, with a judge who knows.

`demonstrations.jsonl` holds mediocre replies, from which a new model of 110 thousand parameters learns to speak. It
then answers prompts twice; annotators with noise choose the better reply; `pairs.jsonl` holds their choices. From
there on nothing knows the truth until the evaluation asks the judge.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_fast.demo.world import GroundTruth, all_prompts, annotate, demonstrate, vocabulary
from rlhf_fast.train.checkpoint import WEIGHTS, numbered, save_model, write_file
from rlhf_fast.train.config import option, validate
from rlhf_fast.train.errors import UserError

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

    from rlhf_fast.train.run import RunConfig


@dataclass(frozen=True)
class DemoConfig:
    """A run of all stages on the demo's world."""

    output_dir: str | None = option(
        None,
        "new directory for everything the demo makes, or that of the demo to continue; none: runs/demo, demo-2, ...",
    )
    algorithm: str = option("ppo", "what learns from the preferences", choices=("ppo", "grpo", "rloo", "dpo"))
    seed: int = option(0, "seed of everything random", minimum=0)
    resume: bool = option(True, "continue what was killed in output_dir; false: refuse a directory in use")


DEMONSTRATIONS = 12_000
PAIRS = 8_000
CONTEXT = 64
REPLY_TOKENS = 40

SHARED = {"heldout_fraction": 0.15, "eval_prompts": 512, "device": "cpu", "threads": 1}
SFT = {
    "num_train_epochs": 3,
    "batch_size": 32,
    "learning_rate": 4e-3,
    "warmup_steps": 50,
    "max_response_tokens": REPLY_TOKENS,
}
REWARD = {
    "num_train_epochs": 3,
    "batch_size": 32,
    "learning_rate": 1e-3,
    "lr_schedule": "linear",
    "max_response_tokens": REPLY_TOKENS,
}
PPO = {
    "total_episodes": 40 * 128,
    "batch_size": 128,
    "num_mini_batches": 2,
    "micro_batch_size": 32,
    "num_ppo_epochs": 4,
    "learning_rate": 3e-4,
    "kl_coef": 0.05,
    "missing_eos": "subtract",
    "response_length": REPLY_TOKENS,
    "num_sample_generations": 2,
}
WATCHED = {"eval_every": 8, "eval_prompts": 128, "guard": "warn"}  # changes no weight
GROUPED = {
    "grpo": {"advantage": "grpo", "kl_coef": 0.4, "num_ppo_epochs": 2},
    "rloo": {"advantage": "rloo"},
}
DPO = {
    "beta": 0.3,
    "num_train_epochs": 2,
    "batch_size": 32,
    "learning_rate": 1e-3,
    "max_response_tokens": REPLY_TOKENS,
}


def run_demo(config: DemoConfig) -> Path:
    """Make the world's data and model in `output_dir`, run all stages there, and return it. UserError: it is in use."""
    from rlhf_fast.train.run import run

    validate(config)
    out = Path(config.output_dir) if config.output_dir else next_free("runs/demo", config)
    return run(
        settings(out, config),
        prepare=lambda: make_inputs(out, config.seed),
        make_pairs=lambda policy: write_pairs(out / "pairs.jsonl", policy, seed=config.seed, count=PAIRS),
        judge=GroundTruth(),
    )


def next_free(path: str, config: DemoConfig) -> Path:
    """`path`, or the first of path-2, path-3, ... that does not exist, so that a demo is run again without losing the last.

    One that was killed, with this config, comes before.
    """
    return next(out for out in numbered(path) if not out.exists() or (config.resume and unfinished(out, config)))


def unfinished(out: Path, config: DemoConfig) -> bool:
    """Whether `out` holds this demo, begun and not finished, and no process is at it."""
    from rlhf_fast.train.checkpoint import LOCK, locked
    from rlhf_fast.train.run import CONFIG, claim

    try:
        _, finished = claim(settings(out, config))
        with locked(out / LOCK):
            return (out / CONFIG).is_file() and not finished
    except UserError:
        return False


def make_inputs(out: Path, seed: int) -> None:
    """The demonstrations and the model that SFT starts from, unless they are there."""
    if not (out / "demonstrations.jsonl").exists():
        write_demonstrations(out / "demonstrations.jsonl", seed=seed, count=DEMONSTRATIONS)
    if not (out / "base" / WEIGHTS).exists():
        tokenizer = build_tokenizer()
        save_model(out / "base", build_model(tokenizer, seed=seed), tokenizer)


def settings(out: Path, config: DemoConfig) -> RunConfig:
    """The run's configuration: the measured settings above, for one thread."""
    from rlhf_fast.train.config import from_dict
    from rlhf_fast.train.run import RunConfig

    files = {"data": str(out / "demonstrations.jsonl"), "model": str(out / "base"), "output_dir": str(out)}
    given = {"seed": config.seed, "resume": config.resume, "algorithm": "dpo" if config.algorithm == "dpo" else "ppo"}
    ppo = PPO | WATCHED | GROUPED.get(config.algorithm, {})
    return from_dict(RunConfig, files | SHARED | given | {"sft": SFT, "reward": REWARD, "ppo": ppo, "dpo": DPO})


def write_demonstrations(path: Path, *, seed: int, count: int) -> Path:
    """`count` rows {prompt, response} by the demonstrator, on prompts drawn at random."""
    rng = random.Random(seed)
    asked = rng.choices(all_prompts(), k=count)
    return write_rows(path, ({"prompt": prompt, "response": demonstrate(prompt, rng)} for prompt in asked))


def write_pairs(path: Path, policy_dir: Path, *, seed: int, count: int) -> Path:
    """`count` rows {prompt, chosen, rejected}: two replies of the policy at temperature 1, ordered by an annotator.

    Prompts that got the same reply twice are left out. A file that is there is left alone.
    """
    if path.exists():
        return path
    import torch

    from rlhf_fast.train.data import encode_prompt
    from rlhf_fast.train.generate import Sample, generate
    from rlhf_fast.train.model import load_policy

    rng, judge, asked = random.Random(seed), GroundTruth(), all_prompts()
    model, tokenizer = load_policy(policy_dir)
    prompts = [prompt for prompt in rng.choices(asked, k=count) for _ in range(2)]
    torch.manual_seed(seed)
    completions = generate(
        model,
        tokenizer,
        [encode_prompt(tokenizer, prompt, CONTEXT) for prompt in prompts],
        max_new_tokens=REPLY_TOKENS,
        temperature=1.0,
        batch_size=512,
    )
    texts, finished = completions.texts(tokenizer), completions.finished.tolist()
    replies = [Sample(*row) for row in zip(prompts, texts, finished, strict=True)]
    scores = judge(replies)

    def rows() -> Iterable[Mapping[str, str]]:
        for i in range(0, len(replies), 2):
            first, second = replies[i].response, replies[i + 1].response
            if not annotate(scores[i], scores[i + 1], rng):
                first, second = second, first
            if first != second and first and second:
                yield {"prompt": prompts[i], "chosen": first, "rejected": second}

    return write_rows(path, rows())


def write_rows(path: Path, rows: Iterable[Mapping[str, str]]) -> Path:
    with write_file(path) as partial:
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word of the world; `<pad>`, `<bos>`, `<eos>` and `<unk>` beside them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<bos>", "<eos>", "<unk>", *vocabulary()]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def build_model(tokenizer: PreTrainedTokenizerFast, *, seed: int) -> GPT2LMHeadModel:
    """A new GPT-2 of two layers, width 64: 110 thousand parameters."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=CONTEXT,
        n_embd=64,
        n_layer=2,
        n_head=4,
        # The same function as GPT-2's own "gelu_new", in one pass over memory where that takes eight.
        activation_function="gelu_pytorch_tanh",
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config)
