"""GRPO and RLOO against independent transcriptions in float64, one reply at a time and without padding, and as a stage."""

import dataclasses
import json

import pytest
import tiny
import torch
from test_ppo import TRL_NAMES, build_models, end_at, options, stage_config

from rlhf_fast.train import group, loop, ppo, rollout
from rlhf_fast.train.errors import UserError
from rlhf_fast.train.generate import Sample
from rlhf_fast.train.rollout import Models

VALUE_NAMES = {"loss/value_avg", "val/clipfrac_avg", "val/explained_var", "value/grad_norm"}
LENGTHS = [10, 4, 1, 7, 10, 3, 9, 2]


def chosen(kind, **changes):
    """Without the keys of `options` that a value model alone would read."""
    of_values = {name: getattr(ppo.PPOConfig, name) for name in ppo.OF_VALUES}
    return options(**(of_values | {"advantage": kind, "group_size": 4} | changes))


def without_value(models: Models) -> Models:
    return dataclasses.replace(models, value=None)


def play(models, config):
    """The experience of one update: two prompts with four replies each, or four with two."""
    torch.manual_seed(11)
    prompts = ["the cat sat on a", "dog", "on a hill", "ran"][: 8 // config.group_size]
    asked = [prompt for prompt in prompts for _ in range(config.group_size)]
    queries = [[1, *models.tokenizer.encode(prompt, add_special_tokens=False)] for prompt in asked]
    sampling = {"response_length": config.response_length, "temperature": config.temperature}
    replies = end_at(rollout.roll_out(models, asked, queries, **sampling), LENGTHS, models.tokenizer)
    scored = rollout.score(
        replies,
        models,
        temperature=config.temperature,
        missing_eos=config.missing_eos,
        missing_eos_penalty=config.missing_eos_penalty,
        micro_batch_size=config.micro_batch_size,
    )
    return ppo.advantages_of(scored, config.kl_coef, config)


# ------------------------------------------------------------------------------------- transcription in float64


class Transcription:
    """arXiv 2402.03300 eq. 3 and 4 with the mean over tokens, arXiv 2402.14740 with a clip on the reply's ratio."""

    def __init__(self, models, replies, config):
        self.policy, self.config = models.policy, config
        width, ends = replies.ids.shape[1] - replies.response_mask.shape[1], models.tokenizer.eos_token_id
        self.rows = [
            (ids[width - query : width].tolist(), ids[width : width + response].tolist())
            for ids, query, response in zip(replies.ids, replies.query_lengths, replies.response_lengths, strict=True)
        ]
        with torch.no_grad():
            self.old = [self.logprobs(models.policy, *row)[0] for row in self.rows]
            self.ref = [self.logprobs(models.reference, *row)[0] for row in self.rows]
            scores = [self.score(models.reward, *row) if row[1][-1] == ends else -1.0 for row in self.rows]
        self.scores = [float(score) for score in scores]
        size = config.group_size
        self.advantages = []
        for start in range(0, len(self.rows), size):
            self.advantages += getattr(self, config.advantage)(range(start, start + size))

    def grpo(self, rows):
        scores = torch.tensor([self.clipped(self.scores[row]) for row in rows], dtype=torch.float64)
        return ((scores - scores.mean()) / (scores.std() + 1e-4)).tolist()

    def rloo(self, rows):
        penalty = {"k1": lambda d: d, "k3": lambda d: torch.exp(-d) - 1 + d}[self.config.kl_estimator]
        kl = [float(penalty(self.old[row] - self.ref[row]).sum()) for row in rows]
        rewards = [self.clipped(self.scores[row]) - self.config.kl_coef * k for row, k in zip(rows, kl, strict=True)]
        return [reward - (sum(rewards) - reward) / (len(rewards) - 1) for reward in rewards]

    def clipped(self, score):
        limit = self.config.score_clip
        return score if limit is None else max(-limit, min(limit, score))

    def logprobs(self, model, query, response):
        logits = model(torch.tensor([query + response])).logits[0] / self.config.temperature
        table = logits[len(query) - 1 : -1].log_softmax(-1)
        return table[range(len(response)), response], -(table.exp() * table).sum(-1)

    def score(self, model, query, response):
        return model.score(model.transformer(torch.tensor([query + response])).last_hidden_state[0])[-1, 0]

    def minibatch(self, rows):
        c = self.config
        new, entropy = zip(*(self.logprobs(self.policy, *self.rows[row]) for row in rows), strict=True)
        parts = list(zip(new, [self.old[row] for row in rows], [self.ref[row] for row in rows], strict=True))
        if c.advantage == "rloo":
            ratio = torch.stack([torch.exp(n.sum() - old.sum()) for n, old, _ in parts])
            each = [self.advantages[row] for row in rows]
        else:
            ratio = torch.cat([torch.exp(n - old) for n, old, _ in parts])
            each = [self.advantages[row] for row in rows for _ in self.rows[row][1]]
        advantages = torch.tensor(each, dtype=torch.float64)
        high = c.cliprange if c.cliprange_high is None else c.cliprange_high
        free, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - c.cliprange, 1 + high)
        losses, mean_entropy = torch.maximum(free, clipped), torch.cat(entropy).mean()
        if c.dual_clip is not None:
            losses = torch.where(advantages < 0, torch.minimum(losses, -advantages * c.dual_clip), losses)
        policy_loss = losses.mean()
        stats = {
            "loss/policy_avg": policy_loss,
            "policy/entropy_avg": mean_entropy,
            "policy/approxkl_avg": 0.5 * (ratio.log() ** 2).mean(),
            "policy/clipfrac_avg": (clipped > free).double().mean(),
            "val/ratio": ratio.mean(),
            "val/ratio_var": ratio.var(unbiased=False),
        }
        loss = policy_loss - c.entropy_coef * mean_entropy
        if c.advantage == "grpo":
            kl = torch.cat([torch.exp(ref - n) - (ref - n) - 1 for n, _, ref in parts]).mean()
            stats["loss/kl_avg"] = kl
            loss = loss + c.kl_coef * kl
        return loss, stats

    def update(self, order):
        c, history = self.config, []
        optimizer = torch.optim.AdamW(
            self.policy.parameters(), lr=c.learning_rate, eps=c.adam_epsilon, weight_decay=c.weight_decay
        )
        for _ in range(c.num_ppo_epochs):
            for rows in torch.randperm(len(self.rows), generator=order).split(len(self.rows) // c.num_mini_batches):
                optimizer.zero_grad()
                loss, stats = self.minibatch(rows.tolist())
                loss.backward()
                stats["policy/grad_norm"] = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), c.max_grad_norm)
                optimizer.step()
                history.append({name: float(value.detach()) for name, value in stats.items()})
        return {name: sum(row[name] for row in history) / len(history) for name in history[0]}


CASES = {
    "grpo": chosen("grpo"),
    "grpo, micro-batches of 3": chosen("grpo", micro_batch_size=3, score_clip=0.2),
    "grpo, pairs": chosen("grpo", group_size=2, kl_estimator="k3", entropy_coef=0.0),
    "grpo, clip higher": chosen("grpo", cliprange=0.05, cliprange_high=0.28),
    "rloo, dual clip": chosen("rloo", learning_rate=2e-3, cliprange_high=0.3, dual_clip=1.05),
    "rloo": chosen("rloo", learning_rate=2e-3),
    "rloo, micro-batches of 3": chosen("rloo", learning_rate=2e-3, micro_batch_size=3, num_mini_batches=1),
    "rloo, pairs": chosen("rloo", learning_rate=2e-3, group_size=2, kl_estimator="k3", score_clip=0.2),
}


@pytest.mark.parametrize("case", CASES)
def test_one_update_is_the_published_algorithm(case):
    config = CASES[case]
    models, twins = without_value(build_models()), build_models()
    batch = play(models, config)
    replies = batch.scored.rollout
    expected = Transcription(twins, replies, config)
    assert replies.response_lengths == LENGTHS and batch.returns is batch.scored.values is None
    assert batch.scored.scores.tolist() == pytest.approx(expected.scores, rel=1e-6)
    assert batch.advantages.flatten().tolist() == pytest.approx(expected.advantages, rel=1e-6, abs=1e-9)

    minibatch = [5, 0, 3, 6]
    stats = ppo.accumulate_gradient(batch, minibatch, models, config)
    loss, expected_stats = expected.minibatch(minibatch)
    loss.backward()
    assert {k: float(v) for k, v in stats.items()} == pytest.approx(
        {k: float(v.detach()) for k, v in expected_stats.items()}, rel=1e-6, abs=1e-9
    )
    for (name, a), b in zip(models.policy.named_parameters(), twins.policy.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-9, msg=name)
    models.policy.zero_grad()

    optimizer = loop.adamw(models.trained.values(), weight_decay=config.weight_decay, epsilon=config.adam_epsilon)
    order = torch.Generator().manual_seed(3)
    stats = ppo.optimize(batch, models, optimizer, config, order, rate=config.learning_rate, where="test")
    assert stats == pytest.approx(expected.update(torch.Generator().manual_seed(3)), rel=1e-5, abs=1e-7)
    assert stats["policy/clipfrac_avg"] > 0
    for (name, a), b in zip(models.policy.named_parameters(), twins.policy.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


def test_groups_without_spread_are_counted_and_teach_nothing():
    scores = torch.tensor([1.0, 1.0, 1.0, 2.0])
    assert group.describe(scores, 2) == pytest.approx({"reward_std": 0.5, "frac_reward_zero_std": 0.5})
    config = chosen("grpo", missing_eos="none")
    models = without_value(build_models())
    batch = play(dataclasses.replace(models, reward=lambda samples: [3.0] * 4 + [0.0, 1.0, 2.0, 3.0]), config)
    assert not batch.advantages[:4].any() and batch.advantages[4:].all()


# --------------------------------------------------------------------------------------------------------- stage


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("group")
    tiny.save_base(root / "base")
    tiny.write_pairs(root / "pairs.jsonl")
    return root


def share_of_a(samples: list[Sample]) -> list[float]:
    return [sample.response.count("a") / (1 + len(sample.response)) for sample in samples]


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_the_stage_raises_the_reward_and_makes_no_value_model(files, tmp_path, kind):
    asked = []

    def reward(samples):
        asked.append([sample.prompt for sample in samples])
        return share_of_a(samples)

    config = stage_config(
        files,
        tmp_path / kind,
        advantage=kind,
        group_size=8,
        total_episodes=12 * 32,
        batch_size=32,
        num_ppo_epochs=4 if kind == "grpo" else 2,
        kl_coef=0.01,
        learning_rate=2e-2,
        temperature=1.0,
        missing_eos="none",
        micro_batch_size=0,
    )
    out = ppo.train(config, reward=reward)
    log = tiny.read_log(out)
    early, late = (sum(line["objective/scores"] for line in part) / 5 for part in (log[:5], log[-5:]))
    assert late > 1.5 * early > 0
    assert set(log[0]) >= TRL_NAMES - VALUE_NAMES | {"reward_std", "frac_reward_zero_std"}
    assert not set(log[0]) & VALUE_NAMES and ("loss/kl_avg" in log[0]) is (kind == "grpo")
    assert log[-1]["episode"] == 12 * 32
    for update in asked:
        assert all(len(set(update[i : i + 8])) == 1 for i in range(0, 32, 8)) and len(set(update)) == 4
    assert not (out / "value").exists()
    assert json.loads((out / "stage.json").read_text())["config"]["advantage"] == kind


def test_a_stage_that_was_stopped_goes_on_to_the_same_bits(files, tmp_path):
    given = {"advantage": "rloo", "group_size": 4, "total_episodes": 64, "save_every": 0.0}
    peace = ppo.train(stage_config(files, tmp_path / "peace", **given), reward=share_of_a)
    asked = []

    def stop(samples):
        asked.append(len(samples))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return share_of_a(samples)

    halted = stage_config(files, tmp_path / "halted", **given)
    with pytest.raises(KeyboardInterrupt):
        ppo.train(halted, reward=stop)
    out = ppo.train(halted, reward=share_of_a)
    assert json.loads((out / "stage.json").read_text())["resumed_at"] == [2]
    assert (out / "model.safetensors").read_bytes() == (peace / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"advantage": "grpo", "lam": 0.9}, "'lam' means nothing with advantage grpo; leave it at 0.95, got 0.9"),
        ({"advantage": "rloo", "vf_coef": 1.0}, "'vf_coef' means nothing with advantage rloo"),
        ({"advantage": "rloo", "whiten_advantages": False}, "'whiten_advantages' means nothing"),
        ({"group_size": 4}, "'group_size' means nothing with advantage gae"),
        ({"advantage": "grpo", "kl_estimator": "k2"}, "'kl_estimator' is k3 with advantage grpo, got k2"),
        ({"advantage": "rloo", "group_size": 3}, "multiple of 'group_size' 3"),
        ({"advantage": "rloo", "group_size": 1}, "'group_size' must be at least 2"),
        ({"advantage": "remax"}, "must be one of gae, grpo, rloo"),
    ],
)
def test_keys_that_do_not_apply_are_refused(files, tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        ppo.train(stage_config(files, tmp_path / "ppo", **changes), reward=share_of_a)
    assert not (tmp_path / "ppo").exists()
