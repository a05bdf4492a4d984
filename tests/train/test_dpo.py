"""DPO against an independent transcription in float64, one reply at a time and without padding, and as a stage."""

import json
import math

import pytest
import tiny
import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_fast.train import dpo, loop, sft
from rlhf_fast.train.config import keys
from rlhf_fast.train.dpo import DPOConfig, Pair, accumulate_gradient, evaluate, logprobs_of, train
from rlhf_fast.train.errors import UserError
from rlhf_fast.train.replies import Example

PAIRS = [
    Pair(Example([1, 5, 6, 7, 2], 3), Example([1, 5, 6, 8, 9, 10, 2], 3)),
    Pair(Example([1, 11, 2], 1), Example([1, 12, 13, 2], 1)),
    Pair(Example([1, 13, 14, 15, 16, 17, 2], 2), Example([1, 13, 2], 2)),
    Pair(Example([1, 18, 19, 20, 2], 4), Example([1, 18, 19, 20, 21], 4)),
    Pair(Example([1, 22, 23], 2), Example([1, 22, 24, 25, 26, 27, 28, 29, 2], 2)),
]
NAMES = {
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "entropy",
}


def config(tmp_path, base, **options):
    chosen = {"batch_size": 16, "learning_rate": 3e-3, "num_train_epochs": 2, "max_response_tokens": 16}
    return tiny.stage_config(DPOConfig, tmp_path, base, pairs=120, **(chosen | options))


def settings(**options):
    return DPOConfig(model="", data="", output_dir="", **options)


# ------------------------------------------------------------------------------------- transcription in float64


def tokens_of(model, example):
    """Log-probability and entropy of each reply token."""
    table = model(torch.tensor([example.ids])).logits[0].log_softmax(-1)[example.start - 1 : -1]
    return table[range(len(table)), example.ids[example.start :]], -(table.exp() * table).sum(-1)


def transcribed(model, reference, pairs, config):
    """arXiv 2305.18290 eq. 7, 2310.12036 eq. 17 on means, SLiC's hinge, 2403.00409, written out pair by pair."""
    beta, e = config.beta, config.label_smoothing
    rows, entropies = [], []
    for pair in pairs:
        policy, start, lengths = [], [], []
        for side in (pair.chosen, pair.rejected):
            logprobs, entropy = tokens_of(model, side)
            policy.append(logprobs.sum())
            start.append(tokens_of(reference, side)[0].sum().detach())
            lengths.append(len(logprobs))
            entropies.append(entropy)
        ratios = [a - b for a, b in zip(policy, start, strict=True)]
        z = beta * (ratios[0] - ratios[1])
        loss = {
            "sigmoid": lambda z=z: -(1 - e) * logsigmoid(z) - e * logsigmoid(-z),
            "robust": lambda z=z: (-(1 - e) * logsigmoid(z) + e * logsigmoid(-z)) / (1 - 2 * e),
            "hinge": lambda z=z: torch.relu(1 - z),
            "ipo": lambda r=ratios, n=lengths: (r[0] / n[0] - r[1] / n[1] - 1 / (2 * beta)) ** 2,
        }[config.loss_type]()
        rows.append([loss, beta * ratios[0], beta * ratios[1], z, (z > 0).double() + 0.5 * (z == 0), *policy])
    names = ["loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"]
    means = dict(zip([*names, "logps/chosen", "logps/rejected"], map(mean, zip(*rows, strict=True)), strict=True))
    return means | {"entropy": torch.cat(entropies).mean()}


def mean(values):
    return torch.stack(values).mean()


def moved(model):
    """A policy that has left its reference."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    return model


WHOLE, PARTS, ALONE = [[0, 1, 2, 3, 4]], [[4, 1], [0, 2, 3]], [[0], [1], [2], [3], [4]]
CASES = {
    "sigmoid": ({}, WHOLE),
    "sigmoid, micro-batches of 1": ({}, ALONE),
    "conservative": ({"label_smoothing": 0.1, "beta": 0.3}, PARTS),
    "robust": ({"loss_type": "robust", "label_smoothing": 0.2}, PARTS),
    "hinge": ({"loss_type": "hinge"}, ALONE),
    "ipo": ({"loss_type": "ipo", "beta": 0.4}, PARTS),
}


@pytest.mark.parametrize("case", CASES)
def test_one_update_is_the_published_algorithm(case):
    options, parts = CASES[case]
    config = settings(**options)
    start = tiny.model("gpt2").double().eval()
    mine, theirs = (moved(tiny.model("gpt2").double().eval()) for _ in range(2))
    reference = logprobs_of(start, PAIRS, 0, config)
    optimizer = loop.adamw([mine], weight_decay=0.1, epsilon=config.adam_epsilon)
    other = torch.optim.AdamW(theirs.parameters(), lr=0.02, eps=config.adam_epsilon, weight_decay=0.1)
    for _ in range(2):
        stats = accumulate_gradient(mine, PAIRS, reference, parts, 0, config)
        expected = transcribed(theirs, start, PAIRS, config)
        assert {name: value.item() for name, value in stats.items()} == pytest.approx(
            {name: value.item() for name, value in expected.items()}, rel=1e-6, abs=1e-9
        )
        expected["loss"].backward()
        for (name, a), b in zip(mine.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-9, msg=name)
        loop.clip_and_step(optimizer, {"model": mine}, {}, rate=0.02, max_grad_norm=1.0, where="test")
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        other.step()
        other.zero_grad()
    for (name, a), b in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


def test_evaluation_is_the_same_for_any_batch_and_a_tie_counts_half():
    config = settings(batch_size=2)
    model = tiny.model("llama").eval()
    reference = logprobs_of(model, PAIRS, 0, config)
    torch.testing.assert_close(logprobs_of(model, PAIRS, 0, settings(batch_size=5)), reference, rtol=1e-6, atol=1e-5)
    same = evaluate(model, PAIRS, reference, 0, config)
    assert same["eval_loss"] == pytest.approx(math.log(2)) and same["eval_rewards/accuracies"] == 0.5


# --------------------------------------------------------------------------------------------------------- stage


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_the_stage_learns_what_is_preferred(tmp_path, architecture):
    base = tiny.save_base(tmp_path / "base", architecture)
    out = train(config(tmp_path, base, logging_steps=1))
    log = tiny.read_log(out)
    # Before its first update the policy is the reference.
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert log[0]["rewards/chosen"] == pytest.approx(0, abs=1e-4) == log[0]["rewards/margins"]
    assert log[-1]["rewards/margins"] > 0.5 and log[-1]["loss"] < log[0]["loss"]
    assert set(log[0]) > NAMES | {"learning_rate", "grad_norm", "num_tokens", "epoch"}
    evaluated = {"loss", *(f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies"))}
    assert {name for name in log[-1] if name.startswith("eval_")} == {f"eval_{name}" for name in evaluated}
    summary = json.loads((out / "stage.json").read_text())
    results = summary["results"]
    assert results["accuracy"] > 0.9 and results["train_accuracy"] > 0.9 and results["eval_pairs"] > 10
    assert results["accuracy"] == log[-1]["eval_rewards/accuracies"]
    assert results["accuracy_low"] < results["accuracy"] == pytest.approx(results["accuracy_high"], abs=0.1)
    assert summary["data"]["rows_train"] + summary["data"]["rows_heldout"] == 120
    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert any(not a.equal(b) for a, b in zip(model.parameters(), tiny.model(architecture).parameters(), strict=True))


@pytest.mark.parametrize("options", [{"loss_type": "ipo"}, {"micro_batch_size": 3}, {"full_logits": True}])
def test_the_same_seed_gives_the_same_bits_and_another_seed_others(tmp_path, base, options):
    def weights(name, seed):
        chosen = options | {"output_dir": str(tmp_path / name), "seed": seed, "num_train_epochs": 1}
        return (train(config(tmp_path, base, **chosen)) / "model.safetensors").read_bytes()

    assert weights("a", 1) == weights("b", 1) != weights("c", 2)


def test_a_stage_that_was_stopped_goes_on_to_the_same_bits(tmp_path, base, monkeypatch):
    peace = train(config(tmp_path, base, output_dir=str(tmp_path / "peace"), num_train_epochs=1))
    left, original = [4], dpo.accumulate_gradient

    def stop(*given):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return original(*given)

    halted = config(tmp_path, base, num_train_epochs=1, save_every=0.0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(dpo, "accumulate_gradient", stop)
        train(halted)
    out = train(halted)
    assert json.loads((out / "stage.json").read_text())["resumed_at"] == [4]
    assert (out / "model.safetensors").read_bytes() == (peace / "model.safetensors").read_bytes()
    assert tiny.read_log(out)[-1]["num_tokens"] == tiny.read_log(peace)[-1]["num_tokens"]


def test_heldout_pairs_are_those_of_the_other_stages_and_not_trained_on(tmp_path, base, monkeypatch):
    sides, trained = {}, set()
    for stage in (sft, dpo):
        split = stage.split_heldout
        monkeypatch.setattr(
            stage, "split_heldout", lambda *a, stage=stage, split=split, **k: sides.setdefault(stage, split(*a, **k))
        )
    original = dpo.accumulate_gradient

    def remember(model, pairs, reference, parts, *rest):
        trained.update(tuple(pairs[row].chosen.ids) for part in parts for row in part)
        return original(model, pairs, reference, parts, *rest)

    monkeypatch.setattr(dpo, "accumulate_gradient", remember)
    made = config(tmp_path, base, num_train_epochs=1)
    train(made)
    shared = {key: getattr(made, key) for key in ("model", "data", "heldout_fraction", "max_response_tokens")}
    sft.train(sft.SFTConfig(output_dir=str(tmp_path / "sft"), **shared))
    prompts = [{row.prompt for row in side} for stage in (sft, dpo) for side in sides[stage]]
    assert prompts[0] == prompts[2] and prompts[1] == prompts[3] and not prompts[0] & prompts[1]
    assert len(trained) == len(sides[dpo][0])


def test_a_loss_that_is_not_finite_stops_the_stage(tmp_path, base):
    with pytest.raises(UserError, match=r"dpo step \d+: the .* nothing was updated"):
        train(config(tmp_path, base, learning_rate=1e30, max_grad_norm=0, lr_schedule="constant"))
    assert not (tmp_path / "dpo" / "stage.json").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"beta": 0.0}, "beta"),
        ({"loss_type": "slic"}, "must be one of sigmoid"),
        ({"label_smoothing": 0.5}, "must be below 0.5"),
        ({"label_smoothing": 0.1, "loss_type": "hinge"}, "must be 0 with loss_type hinge"),
        ({"model": "/nowhere"}, "is not a directory"),
        ({"data": "/nowhere.jsonl"}, "does not exist"),
        ({"max_response_tokens": 64}, "leave no room"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_written(tmp_path, base, options, words):
    with pytest.raises(UserError, match=words):
        train(config(tmp_path, base, **options))
    assert not (tmp_path / "dpo").exists()


def test_the_config_is_small_and_every_key_is_explained():
    assert len(keys(DPOConfig)) <= 40 and all(key.info["help"] for key in keys(DPOConfig))
