"""Stage 1, supervised fine-tuning: the model learns to give the demonstrated replies.

    loss = - mean over reply tokens y_t (the end token among them) of log p(y_t | prompt, y_<t)

The prompt is read but, unless `train_on_prompt`, not learnt. Every learnt token of a batch counts the same, whatever
micro-batch it stands in.
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

from rlhf_fast.train import checks, distributed, estimate, fsdp, loop
from rlhf_fast.train.chat import Chat
from rlhf_fast.train.checkpoint import save_model
from rlhf_fast.train.config import option, validate
from rlhf_fast.train.data import DataSummary, read_demonstrations, split_heldout
from rlhf_fast.train.finite import blaming, keeping, padded
from rlhf_fast.train.generate import generation_config
from rlhf_fast.train.model import load_policy
from rlhf_fast.train.policy import FULL_LOGITS, logit_head
from rlhf_fast.train.record import Stage
from rlhf_fast.train.replies import Example, accumulate_loss, encode, reply_logprobs, reply_tokens
from rlhf_fast.train.resume import State, claim

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class SFTConfig(loop.TrainConfig):
    """Supervised fine-tuning on demonstrations, or on the chosen replies of preference pairs."""

    max_prompt_tokens: int = option(
        512, "longer prompts lose their beginning", minimum=1, source=loop.N_PLUS, group="training"
    )
    max_response_tokens: int = option(128, "longer replies lose their end", minimum=1)
    train_on_prompt: bool = option(
        False, "learn the prompt as well as the reply; better where data is scarce", source="arXiv 2405.14394"
    )
    num_train_epochs: int = option(1, "passes over the data", minimum=1, source=loop.N_PLUS)
    batch_size: int = option(64, "demonstrations per update", minimum=1)
    micro_batch_size: int = option(0, "demonstrations per forward pass; 0: the whole batch", minimum=0)
    learning_rate: float = option(1e-5, "peak learning rate", above=0)
    lr_schedule: str = option("linear", "how the rate falls to 0", choices=loop.SCHEDULES)
    warmup_steps: int = option(0, "updates over which the rate rises", minimum=0)
    weight_decay: float = option(0.01, "decoupled weight decay of AdamW", minimum=0)
    adam_epsilon: float = option(1e-5, "epsilon of AdamW", above=0, source=loop.N_PLUS)
    max_grad_norm: float = option(1.0, "the gradient's norm is clipped to this; 0: never", minimum=0)
    logging_steps: int = option(10, "updates between two lines of the log", minimum=1)
    full_logits: bool = option(False, FULL_LOGITS)


def train(config: SFTConfig, *, dry_run: bool = False) -> Path:
    """Run the stage, or what a killed process left of it, and return its directory.

    dry_run: print what memory and time it would take instead, and write nothing.
    UserError, before anything is written, if any input is wrong.
    """
    validate(config)
    loop.check_installed(config, "sft")
    out, finished = claim("sft", config)
    if finished:
        return out
    device = loop.pick_device(config.device)
    if dry_run and not estimate.begin("sft", config, device):
        return out
    chat = Chat.of(config)
    rows, bad_rows, rows_read = read_demonstrations(config.data, bad_rows=config.bad_rows, chat=chat)
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
    examples, heldout = ([encode(encoder, row.prompt, row.response) for row in side] for side in sides)
    if config.checks:
        checks.check_prompts_fit(encoder.truncated_prompts, len(rows), encoder.max_prompt_tokens)
        replies = [example.ids[example.start :] for example in examples]
        checks.check_replies_end(replies, tokenizer, config.max_response_tokens)
        checks.check_weights({"model": model})
        probes = [example.ids for example in examples[: checks.PROBES]]
        checks.check_reading("model", model, probes, pad_id=tokenizer.pad_token_id, full_logits=config.full_logits)
    if not config.full_logits:
        logit_head(model)  # a model without one is refused here
    if config.train_on_prompt:
        # The first token follows nothing, so there is no probability of it to learn.
        examples = [Example(example.ids, start=1) for example in examples]
    cut = (encoder.truncated_prompts, encoder.truncated_responses)
    data = DataSummary(config.data, rows_read, len(rows), len(examples), len(heldout), bad_rows, *cut)
    recorded = data.as_dict() | checks.prompt_form([row.prompt for row in sides[0]])

    lengths = [len(example.ids) for example in examples]
    batches, steps_per_epoch = loop.epochs(lengths, config.batch_size, config.num_train_epochs, order)
    total_steps = len(batches)
    schedule = {"schedule": config.lr_schedule, "warmup_steps": config.warmup_steps}
    optimizer = loop.adamw(
        [model], weight_decay=config.weight_decay, epsilon=config.adam_epsilon, kind=config.optimizer
    )
    means, so_far = loop.Means(), SimpleNamespace(tokens=0, results={})
    inputs = {"training rows": examples, "held-out rows": heldout}
    state = State({"model": model}, optimizer, order, so_far, inputs, means)
    pad_id = tokenizer.pad_token_id

    def alone(example: Example) -> dict[str, Tensor]:
        return accumulate_gradient(model, [[example]], pad_id, config.full_logits)

    def of_rows(rows: Sequence[int]) -> dict[str, Tensor]:
        return accumulate_gradient(model, [[examples[row] for row in rows]], pad_id, config.full_logits)

    if dry_run:
        tried = (lengths, batches, of_rows)
        estimate.passes("sft", config, {"model": model}, optimizer, *tried, sequences=1, device=device)
        return out
    with Stage("sft", config, out, total_steps, model.num_parameters(), device, recorded, state) as stage:
        for step, rows in stage.steps(batches[state.step :]):
            rate = loop.learning_rate(step, total_steps, peak=config.learning_rate, **schedule)
            own = distributed.share(rows, lengths)
            few = loop.micro_batches(own, lengths, config.micro_batch_size, config.micro_batch_tokens)
            parts = [[examples[row] for row in part] for part in few]
            learnt = reply_tokens(examples[row] for row in rows)
            where, batch = f"sft step {step}", dict(enumerate(examples[row] for row in rows))
            with (
                keeping(out, where, [sides[0][row].prompt for row in rows], config),
                blaming({"model": model}, batch, alone, partial(padded, [x.ids for x in batch.values()], pad_id)),
            ):
                losses = accumulate_gradient(model, parts, pad_id, config.full_logits, learnt)
                losses = distributed.combined({"model": model}, losses)
                norms = loop.clip_and_step(
                    optimizer, {"model": model}, losses, rate=rate, max_grad_norm=config.max_grad_norm, where=where
                )
            means.add(losses | {"grad_norm": norms["model"]})
            so_far.tokens += sum(lengths[row] for row in rows)
            last_of_epoch = step % steps_per_epoch == 0
            if step % config.logging_steps == 0 or last_of_epoch:
                metrics = means.take() | {"learning_rate": rate, "epoch": step / steps_per_epoch}
                metrics |= {"num_tokens": so_far.tokens, "tokens_per_second": so_far.tokens / stage.seconds}
                if last_of_epoch and heldout:
                    metrics["eval_loss"] = evaluate(model, heldout, pad_id, config.batch_size, config.full_logits)
                stage.log(step, metrics, show=("loss", "eval_loss"))
                so_far.results |= metrics
        model.generation_config = generation_config(tokenizer, config.max_response_tokens, temperature=1.0)
        save_model(out, model, tokenizer)
        stage.finish(so_far.results)
    return out


def accumulate_gradient(
    model: PreTrainedModel,
    parts: Sequence[Sequence[Example]],
    pad_id: int,
    full_logits: bool = False,
    tokens: int | None = None,
) -> dict[str, Tensor]:
    """Add the gradient of the mean loss over all reply tokens of a batch, given in parts -> its loss and entropy.

    tokens: so many are in the batch, of which `parts` are this process's share; None: they are all of it.
    """
    return accumulate_loss(model, parts, pad_id, full_logits, tokens=tokens)


@torch.inference_mode()
def evaluate(
    model: PreTrainedModel, examples: Sequence[Example], pad_id: int, batch_size: int, full_logits: bool = False
) -> float:
    """Mean loss over all reply tokens of `examples`, in nats per token."""
    total = torch.zeros((), device=model.device, dtype=torch.float64)
    for rows in loop.length_batches([len(example.ids) for example in examples], batch_size, generator=None):
        total -= reply_logprobs(model, [examples[row] for row in rows], pad_id, full_logits)[0].sum()
    return (total / sum(len(example.ids) - example.start for example in examples)).item()
