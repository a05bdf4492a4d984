"""Stage 3, PPO: the policy is moved towards replies that the reward model likes, and held near where it started.

One update goes through frozen dataclasses, Rollout -> Scored -> Advantaged (see `rollout`), then takes
num_ppo_epochs x num_mini_batches optimizer steps on

    max(-A ratio, -A clip(ratio, 1 +- cliprange)) + vf_coef * clipped value loss - entropy_coef * entropy
        + ptx_coef * loss of written replies (PPO-ptx, Ouyang et al. 2022, arXiv 2203.02155)

(Schulman et al. 2017, arXiv 1707.06347). The details that decide whether this learns, and the defaults, are those of
Huang et al. 2024 (arXiv 2403.17031), with gradient clipping added. Every mean runs over response tokens alone. With
`advantage` grpo or rloo, several replies to each prompt take the place of the value model: see `group`.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

from rlhf_fast import kl_penalty, ppo_value_loss
from rlhf_fast.train import checks, distributed, engine, estimate, fsdp, group, loop, lora, trl, zero
from rlhf_fast.train.chat import Chat
from rlhf_fast.train.checkpoint import save_model
from rlhf_fast.train.config import option, validate
from rlhf_fast.train.data import DataSummary, Prompt, read_demonstrations, read_prompts, split_heldout
from rlhf_fast.train.errors import UserError
from rlhf_fast.train.evaluate import Judge, PairJudge, distinct_n
from rlhf_fast.train.finite import blaming, check_finite, keeping, padded
from rlhf_fast.train.generate import EOS, STOP_TOKEN, Sample, generation_config, stop_ids
from rlhf_fast.train.guard import Guard, Settings
from rlhf_fast.train.model import compute_dtype, load_policy, load_scalar_model, reward_from_policy, token_values
from rlhf_fast.train.policy import FULL_LOGITS, keep_step, logit_head, response_logprobs, response_ppo_loss
from rlhf_fast.train.record import Stage
from rlhf_fast.train.replies import Example, accumulate_loss, encode, reply_tokens
from rlhf_fast.train.resume import State, claim
from rlhf_fast.train.rewards import SPEC, check_accuracy, make_reward, terms_of
from rlhf_fast.train.rollout import Advantaged, Models, Scored, advantage, joined, moved, roll_out, score

# Keys that a kind of advantage does not read.
OF_VALUES = (
    "whiten_rewards",
    "whiten_advantages",
    "whiten_unbiased",
    "advantage_clip",
    "gamma",
    "lam",
    "cliprange_value",
    "vf_coef",
    "value_init",
    "value_learning_rate",
    "critic_warmup",
)
UNREAD = {"gae": ("group_size",), "grpo": OF_VALUES, "rloo": OF_VALUES}
INSTRUCT_GPT, MOSS = "arXiv 2203.02155", "arXiv 2307.04964"
SMALLEST_SCALE = 1e-6
SHOWN = ("objective/scores", "objective/kl", "policy/entropy_avg", "eval/win_rate")
WRITTEN = 16  # completions


@dataclass(frozen=True)
class PPOConfig(loop.TrainConfig):
    """PPO on the prompts of `data`; `model` is the fine-tuned policy, which also stays as the reference."""

    FOREIGN: ClassVar = trl.Names()

    reward_model: str | None = option(
        None, "directory of the reward model; with gae its copy becomes the value model", group="files"
    )
    reward: str | None = option(None, f"in place of it: {SPEC}", several=True)
    min_reward_accuracy: float | None = option(
        0.5, "refuse a reward model whose stated held-out accuracy is lower; none: take any", minimum=0, maximum=1
    )
    max_prompt_tokens: int = option(
        512, "longer prompts lose their beginning", minimum=1, source=loop.N_PLUS, group="rollout"
    )
    response_length: int = option(53, "most tokens of a reply", minimum=1, source=loop.N_PLUS)
    temperature: float = option(0.7, "divides the logits of policy and reference", above=0, source=loop.N_PLUS)
    stop_token: str | None = option(
        EOS,
        STOP_TOKEN,
        source=f"arXiv 1909.08593, which ends them at a full stop; {loop.N_PLUS}",
    )
    generation: str = option("transformers", "what samples the replies", choices=("transformers", "vllm"))
    vllm_memory: float = option(
        0.3, "share of the GPU's memory that vllm may take", above=0, maximum=1, source="TRL 1.16"
    )
    missing_eos: str = option(
        "replace",
        "score of a reply that does not end: replace it by -missing_eos_penalty, subtract that from it, or leave it",
        choices=("none", "replace", "subtract"),
        source=f"{loop.N_PLUS}; TRL subtracts",
    )
    missing_eos_penalty: float = option(1.0, "see missing_eos", minimum=0, source=loop.N_PLUS)
    min_response_length: int = option(
        0, "a reply of fewer tokens scores as one that does not end", minimum=0, source="torchtune, which uses 18"
    )
    rollout_micro_batch_size: int | None = option(
        None, "rollouts per forward pass without gradient; none: micro_batch_size", minimum=0
    )
    kl_coef: float = option(
        0.05,
        "weight of the KL penalty in the reward; in the loss with grpo",
        minimum=0,
        source=loop.N_PLUS,
        group="reward",
    )
    kl_estimator: str = option(
        "k1", "per-token estimator; with grpo it is k3", choices=("k1", "k2", "k3", "abs"), source=loop.N_PLUS
    )
    kl_target: float | None = option(
        None, "adapt kl_coef to this KL per reply, in nats", above=0, source="arXiv 1909.08593, which uses 6"
    )
    kl_horizon: int = option(10_000, "episodes over which kl_coef adapts", minimum=1, source="arXiv 1909.08593")
    reward_scaling: bool = option(
        False, "divide scores by the standard deviation of all scores so far", source=f"PPO-max, {MOSS}"
    )
    score_clip: float | None = option(
        None, "limit scores to +- this, after reward_scaling", above=0, source=f"PPO-max, {MOSS}"
    )
    advantage: str = option(
        "gae",
        "what a token is credited with: gae, by a value model (PPO); without one, its reply's score against those of the "
        "other replies to the prompt: grpo (arXiv 2402.03300) or rloo (arXiv 2402.14740)",
        choices=("gae", "grpo", "rloo"),
        group="advantage",
    )
    group_size: int = option(8, "replies to each prompt with grpo and rloo", minimum=2, source="TRL 1.16's GRPO")
    whiten_rewards: bool = option(False, "scale rewards to variance 1, mean kept", source=loop.N_PLUS)
    gamma: float = option(1.0, "discount", minimum=0, maximum=1, source=loop.N_PLUS)
    lam: float = option(0.95, "lambda of GAE", minimum=0, maximum=1, source=loop.N_PLUS)
    whiten_advantages: bool = option(True, "scale advantages to mean 0, variance 1", source=loop.N_PLUS)
    whiten_unbiased: bool = option(
        False, "with Bessel's correction of that variance, as TRL and verl", source=loop.N_PLUS
    )
    advantage_clip: float | None = option(
        None, "limit advantages to +- this, after whitening", above=0, source=f"PPO-max, {MOSS}, which uses 0.5"
    )
    value_init: str = option(
        "reward",
        "the value model starts as a copy of the reward model, or as the policy's body under a head of zeros; with a reward "
        "function always zeros",
        choices=("reward", "zeros"),
        source=f"{loop.N_PLUS}; zeros: arXiv 1909.08593",
    )
    total_episodes: int | None = option(
        None, "rollouts in all; none: each prompt once, with all its replies", minimum=1, group="update"
    )
    batch_size: int = option(512, "rollouts per update", minimum=1, source=loop.N_PLUS)
    num_ppo_epochs: int = option(4, "passes over the rollouts of an update", minimum=1, source=loop.N_PLUS)
    num_mini_batches: int = option(1, "optimizer steps per pass", minimum=1, source=loop.N_PLUS)
    micro_batch_size: int = option(0, "rollouts per forward pass; 0: a whole minibatch", minimum=0)
    learning_rate: float = option(3e-6, "peak learning rate", above=0, source=loop.N_PLUS)
    value_learning_rate: float | None = option(
        None, "that of the value model; none: the same", above=0, source=f"{loop.N_PLUS}; {INSTRUCT_GPT} uses 9e-6"
    )
    lr_schedule: str = option("linear", "how the rate falls to 0", choices=loop.SCHEDULES, source=loop.N_PLUS)
    warmup_steps: int = option(0, "updates over which the rate rises", minimum=0, source=loop.N_PLUS)
    critic_warmup: int = option(0, "first updates, which train the value model alone", minimum=0, source="verl")
    weight_decay: float = option(0.01, "decoupled weight decay of AdamW", minimum=0, source=loop.N_PLUS)
    adam_beta1: float = option(0.9, "first beta of AdamW", minimum=0, maximum=0.9999999, source=loop.N_PLUS)
    adam_beta2: float = option(0.999, "second beta of AdamW", minimum=0, maximum=0.9999999, source=loop.N_PLUS)
    adam_epsilon: float = option(1e-5, "epsilon of AdamW", above=0, source=loop.N_PLUS)
    max_grad_norm: float = option(
        1.0, "the norm of each model's gradient is clipped to this; 0: never", minimum=0, source=loop.CLIPPED_BY
    )
    cliprange: float = option(0.2, "policy ratio is clipped to 1 +- this", above=0, maximum=1, source=loop.N_PLUS)
    cliprange_high: float | None = option(
        None, "upper side of cliprange; none: the same", above=0, source="DAPO, arXiv 2503.14476, which uses 0.28"
    )
    dual_clip: float | None = option(
        None,
        "where the advantage is negative, the loss is at most this times it",
        above=1,
        source="arXiv 1912.09729: 3",
    )
    log_ratio_clip: float | None = option(
        20.0, "the log of the ratio is held within +- this; none: never", above=0, source="verl, OpenRLHF"
    )
    cliprange_value: float | None = option(0.2, "values move at most this; none: freely", above=0, source=loop.N_PLUS)
    vf_coef: float = option(0.1, "weight of the value loss", minimum=0, source=loop.N_PLUS)
    entropy_coef: float = option(0.0, "weight of an entropy bonus", minimum=0, source="arXiv 1707.06347")
    target_kl: float | None = option(
        None, "end the passes of an update once approxkl is above this", above=0, source="OpenAI Spinning Up"
    )
    ptx_coef: float = option(
        0.0,
        "weight of the loss of written replies, as many a step as rollouts",
        minimum=0,
        source=f"PPO-ptx, {INSTRUCT_GPT}, which uses 27.8",
    )
    ptx_data: str | None = option(
        None, "file with these replies, demonstrations or preferences (chosen); none: data", source=INSTRUCT_GPT
    )
    ema_decay: float | None = option(
        None,
        "keep an average of the policy's weights, that of every step weighing 1 - this; it is what is judged and saved",
        minimum=0,
        maximum=1,
        source=f"{INSTRUCT_GPT}, which uses 0.992",
    )
    full_logits: bool = option(False, FULL_LOGITS)
    num_sample_generations: int = option(
        10,
        "how many times in all some replies are shown as a table and written to completions.jsonl and the trackers",
        minimum=0,
        source="TRL 1.12",
        group="log",
    )
    eval_every: int = option(
        0, "updates between two judgements against the start on held-out prompts; 0: none", minimum=0, group="judge"
    )
    eval_prompts: int = option(256, "at most so many held-out prompts are answered", minimum=1)
    judge: str | None = option(None, f"who judges, not the reward itself: {SPEC}", several=True)
    guard: str = option(
        "stop",
        "when the judge's score falls while the reward rises: stop and keep the best policy, or warn",
        choices=("stop", "warn"),
        source="arXiv 2210.10760",
    )
    patience: int | None = option(
        None,
        "early stopping: end, and keep the best policy, after so many looks of the judge in a row that are no better than the "
        "best (not the start) while the reward is above what it was then; none: never, as chance stops a policy that no longer "
        "changes",
        minimum=1,
        source="doi 10.1007/3-540-49430-8_3",
    )


def train(
    config: PPOConfig, *, reward: Any = None, judge: Judge | PairJudge | None = None, dry_run: bool = False
) -> Path:
    """Run the stage, or what a killed process left of it, and return its directory.

    reward: a function from replies to one number each, an nn.Module, or a list of such with weights (see `rewards`), in
    place of those in `config`; the value model is then the policy's body under a head of zeros. What such a function
    remembers is not saved.
    judge: the same, in place of `config.judge`.
    dry_run: print what memory and time it would take instead, and write nothing.
    UserError, before anything is written, if any input is wrong.
    """
    validate(config)
    reward = config.reward if reward is None else reward
    judge = make_reward(config.judge, device=config.device) if judge is None and config.judge else judge
    check(config, reward, judge)
    out, finished = claim("ppo", config)
    if finished:
        return out
    device = loop.pick_device(config.device)
    if dry_run and not estimate.begin("ppo", config, device):
        return out
    chat = Chat.of(config)
    rows, bad_rows, rows_read = read_prompts(config.data, bad_rows=config.bad_rows, chat=chat)
    train_rows, heldout = split_heldout(rows, fraction=config.heldout_fraction, seed=config.split_seed)
    order = loop.seed_everything(config.seed)
    if config.generation == "vllm":
        engine.check(device, "ppo")
    models = load_models(config, reward, device, chat)
    loop.use_threads(config.threads, parameters=models.policy.num_parameters(), device=device)
    limits = {"max_prompt_tokens": config.max_prompt_tokens, "max_response_tokens": config.response_length}
    others = [model for model in (models.value, models.reward) if isinstance(model, torch.nn.Module)]
    encoder = loop.Encoder(models.policy, models.tokenizer, others=others, **limits)
    if config.generation == "vllm":
        context = encoder.max_prompt_tokens + config.response_length
        sampler = engine.VLLM(
            config.model, models.policy, dtype=config.dtype, memory=config.vllm_memory, context=context
        )
        models = dataclasses.replace(models, engine=sampler)
    prompts = [row.prompt for row in train_rows]
    queries = [encoder.prompt(prompt) for prompt in prompts]
    cut, stop = encoder.truncated_prompts, stop_ids(models.tokenizer, config.stop_token)
    ptx = read_ptx(config, encoder, chat) if config.ptx_coef else []
    data = DataSummary(config.data, rows_read, len(rows), len(prompts), len(heldout), bad_rows, cut)

    recorded = data.as_dict() | checks.prompt_form(prompts)
    guard = judge and config.eval_every and watch(models, judge, heldout, encoder, out, config)
    if config.checks:
        if guard:
            split = {"heldout_fraction": config.heldout_fraction, "split_seed": config.split_seed}
            checks.check_same_split(config.model, **split)
        checks.check_prompts_fit(cut, len(prompts), encoder.max_prompt_tokens)
        for directory in filter(None, (config.model, config.reward_model)):
            checks.check_same_form(directory, prompts)
        checks.check_ppo(
            models,
            prompts,
            queries,
            response_length=config.response_length,
            temperature=config.temperature,
            missing_eos=config.missing_eos,
            stop=stop,
            full_logits=config.full_logits,
        )
    if not config.full_logits:
        logit_head(models.policy)  # a model without one is refused here

    each = replies_each(config)
    updates = max(1, (config.total_episodes or each * len(prompts)) // config.batch_size)
    if config.critic_warmup >= updates:
        raise UserError(
            f"ppo: 'critic_warmup' {config.critic_warmup} leaves the policy none of the {updates} updates; lower it, or raise "
            "total_episodes"
        )
    optimizer = loop.adamw(
        models.trained.values(),
        weight_decay=config.weight_decay,
        epsilon=config.adam_epsilon,
        betas=(config.adam_beta1, config.adam_beta2),
        kind=config.optimizer,
    )
    if dry_run:
        few = partial(first_experience, models, prompts, queries, config, stop)
        sizes = {"prompt_tokens": max(map(len, queries)), "updates": updates, "group": each}

        def gradient(batch: Advantaged, rows: Sequence[int]) -> dict[str, Tensor]:
            return accumulate_gradient(batch, rows, models, config, draw(ptx, len(rows), order))

        estimate.rollouts(config, models, optimizer, few, gradient, **sizes, device=device)
        return out
    so_far = SimpleNamespace(kl_coef=float(config.kl_coef), tokens=0, waiting=[], moments=[0.0, 0.0, 0.0], results={})
    averaged = {} if models.average is None else {"average": models.average}
    inputs = {"prompts": (prompts, queries)} | ({"ptx rows": ptx} if ptx else {})
    state = State(models.trained | averaged, optimizer, order, so_far, inputs)
    loop.seed_process(config.seed)
    with Stage("ppo", config, out, updates, models.policy.num_parameters(), device, recorded, state) as stage:
        if guard:
            guard.begin(state.step)
        left = prompt_batches(len(prompts), config.batch_size // each, updates - state.step, order, so_far.waiting)
        for update, drawn in stage.steps(left):
            batch = [row for row in drawn for _ in range(each)]
            rates = learning_rates(update, updates, config)
            where, asked = f"ppo update {update}", [prompts[i] for i in batch]
            alarm = early_stop = None
            with keeping(out, where, asked, config):
                experience = collect(
                    models, asked, [queries[i] for i in batch], so_far.kl_coef, config, stop, so_far.moments
                )
                warming = update <= config.critic_warmup
                stats = optimize(
                    experience, models, optimizer, config, order, rate=rates, where=where, ptx=ptx, warming=warming
                )
            episode = update * config.batch_size
            so_far.tokens += sum(experience.scored.rollout.response_lengths)
            results = describe(experience, kl_estimator(config)) | stats
            if config.advantage != "gae":
                results |= group.describe(experience.scored.scores, config.group_size)
            if config.reward_scaling:
                results["objective/score_scale"] = experience.score_scale
            if config.value_learning_rate is not None:
                results["value/lr"] = rates[-1]
            results |= {"lr": rates[0], "episode": episode, "epoch": episode / (each * len(prompts))}
            results |= {"eps": episode / stage.seconds, "tokens_per_second": so_far.tokens / stage.seconds}
            if guard and (update % config.eval_every == 0 or update == updates):
                results |= guard.look(update)
                alarm, early_stop = guard.alarm(), guard.early_stop()
            told = completions(experience) if is_told(update, updates, config.num_sample_generations) else ()
            stage.log(update, results, show=SHOWN, completions=told)
            so_far.kl_coef, so_far.results = adapted(so_far.kl_coef, results["objective/kl"], config), results
            if alarm:
                loop.say(f"{where}: over-optimisation: {alarm}")
            elif early_stop:
                loop.say(f"{where}: early stopping, which is no proof of over-optimisation: {early_stop}")
            if (alarm or early_stop) and config.guard == "stop":
                break
        policy = models.policy
        if models.average is not None:
            follow(policy, models.average, decay=0.0)  # in the type of its weights
        saves = True
        if guard:
            so_far.results |= (said := guard.conclusion())
            stopped = config.guard == "stop" and (said["alarm"] or said["early_stop"])
            if stopped and (saves := distributed.is_main()):
                policy = guard.load_best()
        policy.generation_config = generation_config(
            models.tokenizer, config.response_length, config.temperature, stop=stop
        )
        if models.value is not None:
            save_model(out / "value", models.value, models.tokenizer)
        if saves:
            save_model(out, policy, models.tokenizer)
        stage.finish(so_far.results)
    return out


def watch(
    models: Models,
    judge: Judge | PairJudge,
    heldout: Sequence[Prompt],
    encoder: loop.Encoder,
    out: Path,
    config: PPOConfig,
) -> Guard:
    """What judges the policy during training, on the last held-out prompts: a later evaluation asks the first ones."""
    prompts = list(dict.fromkeys(row.prompt for row in heldout))[-config.eval_prompts :]
    if not prompts:
        raise UserError("ppo: 'eval_every' needs held-out prompts; raise heldout_fraction or set eval_every 0")
    settings = Settings(**{field.name: getattr(config, field.name) for field in dataclasses.fields(Settings)})
    queries = [encoder.prompt(prompt) for prompt in prompts]
    return Guard(judged_models(models), judge, prompts, queries, settings, out, config.patience)


def judged_models(models: Models) -> Models:
    """Those with which the policy is judged that will be saved: the average, where there is one, in place of the policy."""
    if models.average is None:
        return models
    # With an adapter a policy is its own reference, and so is the average, which has an adapter of its own.
    reference = models.average if models.reference is models.policy else models.reference
    return dataclasses.replace(models, policy=models.average, reference=reference)


def check(config: PPOConfig, reward: Any, judge: Judge | PairJudge | None = None) -> None:
    """UserError for keys that are right one by one and wrong together, or a reward model that is too poor."""
    if (config.reward_model is None) == (reward is None):
        raise UserError("ppo: give either 'reward_model' (a directory) or a reward function, and not both")
    sources = [config.reward_model] if reward is None else [source for source, _ in terms_of(reward)]
    for directory in sources:
        if isinstance(directory, str | Path):
            check_accuracy(directory, config.min_reward_accuracy)
    if config.eval_every and judge is None and config.judge is None:
        raise UserError(
            "ppo: 'eval_every' needs a judge, which the reward itself cannot be; give 'judge' or eval_every 0"
        )
    if config.patience is not None and not config.eval_every:
        raise UserError(
            f"ppo: 'patience' {config.patience} counts looks of the judge, and eval_every is 0; set that, or leave it none"
        )
    if config.patience is not None and config.guard == "warn":
        raise UserError(
            f"ppo: 'patience' {config.patience} stops training, which guard warn never does; set guard stop, or leave it none"
        )
    if config.batch_size % config.num_mini_batches:
        raise UserError(
            f"ppo: 'batch_size' {config.batch_size} must be a multiple of 'num_mini_batches' {config.num_mini_batches}"
        )
    if config.missing_eos == "none" and config.min_response_length:
        raise UserError(
            "ppo: 'min_response_length' takes the penalty of missing_eos, which is none; set it, or leave one"
        )
    if config.min_response_length > config.response_length:
        raise UserError(
            f"ppo: 'min_response_length' {config.min_response_length} is longer than 'response_length' "
            f"{config.response_length}, so every reply would be penalised"
        )
    if config.missing_eos != "none" and config.stop_token is None:
        raise UserError("ppo: without 'stop_token' no reply ends, so set missing_eos none, or each would be penalised")
    if config.ptx_data is not None and not config.ptx_coef:
        raise UserError("ppo: 'ptx_data' is read with a 'ptx_coef' above 0 alone; give one")
    for name in UNREAD[config.advantage]:
        if (value := getattr(config, name)) != (default := getattr(PPOConfig, name)):
            raise UserError(
                f"ppo: '{name}' means nothing with advantage {config.advantage}; leave it at {default}, got {value}"
            )
    if config.advantage == "grpo" and config.kl_estimator not in (PPOConfig.kl_estimator, group.KL_IN_LOSS):
        raise UserError(f"ppo: 'kl_estimator' is {group.KL_IN_LOSS} with advantage grpo, got {config.kl_estimator}")
    loop.check_installed(config, "ppo")
    if config.batch_size < config.num_mini_batches * distributed.asked_for():
        raise UserError(
            f"ppo: 'batch_size' {config.batch_size} leaves a process without a row: {distributed.asked_for()} processes share "
            f"each of {config.num_mini_batches} minibatches"
        )
    if config.batch_size % replies_each(config):
        raise UserError(
            f"ppo: 'batch_size' {config.batch_size} counts replies, so it must be a multiple of 'group_size' "
            f"{config.group_size}"
        )


def replies_each(config: PPOConfig) -> int:
    """Replies to a prompt in an update."""
    return 1 if config.advantage == "gae" else config.group_size


def kl_estimator(config: PPOConfig) -> str:
    """Of the KL penalty, in the reward or in the loss."""
    return group.KL_IN_LOSS if config.advantage == "grpo" else config.kl_estimator


def load_models(config: PPOConfig, reward: Any, device: torch.device, chat: Chat | None = None) -> Models:
    """Policy and its frozen copy; reward model and, for gae, its copy that becomes the value model (N+, detail 22).

    With an adapter the policy is its own reference, and the value model has an adapter as well.
    """
    places = {"dtype": config.dtype, "device": device}
    policy, tokenizer = load_policy(config.model, **places, chat=chat)
    loop.made_trainable(policy, config)
    average = None if config.ema_decay is None else fsdp.spread(averaging(policy))
    fsdp.spread(policy)
    reference = policy if config.lora_rank else fsdp.spread(load_policy(config.model, **places, chat=chat)[0])
    value = None
    if reward is None:
        judge, reward_tokenizer = load_scalar_model(config.reward_model, **places)
        fsdp.spread(judge)
        checks.check_same_words(tokenizer, reward_tokenizer, (config.model, config.reward_model))
    if config.advantage == "gae" and reward is None and config.value_init == "reward":
        value, _ = load_scalar_model(config.reward_model, **places)
    elif config.advantage == "gae":
        value, _ = reward_from_policy(config.model, **places, chat=chat)
        torch.nn.init.zeros_(value.score.weight)
    if value is not None:
        fsdp.spread(loop.made_trainable(value, config))
    if reward is not None:
        judge = make_reward(reward, tokenizer=tokenizer, device=device)
    return Models(policy, reference, value, judge, tokenizer, average)


def averaging(policy: torch.nn.Module) -> torch.nn.Module:
    """A copy to hold the average of what is trained of the policy, in float32 at least: a small step would round away in
    bfloat16. The weights under an adapter are not copied: both have the same."""
    frozen = {id(parameter): parameter for parameter in policy.parameters() if not parameter.requires_grad}
    average = copy.deepcopy(policy, frozen)
    for parameter in lora.trained(average):
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    return average


def read_ptx(config: PPOConfig, encoder: loop.Encoder, chat: Chat | None = None) -> list[Example]:
    """The written replies that PPO-ptx keeps likely, to the prompts that training may see."""
    rows, _, _ = read_demonstrations(config.ptx_data or config.data, bad_rows=config.bad_rows, chat=chat)
    rows, _ = split_heldout(rows, fraction=config.heldout_fraction, seed=config.split_seed)
    return [encode(encoder, row.prompt, row.response) for row in rows]


def learning_rates(update: int, updates: int, config: PPOConfig) -> list[float]:
    """Of the policy and, with gae, of the value model."""
    peaks = [config.learning_rate]
    if config.advantage == "gae":
        peaks.append(config.learning_rate if config.value_learning_rate is None else config.value_learning_rate)
    course = {"schedule": config.lr_schedule, "warmup_steps": config.warmup_steps}
    return [loop.learning_rate(update, updates, peak=peak, **course) for peak in peaks]


def collect(
    models: Models,
    prompts: Sequence[str],
    queries: Sequence[list[int]],
    kl_coef: float,
    config: PPOConfig,
    stop: Sequence[int] | None = None,
    moments: list[float] | None = None,
) -> Advantaged:
    """The experience of one update: replies to `prompts`, scored, with their advantages.

    Of several processes each samples its part, and then all have the whole. stop: as in `generate`. moments: of the scores so
    far, which `reward_scaling` reads and keeps up to date.
    """
    own = distributed.stretch(len(prompts))
    sampling = {"response_length": config.response_length, "temperature": config.temperature, "stop": stop}
    rollout = roll_out(models, prompts[own], queries[own], **sampling)
    scored = score(
        rollout,
        models,
        temperature=config.temperature,
        missing_eos=config.missing_eos,
        missing_eos_penalty=config.missing_eos_penalty,
        min_response_length=config.min_response_length,
        micro_batch_size=(
            config.micro_batch_size if config.rollout_micro_batch_size is None else config.rollout_micro_batch_size
        ),
        micro_batch_tokens=config.micro_batch_tokens,
        full_logits=config.full_logits,
    )
    if distributed.count() > 1:
        device, here = rollout.ids.device, moved(scored, "cpu")
        scored = moved(joined(distributed.gathered(here), models.tokenizer.pad_token_id), device)
        rollout = scored.rollout
    check_finite(tensors_of(scored), samples=rollout.samples, beside=tensors_of(rollout))
    scale = (
        running_scale([0.0, 0.0, 0.0] if moments is None else moments, scored.scores) if config.reward_scaling else 1.0
    )
    batch = advantages_of(scored, kl_coef, config, scale)
    check_finite(tensors_of(batch), samples=rollout.samples, beside=tensors_of(rollout) | tensors_of(scored))
    return batch


def first_experience(
    models: Models,
    prompts: Sequence[str],
    queries: Sequence[list[int]],
    config: PPOConfig,
    stop: Sequence[int],
    count: int,
) -> Advantaged:
    """The experience of `count` rollouts on the first prompts."""
    rows = [i // replies_each(config) % len(prompts) for i in range(count)]
    asked = [prompts[i] for i in rows], [queries[i] for i in rows]
    return collect(models, *asked, float(config.kl_coef), config, stop)


def tensors_of(record: object) -> dict[str, Tensor]:
    """The tensors of a rollout, a scored or an advantaged batch."""
    return {name: value for name, value in vars(record).items() if isinstance(value, Tensor)}


def all_tensors(batch: Advantaged) -> dict[str, Tensor]:
    return tensors_of(batch.scored.rollout) | tensors_of(batch.scored) | tensors_of(batch)


def running_scale(moments: list[float], scores: Tensor) -> float:
    """Add scores [B] to `moments`, their number, mean and sum of squared deviations so far -> the standard deviation, unbiased.

    As the running moments of PPO-max (arXiv 2307.04964), in float64, merged as Chan et al. 1979. 1 while all are the same.
    """
    count, mean, squares = moments
    new, own = float(len(scores)), scores.double()
    own_mean, total = own.mean().item(), count + new
    gap = own_mean - mean
    squares += (own - own_mean).square().sum().item() + gap**2 * count * new / total
    moments[:] = [total, mean + gap * new / total, squares]
    scale = math.sqrt(squares / max(1.0, total - 1))
    return scale if scale > SMALLEST_SCALE else 1.0


def advantages_of(scored: Scored, kl_coef: float, config: PPOConfig, score_scale: float = 1.0) -> Advantaged:
    """What every token is credited with, by the kind of advantage that was asked for."""
    penalty = {"kl_coef": kl_coef, "kl_estimator": config.kl_estimator, "score_clip": config.score_clip}
    scaled = scored if score_scale == 1 else dataclasses.replace(scored, scores=scored.scores / score_scale)
    if config.advantage != "gae":
        batch = group.advantage(scaled, config.advantage, config.group_size, **penalty)
    else:
        batch = advantage(
            scaled,
            **penalty,
            gamma=config.gamma,
            lam=config.lam,
            whiten_rewards=config.whiten_rewards,
            whiten_advantages=config.whiten_advantages,
            whiten_unbiased=config.whiten_unbiased,
            advantage_clip=config.advantage_clip,
        )
    return dataclasses.replace(batch, scored=scored, score_scale=score_scale)


def prompt_batches(
    count: int, batch_size: int, updates: int, order: torch.Generator, waiting: list[int]
) -> Iterator[list[int]]:
    """Numbers of prompts for each update; every prompt is used once before one is used again.

    waiting: those drawn and not yet used, kept up to date.
    """
    for _ in range(updates):
        while len(waiting) < batch_size:
            waiting += torch.randperm(count, generator=order).tolist()
        batch = waiting[:batch_size]
        del waiting[:batch_size]
        yield batch


def optimize(
    batch: Advantaged,
    models: Models,
    optimizer: torch.optim.Optimizer,
    config: PPOConfig,
    order: torch.Generator,
    *,
    rate: float | Sequence[float],
    where: str,
    ptx: Sequence[Example] = (),
    warming: bool = False,
) -> dict[str, float]:
    """All optimizer steps of one update -> the statistics of its minibatches, averaged over them.

    rate: as in `clip_and_step`. ptx: written replies to draw from. warming: only the value model learns.
    """
    learning = {"value": models.value} if warming else models.trained
    count, samples = len(batch.scored.scores), batch.scored.rollout.samples
    means, done = loop.Means(), []
    alone = partial(gradient_of_row, batch, models, config, warming=warming)
    for _ in range(config.num_ppo_epochs):
        minibatches = torch.randperm(count, generator=order).chunk(config.num_mini_batches)
        for rows in minibatches:
            rows = rows.tolist()
            written = draw(() if warming else ptx, len(rows), order)
            with (
                blaming_written(written, models, config),
                blaming(learning, {row: row for row in rows}, alone, partial(all_tensors, batch), lambda: samples),
            ):
                stats = accumulate_gradient(batch, rows, models, config, written, warming=warming)
                losses = {name: stat for name, stat in stats.items() if name.startswith("loss/")}
                if config.checks and not done:
                    checks.check_first_ratio(
                        stats["val/ratio"], stats["val/ratio_var"], compute_dtype(models.policy), where
                    )
                norms = loop.clip_and_step(
                    optimizer, learning, losses, rate=rate, max_grad_norm=config.max_grad_norm, where=where
                )
                if models.average is not None and not warming:
                    follow(models.average, models.policy, config.ema_decay)
            done.append(stats["policy/approxkl_avg"])
            means.add(stats | {f"{name}/grad_norm": norm for name, norm in norms.items()})
        if config.target_kl is not None and torch.stack(done[-len(minibatches) :]).mean() > config.target_kl:
            break
    return means.take()


@torch.no_grad()
def follow(average: torch.nn.Module, model: torch.nn.Module, decay: float) -> None:
    """average <- decay * average + (1 - decay) * model, parameter by parameter that is trained."""
    for kept, now in zip(lora.trained(average), lora.trained(model), strict=True):
        kept.lerp_(now.to(kept.dtype), 1 - decay)


def draw(ptx: Sequence[Example], count: int, order: torch.Generator) -> list[Example]:
    """So many of the written replies, if there are any, with replacement."""
    return [ptx[row] for row in torch.randint(len(ptx), (count,), generator=order).tolist()] if ptx else []


def gradient_of_row(
    batch: Advantaged, models: Models, config: PPOConfig, row: int, *, warming: bool = False
) -> dict[str, Tensor]:
    return add_gradient(batch, [row], models, config, warming=warming)


@contextmanager
def blaming_written(written: Sequence[Example], models: Models, config: PPOConfig) -> Iterator[None]:
    """`blaming` of the written replies of a minibatch."""
    tokenizer = models.tokenizer

    def alone(example: Example) -> dict[str, Tensor]:
        parts = [[example]]
        return accumulate_loss(models.policy, parts, tokenizer.pad_token_id, config.full_logits, weight=config.ptx_coef)

    def tensors() -> dict[str, Tensor]:
        made = padded([example.ids for example in written], tokenizer.pad_token_id) if written else {}
        return {f"ptx_{name}": tensor for name, tensor in made.items()}

    def samples() -> list[Sample]:
        halves = [(example.ids[: example.start], example.ids[example.start :]) for example in written]
        texts = [tokenizer.batch_decode(list(half), skip_special_tokens=True) for half in halves]
        return [Sample(prompt, reply, True) for prompt, reply in texts]

    with blaming(models.trained, dict(enumerate(written)), alone, tensors, samples, part="ptx"):
        yield


def accumulate_gradient(
    batch: Advantaged,
    rows: Sequence[int],
    models: Models,
    config: PPOConfig,
    written: Sequence[Example] = (),
    *,
    warming: bool = False,
) -> dict[str, Tensor]:
    """`add_gradient` of a minibatch, and `add_ptx_gradient` of replies, by all processes together, each its share of both.

    Returns losses and statistics of the whole, the same in all of them.
    """
    own = distributed.share(rows, batch.scored.rollout.lengths)
    stats = add_gradient(batch, own, models, config, rows, warming=warming)
    if written:
        stats |= add_ptx_gradient(written, models, config)
    return with_variance(distributed.combined(models.trained, stats))


def add_ptx_gradient(written: Sequence[Example], models: Models, config: PPOConfig) -> dict[str, Tensor]:
    """Add ptx_coef times the gradient of the mean loss over all reply tokens of `written`, this process's share of it."""
    lengths, pad_id = [len(example.ids) for example in written], models.tokenizer.pad_token_id
    own = distributed.share(range(len(written)), lengths)
    few = loop.micro_batches(own, lengths, config.micro_batch_size, config.micro_batch_tokens)
    parts = [[written[row] for row in part] for part in few]
    options = {"weight": config.ptx_coef, "tokens": reply_tokens(written)}
    told = accumulate_loss(models.policy, parts, pad_id, config.full_logits, **options)
    return {"loss/ptx_avg": told["loss"]}


def with_variance(stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The variance of the ratio, from its second moment about 1."""
    return stats | {"val/ratio_var": stats["val/ratio_var"] - (stats["val/ratio"] - 1) ** 2}


def add_gradient(
    batch: Advantaged,
    rows: Sequence[int],
    models: Models,
    config: PPOConfig,
    batch_rows: Sequence[int] | None = None,
    *,
    warming: bool = False,
) -> dict[str, Tensor]:
    """Add the gradient of the losses over the response tokens of a minibatch -> its losses and statistics.

    The minibatch is taken in micro-batches; dividing each by the tokens (with rloo: replies) of the whole makes their sum
    exact. With rloo the ratios, and what is said of them, are those of whole replies.

    batch_rows: those of the whole minibatch, where `rows` are only this process's share. The statistics are shares of the
    whole, `val/ratio_var` the second moment about 1. warming: only the value model gets a gradient, and the policy is read
    for its statistics alone.
    """
    scored, rollout = batch.scored, batch.scored.rollout
    whole = rows if batch_rows is None else batch_rows
    tokens, replies = sum(rollout.response_lengths[row] for row in whole), len(whole)
    limits = {
        "clip_low": config.cliprange,
        "clip_high": config.cliprange if config.cliprange_high is None else config.cliprange_high,
        "dual_clip": config.dual_clip,
        "log_ratio_clip": config.log_ratio_clip,
    }
    totals: dict[str, Tensor] = {}
    windows = list(rollout.windows(rows, config.micro_batch_size, config.micro_batch_tokens))
    keep_step(list(models.trained.values()), len(windows), config.full_logits, read=[models.policy] if warming else ())
    for window in windows:
        ids, mask, response_mask = rollout.inputs(window)
        place, length = (window.rows, window.response), window.response_length
        old, advantages, ratios = scored.logprobs[place], batch.advantages[place], window.tokens / tokens
        options = {"temperature": config.temperature, "full_logits": config.full_logits}
        if config.advantage == "rloo":
            ratios = len(window.rows) / replies
            options |= {"response_mask": response_mask, "with_entropy": True}
            logprobs, entropies = response_logprobs(models.policy, ids, mask, length, **options)
            policy_loss, policy_stats = group.reply_loss(logprobs, old, advantages, replies=replies, **limits)
            entropy = entropies.sum() / tokens
            loss = policy_loss - config.entropy_coef * entropy if config.entropy_coef else policy_loss
            policy_stats |= {"policy_loss": policy_loss.detach(), "entropy": entropy.detach()}
        else:
            options |= limits | {"normalizer": tokens}
            if config.advantage == "grpo":
                options |= group.kl_options(scored.ref_logprobs[place], batch.kl_coef)
            with torch.set_grad_enabled(not warming):
                loss, policy_stats = response_ppo_loss(
                    models.policy,
                    ids,
                    mask,
                    length,
                    old,
                    advantages,
                    response_mask,
                    entropy_coef=config.entropy_coef,
                    **options,
                )
        if not warming:
            zero.backward(models.policy, loss)
        shift = policy_stats["ratio_mean"] - 1
        part = {
            "loss/policy_avg": policy_stats["policy_loss"],
            "policy/entropy_avg": policy_stats["entropy"],
            "policy/approxkl_avg": policy_stats["approx_kl"] * ratios,
            "policy/clipfrac_avg": policy_stats["clip_fraction"] * ratios,
            "val/ratio": policy_stats["ratio_mean"] * ratios,
            # About 1, where the mean is: about 0 the difference of squares would lose all digits.
            "val/ratio_var": (policy_stats["ratio_var"] + shift**2) * ratios,
        }
        if config.advantage == "grpo":
            part["loss/kl_avg"] = policy_stats["kl"]
        if models.value is not None:
            value_loss, value_stats = ppo_value_loss(
                token_values(models.value, ids, mask, length),
                scored.values[place],
                batch.returns[place],
                response_mask,
                clip=config.cliprange_value,
                normalizer=tokens,
            )
            zero.backward(models.value, config.vf_coef * value_loss)
            part["loss/value_avg"] = value_loss.detach()
            part["val/clipfrac_avg"] = value_stats["clip_fraction"] * (window.tokens / tokens)
        totals = {name: totals[name] + value for name, value in part.items()} if totals else part
    return totals


def describe(batch: Advantaged, kl_estimator: str) -> dict[str, float]:
    """What the rollouts of an update were like, under the names of TRL 1.12, over response tokens only."""
    scored, rollout, mask = batch.scored, batch.scored.rollout, batch.scored.rollout.response_mask
    penalty = kl_penalty(scored.logprobs, scored.ref_logprobs, estimator=kl_estimator, mask=mask)
    non_score = -batch.kl_coef * penalty.sum(1).mean()
    values = {}
    if scored.values is not None:
        _, value_stats = ppo_value_loss(scored.values, scored.values, batch.returns, mask)
        values["val/explained_var"] = value_stats["explained_variance"]
    means = loop.Means()
    means.add(
        values
        | {
            "objective/kl": kl_penalty(scored.logprobs, scored.ref_logprobs, mask=mask).sum(1).mean(),
            "objective/entropy": -scored.logprobs.sum(1).mean(),
            "objective/non_score_reward": non_score,
            "objective/rlhf_reward": scored.scores.mean() / batch.score_scale + non_score,
            "objective/scores": scored.scores.mean(),
            "val/num_eos_tokens": rollout.finished.sum(),
            "response/length": mask.sum(1).double().mean(),
            "response/eos_rate": rollout.finished.double().mean(),
        }
    )
    replies = [sample.response for sample in rollout.samples]
    distinct = {f"response/distinct_{n}": distinct_n(replies, n) for n in (1, 2)}
    return means.take() | distinct | {"objective/kl_coef": batch.kl_coef}


def is_told(update: int, updates: int, times: int) -> bool:
    """Whether this update's replies are shown, of `times` spread evenly over all updates, the last among them."""
    return update * times // updates > (update - 1) * times // updates


def completions(batch: Advantaged) -> list[dict[str, Any]]:
    """The first replies of an update, with their scores."""
    scored = batch.scored
    rows = zip(scored.rollout.samples[:WRITTEN], scored.scores[:WRITTEN].tolist(), strict=True)
    return [{"score": score, **dataclasses.asdict(sample)} for sample, score in rows]


def adapted(kl_coef: float, kl: float, config: PPOConfig) -> float:
    """The next KL coefficient: held, or moved towards `kl_target` (arXiv 1909.08593, section 2.2)."""
    if config.kl_target is None:
        return kl_coef
    error = min(max(kl / config.kl_target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * config.batch_size / config.kl_horizon)
