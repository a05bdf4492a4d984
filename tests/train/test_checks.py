"""Every fault is put into a real directory or a real model, and found by the stage that would have lost the run to it."""

import json
import re

import pytest
import tiny
import torch
from torch import nn

from rlhf_fast.train import checks, ppo, reward, sft
from rlhf_fast.train import model as models_
from rlhf_fast.train.config import to_dict
from rlhf_fast.train.errors import UserError
from rlhf_fast.train.model import load_policy, reward_from_policy
from rlhf_fast.train.rollout import Models

LENGTH = 12


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("checks")
    tiny.save_base(root / "base", "gpt2")
    tiny.write_pairs(root / "pairs.jsonl")
    save_reward(root / "reward", root / "base")
    return root


def save_reward(directory, base, change=lambda model, tokenizer: None):
    torch.manual_seed(0)
    model, tokenizer = reward_from_policy(base)
    change(model, tokenizer)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


SHARED = {"heldout_fraction": 0.2, "max_response_tokens": 16}


def run_sft(files, tmp_path, **changes):
    chosen = {"model": str(files / "base"), "data": str(files / "pairs.jsonl"), "output_dir": str(tmp_path / "sft")}
    return sft.train(sft.SFTConfig(**(chosen | SHARED | changes)))


def run_reward(files, tmp_path, **changes):
    chosen = {"model": str(files / "base"), "data": str(files / "pairs.jsonl"), "output_dir": str(tmp_path / "reward")}
    return reward.train(reward.RewardConfig(**(chosen | SHARED | {"normalize_samples": 8} | changes)))


def run_ppo(files, tmp_path, **changes):
    chosen = {"model": str(files / "base"), "data": str(files / "pairs.jsonl"), "output_dir": str(tmp_path / "ppo")}
    chosen |= {"reward_model": str(files / "reward"), "heldout_fraction": 0.2, "response_length": LENGTH}
    chosen |= {"batch_size": 8, "total_episodes": 8, "num_ppo_epochs": 1}
    return ppo.train(ppo.PPOConfig(**(chosen | changes)))


def rewrite(files, tmp_path, change):
    """A copy of the pairs with each row changed."""
    rows = [json.loads(line) for line in (files / "pairs.jsonl").read_text().splitlines()]
    path = tmp_path / "changed.jsonl"
    path.write_text("".join(json.dumps(row | change(row)) + "\n" for row in rows))
    return str(path)


def copy_base(files, tmp_path, change):
    """The base model and its tokenizer with a fault, in a directory of their own."""
    model, tokenizer = load_policy(files / "base")
    change(model, tokenizer)
    model.save_pretrained(tmp_path / "faulty")
    tokenizer.save_pretrained(tmp_path / "faulty")
    return str(tmp_path / "faulty")


def refused(words, call, *arguments, **changes):
    """The message of a stage that must stop, which is one line, says `words`, and leaves nothing behind."""
    with pytest.raises(UserError, match=words) as caught:
        call(*arguments, **changes)
    assert "\n" not in str(caught.value)
    assert re.search(r"; |, or | or ", str(caught.value)), "says what to do"
    outputs = [path for path in arguments[1].iterdir() if path.name in ("sft", "reward", "ppo")] if arguments else []
    assert not outputs


# ----------------------------------------------------------------------------------------------------- healthy


def test_healthy_stages_pass_and_their_random_numbers_are_left_alone(files, tmp_path):
    with_checks = run_ppo(files, tmp_path / "a")
    without = run_ppo(files, tmp_path / "b", checks=False)
    assert (with_checks / "model.safetensors").read_bytes() == (without / "model.safetensors").read_bytes()
    run_sft(files, tmp_path)
    run_reward(files, tmp_path)


@pytest.mark.parametrize("architecture", tiny.CONFIGS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_architecture_passes(tmp_path, architecture, dtype):
    models = build(tiny.save_base(tmp_path / "base", architecture), dtype=dtype)
    check(models)


def test_every_stage_has_the_switch():
    for config in (sft.SFTConfig, reward.RewardConfig, ppo.PPOConfig):
        assert to_dict(config(model="m", data="d", output_dir="o"))["checks"] is True


# -------------------------------------------------------------------------------------------------------- data


def test_prompts_longer_than_the_context(files, tmp_path):
    data = rewrite(files, tmp_path, lambda row: {"prompt": row["prompt"] + " the cat sat on a mat" * 12})
    for call in (run_sft, run_reward, run_ppo):
        refused("prompts are longer than .* tokens and would lose their beginning", call, files, tmp_path, data=data)


def test_replies_that_lose_their_end(files, tmp_path):
    refused("only 0 of .* replies keep their end token", run_sft, files, tmp_path, max_response_tokens=1)


def test_an_end_token_inside_a_reply(files, tmp_path):
    data = rewrite(files, tmp_path, lambda row: {"chosen": row["chosen"] + "<eos> and more"})
    refused("holds the end token '<eos>' before its end", run_sft, files, tmp_path, data=data)


def test_pairs_that_are_equal_once_they_are_cut(files, tmp_path):
    refused("chosen equals rejected in its first 1 tokens", run_reward, files, tmp_path, max_response_tokens=1)


@pytest.mark.parametrize(("before", "after", "word"), [("<user> ", "", "begin"), ("", " <assistant>", "end")])
def test_another_template_than_the_stage_before(files, tmp_path, before, after, word):
    data = rewrite(files, tmp_path, lambda row: {"prompt": f"{before}{row['prompt']}{after}"})
    sft_dir = str(run_sft(files, tmp_path / "first", data=data))
    words = f"was trained on prompts that all {word} with"
    refused(words, run_reward, files, tmp_path, model=sft_dir)
    refused(words, run_ppo, files, tmp_path, model=sft_dir)
    run_reward(files, tmp_path / "meant", model=sft_dir, checks=False)
    run_reward(files, tmp_path / "same", model=sft_dir, data=data)


def test_prompt_form():
    form = checks.prompt_form([f"Q: {i}? A:" for i in range(30)])["prompt_form"]
    assert form == {"start": "Q: ", "end": "? A:", "prompts": 30}


# -------------------------------------------------------------------------------------------------------- words


def test_a_tokenizer_larger_than_the_embedding(files, tmp_path):
    faulty = copy_base(files, tmp_path, lambda model, tokenizer: tokenizer.add_tokens(["<more>", "<and more>"]))
    for call in (run_sft, run_reward, run_ppo):
        refused(r"has \d+ tokens but the model has embeddings for \d+", call, files, tmp_path, model=faulty)


def another_template(model, tokenizer):
    tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"


def another_start(model, tokenizer):
    tokenizer.bos_token = "<pad>"


def another_split(model, tokenizer):
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (another_template, "have different chat templates"),
        (another_start, "the bos_token of .* and that of"),
        (another_split, "into different tokens"),
    ],
)
def test_a_reward_model_that_reads_other_words(files, tmp_path, change, words):
    faulty = save_reward(tmp_path / "faulty", files / "base", change)
    refused(words, run_ppo, files, tmp_path, reward_model=str(faulty))


def test_settings_that_end_with_another_token(files, tmp_path):
    def change(model, tokenizer):
        model.generation_config.eos_token_id = [7, 9]

    refused("stops at token .*7, 9.* by its", run_ppo, files, tmp_path, model=copy_base(files, tmp_path, change))


def test_pad_equal_to_end_is_repaired_on_loading_and_found_if_not(files, tmp_path):
    def change(model, tokenizer):
        tokenizer.pad_token = tokenizer.eos_token

    base = copy_base(files, tmp_path, change)
    tokenizer = load_policy(base)[1]
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    models = build(files / "base")
    models.tokenizer.pad_token = models.tokenizer.eos_token
    refused("the pad token and the end token are both '<eos>'", lambda: check(models))


def test_the_padding_side_of_a_tokenizer_has_no_say(files, tmp_path):
    weights = []
    for side in ("left", "right"):

        def change(model, tokenizer, side=side):
            tokenizer.padding_side = side

        base = copy_base(files, tmp_path / side, change)
        out = run_ppo(files, tmp_path / side, model=base)
        weights.append((out / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


# ------------------------------------------------------------------------------------------------------- models


def build(base, dtype="float32", seed=1):
    policy, tokenizer = load_policy(base, dtype=dtype)
    torch.manual_seed(seed)
    value, reward_model = (reward_from_policy(base, dtype=dtype)[0] for _ in range(2))
    return Models(policy, load_policy(base, dtype=dtype)[0], value, reward_model, tokenizer)


def check(models, **changes):
    prompts = ["the cat", "a dog sat on a mat today", "hill", "the cat was happy", "mat", "sad", "on a hill", "ran"]
    queries = [[1, *models.tokenizer.encode(prompt, add_special_tokens=False)] for prompt in prompts]
    options = {"response_length": LENGTH, "temperature": 0.7, "missing_eos": "replace"}
    checks.check_ppo(models, prompts, queries, **(options | changes))


@pytest.mark.parametrize("architecture", ["gpt_neox", "gpt2"])
def test_dropout_left_on(tmp_path, monkeypatch, architecture):
    monkeypatch.setattr(models_, "disable_dropout", lambda model: model.train())
    tiny.save_base(tmp_path / "base", architecture)
    tiny.write_pairs(tmp_path / "pairs.jsonl")
    for call in (run_sft, run_reward):
        refused("reads the same tokens differently each time", call, tmp_path, tmp_path)


@pytest.mark.parametrize("name", ["policy", "reference", "value", "reward"])
def test_dropout_that_no_setting_reaches(files, name):
    models = build(files / "base")
    body = getattr(models, name).base_model
    body.wte.register_forward_hook(lambda module, inputs, output: nn.functional.dropout(output, 0.1, training=True))
    refused(f"the {name}.* reads the same tokens differently each time", lambda: check(models))


def without_mask(model, names=("attention_mask", "position_ids")):
    """Make the model's body blind to what says where padding stands."""
    body = model.base_model
    forward = body.forward

    def blind(*arguments, **options):
        return forward(*arguments, **{name: x for name, x in options.items() if name not in names})

    body.forward = blind
    return model


@pytest.mark.parametrize("name", ["policy", "reference", "value", "reward"])
def test_a_model_that_looks_at_padding(files, name):
    models = build(files / "base")
    without_mask(getattr(models, name))
    refused(f"the {name}.* depends on padding", lambda: check(models))


def test_sampling_that_differs_from_training(files):
    models = build(files / "base")
    prepare = models.policy.prepare_inputs_for_generation

    def careless(*arguments, **kwargs):
        return {name: x for name, x in prepare(*arguments, **kwargs).items() if name != "position_ids"}

    models.policy.prepare_inputs_for_generation = careless
    refused("samples from another distribution than training computes", lambda: check(models))


def test_a_temperature_that_only_one_side_knows(files, monkeypatch):
    models = build(files / "base")
    read = checks.response_logprobs
    monkeypatch.setattr(
        checks,
        "response_logprobs",
        lambda *a, **options: read(*a, **{k: v for k, v in options.items() if k != "temperature"}),
    )
    refused("ratio would not be 1 at the first minibatch", lambda: check(models))


def test_a_policy_that_moved_between_rollout_and_update(files, tmp_path, monkeypatch):
    collect = ppo.collect

    def meddle(models, *arguments):
        batch = collect(models, *arguments)
        with torch.no_grad():
            for parameter in models.policy.parameters():
                parameter.mul_(1.05)
        return batch

    monkeypatch.setattr(ppo, "collect", meddle)
    with pytest.raises(UserError, match=r"ppo update 1: the ratio of new to old probabilities is .* and must be 1"):
        run_ppo(files, tmp_path)


def test_a_reward_model_that_scores_everything_the_same(files, tmp_path):
    def change(model, tokenizer):
        model.score.weight.data.zero_()

    faulty = save_reward(tmp_path / "faulty", files / "base", change)
    refused("gives .* different texts the same score", run_ppo, files, tmp_path, reward_model=str(faulty))


def test_a_reference_that_is_not_the_start(files):
    models = build(files / "base")
    with torch.no_grad():
        models.reference.transformer.h[1].mlp.c_fc.weight.mul_(1.1)
    refused("the reference is not the model that the policy starts from", lambda: check(models))


def test_a_head_that_gives_two_numbers(files, tmp_path):
    def change(model, tokenizer):
        model.score, model.config.num_labels = nn.Linear(16, 2), 2

    faulty = save_reward(tmp_path / "faulty", files / "base", change)
    with pytest.raises(UserError, match=r"cannot be loaded as a reward model|no head 'score' with one output"):
        run_ppo(files, tmp_path, reward_model=str(faulty))


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(files, tmp_path, number):
    def change(model, tokenizer):
        model.transformer.h[0].mlp.c_fc.weight.data[2, 3] = number

    faulty = copy_base(files, tmp_path, change)
    for call in (run_sft, run_reward, run_ppo):
        refused(r"hold NaN or infinity in transformer\.h\.0", call, files, tmp_path, model=faulty)


def with_bias(model, token, bias):
    """The chance of one token made large or small, whatever stands before it."""
    head = nn.Linear(16, model.lm_head.out_features)
    with torch.no_grad():
        head.weight.copy_(model.lm_head.weight)
        head.bias.zero_()
        head.bias[token] = bias
    model.lm_head = head


@pytest.mark.parametrize(
    ("bias", "words"), [(-50.0, "no reply would end within response_length 12"), (50.0, "answers nothing")]
)
def test_an_end_that_never_comes_or_always(files, bias, words):
    models = build(files / "base")
    for model in (models.policy, models.reference):
        with_bias(model, models.tokenizer.eos_token_id, bias)
    refused(words, lambda: check(models))
    if bias < 0:
        check(models, missing_eos="none")


def test_an_end_token_without_a_logit(files):
    models = build(files / "base")
    models.policy.set_output_embeddings(nn.Linear(16, models.tokenizer.eos_token_id, bias=False))
    refused(r"the end token '<eos>' is token \d+ and the model has logits for", lambda: check(models))


def test_no_model_is_left_changed(files):
    models = build(files / "base")
    before = [x.clone() for x in models.policy.parameters()]
    state = torch.get_rng_state()
    check(models)
    assert all(a.equal(b) for a, b in zip(before, models.policy.parameters(), strict=True))
    assert torch.get_rng_state().equal(state)
