import json
import math

import pytest
import tiny
import torch
from transformers import AutoModelForSequenceClassification

from rlhf_fast.train import reward, sft
from rlhf_fast.train.config import keys
from rlhf_fast.train.errors import UserError
from rlhf_fast.train.generate import generate
from rlhf_fast.train.model import load_policy, load_scalar_model, reward_from_policy
from rlhf_fast.train.reward import Pair, RewardConfig, accumulate_gradient, evaluate, normalize_head, score_all, train

PAIRS = [
    Pair([1, 5, 6, 7, 2], [1, 5, 6, 8, 9, 10, 2]),
    Pair([1, 11, 2], [1, 12, 2]),
    Pair([1, 13, 14, 15, 16, 17, 2], [1, 13, 2]),
    Pair([1, 18, 19, 20, 2], [1, 18, 21]),
    Pair([1, 22, 23], [1, 22, 24, 25, 26, 27, 28, 29, 2]),
]


def config(tmp_path, base, **options):
    chosen = {
        "batch_size": 16,
        "learning_rate": 3e-3,
        "num_train_epochs": 3,
        "max_response_tokens": 16,
        "normalize_samples": 48,
    }
    return tiny.stage_config(RewardConfig, tmp_path, base, pairs=120, **(chosen | options))


def scalar_model(architecture, tmp_path, dtype="float64"):
    torch.manual_seed(0)
    return reward_from_policy(tiny.save_base(tmp_path / architecture, architecture), dtype=dtype)[0]


@pytest.mark.parametrize("center_coef", [0.0, 0.1])
@pytest.mark.parametrize("sizes", [(5,), (2, 3), (1, 1, 1, 1, 1)])
def test_loss_and_gradient_do_not_depend_on_padding_or_micro_batches(tmp_path, sizes, center_coef):
    model, reference = scalar_model("gpt2", tmp_path), scalar_model("gpt2", tmp_path / "again")

    def alone(ids):
        hidden = reference.transformer(torch.tensor([ids])).last_hidden_state[0, -1]
        return reference.score(hidden)[0]

    scores = [(alone(pair.chosen), alone(pair.rejected)) for pair in PAIRS]
    losses = [-torch.nn.functional.logsigmoid(a - b) + center_coef * (a + b) ** 2 for a, b in scores]
    expected = torch.stack(losses).mean()
    expected.backward()
    iterator = iter(PAIRS)
    parts = [[next(iterator) for _ in range(size)] for size in sizes]
    stats = accumulate_gradient(model, parts, 0, center_coef=center_coef)
    flat = torch.tensor([[a.item(), b.item()] for a, b in scores], dtype=torch.float64)
    expected_stats = {
        "loss": expected.item(),
        "accuracy": (flat[:, 0] > flat[:, 1]).double().mean().item(),
        "margin": (flat[:, 0] - flat[:, 1]).mean().item(),
        "mean_reward": flat.mean().item(),
        "min_reward": flat.min().item(),
        "max_reward": flat.max().item(),
    }
    assert {name: value.item() for name, value in stats.items()} == pytest.approx(expected_stats, rel=1e-6)
    for (name, mine), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-8, atol=1e-10, msg=name)


def test_scores_do_not_depend_on_the_batch_they_stand_in(tmp_path):
    model = scalar_model("llama", tmp_path)
    sequences = [ids for pair in PAIRS for ids in (pair.chosen, pair.rejected)]
    together = score_all(model, sequences, 0, batch_size=len(sequences))
    for size in (1, 3):
        torch.testing.assert_close(score_all(model, sequences, 0, batch_size=size), together, rtol=1e-6, atol=1e-6)


def test_a_tie_counts_half(tmp_path):
    model = scalar_model("llama", tmp_path)
    torch.nn.init.zeros_(model.score.weight)
    assert evaluate(model, PAIRS, 0, 8) == pytest.approx({"eval_loss": math.log(2), "eval_accuracy": 0.5})


def test_normalising_makes_mean_0_and_std_1_and_keeps_the_order(tmp_path):
    model = scalar_model("llama", tmp_path, dtype="float32")
    sequences = [ids for pair in PAIRS for ids in (pair.chosen, pair.rejected)]
    before = score_all(model, sequences, 0, 4)
    folded = normalize_head(model, sequences, 0, 4)
    after = score_all(model, sequences, 0, 4)
    assert folded == pytest.approx({"normalize_mean": before.mean().item(), "normalize_std": before.std().item()})
    assert after.mean().item() == pytest.approx(0, abs=1e-5) and after.std().item() == pytest.approx(1, rel=1e-5)
    torch.testing.assert_close(after, (before - before.mean()) / before.std(), rtol=1e-4, atol=1e-5)


def test_a_reward_model_without_an_opinion_is_refused(tmp_path):
    model = scalar_model("llama", tmp_path, dtype="float32")
    torch.nn.init.zeros_(model.score.weight)
    with pytest.raises(UserError, match="gives all 2 sampled replies the same score"):
        normalize_head(model, [[1, 5, 2], [1, 6, 7, 2]], 0, 4)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "qwen2", "gpt_neox", "opt"])
def test_every_architecture_learns_what_is_preferred(tmp_path, architecture):
    base = tiny.save_base(tmp_path / "base", architecture)
    out = train(config(tmp_path, base, learning_rate=1e-2, num_train_epochs=6))
    results = json.loads((out / "stage.json").read_text())["results"]
    assert results["accuracy"] > 0.9 and results["train_accuracy"] > 0.9
    assert results["accuracy_low"] < results["accuracy"] < results["accuracy_high"] <= 1 or results["accuracy"] == 1
    assert results["eval_pairs"] > 10 and results["normalize_std"] > 0
    log = tiny.read_log(out)
    assert log[-1]["loss"] < log[0]["loss"] and log[-1]["eval_accuracy"] == results["accuracy"]
    assert {"accuracy", "margin", "mean_reward", "min_reward", "max_reward", "learning_rate", "grad_norm"} <= set(
        log[0]
    )
    assert AutoModelForSequenceClassification.from_pretrained(out).config.num_labels == 1


def test_the_saved_model_scores_replies_of_the_policy_with_mean_0_and_std_1(tmp_path, base):
    sft_dir = sft.train(
        sft.SFTConfig(
            model=str(base),
            data=str(tiny.write_pairs(tmp_path / "pairs.jsonl", count=120)),
            output_dir=str(tmp_path / "sft"),
            heldout_fraction=0.2,
            num_train_epochs=3,
            batch_size=8,
            learning_rate=1e-2,
            max_response_tokens=16,
        )
    )
    out = train(config(tmp_path, sft_dir, normalize_samples=300))
    model, _ = load_scalar_model(out)
    policy, tokenizer = load_policy(sft_dir)
    torch.manual_seed(7)
    prompt = tokenizer.encode("say 3 the cat")
    made = generate(policy, tokenizer, [prompt] * 300, max_new_tokens=16, temperature=0.7, batch_size=100)
    lengths = made.response_mask.sum(1).tolist()
    replies = [prompt + ids[:n] for ids, n in zip(made.response_ids.tolist(), lengths, strict=True)]
    scores = score_all(model, replies, tokenizer.pad_token_id, 100)
    # One prompt instead of all of them, and other samples: near 0 and 1, not equal.
    assert abs(scores.mean()) < 0.5 and 0.5 < scores.std() < 1.6


def test_the_same_seed_gives_the_same_bits(tmp_path, base):
    first, second = (train(config(tmp_path, base, output_dir=str(tmp_path / name))) for name in "ab")
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


def test_the_split_is_that_of_the_other_stages(tmp_path, base, monkeypatch):
    sides = {}
    for stage, cls in ((sft, sft.SFTConfig), (reward, RewardConfig)):
        split = stage.split_heldout
        monkeypatch.setattr(
            stage, "split_heldout", lambda *a, stage=stage, split=split, **k: sides.setdefault(stage, split(*a, **k))
        )
        made = config(tmp_path, base)
        shared = {key: getattr(made, key) for key in ("model", "data", "heldout_fraction")}
        stage.train(cls(output_dir=str(tmp_path / stage.__name__), max_response_tokens=16, **shared))
    prompts = [{row.prompt for row in side} for stage in (sft, reward) for side in sides[stage]]
    assert prompts[0] == prompts[2] and prompts[1] == prompts[3] and not prompts[0] & prompts[1]


def test_a_loss_that_is_not_finite_stops_the_stage(tmp_path, base):
    with pytest.raises(UserError, match=r"reward step \d+: the .* nothing was updated"):
        train(config(tmp_path, base, learning_rate=1e30, max_grad_norm=0, lr_schedule="constant"))
    assert not (tmp_path / "reward" / "stage.json").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"center_coef": -1.0}, "center_coef"),
        ({"model": "/nowhere"}, "is not a directory"),
        ({"data": "/nowhere.jsonl"}, "does not exist"),
        ({"max_response_tokens": 64}, "leave no room"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_written(tmp_path, base, options, words):
    with pytest.raises(UserError, match=words):
        train(config(tmp_path, base, **options))
    assert not (tmp_path / "reward").exists()


def test_the_config_is_small_and_every_key_is_explained():
    assert len(keys(RewardConfig)) <= 40 and all(key.info["help"] for key in keys(RewardConfig))
