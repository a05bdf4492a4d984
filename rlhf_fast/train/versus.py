"""`rlhf-fast evaluate`: which of two policies answers held-out prompts better, by any judge, alone or as the best of n."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rlhf_fast.train import loop
from rlhf_fast.train.chat import Chat
from rlhf_fast.train.checkpoint import claim_output, write_json
from rlhf_fast.train.config import option, required, validate
from rlhf_fast.train.data import read_prompts, split_heldout
from rlhf_fast.train.evaluate import Judge, PairJudge, compare_policies
from rlhf_fast.train.generate import EOS, STOP_TOKEN
from rlhf_fast.train.rewards import SPEC, make_reward

RESULT = "evaluation.json"


@dataclass(frozen=True)
class EvaluateConfig:
    """Two policies answer the held-out prompts of `data`, and a judge compares the replies."""

    before: str = required("directory of the policy to compare with", group="files")
    after: str = required("directory of the policy in question; the same one again, to see what best_of gives")
    data: str = required("file or hub data set with prompts, as for training")
    output_dir: str = required("new directory for evaluation.json")
    judge: str | None = option(None, f"who decides; none: the reward. {SPEC}", several=True, group="judge")
    reward: str | None = option(None, f"scores the replies and picks the best of n: {SPEC}", several=True)
    best_of: int = option(1, "of so many replies of `after` the one the reward likes best is judged", minimum=1)
    bad_rows: str = option(
        "stop", "what to do with rows that cannot be used", choices=("stop", "skip"), group="prompts"
    )
    chat_template: str | None = option(None, loop.CHAT_TEMPLATE)
    system_prompt: str | None = option(None, loop.SYSTEM_PROMPT)
    heldout_fraction: float = option(
        0.05, "share of prompts that no stage trained on, which are asked; 0: all prompts", minimum=0, maximum=0.9
    )
    split_seed: int = option(0, "chooses which prompts are held out; as in training")
    eval_prompts: int = option(512, "at most so many prompts", minimum=1)
    max_prompt_tokens: int = option(512, "longer prompts lose their beginning", minimum=1)
    response_length: int = option(53, "most tokens of a reply", minimum=1, source=loop.N_PLUS)
    temperature: float = option(0.7, "of both policies; 0: always the likeliest token", minimum=0, source=loop.N_PLUS)
    stop_token: str | None = option(EOS, STOP_TOKEN, source=loop.N_PLUS)
    seed: int = option(0, "seed of the sampling", group="machine")
    device: str = option("auto", "auto, cpu, cuda or cuda:N")


def evaluate(config: EvaluateConfig, *, judge: Judge | PairJudge | None = None, reward: Judge | None = None) -> Path:
    """Compare and write `evaluation.json` -> the output directory. judge, reward: in place of those in `config`."""
    validate(config)
    out, device = claim_output(config.output_dir), str(loop.pick_device(config.device))
    judge = make_reward(config.judge, device=device) if judge is None and config.judge else judge
    reward = make_reward(config.reward, device=device) if reward is None and config.reward else reward
    chat = Chat.of(config, config.before)
    rows, _, _ = read_prompts(config.data, bad_rows=config.bad_rows, chat=chat)
    if config.heldout_fraction:
        rows = split_heldout(rows, fraction=config.heldout_fraction, seed=config.split_seed)[1]
    result = compare_policies(
        config.before,
        config.after,
        list(dict.fromkeys(row.prompt for row in rows))[: config.eval_prompts],
        judge,
        reward=reward,
        best_of=config.best_of,
        max_prompt_tokens=config.max_prompt_tokens,
        response_length=config.response_length,
        temperature=config.temperature,
        stop_token=config.stop_token,
        seed=config.seed,
        device=device,
        chat=chat,
    )
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / RESULT, result)
    return out
