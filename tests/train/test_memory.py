"""What saves memory changes nothing else: checkpointed activations give the same bits, 8-bit moments the same curve."""

import functools
import importlib.util
from types import SimpleNamespace

import pytest
import tiny
import torch

from rlhf_fast.train import loop, ppo, resume, sft
from rlhf_fast.train.errors import UserError
from rlhf_fast.train.estimate import SavedTensors
from rlhf_fast.train.generate import generate
from rlhf_fast.train.model import load_policy
from rlhf_fast.train.policy import response_logprobs
from tests.train import kill


def config(tmp_path, base, **options):
    chosen = {"batch_size": 8, "learning_rate": 1e-2, "num_train_epochs": 2, "max_response_tokens": 24}
    return tiny.stage_config(sft.SFTConfig, tmp_path, base, pairs=40, **chosen | options)


@pytest.mark.parametrize("full_logits", [False, True])
@pytest.mark.parametrize("architecture", tiny.CONFIGS)
def test_checkpointed_activations_give_the_same_gradients_from_less(tmp_path, architecture, full_logits):
    base = tiny.save_base(tmp_path / "base", architecture)
    ids = torch.randint(3, 270, (4, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)

    def gradients(checkpointed):
        model, _ = load_policy(base)
        asked = sft.SFTConfig(model="", data="", output_dir="", gradient_checkpointing=checkpointed)
        counter = SavedTensors([loop.made_trainable(model, asked)])
        with counter.counting():
            logprobs = response_logprobs(model, ids, mask, 20, full_logits=full_logits)
            kept = counter._now
            logprobs.sum().backward()
        assert not model.training
        return kept, {name: parameter.grad for name, parameter in model.named_parameters()}

    (plain, expected), (less, got) = gradients(False), gradients(True)
    assert less < 0.7 * plain
    for name, gradient in expected.items():
        assert (gradient is None and got[name] is None) or gradient.equal(got[name]), name


def test_replies_are_sampled_as_before(base):
    model, tokenizer = load_policy(base)
    sample = functools.partial(generate, max_new_tokens=8, temperature=0.7, batch_size=2)
    torch.manual_seed(0)
    expected = sample(model, tokenizer, [[1, 5], [1, 6, 7]])
    loop.made_trainable(model, sft.SFTConfig(model="", data="", output_dir="", gradient_checkpointing=True))
    torch.manual_seed(0)
    assert sample(model, tokenizer, [[1, 5], [1, 6, 7]]).response_ids.equal(expected.response_ids)


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_a_stage_with_checkpointed_activations_ends_with_the_same_bits(tmp_path, base, lora_rank):
    if lora_rank:
        pytest.importorskip("peft")
    weights = []
    for name, checkpointed in (("plain", False), ("less", True)):
        options = {"output_dir": str(tmp_path / name), "gradient_checkpointing": checkpointed, "lora_rank": lora_rank}
        weights.append((sft.train(config(tmp_path, base, **options)) / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_ppo_takes_every_switch_at_once(tmp_path, base):
    pytest.importorskip("peft")
    data = str(tiny.write_pairs(tmp_path / "pairs.jsonl"))
    options = {"lora_rank": 2, "gradient_checkpointing": True, "micro_batch_tokens": 64, "dtype": "bfloat16"}
    options |= {"batch_size": 8, "total_episodes": 16, "response_length": 6, "missing_eos": "none"}
    places = {"model": str(base), "data": data, "output_dir": str(tmp_path / "out"), "heldout_fraction": 0.2}
    log = tiny.read_log(ppo.train(ppo.PPOConfig(**places, **options), reward=tiny.count_letters))
    assert len(log) == 2 and all(line["val/ratio"] == pytest.approx(1, abs=0.05) for line in log)


def test_micro_batches_of_tokens_train_the_same_model(tmp_path, base):
    logs = []
    for tokens in (0, 40):
        options = {"output_dir": str(tmp_path / str(tokens)), "micro_batch_tokens": tokens}
        logs.append(tiny.read_log(sft.train(config(tmp_path, base, **options))))
    for a, b in zip(*logs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)


def test_moments_of_8_bits_follow_the_curve_of_those_of_32(tmp_path, base):
    pytest.importorskip("bitsandbytes")
    logs = [
        tiny.read_log(sft.train(config(tmp_path, base, output_dir=str(tmp_path / kind), optimizer=kind)))
        for kind in ("adamw", "adamw_8bit")
    ]
    assert logs[0][-1]["loss"] < 0.9 * logs[0][0]["loss"]
    for wide, narrow in zip(*logs, strict=True):
        assert narrow["loss"] == pytest.approx(wide["loss"], rel=0.02)


def test_moments_of_8_bits_are_bytes_and_continue_with_the_same_bits(tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    layer = torch.nn.Linear(128, 64)  # below 4,096 numbers the library keeps 32 bits
    optimizer = loop.adamw([layer], weight_decay=0.1, epsilon=1e-5, kind="adamw_8bit")
    assert isinstance(optimizer, bitsandbytes.optim.AdamW8bit)

    def steps(layer, optimizer, count, seed):
        for i in range(count):
            x = torch.randn(4, 128, generator=torch.Generator().manual_seed(seed + i))
            layer(x).tanh().sum().backward()
            options = {"rate": 0.01, "max_grad_norm": 1.0, "where": "here"}
            loop.clip_and_step(optimizer, {"layer": layer}, {"loss": torch.zeros(())}, **options)

    def state_of(layer, optimizer):
        return resume.State({"layer": layer}, optimizer, torch.Generator(), SimpleNamespace(), {})

    steps(layer, optimizer, 3, 0)
    moments = optimizer.state[layer.weight]
    assert moments["state1"].dtype == torch.uint8
    (tmp_path / "checkpoint").mkdir()
    saved = state_of(layer, optimizer).save(tmp_path / "checkpoint")
    steps(layer, optimizer, 3, 10)

    again = torch.nn.Linear(128, 64)
    other = loop.adamw([again], weight_decay=0.1, epsilon=1e-5, kind="adamw_8bit")
    state_of(again, other).load(tmp_path / "checkpoint", saved)
    steps(again, other, 3, 10)
    assert again.weight.equal(layer.weight) and again.bias.equal(layer.bias)


def test_a_stage_with_moments_of_8_bits_resumes(tmp_path):
    pytest.importorskip("bitsandbytes")
    with kill.made() as world:
        train = world.stage("sft", optimizer="adamw_8bit")
        peace = kill.child(train, world.place / "peace" / "eight")
        assert peace.code == kill.FINISHED, peace.text
        killed = kill.child(train, world.place / "eight", event=peace.events // 2)
        assert killed.code == -kill.signal.SIGKILL
        end = kill.child(train, world.place / "eight")
        assert end.code == kill.FINISHED, end.text
        assert "continued after step" in end.text
        results = [kill.result(place) for place in (world.place / "eight", world.place / "peace" / "eight")]
    assert not kill.difference(*results)


def test_without_bitsandbytes_its_command_is_named(tmp_path, base, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name))
    with pytest.raises(UserError, match=r"'optimizer' adamw_8bit needs bitsandbytes.*: pip install bitsandbytes"):
        sft.train(config(tmp_path, base, optimizer="adamw_8bit"))
    assert not (tmp_path / "sft").exists()
