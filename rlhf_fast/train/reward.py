"""Stage 2, the reward model: the fine-tuned policy's body under a scalar head learns which of two replies is better.

    loss = - mean over pairs of log sigmoid(r(prompt, chosen) - r(prompt, rejected))        (Bradley and Terry 1952)

r is read at the last token of the reply. The loss fixes r only up to a constant, and its scale follows the number of
updates; so afterwards the head is rescaled until replies of the fine-tuned policy score with mean 0 and standard
deviation 1 (arXiv 1909.08593). PPO's KL coefficient and penalties then mean the same for every reward model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlhf_fast import reward_pair_loss
from rlhf_fast.train import checks, distributed, estimate, fsdp, loop, zero
from rlhf_fast.train.chat import Chat
from rlhf_fast.train.checkpoint import save_model
from rlhf_fast.train.config import option, validate
from rlhf_fast.train.data import DataSummary, Preference, collate, read_preferences, split_heldout
from rlhf_fast.train.errors import UserError
from rlhf_fast.train.finite import blaming, keeping, padded
from rlhf_fast.train.generate import generate
from rlhf_fast.train.model import load_policy, reward_from_policy, sequence_scores
from rlhf_fast.train.policy import keep_step
from rlhf_fast.train.record import Stage
from rlhf_fast.train.resume import State, claim

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SMALLEST_SPREAD = 1e-6
EXTREMES = {"min_reward": min, "max_reward": max}  # the other statistics of a batch are means


@dataclass(frozen=True)
class RewardConfig(loop.TrainConfig):
    """A reward model from preference pairs; `model` is the directory of the fine-tuned policy."""

    max_prompt_tokens: int = option(
        512, "longer prompts lose their beginning", minimum=1, source=loop.N_PLUS, group="training"
    )
    max_response_tokens: int = option(128, "longer replies lose their end", minimum=1)
    num_train_epochs: int = option(1, "passes over the pairs; more than one overfits", minimum=1, source=loop.N_PLUS)
    batch_size: int = option(64, "pairs per update", minimum=1, source=loop.N_PLUS)
    micro_batch_size: int = option(0, "pairs per forward pass; 0: the whole batch", minimum=0)
    learning_rate: float = option(3e-6, "peak learning rate", above=0, source=loop.N_PLUS)
    lr_schedule: str = option("cosine", "how the rate falls to 0", choices=loop.SCHEDULES, source=loop.N_PLUS)
    warmup_steps: int = option(0, "updates over which the rate rises", minimum=0)
    weight_decay: float = option(0.01, "decoupled weight decay of AdamW", minimum=0)
    adam_epsilon: float = option(1e-5, "epsilon of AdamW", above=0, source=loop.N_PLUS)
    max_grad_norm: float = option(
        1.0, "the gradient's norm is clipped to this; 0: never", minimum=0, source=loop.CLIPPED_BY
    )
    center_coef: float = option(
        0.0, "weight of (chosen + rejected)^2 in the loss", minimum=0, source="arXiv 2312.09244"
    )
    head_init_std: float | None = option(
        None, "standard deviation of the new head's weights; none: 1/sqrt(width + 1)", above=0, source=loop.N_PLUS
    )
    normalize_samples: int = option(
        256, "policy replies to normalise on; 0: do not", minimum=0, source="arXiv 1909.08593", group="normalisation"
    )
    temperature: float = option(0.7, "temperature of these replies: that of PPO", above=0, source=loop.N_PLUS)
    logging_steps: int = option(10, "updates between two lines of the log", minimum=1, group="log")


@dataclass(frozen=True)
class Pair:
    """Token ids of a prompt with its better and with its worse reply."""

    chosen: list[int]
    rejected: list[int]

    def __len__(self) -> int:
        return max(len(self.chosen), len(self.rejected))


def train(config: RewardConfig, *, dry_run: bool = False) -> Path:
    """Run the stage, or what a killed process left of it, and return its directory.

    dry_run: print what memory and time it would take instead, and write nothing.
    UserError, before anything is written, if any input is wrong.
    """
    validate(config)
    loop.check_installed(config, "reward")
    out, finished = claim("reward", config)
    if finished:
        return out
    device = loop.pick_device(config.device)
    if dry_run and not estimate.begin("reward", config, device):
        return out
    chat = Chat.of(config)
    rows, bad_rows, rows_read = read_preferences(config.data, bad_rows=config.bad_rows, chat=chat)
    sides = split_heldout(rows, fraction=config.heldout_fraction, seed=config.split_seed)
    order = loop.seed_everything(config.seed)
    places = {"dtype": config.dtype, "device": device, "chat": chat}
    model, tokenizer = reward_from_policy(config.model, **places, std=config.head_init_std)
    fsdp.spread(loop.made_trainable(model, config))
    policy = fsdp.spread(load_policy(config.model, **places)[0])
    loop.use_threads(config.threads, parameters=model.num_parameters(), device=device)
    encoder = loop.Encoder(
        model,
        tokenizer,
        max_prompt_tokens=config.max_prompt_tokens,
        max_response_tokens=config.max_response_tokens,
    )
    pairs, heldout = ([encode(encoder, row) for row in side] for side in sides)
    cut = (encoder.truncated_prompts, encoder.truncated_responses)
    data = DataSummary(config.data, rows_read, len(rows), len(pairs), len(heldout), bad_rows, *cut)

    prompts, pad_id = [row.prompt for row in sides[0]], tokenizer.pad_token_id
    recorded = data.as_dict() | checks.prompt_form(prompts)
    if config.checks:
        sequences = [(pair.chosen, pair.rejected) for pair in pairs]
        checks.check_preferences(config, model, encoder, prompts, len(rows), sequences, pad_id=pad_id)

    lengths = [len(pair) for pair in pairs]
    batches, steps_per_epoch = loop.epochs(lengths, config.batch_size, config.num_train_epochs, order)
    total_steps = len(batches)
    schedule = {"schedule": config.lr_schedule, "warmup_steps": config.warmup_steps}
    optimizer = loop.adamw(
        [model], weight_decay=config.weight_decay, epsilon=config.adam_epsilon, kind=config.optimizer
    )
    means = loop.Means()
    inputs = {"training rows": pairs, "held-out rows": heldout}
    state = State({"model": model}, optimizer, order, SimpleNamespace(), inputs, means)

    def alone(pair: Pair) -> dict[str, Tensor]:
        return accumulate_gradient(model, [[pair]], pad_id, center_coef=config.center_coef)

    def of_rows(rows: Sequence[int]) -> dict[str, Tensor]:
        return accumulate_gradient(model, [[pairs[row] for row in rows]], pad_id, center_coef=config.center_coef)

    if dry_run:
        tried = (lengths, batches, of_rows)
        estimate.passes("reward", config, {"model": model}, optimizer, *tried, sequences=2, device=device)
        return out
    with Stage("reward", config, out, total_steps, model.num_parameters(), device, recorded, state) as stage:
        for step, rows in stage.steps(batches[state.step :]):
            rate = loop.learning_rate(step, total_steps, peak=config.learning_rate, **schedule)
            own = distributed.share(rows, lengths)
            few = loop.micro_batches(own, lengths, config.micro_batch_size, config.micro_batch_tokens, sequences=2)
            parts = [[pairs[row] for row in part] for part in few]
            where, batch = f"reward step {step}", dict(enumerate(pairs[row] for row in rows))
            with (
                keeping(out, where, [prompts[row] for row in rows], config),
                blaming({"model": model}, batch, alone, partial(tensors_of, batch.values(), pad_id)),
            ):
                stats = accumulate_gradient(model, parts, pad_id, center_coef=config.center_coef, count=len(rows))
                stats = distributed.combined({"model": model}, stats, EXTREMES)
                norms = loop.clip_and_step(
                    optimizer,
                    {"model": model},
                    {"loss": stats["loss"]},
                    rate=rate,
                    max_grad_norm=config.max_grad_norm,
                    where=where,
                )
            means.add(stats | {"grad_norm": norms["model"]})
            last_of_epoch = step % steps_per_epoch == 0
            if step % config.logging_steps == 0 or last_of_epoch:
                metrics = means.take() | {"learning_rate": rate, "epoch": step / steps_per_epoch}
                if last_of_epoch and heldout:
                    metrics |= evaluate(model, heldout, pad_id, config.batch_size)
                stage.log(step, metrics, show=("loss", "accuracy", "eval_accuracy"))
        results = summary(model, pairs, heldout, pad_id, config.batch_size)
        if config.normalize_samples:
            queries = [encoder.prompt(prompt) for prompt in prompts]
            replies = sample_replies(policy, tokenizer, queries, order, config)
            results |= normalize_head(model, replies, pad_id, config.batch_size)
        save_model(out, model, tokenizer)
        stage.finish(results)
    return out


def encode(encoder: loop.Encoder, row: Preference) -> Pair:
    prompt = encoder.prompt(row.prompt)
    return Pair(prompt + encoder.response(row.chosen), prompt + encoder.response(row.rejected))


def tensors_of(pairs: Iterable[Pair], pad_id: int) -> dict[str, Tensor]:
    """The token ids of a batch, a pair a row."""
    sides = {side: padded([getattr(pair, side) for pair in pairs], pad_id) for side in ("chosen", "rejected")}
    return {f"{side}_{name}": x for side, tensors in sides.items() for name, x in tensors.items()}


def accumulate_gradient(
    model: PreTrainedModel,
    parts: Sequence[Sequence[Pair]],
    pad_id: int,
    *,
    center_coef: float,
    count: int | None = None,
) -> dict[str, Tensor]:
    """Add the gradient of the mean loss over all pairs of a batch, given in parts -> its loss and statistics.

    count: so many pairs are in the batch, of which `parts` are this process's share, or nothing; None: they are all of it.
    """
    count = count or sum(map(len, parts))
    keep_step([model], len(parts))
    if not parts:
        return {}
    rows = []
    for part in parts:
        chosen, rejected = score(
            [pair.chosen for pair in part] + [pair.rejected for pair in part], model, pad_id
        ).chunk(2)
        loss, stats = reward_pair_loss(chosen, rejected, center_coef=center_coef)
        zero.backward(model, loss * (len(part) / count))
        rows.append(stats | {"loss": loss.detach()})
    weights = torch.tensor([len(part) / count for part in parts], device=model.device)
    mean = {name: (torch.stack([row[name] for row in rows]) * weights).sum() for name in rows[0]}
    return {
        "loss": mean["loss"],
        "accuracy": mean["accuracy"],
        "margin": mean["margin"],
        "mean_reward": (mean["chosen_mean"] + mean["rejected_mean"]) / 2,
        "min_reward": torch.stack([row["reward_min"] for row in rows]).min(),
        "max_reward": torch.stack([row["reward_max"] for row in rows]).max(),
    }


def score(sequences: Sequence[list[int]], model: PreTrainedModel, pad_id: int) -> Tensor:
    ids, mask = collate(sequences, pad_id, side="right")
    return sequence_scores(model, ids.to(model.device), mask.to(model.device))


@torch.inference_mode()
def score_all(model: PreTrainedModel, sequences: Sequence[list[int]], pad_id: int, batch_size: int) -> Tensor:
    """Scores of any number of sequences -> [B] on the CPU, in their order."""
    scores = torch.empty(len(sequences), dtype=torch.float64)
    for rows in loop.length_batches([len(ids) for ids in sequences], batch_size, generator=None):
        scores[rows] = score([sequences[row] for row in rows], model, pad_id).double().cpu()
    return scores


def evaluate(model: PreTrainedModel, pairs: Sequence[Pair], pad_id: int, batch_size: int) -> dict[str, float]:
    """Loss, and share of pairs in the right order; a tie counts half."""
    sequences = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    chosen, rejected = score_all(model, sequences, pad_id, 2 * batch_size).chunk(2)
    loss, stats = reward_pair_loss(chosen, rejected)
    return {"eval_loss": loss.item(), "eval_accuracy": stats["accuracy"].item()}


def summary(
    model: PreTrainedModel, pairs: Sequence[Pair], heldout: Sequence[Pair], pad_id: int, batch_size: int
) -> dict[str, float | int]:
    """Accuracy on held-out pairs with its 95 % interval, and on as many training pairs, to see overfitting."""
    seen = pairs[: len(heldout) or batch_size]
    results = {"train_accuracy": evaluate(model, seen, pad_id, batch_size)["eval_accuracy"], "eval_pairs": len(heldout)}
    if heldout:
        accuracy = evaluate(model, heldout, pad_id, batch_size)["eval_accuracy"]
        low, high = loop.wilson_interval(accuracy * len(heldout), len(heldout))
        results |= {"accuracy": accuracy, "accuracy_low": low, "accuracy_high": high}
    return results


def sample_replies(
    policy: PreTrainedModel,
    tokenizer: object,
    prompts: Sequence[list[int]],
    order: torch.Generator,
    config: RewardConfig,
) -> list[list[int]]:
    """Prompts drawn at random from `prompts`, each with a reply of the policy, as token ids."""
    rows = torch.randint(len(prompts), (config.normalize_samples,), generator=order).tolist()
    completions = generate(
        policy,
        tokenizer,
        [prompts[row] for row in rows],
        max_new_tokens=config.max_response_tokens,
        temperature=config.temperature,
        batch_size=2 * config.batch_size,
    )
    lengths = completions.response_mask.sum(1).tolist()
    replies = zip(rows, completions.response_ids.tolist(), lengths, strict=True)
    return [prompts[row] + ids[:length] for row, ids, length in replies]


def normalize_head(
    model: PreTrainedModel, sequences: Sequence[list[int]], pad_id: int, batch_size: int
) -> dict[str, float]:
    """Fold (r - mean) / std over `sequences` into the head's weight and bias -> what mean and std were.

    UserError if the model scores all of them the same: it has learnt nothing that PPO could use.
    """
    scores = score_all(model, sequences, pad_id, batch_size)
    mean, std = scores.mean().item(), scores.std().item()
    if not std > SMALLEST_SPREAD:
        raise UserError(
            f"the reward model gives all {len(sequences)} sampled replies the same score ({mean:.4g}); "
            "train it longer or on pairs that differ"
        )
    with torch.no_grad():
        model.score.weight /= std
        model.score.bias.sub_(mean).div_(std)
    return {"normalize_mean": mean, "normalize_std": std}
