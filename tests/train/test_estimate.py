"""A dry run counts what is there, takes nothing for granted that can be measured, and leaves nothing behind."""

import re

import pytest
import tiny
import torch
from torch import nn

from rlhf_fast import cli
from rlhf_fast.train import dpo, estimate, loop, ppo, reward, sft
from rlhf_fast.train.errors import UserError
from rlhf_fast.train.model import load_policy, reward_from_policy

SMALL = {"batch_size": 8, "max_response_tokens": 24}
STAGES = {"sft": sft, "reward": reward, "dpo": dpo}


def config(stage, tmp_path, base, **options):
    kind = {"sft": sft.SFTConfig, "reward": reward.RewardConfig, "dpo": dpo.DPOConfig}[stage]
    return tiny.stage_config(kind, tmp_path, base, pairs=40, **SMALL | options)


def ppo_config(tmp_path, base, reward_model=None, **options):
    data = tmp_path / "pairs.jsonl"
    if not data.exists():
        tiny.write_pairs(data)
    places = {"model": str(base), "data": str(data), "output_dir": str(tmp_path / "ppo"), "reward_model": reward_model}
    return ppo.PPOConfig(**places, heldout_fraction=0.2, batch_size=8, response_length=6, missing_eos="none", **options)


def numbers(text):
    """Every line of a dry run that ends in a number with its unit."""
    found = re.findall(r"^  (\S.*?) {2,}([\d.,e+-]+) (MiB|s)$", text, flags=re.MULTILINE)
    return {name: float(number.replace(",", "")) for name, number, _ in found}


@pytest.mark.parametrize("architecture", tiny.CONFIGS)
def test_models_are_counted_without_being_loaded(tmp_path, architecture):
    base = tiny.save_base(tmp_path / "base", architecture)
    for dtype, width in (("float32", 4), ("bfloat16", 2)):
        asked = sft.SFTConfig(model=str(base), data="", output_dir="", dtype=dtype)
        model, _ = load_policy(base, dtype=dtype)
        (found,) = estimate.held("sft", asked)
        assert found.parameters == found.trained == sum(p.numel() for p in model.parameters())
        assert found.weights == found.gradients == width * found.parameters
    scalar, _ = reward_from_policy(base)
    trained, sampler = estimate.held("reward", reward.RewardConfig(model=str(base), data="", output_dir=""))
    assert trained.parameters == sum(p.numel() for p in scalar.parameters())
    assert sampler.parameters == model.num_parameters() and sampler.trained == sampler.gradients == 0


def test_who_takes_part_in_ppo(tmp_path, base):
    def names(**options):
        return [model.name for model in estimate.held("ppo", ppo_config(tmp_path, base, **options))]

    assert names(reward_model=str(base)) == ["policy", "reference", "value", "reward"]
    assert names(reward="words:count") == ["policy", "reference", "value"]
    assert names(reward="words:count", advantage="grpo") == ["policy", "reference"]
    averaged = names(reward="words:count", ema_decay=0.9)
    assert averaged == ["policy", "average of the policy", "reference", "value"]


def test_a_value_model_that_starts_anew_is_the_policys_body_and_an_average_is_float32(tmp_path, base):
    other = tiny.save_base(tmp_path / "other", "gpt2")
    asked = {"reward_model": str(other), "ema_decay": 0.9, "dtype": "bfloat16"}
    for start, body in (("reward", other), ("zeros", base)):
        policy, average, _, value, _ = estimate.held("ppo", ppo_config(tmp_path, base, **asked, value_init=start))
        assert value.parameters == sum(p.numel() for p in reward_from_policy(body)[0].parameters())
        assert average.weights == 2 * policy.weights and average.gradients == average.trained == 0


def test_an_adapter_leaves_little_to_train_and_no_reference(tmp_path, base):
    pytest.importorskip("peft")
    policy, value = estimate.held("ppo", ppo_config(tmp_path, base, reward="words:count", lora_rank=2))
    assert (policy.name, value.name) == ("policy", "value")
    asked = sft.SFTConfig(model=str(base), data="", output_dir="", lora_rank=2)
    adapter = sum(p.numel() for p in estimate.lora.trained(estimate.lora.attach(load_policy(base)[0], asked)))
    assert policy.trained == adapter and policy.gradients == 4 * adapter
    assert value.trained == adapter + 16 + 1  # the head
    averaged = estimate.held("ppo", ppo_config(tmp_path, base, reward="words:count", lora_rank=2, ema_decay=0.9))
    assert averaged[1].weights == 4 * adapter


def test_saved_tensors_are_counted_once_and_until_they_are_let_go():
    layers = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Tanh(), nn.Linear(8, 8, bias=False))
    counter = estimate.SavedTensors([layers])
    with counter.counting():
        for _ in range(3):
            layers(torch.ones(5, 8)).sum().backward()
    # The input, and the output of tanh, which tanh and the second layer both keep.
    assert counter.peak == 2 * 5 * 8 * 4 and counter._now == 0
    with counter.counting():
        kept = [layers(torch.ones(5, 8)) for _ in range(3)]
    assert counter.peak == counter._now == 3 * 2 * 5 * 8 * 4
    del kept


@pytest.mark.parametrize("stage", STAGES)
def test_a_dry_run_prints_and_writes_nothing(tmp_path, base, capsys, stage):
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    asked = config(stage, tmp_path, base)
    assert STAGES[stage].train(asked, dry_run=True) == tmp_path / stage
    shown = numbers(capsys.readouterr().out)
    assert {path for path in tmp_path.rglob("*") if path not in before} == {tmp_path / "pairs.jsonl"}
    weights = sum(size for name, size in shown.items() if name.startswith("weights"))
    rest = ("gradients", "moments of the optimizer", "logits, a tile at a time")
    activations = next(size for name, size in shown.items() if name.startswith("activations"))
    total = weights + activations + sum(shown.get(name, 0) for name in rest)
    assert shown["in all"] == pytest.approx(total, abs=0.3) and activations > 0
    assert shown["moments of the optimizer"] == pytest.approx(2 * shown["gradients"], abs=0.2)
    update, whole = shown["one update"], next(v for name, v in shown.items() if name.startswith("all"))
    updates = int(next(name for name in shown if name.startswith("all")).split()[1])
    rows = len(loop.epochs([1] * 32, 8, asked.num_train_epochs, torch.Generator())[0])
    assert 0 < update < whole and whole == pytest.approx(update * updates, rel=0.02) and abs(updates - rows) <= 2


def test_a_dry_run_of_ppo(tmp_path, base, capsys):
    out = ppo.train(ppo_config(tmp_path, base), reward=tiny.count_letters, dry_run=True)
    shown = numbers(capsys.readouterr().out)
    assert not out.exists() and shown["in all"] > 0
    assert any("replies and their scores, measured" in name for name in shown)
    model, tokens = load_policy(base)[0], 8 * 20
    assert estimate.kv_cache(model, tokens) == tokens * 2 * 2 * 16 * 4  # keys and values, layers, width, float32


def test_a_dry_run_counts_written_replies_and_conversations(tmp_path, capsys):
    base = tiny.save_chat_base(tmp_path / "base")
    turns = [[{"role": "user", "content": f"the cat {i}"}] for i in range(16)]
    replies = {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    tiny.write_rows(tmp_path / "pairs.jsonl", [{"prompt": prompt, **replies} for prompt in turns])
    options = {"ptx_coef": 1.0, "ema_decay": 0.9, "value_learning_rate": 1e-3}
    out = ppo.train(ppo_config(tmp_path, base, **options), reward=tiny.count_letters, dry_run=True)
    assert not out.exists() and "weights of the average of the policy" in numbers(capsys.readouterr().out)
    for stage in STAGES:
        asked = STAGES[stage]
        kind = {"sft": sft.SFTConfig, "reward": reward.RewardConfig, "dpo": dpo.DPOConfig}[stage]
        places = {"model": str(base), "data": str(tmp_path / "pairs.jsonl"), "output_dir": str(tmp_path / stage)}
        out = asked.train(kind(**places, heldout_fraction=0.2), dry_run=True)
        assert not out.exists() and numbers(capsys.readouterr().out)["one update"] > 0


def test_activations_grow_with_the_micro_batch(tmp_path, base, capsys):
    def activations(size):
        sft.train(config("sft", tmp_path, base, batch_size=16, micro_batch_size=size), dry_run=True)
        lines = numbers(capsys.readouterr().out)
        return next(value for name, value in lines.items() if name.startswith("activations"))

    assert activations(0) > 2 * activations(4) > 0


def test_what_does_not_fit_is_not_loaded(tmp_path, base, capsys, monkeypatch):
    monkeypatch.setattr(estimate, "free_memory", lambda device: 1000)
    monkeypatch.setattr(sft, "load_policy", lambda *_, **__: pytest.fail("loaded"))
    sft.train(config("sft", tmp_path, base), dry_run=True)
    shown = capsys.readouterr().out
    assert "does not fit: 0.2 MiB without activations, 0.0 MiB are free" in shown and "measured" not in shown


def test_a_model_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="model /nowhere is not a directory"):
        estimate.held("sft", sft.SFTConfig(model="/nowhere", data="", output_dir=""))


@pytest.mark.parametrize("flag", ["--dry-run", "--dry_run"])
def test_the_flag_prints_and_makes_no_report(tmp_path, base, capsys, flag):
    data = tiny.write_pairs(tmp_path / "pairs.jsonl")
    words = ["sft", "--model", str(base), "--data", str(data), "--output_dir", str(tmp_path / "out"), flag]
    assert cli.main([*words, "--max_response_tokens", "24", "--heldout_fraction", "0.2"]) == 0
    assert "one update" in capsys.readouterr().out and not (tmp_path / "out").exists()
