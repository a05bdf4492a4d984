"""Adapters: only they are trained, switched off they are the reference, and what is written loads without peft, and with it."""

import json
import random

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from rlhf_fast.train import dpo, loop, lora, ppo, resume, reward, rollout, sft
from rlhf_fast.train.errors import UserError
from rlhf_fast.train.model import load_policy, load_scalar_model, reward_from_policy, sequence_scores
from rlhf_fast.train.policy import logit_head, response_logprobs
from tests.train import kill

peft = pytest.importorskip("peft")

RATE = {"lora_rank": 4, "batch_size": 8, "learning_rate": 2e-2}
FIRST = {"gpt2": "c_attn", "gpt_neox": "query_key_value", "opt": "q_proj", "llama": "q_proj", "qwen2": "q_proj"}


def with_adapter(base, **options):
    config = sft.SFTConfig(model=str(base), data="", output_dir="", **{"lora_rank": 4} | options)
    torch.manual_seed(0)
    return lora.attach(load_policy(base)[0], config)


def shaken(model):
    """An adapter starts at 0: after this it says something."""
    with torch.no_grad():
        for parameter in lora.trained(model):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


IDS = torch.randint(3, 270, (3, 12), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS, dtype=torch.bool)


@torch.no_grad()
def logprobs(model):
    return response_logprobs(model, IDS, MASK, 8)


@pytest.mark.parametrize("architecture", tiny.CONFIGS)
def test_switched_off_it_is_the_model_before_and_merged_it_is_the_model_after(tmp_path, architecture):
    base = tiny.save_base(tmp_path / "base", architecture)
    plain, model = load_policy(base)[0], with_adapter(base)
    assert logprobs(model).equal(logprobs(plain))
    shaken(model)
    logit_head(model)  # the head is still a plain linear layer
    now = logprobs(model)
    assert (now - logprobs(plain)).abs().max() > 0.01
    with lora.switched_off(model):
        assert logprobs(model).equal(logprobs(plain))
    assert logprobs(model).equal(now)
    plain.load_state_dict(lora.merged_weights(model))
    torch.testing.assert_close(logprobs(plain), now, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", tiny.CONFIGS)
def test_only_adapters_are_trained_and_the_head_of_a_reward_model(tmp_path, architecture):
    base = tiny.save_base(tmp_path / "base", architecture)
    config = reward.RewardConfig(model=str(base), data="", output_dir="", lora_rank=2)
    model = lora.attach(reward_from_policy(base, dtype="bfloat16")[0], config)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {"score.weight", "score.bias"} < trained
    assert all(".lora_" in name for name in trained - {"score.weight", "score.bias"})
    assert any(FIRST[architecture] in name for name in trained)
    assert {parameter.dtype for parameter in lora.trained(model)} == {torch.float32}
    assert model.dtype == torch.bfloat16
    named = with_adapter(base, lora_target_modules=FIRST[architecture])
    assert set(lora.adapted_layers(named)) == {n for n, _ in named.named_modules() if n.endswith(FIRST[architecture])}


def test_without_a_rank_nothing_happens_and_nothing_is_drawn(base):
    state = torch.get_rng_state()
    model = load_policy(base)[0]
    config = sft.SFTConfig(model=str(base), data="", output_dir="")
    assert lora.attach(model, config) is model and not lora.adapted_layers(model)
    assert lora.merged_weights(model) is None and torch.get_rng_state().equal(state)
    with lora.switched_off(model):
        assert all(parameter.requires_grad for parameter in model.parameters())


def stage(kind, tmp_path, base, **options):
    own = {"num_train_epochs": 2, "max_response_tokens": 24}
    if kind is ppo.PPOConfig:
        own = {"response_length": 8, "total_episodes": 24, "num_ppo_epochs": 2, "missing_eos": "none"}
        chosen = {
            "model": str(base),
            "data": str(tmp_path / "pairs.jsonl"),
            "output_dir": str(tmp_path / "ppo"),
            "heldout_fraction": 0.2,
        }
        tiny.write_pairs(tmp_path / "pairs.jsonl")
        return kind(**(chosen | RATE | own | options))
    return tiny.stage_config(kind, tmp_path, base, pairs=40, **(RATE | own | options))


def test_all_stages_train_adapters_and_write_models_that_need_no_peft(tmp_path, base):
    tuned = sft.train(stage(sft.SFTConfig, tmp_path, base))
    log = tiny.read_log(tuned)
    assert log[-1]["eval_loss"] < log[0]["loss"] * 0.9
    before, after = (dict(AutoModelForCausalLM.from_pretrained(place).named_parameters()) for place in (base, tuned))
    moved = {name for name, weight in after.items() if not weight.equal(before[name])}
    assert before.keys() == after.keys() and moved and all("_proj" in name for name in moved)

    judge = reward.train(stage(reward.RewardConfig, tmp_path, tuned, normalize_samples=16))
    assert json.loads((judge / "stage.json").read_text())["results"]["train_accuracy"] > 0.6
    assert not (judge / "adapter").exists() and load_scalar_model(judge)[0].score.bias.item() != 0

    for name, out in (
        ("dpo", dpo.train(stage(dpo.DPOConfig, tmp_path, tuned))),
        ("ppo", ppo.train(stage(ppo.PPOConfig, tmp_path, tuned, reward_model=str(judge)))),
    ):
        merged = AutoModelForCausalLM.from_pretrained(out).eval()
        apart = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tuned), out / "adapter").eval()
        with torch.no_grad():
            close = {"rtol": 1e-4, "atol": 1e-4, "msg": name}
            torch.testing.assert_close(apart(IDS).logits, merged(IDS).logits, **close)
    assert load_scalar_model(out / "value")[0].score.weight.shape == (1, 16)
    kl = [line["objective/kl"] for line in tiny.read_log(tmp_path / "ppo")]
    assert kl[0] == 0 and kl[-1] != 0


def test_a_reward_model_is_saved_as_it_scores(tmp_path, base):
    from rlhf_fast.train.checkpoint import save_model

    config = reward.RewardConfig(model=str(base), data="", output_dir="", lora_rank=2)
    model, tokenizer = reward_from_policy(base)
    shaken(lora.attach(model, config))
    save_model(tmp_path / "out", model, tokenizer)
    with torch.no_grad():
        scores = [sequence_scores(made, IDS, MASK) for made in (model, load_scalar_model(tmp_path / "out")[0])]
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-5)


def test_ppo_keeps_one_policy_in_memory_and_holds_it_to_what_it_was(tmp_path, base):
    config = stage(ppo.PPOConfig, tmp_path, base, reward="words:none")
    loop.seed_everything(0)
    models = ppo.load_models(config, tiny.count_letters, torch.device("cpu"))
    assert models.reference is models.policy
    shaken(models.policy)
    plain = load_policy(base)[0]
    replies = rollout.roll_out(models, ["a", "b"], [[1, 5], [1, 6, 7]], response_length=6, temperature=0.7)
    options = {"temperature": 0.7, "missing_eos": "none", "missing_eos_penalty": 0.0, "micro_batch_size": 0}
    models = rollout.Models(models.policy, models.policy, models.value, lambda samples: [0.0, 1.0], models.tokenizer)
    apart = rollout.Models(models.policy, plain, models.value, models.reward, models.tokenizer)
    one, two = (rollout.score(replies, which, **options) for which in (models, apart))
    assert one.ref_logprobs.equal(two.ref_logprobs) and one.logprobs.equal(two.logprobs)
    assert not one.ref_logprobs.equal(one.logprobs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_average_is_that_of_the_adapter_over_the_same_weights(tmp_path, base, dtype):
    config = stage(ppo.PPOConfig, tmp_path, base, reward="words:none", ema_decay=0.5, dtype=dtype)
    loop.seed_everything(0)
    models = ppo.load_models(config, tiny.count_letters, torch.device("cpu"))
    policy, average = models.policy, models.average
    places = [{p.data_ptr() for p in model.parameters() if not p.requires_grad} for model in (policy, average)]
    assert places[0] == places[1] and len(lora.trained(average)) == len(lora.trained(policy)) == 2 * 14
    before = [parameter.detach().clone() for parameter in lora.trained(policy)]
    shaken(policy)
    ppo.follow(average, policy, 0.5)
    for kept, old, now in zip(lora.trained(average), before, lora.trained(policy), strict=True):
        torch.testing.assert_close(kept, (old + now) / 2)
    judged = ppo.judged_models(models)
    assert judged.policy is average
    with models.referring() as plain, judged.referring() as reference:
        assert logprobs(plain).equal(logprobs(reference))
    assert (logprobs(average) - logprobs(policy)).abs().max() > 0.001
    assert {name for name in resume._tensors_of(average) if "lora_" not in name} == dict(average.named_buffers()).keys()


def test_the_average_of_an_adapter_is_judged_and_saved(tmp_path, base):
    start = AutoModelForCausalLM.from_pretrained(base).state_dict()
    name, moved, kl = "model.layers.0.mlp.down_proj.weight", {}, {}
    for decay in (None, 0.9, 1.0):  # 1.0: it stays where it started
        options = {"ema_decay": decay, "eval_every": 3, "eval_prompts": 8, "guard": "warn", "checks": False}
        config = stage(ppo.PPOConfig, tmp_path, base, **options, output_dir=str(tmp_path / str(decay)))
        out = ppo.train(config, reward=tiny.count_letters, judge=lambda samples: [0.0] * len(samples))
        moved[decay] = (AutoModelForCausalLM.from_pretrained(out).state_dict()[name] - start[name]).norm().item()
        kl[decay] = tiny.read_log(out)[-1]["eval/kl"]
    assert moved[1.0] == 0 < moved[0.9] < moved[None]
    assert kl[1.0] == 0 and abs(kl[None]) > 1e-3
    apart = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "0.9" / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "0.9")
    with torch.no_grad():
        torch.testing.assert_close(apart(IDS).logits, merged(IDS).logits, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_holds_the_adapter_alone(tmp_path, base):
    model = with_adapter(base)
    assert {name for name in resume._tensors_of(model) if "lora_" not in name} == dict(model.named_buffers()).keys()
    assert len(loop.adamw([model], weight_decay=0, epsilon=1e-8).param_groups[0]["params"]) == 2 * 14


def test_killed_at_random_it_ends_with_the_same_bits():
    threads = torch.get_num_threads()
    with kill.made() as world:
        peaceful = kill.in_peace(world, "lora")
        assert "out/adapter/adapter_model.safetensors" in peaceful.result
        killed, wrong = kill.ordeal(world, "lora", peaceful, random.Random(0), 4, event=peaceful.events // 2)
    torch.set_num_threads(threads)
    assert not wrong and killed


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lora_rank": 0, "lora_alpha": 8.0}, "'lora_alpha' means nothing without 'lora_rank'"),
        ({"lora_rank": -1}, "'lora_rank' must be at least 0"),
        ({"lora_target_modules": "q_prok"}, "'lora_target_modules' q_prok does not fit LlamaForCausalLM: .*q_proj"),
        ({"lora_target_modules": "lm_head"}, "come from a peft.*Linear, not a plain nn.Linear. Set full_logits"),
    ],
)
def test_wrong_keys_are_refused_before_anything_is_written(tmp_path, base, options, words):
    with pytest.raises(UserError, match=words):
        sft.train(stage(sft.SFTConfig, tmp_path, base, **options))
    assert not (tmp_path / "sft").exists()


def test_a_head_with_an_adapter_is_trained_with_whole_logits(tmp_path, base):
    out = sft.train(stage(sft.SFTConfig, tmp_path, base, lora_target_modules="lm_head,q_proj", full_logits=True))
    before, after = (AutoModelForCausalLM.from_pretrained(place).lm_head.weight for place in (base, out))
    assert not before.equal(after)


def test_an_adapter_on_a_head_that_is_the_embedding_too_is_refused(tmp_path):
    base = tiny.save_base(tmp_path / "base", "gpt2")
    with pytest.raises(UserError, match="head of this GPT2LMHeadModel is its embedding"):
        with_adapter(base, lora_target_modules="lm_head,c_attn")


def test_without_peft_its_command_is_named(tmp_path, base, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(UserError, match="'lora_rank' needs peft, which is not installed: pip install peft"):
        sft.train(stage(sft.SFTConfig, tmp_path, base))
