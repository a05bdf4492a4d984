"""Direct preference optimisation: the policy learns from preference pairs themselves, without a reward model or sampling.

    h = log p(chosen)/p_ref(chosen) - log p(rejected)/p_ref(rejected)
    loss = - mean over pairs of log sigmoid(beta h)                    (Rafailov et al. 2023, arXiv 2305.18290)

p_ref is the policy before its first update, so all that is kept of it is one number a reply, taken before training.
beta times a reply's log-ratio is its implicit reward: a pair is in the right order where h is above 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlhf_fast import dpo_loss
from rlhf_fast.train import checks, distributed, estimate, fsdp, loop, zero
from rlhf_fast.train.chat import Chat
from rlhf_fast.train.checkpoint import save_model
from rlhf_fast.train.config import option, validate
from rlhf_fast.train.data import DataSummary, Preference, read_preferences, split_heldout
from rlhf_fast.train.errors import UserError
from rlhf_fast.train.finite import blaming, keeping, padded
from rlhf_fast.train.generate import generation_config
from rlhf_fast.train.model import load_policy
from rlhf_fast.train.policy import FULL_LOGITS, keep_step, logit_head
from rlhf_fast.train.record import Stage
from rlhf_fast.train.replies import Example, encode, reply_logprobs
from rlhf_fast.train.resume import State, claim

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TRL = "TRL 1.16"  # its DPOConfig
SMOOTHED = ("sigmoid", "robust")


@dataclass(frozen=True)
class DPOConfig(loop.TrainConfig):
    """DPO on preference pairs; `model` is the fine-tuned policy, which also is the reference."""

    max_prompt_tokens: int = option(
        512, "longer prompts lose their beginning", minimum=1, source=loop.N_PLUS, group="training"
    )
    max_response_tokens: int = option(128, "longer replies lose their end", minimum=1)
    beta: float = option(
        0.1, "how strongly the policy is held to the reference", above=0, source=f"arXiv 2305.18290, {TRL}"
    )
    loss_type: str = option(
        "sigmoid",
        "sigmoid (DPO), ipo on means over tokens (arXiv 2310.12036), hinge (SLiC, 2305.10425) or robust (2403.00409)",
        choices=("sigmoid", "ipo", "hinge", "robust"),
        source=TRL,
    )
    label_smoothing: float = option(
        0.0,
        "share of pairs taken to be labelled the wrong way, below 0.5; sigmoid then is conservative DPO, robust unbiased",
        minimum=0,
        source=TRL,
    )
    num_train_epochs: int = option(3, "passes over the pairs", minimum=1, source=TRL)
    batch_size: int = option(64, "pairs per update", minimum=1, source="arXiv 2305.18290")
    micro_batch_size: int = option(0, "pairs per forward pass; 0: the whole batch", minimum=0)
    learning_rate: float = option(1e-6, "peak learning rate", above=0, source=f"arXiv 2305.18290, {TRL}")
    lr_schedule: str = option("linear", "how the rate falls to 0", choices=loop.SCHEDULES, source=TRL)
    warmup_steps: int = option(0, "updates over which the rate rises", minimum=0, source=TRL)
    weight_decay: float = option(0.0, "decoupled weight decay of AdamW", minimum=0, source=TRL)
    adam_epsilon: float = option(1e-8, "epsilon of AdamW", above=0, source=TRL)
    max_grad_norm: float = option(1.0, "the gradient's norm is clipped to this; 0: never", minimum=0, source=TRL)
    logging_steps: int = option(10, "updates between two lines of the log", minimum=1, source=TRL)
    full_logits: bool = option(False, FULL_LOGITS)


@dataclass(frozen=True)
class Pair:
    """A prompt with its better and with its worse reply."""

    chosen: Example
    rejected: Example

    def __len__(self) -> int:
        return max(len(self.chosen.ids), len(self.rejected.ids))

    @property
    def both(self) -> tuple[Example, Example]:
        return self.chosen, self.rejected


def train(config: DPOConfig, *, dry_run: bool = False) -> Path:
    """Run the stage, or what a killed process left of it, and return its directory.

    dry_run: print what memory and time it would take instead, and write nothing.
    UserError, before anything is written, if any input is wrong.
    """
    validate(config)
    check(config)
    loop.check_installed(config, "dpo")
    out, finished = claim("dpo", config)
    if finished:
        return out
    device = loop.pick_device(config.device)
    if dry_run and not estimate.begin("dpo", config, device):
        return out
    chat = Chat.of(config)
    rows, bad_rows, rows_read = read_preferences(config.data, bad_rows=config.bad_rows, chat=chat)
    sides = split_heldout(rows, fraction=config.heldout_fraction, seed=config.split_seed)
    order = loop.seed_everything(config.seed)
    model, tokenizer = load_policy(config.model, dtype=config.dtype, device=device, chat=chat)
    fsdp.spread(loop.made_trainable(model, config))
    loop.use_threads(config.threads, parameters=model.num_parameters(), device=device)
    encoder = loop.Encoder(
        model,
        tokenizer,
        max_prompt_tokens=config.max_prompt_tokens,
        max_response_tokens=config.max_response_tokens,
    )
    pairs, heldout = ([encode_pair(encoder, row) for row in side] for side in sides)
    cut = (encoder.truncated_prompts, encoder.truncated_responses)
    data = DataSummary(config.data, rows_read, len(rows), len(pairs), len(heldout), bad_rows, *cut)

    prompts, pad_id = [row.prompt for row in sides[0]], tokenizer.pad_token_id
    recorded = data.as_dict() | checks.prompt_form(prompts)
    if config.checks:
        sequences = [(pair.chosen.ids, pair.rejected.ids) for pair in pairs]
        reading = {"pad_id": pad_id, "full_logits": config.full_logits}
        checks.check_preferences(config, model, encoder, prompts, len(rows), sequences, **reading)
    if not config.full_logits:
        logit_head(model)  # a model without one is refused here
    if dry_run:
        reference = torch.zeros(2, len(pairs))
    else:
        loop.say(f"dpo: the reference reads {len(rows):,} pairs")
        reference, heldout_reference = (logprobs_of(model, side, pad_id, config) for side in (pairs, heldout))
    lengths = [len(pair) for pair in pairs]
    batches, steps_per_epoch = loop.epochs(lengths, config.batch_size, config.num_train_epochs, order)
    total_steps = len(batches)
    schedule = {"schedule": config.lr_schedule, "warmup_steps": config.warmup_steps}
    optimizer = loop.adamw(
        [model], weight_decay=config.weight_decay, epsilon=config.adam_epsilon, kind=config.optimizer
    )
    means, so_far = loop.Means(), SimpleNamespace(tokens=0)
    inputs = {"training rows": pairs, "held-out rows": heldout}
    state = State({"model": model}, optimizer, order, so_far, inputs, means)

    def of_rows(rows: Sequence[int]) -> dict[str, Tensor]:
        return accumulate_gradient(model, pairs, reference, [rows], pad_id, config)

    def alone(row: int) -> dict[str, Tensor]:
        return of_rows([row])

    if dry_run:
        tried = (lengths, batches, of_rows)
        estimate.passes("dpo", config, {"model": model}, optimizer, *tried, sequences=2, device=device)
        return out
    with Stage("dpo", config, out, total_steps, model.num_parameters(), device, recorded, state) as stage:
        for step, rows in stage.steps(batches[state.step :]):
            rate = loop.learning_rate(step, total_steps, peak=config.learning_rate, **schedule)
            own = distributed.share(rows, lengths)
            parts = loop.micro_batches(own, lengths, config.micro_batch_size, config.micro_batch_tokens, sequences=2)
            where = f"dpo step {step}"
            with (
                keeping(out, where, [prompts[row] for row in rows], config),
                blaming({"model": model}, dict(enumerate(rows)), alone, partial(tensors_of, pairs, rows, pad_id)),
            ):
                stats = accumulate_gradient(model, pairs, reference, parts, pad_id, config, rows)
                stats = distributed.combined({"model": model}, stats)
                norms = loop.clip_and_step(
                    optimizer,
                    {"model": model},
                    {"loss": stats["loss"]},
                    rate=rate,
                    max_grad_norm=config.max_grad_norm,
                    where=where,
                )
            means.add(stats | {"grad_norm": norms["model"]})
            so_far.tokens += sum(len(side.ids) for row in rows for side in pairs[row].both)
            last_of_epoch = step % steps_per_epoch == 0
            if step % config.logging_steps == 0 or last_of_epoch:
                metrics = means.take() | {"learning_rate": rate, "epoch": step / steps_per_epoch}
                metrics |= {"num_tokens": so_far.tokens, "tokens_per_second": so_far.tokens / stage.seconds}
                if last_of_epoch and heldout:
                    metrics |= evaluate(model, heldout, heldout_reference, pad_id, config)
                stage.log(step, metrics, show=("loss", "rewards/accuracies", "eval_rewards/accuracies"))
        results = summary(model, (pairs, heldout), (reference, heldout_reference), pad_id, config)
        model.generation_config = generation_config(tokenizer, config.max_response_tokens, temperature=1.0)
        save_model(out, model, tokenizer)
        stage.finish(results)
    return out


def check(config: DPOConfig) -> None:
    """UserError for keys that are right one by one and wrong together."""
    if config.label_smoothing >= 0.5:
        raise UserError(f"dpo: 'label_smoothing' must be below 0.5, got {config.label_smoothing}")
    if config.label_smoothing and config.loss_type not in SMOOTHED:
        raise UserError(
            f"dpo: 'label_smoothing' must be 0 with loss_type {config.loss_type}, got {config.label_smoothing}; "
            f"only {' and '.join(SMOOTHED)} take one"
        )


def tensors_of(pairs: Sequence[Pair], rows: Sequence[int], pad_id: int) -> dict[str, Tensor]:
    """The token ids of a batch, a pair a row."""
    sides = {side: padded([getattr(pairs[row], side).ids for row in rows], pad_id) for side in ("chosen", "rejected")}
    return {f"{side}_{name}": x for side, tensors in sides.items() for name, x in tensors.items()}


def encode_pair(encoder: loop.Encoder, row: Preference) -> Pair:
    return Pair(encode(encoder, row.prompt, row.chosen), encode(encoder, row.prompt, row.rejected))


def accumulate_gradient(
    model: PreTrainedModel,
    pairs: Sequence[Pair],
    reference: Tensor,
    parts: Sequence[Sequence[int]],
    pad_id: int,
    config: DPOConfig,
    batch_rows: Sequence[int] = (),
) -> dict[str, Tensor]:
    """Add the gradient of the mean loss over a batch, given as row numbers in parts -> its loss and statistics.

    reference: log-probs [2, N] of all `pairs` under the reference. batch_rows: those of the whole batch, where `parts` are only
    this process's share of them.
    """
    whole = batch_rows or [row for part in parts for row in part]
    count = len(whole)
    tokens = sum(len(side.ids) - side.start for row in whole for side in pairs[row].both)
    totals: dict[str, Tensor] = {}
    keep_step([model], len(parts), config.full_logits)
    for part in parts:
        batch, share = [pairs[row] for row in part], len(part) / count
        logprobs, entropy = read(model, batch, pad_id, config.full_logits)
        loss, stats = preference_loss(logprobs, reference[:, part], batch, config)
        zero.backward(model, loss * share)
        means = logprobs.detach().mean(1)
        values = described(loss.detach(), stats) | {"logps/chosen": means[0], "logps/rejected": means[1]}
        mean = {name: value * share for name, value in values.items()} | {"entropy": entropy / tokens}
        totals = {name: totals[name] + value for name, value in mean.items()} if totals else mean
    return totals


def described(loss: Tensor, stats: dict[str, Tensor]) -> dict[str, Tensor]:
    """Loss and statistics under TRL's names."""
    return {
        "loss": loss,
        "rewards/chosen": stats["chosen_reward"],
        "rewards/rejected": stats["rejected_reward"],
        "rewards/margins": stats["margin"],
        "rewards/accuracies": stats["accuracy"],
    }


def read(model: PreTrainedModel, pairs: Sequence[Pair], pad_id: int, full_logits: bool) -> tuple[Tensor, Tensor]:
    """Log-probs [2, B] of whole replies, the chosen ones first, and the entropy [] summed over all their tokens."""
    examples = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    logprobs, entropy = reply_logprobs(model, examples, pad_id, full_logits)
    return logprobs.sum(1).view(2, -1), entropy.detach().sum()


@torch.inference_mode()
def logprobs_of(model: PreTrainedModel, pairs: Sequence[Pair], pad_id: int, config: DPOConfig) -> Tensor:
    """Log-probs [2, B] as `read` gives them, of any number of pairs, in their order, on the CPU."""
    logprobs = torch.empty(2, len(pairs), dtype=torch.float64)
    size = config.micro_batch_size or config.batch_size
    for rows in loop.length_batches([len(pair) for pair in pairs], size, generator=None):
        logprobs[:, rows] = read(model, [pairs[row] for row in rows], pad_id, config.full_logits)[0].double().cpu()
    return logprobs


def preference_loss(
    logprobs: Tensor, reference: Tensor, pairs: Sequence[Pair], config: DPOConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and statistics of `dpo_loss` for B pairs, given the log-probs [2, B] of policy and reference."""
    reference = reference.to(logprobs)
    options = {"beta": config.beta, "loss_type": config.loss_type, "label_smoothing": config.label_smoothing}
    if config.loss_type != "ipo":
        return dpo_loss(*logprobs, *reference, **options)
    # Over sums the target 1 / (2 beta) would mean less, the longer the reply; means over tokens are what the paper's authors
    # and TRL train. The rewards stay those of whole replies, as with the other losses.
    lengths = torch.tensor([[len(side.ids) - side.start for side in pair.both] for pair in pairs]).T.to(logprobs)
    loss, _ = dpo_loss(*(logprobs / lengths), *(reference / lengths), **options)
    return loss, dpo_loss(*logprobs.detach(), *reference, beta=config.beta)[1]


def evaluate(
    model: PreTrainedModel, pairs: Sequence[Pair], reference: Tensor, pad_id: int, config: DPOConfig
) -> dict[str, float]:
    """Loss, implicit rewards, and share of pairs in the right order; a tie counts half."""
    loss, stats = preference_loss(logprobs_of(model, pairs, pad_id, config), reference, pairs, config)
    return {f"eval_{name}": value.item() for name, value in described(loss, stats).items()}


def summary(
    model: PreTrainedModel,
    sides: tuple[Sequence[Pair], Sequence[Pair]],
    references: tuple[Tensor, Tensor],
    pad_id: int,
    config: DPOConfig,
) -> dict[str, float | int]:
    """Accuracy on held-out pairs with its 95 % interval, and on as many training pairs, to see overfitting."""
    (pairs, heldout), (reference, heldout_reference) = sides, references
    seen = len(heldout) or config.batch_size
    results = evaluate(model, pairs[:seen], reference[:, :seen], pad_id, config)
    results = {"train_accuracy": results["eval_rewards/accuracies"], "eval_pairs": len(heldout)}
    if heldout:
        accuracy = evaluate(model, heldout, heldout_reference, pad_id, config)["eval_rewards/accuracies"]
        low, high = loop.wilson_interval(accuracy * len(heldout), len(heldout))
        results |= {"accuracy": accuracy, "accuracy_low": low, "accuracy_high": high}
    return results
