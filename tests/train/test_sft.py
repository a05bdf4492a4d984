import dataclasses
import json

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_fast.train import sft
from rlhf_fast.train.config import keys
from rlhf_fast.train.errors import UserError
from rlhf_fast.train.sft import Example, SFTConfig, accumulate_gradient, evaluate, train


def config(tmp_path, base, **options):
    chosen = {"batch_size": 8, "learning_rate": 1e-2, "num_train_epochs": 3, "max_response_tokens": 24}
    return tiny.stage_config(SFTConfig, tmp_path, base, pairs=40, **(chosen | options))


EXAMPLES = [
    Example([1, 5, 6, 7, 8, 2], 3),
    Example([1, 9, 10, 2], 2),
    Example([1, 11, 12, 13, 14, 15, 16, 2], 5),
    Example([1, 17, 2], 2),
    Example([1, 18, 19, 20, 21, 22, 23, 24, 2], 2),
]


def reference_loss(model):
    """Mean over reply tokens of -log p, one example at a time without any padding."""
    losses = []
    for example in EXAMPLES:
        logprobs = model(torch.tensor([example.ids])).logits[0].log_softmax(-1)
        losses += [-logprobs[i - 1, example.ids[i]] for i in range(example.start, len(example.ids))]
    return torch.stack(losses).mean()


@pytest.mark.parametrize("sizes", [(5,), (2, 3), (1, 1, 1, 1, 1), (4, 1)])
def test_loss_and_gradient_do_not_depend_on_padding_or_micro_batches(sizes):
    model, reference = (tiny.model("gpt2").double().eval() for _ in range(2))
    expected = reference_loss(reference)
    expected.backward()
    iterator = iter(EXAMPLES)
    parts = [[next(iterator) for _ in range(size)] for size in sizes]
    stats = accumulate_gradient(model, parts, pad_id=0)
    torch.testing.assert_close(stats["loss"].double(), expected.detach(), rtol=1e-6, atol=1e-6)
    for (name, mine), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-11, msg=name)
    assert evaluate(reference, EXAMPLES, 0, batch_size=2) == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "qwen2", "gpt_neox", "opt"])
def test_every_architecture_learns_the_replies(tmp_path, architecture):
    base = tiny.save_base(tmp_path / "base", architecture)
    out = train(config(tmp_path, base))
    log = tiny.read_log(out)
    assert log[-1]["eval_loss"] < log[0]["loss"] * 0.8
    assert log[-1]["epoch"] == 3 and log[-1]["learning_rate"] < log[0]["learning_rate"] and log[-1]["grad_norm"] > 0
    summary = json.loads((out / "stage.json").read_text())
    assert summary["results"]["eval_loss"] == log[-1]["eval_loss"]
    assert summary["data"]["rows_used"] == summary["data"]["rows_train"] + summary["data"]["rows_heldout"] == 40
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id != tokenizer.pad_token_id
    assert model.generation_config.max_new_tokens == 24


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(tmp_path, base):
    def weights(name, seed):
        out = train(config(tmp_path, base, output_dir=str(tmp_path / name), seed=seed, num_train_epochs=1))
        return (out / "model.safetensors").read_bytes()

    assert weights("a", 1) == weights("b", 1) != weights("c", 2)


def test_micro_batches_train_the_same_model(tmp_path, base):
    whole = train(config(tmp_path, base, output_dir=str(tmp_path / "whole")))
    parts = train(config(tmp_path, base, output_dir=str(tmp_path / "parts"), micro_batch_size=3))
    for a, b in zip(tiny.read_log(whole), tiny.read_log(parts), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3) and a["entropy"] == pytest.approx(b["entropy"], rel=1e-3)


def test_heldout_prompts_are_not_trained_on_and_can_be_none(tmp_path, base, monkeypatch):
    trained, evaluated = set(), set()

    def remember(function, seen, examples):
        def wrapped(model, given, *rest):
            seen.update(tuple(example.ids) for example in examples(given))
            return function(model, given, *rest)

        return wrapped

    parts = remember(sft.accumulate_gradient, trained, lambda parts: [example for part in parts for example in part])
    monkeypatch.setattr(sft, "accumulate_gradient", parts)
    monkeypatch.setattr(sft, "evaluate", remember(sft.evaluate, evaluated, list))
    train(config(tmp_path, base))
    assert len(trained) + len(evaluated) == 40 and evaluated and not trained & evaluated

    out = train(config(tmp_path, base, output_dir=str(tmp_path / "all"), heldout_fraction=0.0, num_train_epochs=1))
    summary = json.loads((out / "stage.json").read_text())
    assert summary["data"]["rows_heldout"] == 0 and "eval_loss" not in summary["results"] and len(trained) == 40


def test_what_was_cut_is_counted(tmp_path, base):
    out = train(config(tmp_path, base, max_prompt_tokens=6, max_response_tokens=5, num_train_epochs=1, checks=False))
    data = json.loads((out / "stage.json").read_text())["data"]
    assert data["truncated_prompts"] == 40 and data["truncated_responses"] > 20


def test_a_loss_that_is_not_finite_stops_the_stage(tmp_path, base):
    with pytest.raises(UserError, match=r"sft step \d+: the .* nothing was updated"):
        train(config(tmp_path, base, learning_rate=1e30, max_grad_norm=0, lr_schedule="constant"))
    assert not (tmp_path / "sft" / "stage.json").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"model": "/nowhere"}, "is not a directory"),
        ({"data": "/nowhere.jsonl"}, "does not exist"),
        ({"device": "warp"}, "not known to torch"),
        ({"max_response_tokens": 64}, "leave no room"),
        ({"heldout_fraction": 0.0001}, "held out"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_written(tmp_path, base, options, words):
    with pytest.raises(UserError, match=words):
        train(config(tmp_path, base, **options))
    assert not (tmp_path / "sft").exists()


def test_a_directory_in_use_is_refused_and_kept(tmp_path, base):
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "mine").write_text("kept")
    with pytest.raises(UserError, match="already holds files"):
        train(config(tmp_path, base))
    assert [path.name for path in (tmp_path / "sft").iterdir()] == ["mine"]


def test_the_config_is_small_and_every_key_is_explained():
    assert len(keys(SFTConfig)) == len(dataclasses.fields(SFTConfig)) <= 40
    assert all(key.info["help"] for key in keys(SFTConfig))


@pytest.mark.parametrize("asked", [False, True])
def test_the_prompt_is_learnt_only_where_asked_for(tmp_path, base, monkeypatch, asked):
    original, starts = accumulate_gradient, []

    def spy(model, parts, *rest):
        starts.extend(example.start for part in parts for example in part)
        return original(model, parts, *rest)

    monkeypatch.setattr(sft, "accumulate_gradient", spy)
    train(config(tmp_path, base, train_on_prompt=asked, num_train_epochs=1))
    assert starts and all((start == 1) is asked for start in starts)
