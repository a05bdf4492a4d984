"""Stage 3, PPO: the policy is moved towards replies that the reward model likes, and held near where it started.

One update goes through frozen dataclasses, Rollout -> Scored -> Advantaged (see `rollout`), then takes
num_ppo_epochs x num_mini_batches optimizer steps on

    max(-A ratio, -A clip(ratio, 1 +- cliprange)) + vf_coef * clipped value loss - entropy_coef * entropy

(Schulman et al. 2017, arXiv 1707.06347). The details that decide whether this learns, and the defaults, are those of
Huang et al. 2024 (arXiv 2403.17031), with gradient clipping added. Every mean runs over response tokens alone. With
`advantage` grpo or rloo, several replies to each prompt take the place of the value model: see `group`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from rlhf_fast import kl_penalty, ppo_value_loss
from rlhf_fast.train import checks, distributed, engine, estimate, group, loop
from rlhf_fast.train.checkpoint import save_model
from rlhf_fast.train.config import option, validate
from rlhf_fast.train.data import DataSummary, Prompt, read_prompts, split_heldout
from rlhf_fast.train.errors import UserError
from rlhf_fast.train.evaluate import Judge, PairJudge
from rlhf_fast.train.finite import blaming, check_finite, keeping
from rlhf_fast.train.generate import generation_config
from rlhf_fast.train.guard import Guard, Settings
from rlhf_fast.train.model import load_policy, load_scalar_model, reward_from_policy, token_values
from rlhf_fast.train.policy import FULL_LOGITS, logit_head, response_logprobs, response_ppo_loss
from rlhf_fast.train.record import Stage
from rlhf_fast.train.resume import State, claim
from rlhf_fast.train.rewards import SPEC, check_accuracy, make_reward, terms_of
from rlhf_fast.train.rollout import Advantaged, Models, Scored, advantage, joined, moved, roll_out, score

# Keys that a kind of advantage does not read.
OF_VALUES = ("whiten_rewards", "whiten_advantages", "gamma", "lam", "cliprange_value", "vf_coef")
UNREAD = {"gae": ("group_size",), "grpo": OF_VALUES, "rloo": OF_VALUES}


@dataclass(frozen=True)
class PPOConfig(loop.TrainConfig):
    """PPO on the prompts of `data`; `model` is the fine-tuned policy, which also stays as the reference."""

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
    generation: str = option("transformers", "what samples the replies", choices=("transformers", "vllm"))
    vllm_memory: float = option(
        0.3, "share of the GPU's memory that vllm may take", above=0, maximum=1, source="TRL 1.16"
    )
    missing_eos: str = option(
        "replace",
        "score of a reply that does not end: replace it by -missing_eos_penalty, subtract that from it, or leave it",
        choices=("none", "replace", "subtract"),
        source=loop.N_PLUS,
    )
    missing_eos_penalty: float = option(1.0, "see missing_eos", minimum=0, source=loop.N_PLUS)
    score_clip: float | None = option(None, "limit scores to +- this", above=0)
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
    total_episodes: int | None = option(
        None, "rollouts in all; none: each prompt once, with all its replies", minimum=1, group="update"
    )
    batch_size: int = option(512, "rollouts per update", minimum=1, source=loop.N_PLUS)
    num_ppo_epochs: int = option(4, "passes over the rollouts of an update", minimum=1, source=loop.N_PLUS)
    num_mini_batches: int = option(1, "optimizer steps per pass", minimum=1, source=loop.N_PLUS)
    micro_batch_size: int = option(0, "rollouts per forward pass; 0: a whole minibatch", minimum=0)
    learning_rate: float = option(3e-6, "peak learning rate", above=0, source=loop.N_PLUS)
    lr_schedule: str = option("linear", "how the rate falls to 0", choices=loop.SCHEDULES, source=loop.N_PLUS)
    weight_decay: float = option(0.01, "decoupled weight decay of AdamW", minimum=0, source=loop.N_PLUS)
    adam_epsilon: float = option(1e-5, "epsilon of AdamW", above=0, source=loop.N_PLUS)
    max_grad_norm: float = option(1.0, "the norm of each model's gradient is clipped to this; 0: never", minimum=0)
    cliprange: float = option(0.2, "policy ratio is clipped to 1 +- this", above=0, source=loop.N_PLUS)
    cliprange_value: float | None = option(0.2, "values move at most this; none: freely", above=0, source=loop.N_PLUS)
    vf_coef: float = option(0.1, "weight of the value loss", minimum=0, source=loop.N_PLUS)
    entropy_coef: float = option(0.0, "weight of an entropy bonus", minimum=0)
    target_kl: float | None = option(None, "end the passes of an update once approxkl is above this", above=0)
    full_logits: bool = option(False, FULL_LOGITS)
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
    rows, bad_rows, rows_read = read_prompts(config.data, bad_rows=config.bad_rows)
    train_rows, heldout = split_heldout(rows, fraction=config.heldout_fraction, seed=config.split_seed)
    order = loop.seed_everything(config.seed)
    if config.generation == "vllm":
        engine.check(device, "ppo")
    models = load_models(config, reward, device)
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
    cut = encoder.truncated_prompts
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
            full_logits=config.full_logits,
        )
    if not config.full_logits:
        logit_head(models.policy)  # a model without one is refused here

    each = replies_each(config)
    updates = max(1, (config.total_episodes or each * len(prompts)) // config.batch_size)
    optimizer = loop.adamw(
        models.trained.values(),
        weight_decay=config.weight_decay,
        epsilon=config.adam_epsilon,
        kind=config.optimizer,
    )
    if dry_run:
        few = partial(first_experience, models, prompts, queries, config)
        gradient = partial(accumulate_gradient, models=models, config=config)
        longest = max(map(len, queries))
        sizes = {"prompt_tokens": longest, "updates": updates, "group": each}
        estimate.rollouts(config, models, optimizer, few, gradient, **sizes, device=device)
        return out
    so_far = SimpleNamespace(kl_coef=float(config.kl_coef), tokens=0, waiting=[], results={})
    state = State(models.trained, optimizer, order, so_far, {"prompts": (prompts, queries)})
    distributed.agree(models.trained)
    loop.seed_process(config.seed)
    with Stage("ppo", config, out, updates, models.policy.num_parameters(), device, recorded, state) as stage:
        if guard:
            guard.begin(state.step)
        alarm = None
        left = prompt_batches(len(prompts), config.batch_size // each, updates - state.step, order, so_far.waiting)
        for update, drawn in stage.steps(left):
            batch = [row for row in drawn for _ in range(each)]
            rate = loop.learning_rate(update, updates, peak=config.learning_rate, schedule=config.lr_schedule)
            where, asked = f"ppo update {update}", [prompts[i] for i in batch]
            with keeping(out, where, asked, config):
                experience = collect(models, asked, [queries[i] for i in batch], so_far.kl_coef, config)
                stats = optimize(experience, models, optimizer, config, order, rate=rate, where=where)
            episode = update * config.batch_size
            so_far.tokens += sum(experience.scored.rollout.response_lengths)
            results = describe(experience, kl_estimator(config)) | stats
            if config.advantage != "gae":
                results |= group.describe(experience.scored.scores, config.group_size)
            results |= {"lr": rate, "episode": episode, "epoch": episode / (each * len(prompts))}
            results |= {"eps": episode / stage.seconds, "tokens_per_second": so_far.tokens / stage.seconds}
            if guard and (update % config.eval_every == 0 or update == updates):
                results |= guard.look(update)
                alarm = guard.alarm()
            stage.log(update, results, show=("objective/scores", "objective/kl", "policy/entropy_avg", "eval/win_rate"))
            so_far.kl_coef, so_far.results = adapted(so_far.kl_coef, results["objective/kl"], config), results
            if alarm:
                loop.say(f"ppo update {update}: over-optimisation: {alarm}")
            if alarm and config.guard == "stop":
                break
        policy = models.policy
        if guard:
            so_far.results |= guard.conclusion()
            policy = guard.load_best() if distributed.is_main() and guard.alarm() and config.guard == "stop" else policy
        policy.generation_config = generation_config(models.tokenizer, config.response_length, config.temperature)
        if models.value is not None:
            save_model(out / "value", models.value, models.tokenizer)
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
    return Guard(models, judge, prompts, [encoder.prompt(prompt) for prompt in prompts], settings, out)


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
    if config.batch_size % config.num_mini_batches:
        raise UserError(
            f"ppo: 'batch_size' {config.batch_size} must be a multiple of 'num_mini_batches' {config.num_mini_batches}"
        )
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


def load_models(config: PPOConfig, reward: Any, device: torch.device) -> Models:
    """Policy and its frozen copy; reward model and, for gae, its copy that becomes the value model (N+, detail 22).

    With an adapter the policy is its own reference, and the value model has an adapter as well.
    """
    places = {"dtype": config.dtype, "device": device}
    policy, tokenizer = load_policy(config.model, **places)
    loop.made_trainable(policy, config)
    reference = policy if config.lora_rank else load_policy(config.model, **places)[0]
    valued, value = config.advantage == "gae", None
    if reward is not None:
        if valued:
            value, _ = reward_from_policy(config.model, **places)
            torch.nn.init.zeros_(value.score.weight)
            loop.made_trainable(value, config)
        return Models(policy, reference, value, make_reward(reward, tokenizer=tokenizer, device=device), tokenizer)
    reward_model, reward_tokenizer = load_scalar_model(config.reward_model, **places)
    checks.check_same_words(tokenizer, reward_tokenizer, (config.model, config.reward_model))
    if valued:
        value, _ = load_scalar_model(config.reward_model, **places)
        loop.made_trainable(value, config)
    return Models(policy, reference, value, reward_model, tokenizer)


def collect(
    models: Models, prompts: Sequence[str], queries: Sequence[list[int]], kl_coef: float, config: PPOConfig
) -> Advantaged:
    """The experience of one update: replies to `prompts`, scored, with their advantages.

    Of several processes each samples its part, and then all have the whole.
    """
    own = distributed.stretch(len(prompts))
    sampling = {"response_length": config.response_length, "temperature": config.temperature}
    rollout = roll_out(models, prompts[own], queries[own], **sampling)
    scored = score(
        rollout,
        models,
        temperature=config.temperature,
        missing_eos=config.missing_eos,
        missing_eos_penalty=config.missing_eos_penalty,
        micro_batch_size=config.micro_batch_size,
        micro_batch_tokens=config.micro_batch_tokens,
        full_logits=config.full_logits,
    )
    if distributed.count() > 1:
        device, here = rollout.ids.device, moved(scored, "cpu")
        scored = moved(joined(distributed.gathered(here), models.tokenizer.pad_token_id), device)
        rollout = scored.rollout
    check_finite(tensors_of(scored), samples=rollout.samples, beside=tensors_of(rollout))
    batch = advantages_of(scored, kl_coef, config)
    check_finite(tensors_of(batch), samples=rollout.samples, beside=tensors_of(rollout) | tensors_of(scored))
    return batch


def first_experience(
    models: Models, prompts: Sequence[str], queries: Sequence[list[int]], config: PPOConfig, count: int
) -> Advantaged:
    """The experience of `count` rollouts on the first prompts."""
    rows = [i // replies_each(config) % len(prompts) for i in range(count)]
    return collect(models, [prompts[i] for i in rows], [queries[i] for i in rows], float(config.kl_coef), config)


def tensors_of(record: object) -> dict[str, Tensor]:
    """The tensors of a rollout, a scored or an advantaged batch."""
    return {name: value for name, value in vars(record).items() if isinstance(value, Tensor)}


def all_tensors(batch: Advantaged) -> dict[str, Tensor]:
    return tensors_of(batch.scored.rollout) | tensors_of(batch.scored) | tensors_of(batch)


def advantages_of(scored: Scored, kl_coef: float, config: PPOConfig) -> Advantaged:
    """What every token is credited with, by the kind of advantage that was asked for."""
    penalty = {"kl_coef": kl_coef, "kl_estimator": config.kl_estimator, "score_clip": config.score_clip}
    if config.advantage != "gae":
        return group.advantage(scored, config.advantage, config.group_size, **penalty)
    return advantage(
        scored,
        **penalty,
        gamma=config.gamma,
        lam=config.lam,
        whiten_rewards=config.whiten_rewards,
        whiten_advantages=config.whiten_advantages,
    )


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
    rate: float,
    where: str,
) -> dict[str, float]:
    """All optimizer steps of one update -> the statistics of its minibatches, averaged over them."""
    count, samples = len(batch.scored.scores), batch.scored.rollout.samples
    means, done = loop.Means(), []
    alone = partial(gradient_of_row, batch, models, config)
    for _ in range(config.num_ppo_epochs):
        minibatches = torch.randperm(count, generator=order).chunk(config.num_mini_batches)
        for rows in minibatches:
            rows = rows.tolist()
            with blaming(models.trained, {row: row for row in rows}, alone, partial(all_tensors, batch), samples):
                stats = accumulate_gradient(batch, rows, models, config)
                losses = {name: stat for name, stat in stats.items() if name.startswith("loss/")}
                if config.checks and not done:
                    checks.check_first_ratio(stats["val/ratio"], stats["val/ratio_var"], models.policy.dtype, where)
                norms = loop.clip_and_step(
                    optimizer, models.trained, losses, rate=rate, max_grad_norm=config.max_grad_norm, where=where
                )
            done.append(stats["policy/approxkl_avg"])
            means.add(stats | {f"{name}/grad_norm": norm for name, norm in norms.items()})
        if config.target_kl is not None and torch.stack(done[-len(minibatches) :]).mean() > config.target_kl:
            break
    return means.take()


def gradient_of_row(batch: Advantaged, models: Models, config: PPOConfig, row: int) -> dict[str, Tensor]:
    return add_gradient(batch, [row], models, config)


def accumulate_gradient(batch: Advantaged, rows: Sequence[int], models: Models, config: PPOConfig) -> dict[str, Tensor]:
    """`add_gradient` of a minibatch by all processes together, each its share of the rows -> the same in all of them."""
    rollout = batch.scored.rollout
    own = distributed.share(rows, rollout.lengths)
    stats = distributed.combined(models.trained, add_gradient(batch, own, models, config, rows))
    return with_variance(stats)


def with_variance(stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The variance of the ratio, from its second moment about 1."""
    return stats | {"val/ratio_var": stats["val/ratio_var"] - (stats["val/ratio"] - 1) ** 2}


def add_gradient(
    batch: Advantaged,
    rows: Sequence[int],
    models: Models,
    config: PPOConfig,
    batch_rows: Sequence[int] | None = None,
) -> dict[str, Tensor]:
    """Add the gradient of the losses over the response tokens of a minibatch -> its losses and statistics.

    The minibatch is taken in micro-batches; dividing each by the tokens (with rloo: replies) of the whole makes their sum
    exact. With rloo the ratios, and what is said of them, are those of whole replies.

    batch_rows: those of the whole minibatch, where `rows` are only this process's share. The statistics are shares of the
    whole, `val/ratio_var` the second moment about 1.
    """
    scored, rollout = batch.scored, batch.scored.rollout
    whole = rows if batch_rows is None else batch_rows
    tokens, replies = sum(rollout.response_lengths[row] for row in whole), len(whole)
    totals: dict[str, Tensor] = {}
    for window in rollout.windows(rows, config.micro_batch_size, config.micro_batch_tokens):
        ids, mask, response_mask = rollout.inputs(window)
        place, length = (window.rows, window.response), window.response_length
        old, advantages, ratios = scored.logprobs[place], batch.advantages[place], window.tokens / tokens
        options = {"temperature": config.temperature, "full_logits": config.full_logits}
        if config.advantage == "rloo":
            ratios = len(window.rows) / replies
            options |= {"response_mask": response_mask, "with_entropy": True}
            logprobs, entropies = response_logprobs(models.policy, ids, mask, length, **options)
            policy_loss, policy_stats = group.reply_loss(
                logprobs, old, advantages, clip=config.cliprange, replies=replies
            )
            entropy = entropies.sum() / tokens
            loss = policy_loss - config.entropy_coef * entropy if config.entropy_coef else policy_loss
            policy_stats |= {"policy_loss": policy_loss.detach(), "entropy": entropy.detach()}
        else:
            options |= {"clip_low": config.cliprange, "clip_high": config.cliprange, "normalizer": tokens}
            if config.advantage == "grpo":
                options |= group.kl_options(scored.ref_logprobs[place], batch.kl_coef)
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
        loss.backward()
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
            (config.vf_coef * value_loss).backward()
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
            "objective/rlhf_reward": scored.scores.mean() + non_score,
            "objective/scores": scored.scores.mean(),
            "val/num_eos_tokens": rollout.finished.sum(),
            "response/length": mask.sum(1).double().mean(),
            "response/eos_rate": rollout.finished.double().mean(),
        }
    )
    return means.take() | {"objective/kl_coef": batch.kl_coef}


def adapted(kl_coef: float, kl: float, config: PPOConfig) -> float:
    """The next KL coefficient: held, or moved towards `kl_target` (arXiv 1909.08593, section 2.2)."""
    if config.kl_target is None:
        return kl_coef
    error = min(max(kl / config.kl_target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * config.batch_size / config.kl_horizon)
