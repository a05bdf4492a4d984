"""PPO against an independent transcription in float64, one row at a time and without padding, and as a stage."""

import copy
import dataclasses
import functools
import json
import math
import re
import tempfile
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from rlhf_fast.train import loop, ppo, reward, rollout, sft
from rlhf_fast.train.checkpoint import save_model
from rlhf_fast.train.config import keys
from rlhf_fast.train.errors import UserError
from rlhf_fast.train.evaluate import distinct_n
from rlhf_fast.train.generate import Sample
from rlhf_fast.train.model import load_policy, load_scalar_model, reward_from_policy
from rlhf_fast.train.ppo import PPOConfig
from rlhf_fast.train.replies import encode
from rlhf_fast.train.rollout import Models

TRL_NAMES = {
    "eps",
    "objective/kl",
    "objective/entropy",
    "objective/non_score_reward",
    "objective/rlhf_reward",
    "objective/scores",
    "policy/approxkl_avg",
    "policy/clipfrac_avg",
    "loss/policy_avg",
    "loss/value_avg",
    "val/clipfrac_avg",
    "policy/entropy_avg",
    "val/ratio",
    "val/ratio_var",
    "val/num_eos_tokens",
    "lr",
    "episode",
    "epoch",
}
MORE_NAMES = {
    "objective/kl_coef",
    "policy/grad_norm",
    "value/grad_norm",
    "val/explained_var",
    "response/length",
    "response/eos_rate",
    "response/distinct_1",
    "response/distinct_2",
    "tokens_per_second",
    "step",
    "seconds",
    "cpu_seconds",
}


EARLIER_SCORES = [0.5, -1.0, 2.0]
EARLIER_MOMENTS = [3.0, 0.5, 4.5]  # their number, mean and sum of squared deviations
PTX = [("the cat", " sat on a mat"), ("a dog", " ran"), ("hill", " was sad and happy today")]


def options(**changes):
    chosen = {
        "model": "",
        "data": "",
        "output_dir": "",
        "reward_model": "",
        "response_length": 10,
        "batch_size": 8,
        "num_mini_batches": 2,
        "num_ppo_epochs": 2,
        "learning_rate": 0.02,
        "kl_coef": 0.3,
        "vf_coef": 0.5,
        "entropy_coef": 0.01,
        "lam": 0.9,
        "gamma": 0.97,
    }
    return PPOConfig(**(chosen | changes))


@functools.cache
def loaded_models():
    """The models that the tests of single updates start from, loaded once; `build_models` gives copies."""
    with tempfile.TemporaryDirectory() as directory:
        base = tiny.save_base(Path(directory) / "base", "gpt2")
        policy, tokenizer = load_policy(base, dtype="float64")
        reference = load_policy(base, dtype="float64")[0]
        torch.manual_seed(5)
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        value, reward_model = (reward_from_policy(base, dtype="float64")[0] for _ in range(2))
    return Models(policy, reference, value, reward_model, tokenizer)


def build_models():
    made = loaded_models()
    copies = {name: copy.deepcopy(getattr(made, name)) for name in ("policy", "reference", "value", "reward")}
    return dataclasses.replace(made, **copies)


def play(models, config, kl_coef=None, seed=11):
    """The steps of one update before the optimizer, as the stage takes them."""
    torch.manual_seed(seed)
    prompts = ["the cat", "a dog sat on", "hill", "the cat was happy today", "mat", "sad", "on a hill", "ran"]
    queries = [[1, *models.tokenizer.encode(prompt, add_special_tokens=False)] for prompt in prompts]
    replies = rollout.roll_out(
        models, prompts, queries, response_length=config.response_length, temperature=config.temperature
    )
    replies = end_at(replies, [10, 4, 1, 7, 10, 3, 9, 2], models.tokenizer)
    return experience(replies, models, config, config.kl_coef if kl_coef is None else kl_coef)


def end_at(replies, lengths, tokenizer):
    """The same replies, each ended at a length of ours; those of full length stay without an end."""
    ids, width = replies.ids.clone(), replies.ids.shape[1] - replies.response_mask.shape[1]
    mask = torch.arange(replies.response_mask.shape[1]) < torch.tensor(lengths)[:, None]
    for row, length in enumerate(lengths):
        if length < mask.shape[1]:
            ids[row, width + length - 1] = tokenizer.eos_token_id
            ids[row, width + length :] = tokenizer.pad_token_id
    return dataclasses.replace(
        replies,
        ids=ids,
        mask=torch.cat([replies.mask[:, :width], mask], 1),
        response_mask=mask,
        finished=torch.tensor(lengths) < mask.shape[1],
        response_lengths=lengths,
    )


def experience(replies, models, config, kl_coef):
    scored = rollout.score(
        replies,
        models,
        temperature=config.temperature,
        missing_eos=config.missing_eos,
        missing_eos_penalty=config.missing_eos_penalty,
        min_response_length=config.min_response_length,
        micro_batch_size=config.micro_batch_size,
    )
    scale = ppo.running_scale(list(EARLIER_MOMENTS), scored.scores) if config.reward_scaling else 1.0
    return ppo.advantages_of(scored, kl_coef, config, scale)


# ------------------------------------------------------------------------------------- transcription in float64


class Transcription:
    """arXiv 2403.17031 and 1707.06347, and what else is an option, for rows of plain Python lists; gradients by autograd."""

    def __init__(self, models, replies, config):
        self.policy, self.value, self.tokenizer = models.policy, models.value, models.tokenizer
        self.config = config
        width = replies.ids.shape[1] - replies.response_mask.shape[1]
        self.rows = []
        for ids, query, response in zip(replies.ids, replies.query_lengths, replies.response_lengths, strict=True):
            self.rows.append((ids[width - query : width].tolist(), ids[width : width + response].tolist()))
        finished = [
            response[-1] == models.tokenizer.eos_token_id and len(response) >= config.min_response_length
            for _, response in self.rows
        ]
        with torch.no_grad():
            self.old = [self.logprobs(models.policy, *row)[0] for row in self.rows]
            self.ref = [self.logprobs(models.reference, *row)[0] for row in self.rows]
            self.old_values = [self.values(models.value, *row) for row in self.rows]
            self.scores = [self.score(models.reward, *row, end) for row, end in zip(self.rows, finished, strict=True)]
            self.advantages, self.returns = self.estimate()

    def logprobs(self, model, query, response):
        logits = model(torch.tensor([query + response])).logits[0] / self.config.temperature
        table = logits[len(query) - 1 : -1].log_softmax(-1)
        return table[range(len(response)), response], -(table.exp() * table).sum(-1)

    def values(self, model, query, response):
        hidden = model.transformer(torch.tensor([query + response])).last_hidden_state[0]
        return model.score(hidden)[len(query) - 1 : -1, 0]

    def score(self, model, query, response, finished):
        hidden = model.transformer(torch.tensor([query + response])).last_hidden_state[0]
        score = model.score(hidden)[-1, 0]
        penalty = self.config.missing_eos_penalty
        if not finished and self.config.missing_eos == "replace":
            return torch.tensor(-penalty, dtype=torch.float64)
        return score - penalty if not finished and self.config.missing_eos == "subtract" else score

    def penalty(self, old, ref):
        d = old - ref
        return {"k1": d, "k2": d**2 / 2, "k3": torch.exp(-d) - 1 + d, "abs": d.abs()}[self.config.kl_estimator]

    def estimate(self):
        c = self.config
        rewards, scale = [], 1.0
        if c.reward_scaling:
            scale = torch.tensor([*EARLIER_SCORES, *self.scores], dtype=torch.float64).std()
        for old, ref, score in zip(self.old, self.ref, self.scores, strict=True):
            reward_t = -c.kl_coef * self.penalty(old, ref)
            score = float(score) / scale
            reward_t[-1] += score if c.score_clip is None else max(-c.score_clip, min(c.score_clip, score))
            rewards.append(reward_t)
        if c.whiten_rewards:
            flat = torch.cat(rewards)
            rewards = [(r - flat.mean()) / (flat.var() + 1e-8).sqrt() + flat.mean() for r in rewards]
        advantages, returns = [], []
        for reward_t, values in zip(rewards, self.old_values, strict=True):
            gain, next_value, row = 0.0, 0.0, []
            for t in reversed(range(len(reward_t))):
                delta = float(reward_t[t]) + c.gamma * next_value - float(values[t])
                gain = delta + c.gamma * c.lam * gain
                next_value = float(values[t])
                row.insert(0, gain)
            advantages.append(torch.tensor(row, dtype=torch.float64))
            returns.append(advantages[-1] + values)
        if c.whiten_advantages:
            flat = torch.cat(advantages)
            variance = flat.var(unbiased=c.whiten_unbiased)
            advantages = [(a - flat.mean()) / (variance + 1e-8).sqrt() for a in advantages]
        if c.advantage_clip is not None:
            advantages = [
                torch.tensor(
                    [max(-c.advantage_clip, min(c.advantage_clip, float(a))) for a in row], dtype=torch.float64
                )
                for row in advantages
            ]
        return advantages, returns

    def minibatch(self, rows):
        c, tokens = self.config, sum(len(self.rows[row][1]) for row in rows)
        new, entropy = zip(*(self.logprobs(self.policy, *self.rows[row]) for row in rows), strict=True)
        new, entropy = torch.cat(new), torch.cat(entropy)
        old, advantages = torch.cat([self.old[r] for r in rows]), torch.cat([self.advantages[r] for r in rows])
        log_ratio = new - old
        if c.log_ratio_clip is not None:
            log_ratio = log_ratio.clamp(-c.log_ratio_clip, c.log_ratio_clip)
        ratio, high = torch.exp(log_ratio), c.cliprange if c.cliprange_high is None else c.cliprange_high
        unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - c.cliprange, 1 + high)
        token_losses = torch.maximum(unclipped, clipped)
        if c.dual_clip is not None:
            bounded = torch.minimum(token_losses, -advantages * c.dual_clip)
            token_losses = torch.where(advantages < 0, bounded, token_losses)
        policy_loss = token_losses.sum() / tokens
        values = torch.cat([self.values(self.value, *self.rows[row]) for row in rows])
        old_values, returns = torch.cat([self.old_values[r] for r in rows]), torch.cat([self.returns[r] for r in rows])
        near = values
        if c.cliprange_value is not None:
            # Not old + (new - old), whose rounding counts as a clip where the two differ in sign.
            near = values.clamp(old_values - c.cliprange_value, old_values + c.cliprange_value)
        errors, near_errors = (values - returns) ** 2, (near - returns) ** 2
        value_loss = 0.5 * torch.maximum(errors, near_errors).sum() / tokens
        loss = policy_loss + c.vf_coef * value_loss - c.entropy_coef * entropy.mean()
        return loss, {
            "loss/policy_avg": policy_loss,
            "loss/value_avg": value_loss,
            "policy/entropy_avg": entropy.mean(),
            "policy/approxkl_avg": 0.5 * (log_ratio**2).mean(),
            "policy/clipfrac_avg": (clipped > unclipped).double().mean(),
            "val/clipfrac_avg": (near_errors > errors).double().mean(),
            "val/ratio": ratio.mean(),
            "val/ratio_var": ratio.var(unbiased=False),
        }

    def ptx(self, rows, examples):
        """Minus the mean log-probability of the reply tokens of written examples, at temperature 1."""
        found = []
        for row in rows:
            ids, start = examples[row].ids, examples[row].start
            table = self.policy(torch.tensor([ids])).logits[0].log_softmax(-1)
            found.append(table[range(start - 1, len(ids) - 1), ids[start:]])
        return -torch.cat(found).mean()

    def update(self, order, examples=(), warming=False):
        """All optimizer steps of the update; the mean of each statistic over them."""
        c, models, history = self.config, {"policy": self.policy, "value": self.value}, []
        rates = {"policy": c.learning_rate, "value": c.value_learning_rate or c.learning_rate}
        optimizers = {
            name: torch.optim.AdamW(
                model.parameters(),
                lr=rates[name],
                betas=(c.adam_beta1, c.adam_beta2),
                eps=c.adam_epsilon,
                weight_decay=c.weight_decay,
            )
            for name, model in models.items()
            if name == "value" or not warming
        }
        self.average = [parameter.detach().clone() for parameter in self.policy.parameters()]
        for _ in range(c.num_ppo_epochs):
            this_pass = []
            for rows in torch.randperm(len(self.rows), generator=order).split(len(self.rows) // c.num_mini_batches):
                for model in models.values():
                    model.zero_grad()
                loss, stats = self.minibatch(rows.tolist())
                if examples:
                    drawn = torch.randint(len(examples), (len(rows),), generator=order).tolist()
                    stats["loss/ptx_avg"] = self.ptx(drawn, examples)
                    loss = loss + c.ptx_coef * stats["loss/ptx_avg"]
                loss.backward()
                for name, optimizer in optimizers.items():
                    norm = torch.nn.utils.clip_grad_norm_(models[name].parameters(), c.max_grad_norm)
                    stats[f"{name}/grad_norm"] = norm
                    optimizer.step()
                if c.ema_decay is not None:
                    pairs = zip(self.average, self.policy.parameters(), strict=True)
                    self.average = [c.ema_decay * a + (1 - c.ema_decay) * p.detach() for a, p in pairs]
                this_pass.append({name: float(value.detach()) for name, value in stats.items()})
            history += this_pass
            if c.target_kl is not None:
                approx = [row["policy/approxkl_avg"] for row in this_pass]
                if sum(approx) / len(approx) > c.target_kl:
                    break
        return {name: sum(row[name] for row in history) / len(history) for name in history[0]}


CASES = {
    "defaults": {},
    "micro-batches of 1": {"micro_batch_size": 1},
    "micro-batches of 3": {"micro_batch_size": 3},
    "micro-batches of 25 tokens": {"micro_batch_tokens": 25},
    "whitened rewards": {"whiten_rewards": True},
    "raw advantages": {"whiten_advantages": False},
    "k3": {"kl_estimator": "k3", "micro_batch_size": 2},
    "k2": {"kl_estimator": "k2"},
    "subtract": {"missing_eos": "subtract", "missing_eos_penalty": 0.7},
    "no penalty": {"missing_eos": "none", "score_clip": 0.2},
    "free values": {"cliprange_value": None, "vf_coef": 0.1},
    "gamma 1, lam 1": {"gamma": 1.0, "lam": 1.0, "num_mini_batches": 4},
    "abs": {"kl_estimator": "abs", "rollout_micro_batch_size": 3},
    "Bessel's correction": {"whiten_unbiased": True, "whiten_rewards": True},
    "short replies": {"min_response_length": 4, "missing_eos": "subtract"},
    "short replies replaced": {"min_response_length": 3},
    "PPO-max": {"reward_scaling": True, "score_clip": 0.3, "advantage_clip": 0.5, "micro_batch_size": 3},
    "clip higher": {"cliprange": 0.05, "cliprange_high": 0.3},
    "dual clip": {"dual_clip": 1.02, "learning_rate": 0.05},
    "log ratio held": {"log_ratio_clip": 0.3, "learning_rate": 0.05},
    "log ratio free": {"log_ratio_clip": None},
    "target_kl": {"target_kl": 1e-3, "num_ppo_epochs": 3},
    "critic warm-up": {"critic_warmup": 1},
    "own rate of the values": {"value_learning_rate": 0.003, "adam_beta1": 0.8, "adam_beta2": 0.95},
    "PPO-ptx": {"ptx_coef": 0.7, "micro_batch_size": 3},
    "average of the weights": {"ema_decay": 0.9},
    "InstructGPT": {"ptx_coef": 27.8, "ema_decay": 0.992, "value_learning_rate": 0.009, "score_clip": 0.2},
}


@pytest.mark.parametrize("case", CASES)
def test_one_update_is_the_published_algorithm(case):
    config = options(**CASES[case])
    models, twins = build_models(), build_models()
    if config.ema_decay is not None:
        models = dataclasses.replace(models, average=copy.deepcopy(models.policy))
    batch = play(models, config)
    expected = Transcription(twins, batch.scored.rollout, config)
    lengths = batch.scored.rollout.response_lengths
    assert len(set(lengths)) > 2 and set(batch.scored.rollout.finished.tolist()) == {True, False}

    def rows(x):
        return [x[row, :length] for row, length in enumerate(lengths)]

    close = {"rtol": 1e-8, "atol": 1e-9}
    torch.testing.assert_close(list(batch.scored.scores), expected.scores, **close)
    for mine, theirs in (
        (batch.scored.logprobs, expected.old),
        (batch.scored.ref_logprobs, expected.ref),
        (batch.scored.values, expected.old_values),
        (batch.advantages, expected.advantages),
        (batch.returns, expected.returns),
    ):
        torch.testing.assert_close(rows(mine), theirs, **close)
        assert not mine[~batch.scored.rollout.response_mask].any()

    minibatch = [5, 0, 3, 6]
    stats = ppo.accumulate_gradient(batch, minibatch, models, config)
    loss, expected_stats = expected.minibatch(minibatch)
    loss.backward()
    assert {k: float(v) for k, v in stats.items()} == pytest.approx(
        {k: float(v.detach()) for k, v in expected_stats.items()}, rel=1e-6, abs=1e-9
    )
    for mine, theirs in ((models.policy, twins.policy), (models.value, twins.value)):
        for (name, a), b in zip(mine.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-9, msg=name)
        mine.zero_grad()

    optimizer = loop.adamw(
        [models.policy, models.value],
        weight_decay=config.weight_decay,
        epsilon=config.adam_epsilon,
        betas=(config.adam_beta1, config.adam_beta2),
    )
    order, rates = torch.Generator().manual_seed(3), ppo.learning_rates(1, 5, config)
    warming = config.critic_warmup > 0
    encoder = loop.Encoder(models.policy, models.tokenizer, max_prompt_tokens=20, max_response_tokens=20)
    ptx = [encode(encoder, *texts) for texts in PTX] if config.ptx_coef else []
    stats = ppo.optimize(batch, models, optimizer, config, order, rate=rates, where="test", ptx=ptx, warming=warming)
    expected_stats = expected.update(torch.Generator().manual_seed(3), ptx, warming)
    assert stats == pytest.approx(expected_stats, rel=1e-5, abs=1e-7)
    assert warming or stats["policy/clipfrac_avg"] > 0
    assert config.cliprange_value is None or stats["val/clipfrac_avg"] > 0
    if config.ema_decay is not None:
        for (name, a), b in zip(models.average.named_parameters(), expected.average, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)
    for mine, theirs in ((models.policy, twins.policy), (models.value, twins.value)):
        for (name, a), b in zip(mine.named_parameters(), theirs.named_parameters(), strict=True):
            torch.testing.assert_close(a, b[1], rtol=1e-5, atol=1e-6, msg=name)


def test_the_cases_reach_every_branch_they_are_named_after():
    """A limit that never binds would pass whatever it did."""
    models = build_models()
    plain, clipped = (play(models, options(**case)) for case in ({}, {"advantage_clip": 0.5}))
    assert plain.advantages.abs().max() > 0.5 == clipped.advantages.abs().max()
    assert clipped.returns.equal(plain.returns)
    scaled = play(models, options(reward_scaling=True))
    assert scaled.score_scale != 1 and scaled.scored.scores.equal(plain.scored.scores)
    unbiased = play(models, options(whiten_unbiased=True))
    tokens = sum(plain.scored.rollout.response_lengths)
    close = {"rtol": 1e-8, "atol": 1e-12}
    torch.testing.assert_close(unbiased.advantages, plain.advantages * math.sqrt((tokens - 1) / tokens), **close)
    short = play(models, options(min_response_length=4)).scored.scores
    lengths = torch.tensor(plain.scored.rollout.response_lengths)
    assert (short[(lengths < 4) | (lengths == 10)] == -1).all() and (short[(lengths >= 4) & (lengths < 10)] != -1).all()


@pytest.mark.parametrize("full_logits", [False, True])
def test_critic_warm_up_reads_the_policy_and_makes_no_gradient_of_it(monkeypatch, full_logits):
    config = options(critic_warmup=1, micro_batch_size=3, full_logits=full_logits)
    original, results = ppo.add_gradient, {}
    for name in ("thrown away", "never made"):
        models = build_models()
        called = []
        for part, model in models.trained.items():
            for parameter in model.parameters():
                parameter.register_hook(lambda gradient, part=part, called=called: called.append(part))

        def thrown_away(*arguments, warming, models=models):
            stats = original(*arguments)
            models.policy.zero_grad()
            return stats

        with monkeypatch.context() as patch:
            if name == "thrown away":
                patch.setattr(ppo, "add_gradient", thrown_away)
            optimizer = loop.adamw(models.trained.values(), weight_decay=0.1, epsilon=1e-5)
            order = torch.Generator().manual_seed(3)
            batch = play(models, config)
            stats = ppo.optimize(batch, models, optimizer, config, order, rate=0.02, where="test", warming=True)
        assert set(called) == ({"policy", "value"} if name == "thrown away" else {"value"})
        results[name] = stats, models.value.state_dict(), models.policy.state_dict()
    (stats, *weights), (expected_stats, *expected) = results["never made"], results["thrown away"]
    assert stats == expected_stats
    for mine, theirs in zip(weights, expected, strict=True):
        assert all(mine[name].equal(theirs[name]) for name in theirs)


def test_dual_clip_and_the_limit_of_the_log_ratio_change_the_loss():
    losses = {}
    for name, case in {"none": {}, "dual": {"dual_clip": 1.02}, "held": {"log_ratio_clip": 0.01}}.items():
        config = options(learning_rate=0.05, **case)
        models = build_models()
        optimizer = loop.adamw(models.trained.values(), weight_decay=0.0, epsilon=1e-5)
        order = torch.Generator().manual_seed(3)
        stats = ppo.optimize(play(models, config), models, optimizer, config, order, rate=0.05, where="test")
        losses[name] = stats["loss/policy_avg"]
    assert len(set(losses.values())) == 3


def test_the_running_scale_is_the_deviation_of_all_scores_so_far():
    moments, scores = [0.0, 0.0, 0.0], torch.randn(40, generator=torch.Generator().manual_seed(0)) * 3 + 100
    for start in range(0, 40, 8):
        scale = ppo.running_scale(moments, scores[start : start + 8])
        assert scale == pytest.approx(scores[: start + 8].double().std().item(), rel=1e-9)
    assert ppo.running_scale([0.0, 0.0, 0.0], torch.ones(4)) == 1


# ------------------------------------------------------------------------------------------------------- metrics


def wider(replies, tokenizer, left, right):
    """The same rollout with more padding on both sides."""

    def pad(x, left, right, value=0):
        return torch.nn.functional.pad(x, (left, right), value=value)

    return dataclasses.replace(
        replies,
        ids=pad(replies.ids, left, right, tokenizer.pad_token_id),
        mask=pad(replies.mask, left, right),
        response_mask=pad(replies.response_mask, 0, right),
    )


def test_no_metric_depends_on_padding():
    config = options()
    models = build_models()
    tight = play(models, config)
    loose = experience(wider(tight.scored.rollout, models.tokenizer, 5, 7), models, config, config.kl_coef)
    assert loose.advantages.shape[1] == tight.advantages.shape[1] + 7
    assert ppo.describe(loose, "k1") == pytest.approx(ppo.describe(tight, "k1"), rel=1e-9)
    stats = [ppo.accumulate_gradient(batch, range(8), models, config) for batch in (tight, loose)]
    torch.testing.assert_close(stats[0], stats[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ratio_of_the_first_minibatch_is_one_with_minibatches_and_accumulation(dtype):
    """TRL 1.12 reports 0.5 here, having averaged over a buffer half of which is never filled."""
    config = options(num_mini_batches=2, micro_batch_size=2)
    models = build_models()
    models = dataclasses.replace(
        models, **{name: getattr(models, name).to(dtype) for name in ("policy", "reference", "value", "reward")}
    )
    batch = play(models, config)
    stats = ppo.accumulate_gradient(batch, [0, 2, 4, 6], models, config)
    assert stats["val/ratio"].item() == pytest.approx(1, abs=1e-5)
    assert stats["val/ratio_var"].item() == pytest.approx(0, abs=1e-6)
    assert stats["policy/approxkl_avg"].item() == pytest.approx(0, abs=1e-8)
    assert stats["policy/clipfrac_avg"].item() == 0 and stats["policy/entropy_avg"].item() > 0.1


def test_rollout_metrics_by_hand():
    config = options(missing_eos="none")
    models = build_models()
    batch = play(models, config)
    scored, replies = batch.scored, batch.scored.rollout
    told = ppo.describe(batch, "k1")
    kl = [float((scored.logprobs - scored.ref_logprobs)[i, :n].sum()) for i, n in enumerate(replies.response_lengths)]
    kept = replies.response_mask
    returns, residual = batch.returns[kept], (batch.returns - scored.values)[kept]
    expected = {
        "objective/kl": sum(kl) / 8,
        "objective/entropy": -float(scored.logprobs.sum()) / 8,
        "objective/non_score_reward": -0.3 * sum(kl) / 8,
        "objective/scores": float(scored.scores.mean()),
        "objective/rlhf_reward": float(scored.scores.mean()) - 0.3 * sum(kl) / 8,
        "objective/kl_coef": 0.3,
        "val/num_eos_tokens": float((replies.ids[:, -kept.shape[1] :] == models.tokenizer.eos_token_id).sum()),
        "val/explained_var": float(1 - residual.var() / returns.var()),
        "response/length": sum(replies.response_lengths) / 8,
        "response/eos_rate": float(replies.finished.double().mean()),
        "response/distinct_1": distinct_n([sample.response for sample in replies.samples], 1),
        "response/distinct_2": distinct_n([sample.response for sample in replies.samples], 2),
    }
    assert told == pytest.approx(expected, rel=1e-6)


# --------------------------------------------------------------------------------------------------- small parts


def test_every_prompt_is_used_once_before_one_is_used_again():
    batches = list(ppo.prompt_batches(5, 4, 5, torch.Generator().manual_seed(0), []))
    assert [len(batch) for batch in batches] == [4] * 5
    flat = [row for batch in batches for row in batch]
    for start in range(0, 20, 5):
        assert sorted(flat[start : start + 5]) == list(range(5))


def test_the_kl_coefficient_adapts_as_published():
    config = options(kl_target=6.0, kl_horizon=100, batch_size=10, num_mini_batches=1)
    assert ppo.adapted(0.1, 6.0, config) == pytest.approx(0.1)
    assert ppo.adapted(0.1, 6.6, config) == pytest.approx(0.1 * (1 + 0.1 * 0.1))
    assert ppo.adapted(0.1, 60.0, config) == pytest.approx(0.1 * 1.02)
    assert ppo.adapted(0.1, -5.0, config) == pytest.approx(0.1 * 0.98)
    assert ppo.adapted(0.1, 60.0, options()) == 0.1


def test_target_kl_ends_the_passes_of_an_update():
    steps = {}
    for target in (None, 1e-6, 1e9):
        config = options(target_kl=target, num_ppo_epochs=3)
        models = build_models()
        optimizer = loop.adamw([models.policy, models.value], weight_decay=0.0, epsilon=1e-5)
        order = torch.Generator().manual_seed(0)
        ppo.optimize(play(models, config), models, optimizer, config, order, rate=1e-3, where="test")
        steps[target] = int(next(iter(optimizer.state.values()))["step"])
    assert steps == {None: 6, 1e-6: 2, 1e9: 6}


def test_the_reference_and_the_reward_model_are_not_trained():
    config = options()
    models = build_models()
    optimizer = loop.adamw([models.policy, models.value], weight_decay=0.1, epsilon=1e-5)
    ppo.optimize(play(models, config), models, optimizer, config, torch.Generator(), rate=1e-3, where="test")
    for model in (models.reference, models.reward):
        assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda samples: [1.0], "gave 1 scores for 8 replies"),
        (lambda samples: [math.nan] * 8, "not finite"),
        (lambda samples: [math.inf] + [0.0] * 7, "not finite"),
    ],
)
def test_reward_functions_are_checked(function, words):
    models = dataclasses.replace(build_models(), reward=function)
    with pytest.raises(UserError, match=words):
        play(models, options())


# --------------------------------------------------------------------------------------------------------- stage


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("ppo")
    tiny.save_base(root / "base")
    tiny.write_pairs(root / "pairs.jsonl")
    return root


def stage_config(files, out, **changes):
    chosen = {
        "model": str(files / "base"),
        "data": str(files / "pairs.jsonl"),
        "output_dir": str(out),
        "batch_size": 16,
        "heldout_fraction": 0.2,
        "total_episodes": 48,
        "num_ppo_epochs": 2,
        "num_mini_batches": 2,
        "response_length": 12,
        "learning_rate": 3e-3,
        "micro_batch_size": 4,
    }
    return PPOConfig(**(chosen | changes))


def share_of_a(samples: list[Sample]) -> list[float]:
    return [sample.response.count("a") / (1 + len(sample.response)) for sample in samples]


@pytest.mark.parametrize(
    ("architecture", "dtype"), [*((name, "float32") for name in tiny.CONFIGS), ("llama", "bfloat16")]
)
def test_every_architecture_goes_through_all_three_stages(tmp_path, architecture, dtype):
    base, data = tiny.save_base(tmp_path / "base", architecture), tiny.write_pairs(tmp_path / "pairs.jsonl", count=80)
    shared = {"data": str(data), "heldout_fraction": 0.2, "dtype": dtype}
    sft_dir = sft.train(
        sft.SFTConfig(
            model=str(base),
            output_dir=str(tmp_path / "sft"),
            learning_rate=5e-3,
            num_train_epochs=1,
            max_response_tokens=16,
            **shared,
        )
    )
    reward_dir = reward.train(
        reward.RewardConfig(
            model=str(sft_dir),
            output_dir=str(tmp_path / "reward"),
            learning_rate=5e-3,
            batch_size=16,
            max_response_tokens=16,
            normalize_samples=32,
            **shared,
        )
    )
    out = ppo.train(
        PPOConfig(
            model=str(sft_dir),
            reward_model=str(reward_dir),
            output_dir=str(tmp_path / "ppo"),
            batch_size=8,
            total_episodes=24,
            num_ppo_epochs=1,
            num_mini_batches=2,
            response_length=12,
            learning_rate=1e-3,
            **shared,
        )
    )
    log = tiny.read_log(out)
    assert [line["step"] for line in log] == [1, 2, 3] and [line["episode"] for line in log] == [8, 16, 24]
    for line in log:
        assert set(line) == TRL_NAMES | MORE_NAMES
        assert all(isinstance(value, int | float) for value in line.values()), line
        assert line["policy/entropy_avg"] > 0 and line["policy/grad_norm"] > 0
    assert log[0]["objective/kl"] == pytest.approx(0, abs=1e-4) and log[-1]["objective/kl"] != 0
    before, after = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (sft_dir, out))
    assert any(not before[name].equal(after[name]) for name in before)
    value, _ = load_scalar_model(out / "value")
    assert value.score.bias is not None
    summary = json.loads((out / "stage.json").read_text())
    assert summary["results"]["objective/kl"] == log[-1]["objective/kl"]
    assert summary["data"]["rows_train"] + summary["data"]["rows_heldout"] == 80


def test_any_function_can_be_the_reward_and_is_optimised(files, tmp_path):
    config = stage_config(
        files,
        tmp_path / "ppo",
        total_episodes=15 * 32,
        batch_size=32,
        kl_coef=0.01,
        learning_rate=2e-2,
        temperature=1.0,
        missing_eos="none",
        micro_batch_size=0,
    )
    log = tiny.read_log(ppo.train(config, reward=share_of_a))
    early, late = (sum(line["objective/scores"] for line in part) / 5 for part in (log[:5], log[-5:]))
    assert late > 2 * early > 0


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(files, tmp_path):
    def weights(name, seed):
        out = ppo.train(stage_config(files, tmp_path / name, seed=seed), reward=share_of_a)
        return (out / "model.safetensors").read_bytes(), (out / "value" / "model.safetensors").read_bytes()

    assert weights("a", 1) == weights("b", 1) != weights("c", 2)


def test_heldout_prompts_are_never_rolled_out(files, tmp_path, monkeypatch):
    seen = set()

    def remember(samples):
        seen.update(sample.prompt for sample in samples)
        return share_of_a(samples)

    sides = []
    split = ppo.split_heldout
    monkeypatch.setattr(ppo, "split_heldout", lambda *a, **k: sides.append(split(*a, **k)) or sides[0])
    ppo.train(stage_config(files, tmp_path / "ppo", total_episodes=96), reward=remember)
    train_side, heldout = ({row.prompt for row in side} for side in sides[0])
    assert seen == train_side and heldout and not seen & heldout


def test_the_adapted_coefficient_is_used_and_logged(files, tmp_path):
    config = stage_config(files, tmp_path / "ppo", kl_target=1e-6, kl_horizon=16, total_episodes=64)
    coefficients = [line["objective/kl_coef"] for line in tiny.read_log(ppo.train(config, reward=share_of_a))]
    assert coefficients[0] == 0.05 and len(set(coefficients)) > 1


def test_a_value_that_is_not_finite_stops_the_stage(files, tmp_path):
    config = stage_config(files, tmp_path / "ppo", learning_rate=1e30, max_grad_norm=0.0)
    with pytest.raises(UserError, match=r"ppo update \d+: the .* nothing was updated"):
        ppo.train(config, reward=share_of_a)
    assert not (tmp_path / "ppo" / "stage.json").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reward_model": None}, "give either 'reward_model'"),
        ({"reward_model": "/nowhere"}, "is not a directory"),
        ({"reward_model": "{base}"}, "not a reward model"),
        ({"batch_size": 9, "reward_model": "x"}, "must be a multiple of 'num_mini_batches'"),
        ({"response_length": 64, "reward_model": "{reward}"}, "leave no room"),
        ({"kl_estimator": "k9", "reward_model": "x"}, "kl_estimator"),
        ({"data": "/nowhere.jsonl", "reward_model": "x"}, "does not exist"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_written(files, tmp_path, changes, words):
    if not (files / "reward").exists():
        model, tokenizer = reward_from_policy(files / "base")
        model.save_pretrained(files / "reward")
        tokenizer.save_pretrained(files / "reward")
    places = {"{base}": str(files / "base"), "{reward}": str(files / "reward")}
    changes = {key: places.get(value, value) if isinstance(value, str) else value for key, value in changes.items()}
    with pytest.raises(UserError, match=words):
        ppo.train(stage_config(files, tmp_path / "ppo", **changes))
    assert not (tmp_path / "ppo").exists()


def test_a_reward_model_with_another_tokenizer_is_refused(files, tmp_path):
    model, tokenizer = reward_from_policy(files / "base")
    tokenizer.add_tokens(["<more>"])
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"tokenizers of .* differ"):
        ppo.train(stage_config(files, tmp_path / "ppo", reward_model=str(tmp_path / "other")))


@pytest.fixture(scope="module")
def reward_dir(files):
    made = files / "reward-model"
    model, tokenizer = reward_from_policy(files / "base")
    save_model(made, model, tokenizer)
    return made


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"missing_eos": "none", "min_response_length": 3}, "takes the penalty of missing_eos, which is none"),
        ({"min_response_length": 13}, "'min_response_length' 13 is longer than 'response_length' 12"),
        ({"stop_token": None}, "without 'stop_token' no reply ends, so set missing_eos none"),
        ({"stop_token": "the cat"}, "stop_token 'the cat' is not one token of this tokenizer but"),
        ({"ptx_data": "x.jsonl"}, "'ptx_data' is read with a 'ptx_coef' above 0 alone"),
        ({"ptx_coef": 1.0, "ptx_data": "/nowhere.jsonl"}, "does not exist"),
        ({"critic_warmup": 3}, "'critic_warmup' 3 leaves the policy none of the 3 updates"),
        (
            {"advantage": "rloo", "group_size": 2, "critic_warmup": 1},
            "'critic_warmup' means nothing with advantage rloo",
        ),
        (
            {"advantage": "grpo", "group_size": 2, "value_init": "zeros"},
            "'value_init' means nothing with advantage grpo",
        ),
        ({"report_to": "csvv"}, "'report_to' names a tracker 'csvv' that is not known"),
        ({"dual_clip": 1.0}, "'dual_clip' must be above 1"),
        ({"cliprange": 1.5}, "'cliprange' must be at most 1"),
    ],
)
def test_options_that_contradict_each_other_are_refused_before_anything_is_written(files, tmp_path, changes, words):
    with pytest.raises(UserError, match=re.escape(words)):
        ppo.train(stage_config(files, tmp_path / "ppo", **changes), reward=share_of_a)
    assert not (tmp_path / "ppo").exists()


def test_replies_end_at_the_token_that_was_asked_for(files, tmp_path):
    seen = []

    def remember(samples):
        seen.extend(samples)
        return share_of_a(samples)

    config = stage_config(files, tmp_path / "ppo", stop_token="}", response_length=40, missing_eos="subtract")
    out = ppo.train(config, reward=remember)
    ended = [sample.response for sample in seen if sample.finished]
    assert any(text.endswith("}") for text in ended) and not any("}" in sample.response[:-1] for sample in seen)
    tokenizer = load_policy(out)[1]
    stops = json.loads((out / "generation_config.json").read_text())["eos_token_id"]
    assert sorted(stops) == sorted([tokenizer.eos_token_id, *tokenizer.encode("}", add_special_tokens=False)])


def test_without_a_stop_token_replies_run_to_their_full_length(files, tmp_path):
    config = stage_config(files, tmp_path / "ppo", stop_token=None, missing_eos="none", total_episodes=64)
    log = tiny.read_log(ppo.train(config, reward=share_of_a))
    assert [(line["response/length"], line["response/eos_rate"]) for line in log] == [(12, 0)] * 4


def test_the_value_model_starts_where_it_is_asked_to(files, reward_dir):
    heads = {}
    for start in ("reward", "zeros"):
        config = stage_config(files, "unused", reward_model=str(reward_dir), value_init=start)
        heads[start] = ppo.load_models(config, None, torch.device("cpu")).value.score.weight
    assert heads["reward"].equal(load_scalar_model(reward_dir)[0].score.weight) and not heads["zeros"].any()


def test_during_critic_warm_up_only_the_value_model_learns(files, reward_dir, tmp_path):
    config = stage_config(
        files, tmp_path / "ppo", reward_model=str(reward_dir), critic_warmup=2, total_episodes=64, missing_eos="none"
    )
    log = tiny.read_log(ppo.train(config))
    assert [line["val/ratio_var"] > 1e-9 for line in log] == [False, False, True, True]
    assert ["policy/grad_norm" in line for line in log] == [False, False, True, True]
    assert all(line["value/grad_norm"] > 0 for line in log) and all(
        abs(line["objective/kl"]) < 1e-4 for line in log[:3]
    )


def test_rates_warm_up_and_the_value_model_has_its_own(files, tmp_path):
    config = stage_config(files, tmp_path / "ppo", warmup_steps=2, value_learning_rate=6e-3, total_episodes=80)
    log = tiny.read_log(ppo.train(config, reward=share_of_a))
    rates = [line["lr"] for line in log]
    assert rates == pytest.approx([1e-3, 2e-3, 3e-3, 2e-3, 1e-3])
    assert [line["value/lr"] for line in log] == pytest.approx([2 * rate for rate in rates])


def test_written_replies_are_kept_likely_and_the_average_is_what_is_saved(files, tmp_path):
    losses = {}
    for name, coef in (("free", 1e-9), ("held", 5.0)):
        config = stage_config(
            files, tmp_path / name, ptx_coef=coef, total_episodes=96, learning_rate=1e-2, response_length=8
        )
        losses[name] = [line["loss/ptx_avg"] for line in tiny.read_log(ppo.train(config, reward=share_of_a))]
    assert losses["held"][-1] < losses["held"][0] - 0.3 and losses["free"][-1] > losses["held"][-1] + 0.3

    start = load_policy(files / "base")[0].state_dict()
    saved = {}
    for decay in (None, 0.0, 0.9, 1.0):
        config = stage_config(files, tmp_path / str(decay), ema_decay=decay, checks=False, total_episodes=16)
        out = ppo.train(config, reward=share_of_a)
        saved[decay] = load_policy(out)[0].state_dict()
    name = "model.layers.0.mlp.down_proj.weight"
    moved = {decay: (weights[name] - start[name]).norm().item() for decay, weights in saved.items()}
    assert moved[1.0] == 0 < moved[0.9] < moved[None] and saved[0.0][name].equal(saved[None][name])


@pytest.mark.parametrize(("times", "expected"), [(0, []), (2, [3, 6]), (4, [2, 3, 5, 6]), (99, [1, 2, 3, 4, 5, 6])])
def test_replies_are_shown_evenly_over_the_run(times, expected):
    assert [update for update in range(1, 7) if ppo.is_told(update, 6, times)] == expected


def test_replies_are_shown_and_written_down(files, tmp_path, capsys):
    out = ppo.train(stage_config(files, tmp_path / "ppo", num_sample_generations=2, checks=False), reward=share_of_a)
    rows = [json.loads(line) for line in (out / "completions.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2] * 16 + [3] * 16
    assert all(set(row) == {"step", "score", "prompt", "response", "finished"} for row in rows)
    shown = capsys.readouterr().err
    assert [f"ppo {step} " in shown for step in (1, 2, 3)] == [False, True, True]


def test_an_average_of_bfloat16_weights_does_not_stand_still(files, tmp_path):
    policy = load_policy(files / "base", dtype="bfloat16")[0]
    average, before = ppo.averaging(policy), next(policy.parameters()).float().clone()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(2)
    for _ in range(200):
        ppo.follow(average, policy, 0.992)
    close = {"rtol": 1e-3, "atol": 1e-6}
    torch.testing.assert_close(next(average.parameters()), before * (2 - 0.992**200), **close)
    config = stage_config(files, tmp_path / "ppo", ema_decay=0.9, dtype="bfloat16", checks=False)
    saved = load_policy(ppo.train(config, reward=share_of_a), dtype="bfloat16")[0]
    stored = json.loads((tmp_path / "ppo" / "config.json").read_text())
    assert stored["dtype"] == "bfloat16" and next(saved.parameters()).isfinite().all()


def test_the_average_is_what_is_judged(files, tmp_path):
    kl = {}
    for decay in (None, 1.0):  # 1.0: it stays where it started
        out = tmp_path / str(decay)
        config = stage_config(files, out, ema_decay=decay, eval_every=1, eval_prompts=8, checks=False, guard="warn")
        kl[decay] = [
            line["eval/kl"] for line in tiny.read_log(ppo.train(config, reward=share_of_a, judge=judge_letters))
        ]
    assert max(map(abs, kl[1.0])) < 1e-3 < abs(kl[None][-1])


def judge_letters(samples: list[Sample]) -> list[float]:
    return [float(len(set(sample.response))) for sample in samples]


def test_scores_are_scaled_by_what_was_seen_so_far(files, tmp_path):
    config = stage_config(files, tmp_path / "ppo", reward_scaling=True, missing_eos="none", kl_coef=0.0)
    log = tiny.read_log(ppo.train(config, reward=lambda samples: [100 * x for x in share_of_a(samples)]))
    assert len({line["objective/score_scale"] for line in log}) == len(log)
    for line in log:
        assert line["objective/rlhf_reward"] == pytest.approx(line["objective/scores"] / line["objective/score_scale"])


@pytest.mark.parametrize("rows", [range(8), [5, 0, 3]])
def test_no_metric_depends_on_micro_batches(rows):
    models, told = build_models(), []
    for size in (0, 1, 3):
        config = options(micro_batch_size=size, rollout_micro_batch_size=4 - size)
        batch = play(models, config)
        stats = ppo.accumulate_gradient(batch, rows, models, config)
        told.append(ppo.describe(batch, "k1") | {name: float(value) for name, value in stats.items()})
    assert told[1] == pytest.approx(told[0], rel=1e-9, abs=1e-12)
    assert told[2] == pytest.approx(told[0], rel=1e-9, abs=1e-12)


def test_the_config_is_small_and_every_key_is_explained():
    assert len(keys(PPOConfig)) <= 85 and all(key.info["help"] for key in keys(PPOConfig))
