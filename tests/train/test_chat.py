"""Conversations: rendered as the tokenizer's template has it, trained, sampled and judged in every stage."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import pytest
import tiny
import torch
from tiny import assistant, user
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_fast.train import dpo, loop, ppo, reward, sft
from rlhf_fast.train.chat import TURN_END, Chat
from rlhf_fast.train.data import (
    Conversation,
    Rendered,
    encode_prompt,
    encode_response,
    read_demonstrations,
    read_preferences,
    read_prompts,
    split_heldout,
)
from rlhf_fast.train.errors import UserError
from rlhf_fast.train.run import configure, run
from rlhf_fast.train.versus import EvaluateConfig, evaluate

QUESTION, GOOD, BAD = [user("the cat")], [assistant("a happy cat")], [assistant("sad")]
PAIR = {"prompt": QUESTION, "chosen": GOOD, "rejected": BAD}
SYSTEM = {"role": "system", "content": "be happy"}


def chat(template=None, system=None, tokenizer=None):
    return Chat(
        tiny.chat_tokenizer if tokenizer is None else lambda: tokenizer,
        "base",
        template_file=template,
        system_prompt=system,
    )


def refused(words, call, *arguments, **options):
    with pytest.raises(UserError, match=words) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def template(tmp_path, text):
    (tmp_path / "own.jinja").write_text(text)
    return str(tmp_path / "own.jinja")


# --------------------------------------------------------------------------------------------------- rendering


@pytest.mark.parametrize("turns", [QUESTION, [SYSTEM, *QUESTION], [user("on a hill"), assistant("ran"), *QUESTION]])
def test_tokens_are_those_of_the_template(tmp_path, turns):
    words = tiny.chat_tokenizer()
    rows, _, _ = read_preferences(tiny.write_rows(tmp_path / "d", [PAIR | {"prompt": turns}]), chat=chat())
    prompt, reply = encode_prompt(words, rows[0].prompt, 999), encode_response(words, rows[0].chosen, 999)
    assert prompt == words.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    whole = words.apply_chat_template([*turns, *GOOD], return_dict=False)
    assert prompt + reply == whole[: len(prompt + reply)]
    assert words.decode(whole[len(prompt + reply) :]) == "\n"
    assert reply[-1] == words.convert_tokens_to_ids(TURN_END) == words.eos_token_id


def test_a_template_that_writes_the_beginning_mark_has_it_once(tmp_path):
    words = tiny.chat_tokenizer()
    words.chat_template = "{{ bos_token }}" + words.chat_template
    rows, _, _ = read_prompts(tiny.write_rows(tmp_path / "d", [PAIR]), chat=chat(tokenizer=words))
    ids = encode_prompt(words, rows[0].prompt, 999)
    assert ids == words.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False)
    assert ids.count(words.bos_token_id) == 1
    assert encode_prompt(words, rows[0].prompt, 3) == [words.bos_token_id, *ids[-2:]]


def test_prompts_and_replies_of_every_form_are_the_same(tmp_path):
    dialogues = {"chosen": QUESTION + GOOD, "rejected": QUESTION + BAD}
    forms = [PAIR, dialogues, dialogues | {"prompt": "the cat"}]
    rows, _, _ = read_preferences(tiny.write_rows(tmp_path / "d", forms), chat=chat())
    assert len({(row.prompt, row.chosen, row.rejected) for row in rows}) == 1
    forms += [{"prompt": QUESTION, "completion": GOOD}, {"messages": QUESTION + GOOD}]
    shown, _, _ = read_demonstrations(tiny.write_rows(tmp_path / "d", forms), chat=chat())
    assert {(row.prompt, row.response) for row in shown} == {(rows[0].prompt, rows[0].chosen)}
    forms += [{"prompt": QUESTION}, {"messages": QUESTION}]
    asked, _, _ = read_prompts(tiny.write_rows(tmp_path / "d", forms), chat=chat())
    assert {row.prompt for row in asked} == {rows[0].prompt} and len(asked) == len(forms)


def test_a_system_prompt_stands_in_front_of_conversations_without_one(tmp_path):
    rows = [{"prompt": QUESTION}, {"prompt": [SYSTEM, *QUESTION]}]
    asked, _, _ = read_prompts(tiny.write_rows(tmp_path / "d", rows), chat=chat(system="ran"))
    assert asked[0].prompt.startswith("<|im_start|>system\nran<|im_end|>\n<|im_start|>user\nthe cat")
    assert asked[1].prompt.startswith("<|im_start|>system\nbe happy<|im_end|>\n<|im_start|>user\nthe cat")


def test_the_split_hangs_on_what_was_asked_and_not_on_the_template(tmp_path):
    rows = [{"prompt": [user(f"the {i}")]} for i in range(60)]
    path, sides = tiny.write_rows(tmp_path / "d", rows), []
    other = template(tmp_path, "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}")
    for reader in (None, chat(), chat(template=other), chat(system="ran")):
        prompts, _, _ = read_prompts(path, chat=reader)
        sides.append([row.line for row in split_heldout(prompts, fraction=0.3, seed=0)[1]])
    assert sides[0] and all(side == sides[0] for side in sides)
    assert isinstance(read_prompts(path)[0][0].prompt, Conversation)


def test_texts_without_a_prompt_are_split_by_themselves(tmp_path):
    rows, _, _ = read_demonstrations(tiny.write_rows(tmp_path / "d", [{"text": f"the cat {i}"} for i in range(40)]))
    train, heldout = split_heldout(rows, fraction=0.3, seed=0)
    assert len(train) > 20 and heldout and all(row.prompt == "" for row in rows)


# --------------------------------------------------------------------------------------- templates that do not fit


def test_a_tokenizer_without_a_template(tmp_path):
    path = tiny.write_rows(tmp_path / "d", [PAIR])
    words = refused("--chat_template FILE", read_preferences, path, chat=chat(tokenizer=tiny.tokenizer()))
    assert f"the rows of {path} are conversations and the tokenizer of base has no chat template" in words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{% for m in messages %}{{ m.content }}", "cannot write a question and its answer"),
        ("{{ raise_exception('no') }}", "cannot write a question and its answer: no"),
        ("fixed", "leaves out what was said"),
        (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant: <think>{% endif %}",
            "writes a prompt in another way once a reply follows: '<think>' becomes 'That which is answered",
        ),
    ],
)
def test_a_template_that_fits_nothing(tmp_path, text, words):
    path, own = tiny.write_rows(tmp_path / "d", [PAIR]), template(tmp_path, text)
    assert own in refused(words, read_preferences, path, chat=chat(template=own))


@pytest.mark.parametrize(("content", "words"), [(b"", "is empty"), (b"\xff", "not UTF-8"), (None, "No such file")])
def test_a_template_file_that_cannot_be_read(tmp_path, content, words):
    if content is not None:
        (tmp_path / "t.jinja").write_bytes(content)
    refused(f"chat template .*t.jinja .*{words}", chat, template=str(tmp_path / "t.jinja"))


STRICT = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_a_row_that_the_template_refuses_is_named(tmp_path):
    path, own = (
        tiny.write_rows(tmp_path / "d", [PAIR, {"messages": [SYSTEM, *QUESTION, *GOOD]}]),
        template(tmp_path, STRICT),
    )
    words = refused("System role not supported", read_prompts, path, chat=chat(template=own))
    assert "1 of 2 rows cannot be used; line 2: field 'messages': the chat template refuses the conversation" in words
    rows, (bad,), _ = read_prompts(path, bad_rows="skip", chat=chat(template=own))
    assert len(rows) == 1 and (bad.line, bad.field) == (2, "messages")


@pytest.mark.parametrize("mark", ["<|im_end|>", "<|im_start|>"])
def test_text_that_would_end_its_turn_is_named(tmp_path, mark):
    rows = [PAIR | {"chosen": [assistant(f"a {mark} b")]}, PAIR | {"prompt": [user(f"a {mark}system")]}]
    path = tiny.write_rows(tmp_path / "d", [*rows, PAIR])
    _, bad, _ = read_preferences(path, bad_rows="skip", chat=chat())
    assert [(row.line, row.field) for row in bad] == [(1, "chosen"), (2, "prompt")]
    assert all(f"holds '{mark}'" in row.reason for row in bad)


@pytest.mark.parametrize("option", [{"template": True}, {"system": "ran"}])
def test_an_option_for_conversations_beside_texts(tmp_path, option):
    option |= {"template": template(tmp_path, STRICT)} if "template" in option else {}
    path = tiny.write_rows(tmp_path / "d", [{"prompt": "the cat"}])
    refused(
        "'(chat_template|system_prompt)' is for conversations, and the rows of", read_prompts, path, chat=chat(**option)
    )
    refused("'system_prompt' is empty", chat, system=" ")


# ------------------------------------------------------------------------------------------------------ stages


@pytest.fixture(scope="module")
def talk(tmp_path_factory):
    """A chat model, and 24 preferences in messages."""
    root = tmp_path_factory.mktemp("talk")
    tiny.save_chat_base(root / "base")
    rows = [{"prompt": [user(f"the cat {i}")], "chosen": GOOD, "rejected": BAD} for i in range(24)]
    tiny.write_rows(root / "pairs.jsonl", rows)
    return root


def places(root, out, **options):
    shared = {"model": str(root / "base"), "data": str(root / "pairs.jsonl"), "output_dir": str(out)}
    return shared | {"heldout_fraction": 0.2, "logging_steps": 1} | options


ONE_UPDATE = {"batch_size": 32}


@pytest.fixture(scope="module")
def trained(talk):
    """SFT, reward model, PPO and DPO on them, one update each."""
    out = {name: talk / name for name in ("sft", "reward", "ppo", "dpo")}
    sft.train(sft.SFTConfig(**places(talk, out["sft"], **ONE_UPDATE)))
    start = {"model": str(out["sft"])}
    options = {"normalize_samples": 8, "max_response_tokens": 16}
    reward.train(reward.RewardConfig(**places(talk, out["reward"], **ONE_UPDATE, **start, **options)))
    options = {"reward_model": str(out["reward"]), "min_reward_accuracy": None, "missing_eos": "none"}
    options |= {"batch_size": 8, "total_episodes": 8, "response_length": 16, "num_ppo_epochs": 1} | start
    without = {name: value for name, value in places(talk, out["ppo"]).items() if name != "logging_steps"}
    ppo.train(ppo.PPOConfig(**(without | options)))
    dpo.train(dpo.DPOConfig(**places(talk, out["dpo"], **ONE_UPDATE, **start, num_train_epochs=1)))
    return out


def test_every_stage_trains_on_conversations_and_keeps_the_template(trained):
    words = tiny.chat_tokenizer()
    for name, directory in trained.items():
        assert len(tiny.read_log(directory)) == 1, name
        saved = AutoTokenizer.from_pretrained(directory)
        assert (saved.chat_template, saved.eos_token) == (words.chat_template, TURN_END)
        form = json.loads((directory / "stage.json").read_text())["data"]["prompt_form"]
        assert form["start"] == "<|im_start|>user\nthe cat "
        assert form["end"].endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_generation_stops_where_the_template_ends_a_turn(trained):
    model = AutoModelForCausalLM.from_pretrained(trained["ppo"])
    words = AutoTokenizer.from_pretrained(trained["ppo"])
    assert model.generation_config.eos_token_id == words.convert_tokens_to_ids(TURN_END)


def test_only_the_reply_is_learnt(talk, tmp_path, monkeypatch):
    seen, original = [], sft.accumulate_gradient

    def spy(model, parts, *rest):
        seen.extend(example for part in parts for example in part)
        return original(model, parts, *rest)

    monkeypatch.setattr(sft, "accumulate_gradient", spy)
    sft.train(sft.SFTConfig(**places(talk, tmp_path / "sft", **ONE_UPDATE)))
    words = tiny.chat_tokenizer()
    assert {words.decode(example.ids[example.start :]) for example in seen} == {"a happy cat<|im_end|>"}
    assert all(words.decode(x.ids[: x.start]).endswith("<|im_end|>\n<|im_start|>assistant\n") for x in seen)


def test_an_evaluation_asks_in_the_template(trained, talk, tmp_path):
    config = EvaluateConfig(
        before=str(trained["sft"]), after=str(trained["ppo"]), data=str(talk / "pairs.jsonl"), output_dir=str(tmp_path / "e"),
        heldout_fraction=0.2, response_length=8,
    )  # fmt: skip
    result = json.loads((evaluate(config, judge=SimpleJudge()) / "evaluation.json").read_text())
    assert all(row["prompt"].startswith("<|im_start|>user\nthe cat") for row in result["samples"])


class SimpleJudge:
    name = "length"

    def __call__(self, samples):
        return [float(len(sample.response)) for sample in samples]


def test_policies_with_two_templates_are_not_compared(trained, talk, tmp_path):
    shutil.copytree(trained["ppo"], tmp_path / "other")
    (tmp_path / "other" / "chat_template.jinja").write_text(STRICT)
    config = EvaluateConfig(
        before=str(trained["sft"]),
        after=str(tmp_path / "other"),
        data=str(talk / "pairs.jsonl"),
        output_dir=str(tmp_path / "e"),
    )
    refused("has another chat template than", evaluate, config, judge=SimpleJudge())


def test_another_template_or_system_prompt_than_the_stage_before(trained, talk, tmp_path):
    start, changed = {"model": str(trained["sft"])}, template(tmp_path, STRICT)
    for options in ({"chat_template": changed}, {"system_prompt": "be happy"}):
        config = reward.RewardConfig(**places(talk, tmp_path / "reward", **start, **options))
        refused("was trained on prompts that all (begin|end) with", reward.train, config)


def test_a_base_model_that_ends_documents_with_another_token(talk, tmp_path, capsys):
    base = tiny.save_chat_base(tmp_path / "base", end="<eos>")
    out = sft.train(sft.SFTConfig(**places(talk, tmp_path / "sft", **ONE_UPDATE, model=str(base))))
    assert (
        f"replies end with {TURN_END}, as the chat template of {base} has it, not with <eos>" in capsys.readouterr().err
    )
    words, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    assert words.eos_token == TURN_END
    assert {model.generation_config.eos_token_id, model.config.eos_token_id} == {words.eos_token_id}
    config = ppo.PPOConfig(
        model=str(base), data=str(talk / "pairs.jsonl"), output_dir=str(tmp_path / "ppo"), missing_eos="none",
        batch_size=4, total_episodes=4, response_length=4, num_ppo_epochs=1,
    )  # fmt: skip
    ppo.train(config, reward=lambda responses: [float(len(x)) for x in responses])
    assert AutoTokenizer.from_pretrained(tmp_path / "ppo").eos_token == TURN_END


def test_a_template_of_the_user_is_used_and_saved(talk, tmp_path):
    own = template(tmp_path, STRICT)
    out = sft.train(sft.SFTConfig(**places(talk, tmp_path / "sft", **ONE_UPDATE, chat_template=own)))
    assert AutoTokenizer.from_pretrained(out).chat_template == STRICT
    form = json.loads((out / "stage.json").read_text())["data"]["prompt_form"]
    assert form["start"].startswith("user: the cat") and form["end"] == "<|im_end|>assistant: "


def test_a_finished_stage_is_another_with_another_template(talk, tmp_path):
    own = template(tmp_path, STRICT)
    config = sft.SFTConfig(**places(talk, tmp_path / "sft", **ONE_UPDATE, chat_template=own))
    weights = (sft.train(config) / "model.safetensors").read_bytes()
    assert (sft.train(config) / "model.safetensors").read_bytes() == weights
    template(tmp_path, STRICT.replace("<|im_end|>", "<|im_end|>\n"))
    refused("'chat_template' has changed since", sft.train, config)
    refused("system_prompt .was None, now ran", sft.train, sft.SFTConfig(**(vars(config) | {"system_prompt": "ran"})))


def test_an_interrupted_stage_ends_with_the_same_bits_or_refuses_other_conversations(talk, tmp_path, monkeypatch):
    settings = {"batch_size": 4, "save_every": 0.0, "learning_rate": 1e-2, "system_prompt": "ran"}
    whole = sft.train(sft.SFTConfig(**places(talk, tmp_path / "whole", **settings)))
    config, step, calls = sft.SFTConfig(**places(talk, tmp_path / "cut", **settings)), loop.clip_and_step, []

    def stop(*arguments, **options):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(*arguments, **options)

    monkeypatch.setattr(loop, "clip_and_step", stop)
    with pytest.raises(KeyboardInterrupt):
        sft.train(config)
    monkeypatch.undo()
    rows = (talk / "pairs.jsonl").read_text()
    tiny.write_rows(tmp_path / "other", [json.loads(x.replace("cat 3", "dog 3")) for x in rows.splitlines()])
    refused("began with other inputs", sft.train, dataclasses.replace(config, data=str(tmp_path / "other")))
    out = sft.train(config)
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert json.loads((out / "stage.json").read_text())["resumed_at"] == [3]


def test_texts_without_a_prompt_are_learnt_whole(base, tmp_path, monkeypatch):
    seen, original = [], sft.accumulate_gradient
    monkeypatch.setattr(
        sft, "accumulate_gradient", lambda m, parts, *rest: seen.extend(parts[0]) or original(m, parts, *rest)
    )
    data = tiny.write_rows(tmp_path / "d", [{"text": f"the cat {i}"} for i in range(20)])
    options = {"heldout_fraction": 0.2, "max_response_tokens": 24}
    sft.train(sft.SFTConfig(model=str(base), data=str(data), output_dir=str(tmp_path / "sft"), **options))
    words = tiny.tokenizer()
    assert seen and all(example.start == 1 for example in seen)
    assert all(words.decode(example.ids).startswith("<bos>the cat ") for example in seen)


def test_a_run_without_a_model_writes_conversations_in_chatml(talk, tmp_path):
    flags = {
        "data": str(talk / "pairs.jsonl"),
        "output_dir": str(tmp_path / "run"),
        "algorithm": "dpo",
        "vocab_size": 280,
    }
    flags |= {
        "hidden_size": 16,
        "num_heads": 2,
        "sft.num_train_epochs": 1,
        "reward.normalize_samples": 8,
        "eval_prompts": 4,
    }
    flags |= {"sft.max_response_tokens": 16, "reward.max_response_tokens": 16, "dpo.max_response_tokens": 16}
    out = run(configure(None, flags))
    saved = AutoTokenizer.from_pretrained(out / "dpo")
    assert saved.eos_token == TURN_END and saved.chat_template == tiny.chat_tokenizer().chat_template
    evaluation = json.loads((out / "evaluation.json").read_text())
    assert evaluation["samples"][0]["prompt"].startswith("<|im_start|>user\n")
    assert evaluation["samples"][0]["prompt"].endswith("<|im_start|>assistant\n")


def test_rendered_text_is_text():
    made = Rendered("the cat", QUESTION)
    assert made == "the cat" and hash(made) == hash("the cat") and json.dumps([made]) == '["the cat"]'
    assert torch.equal(*(torch.tensor(tiny.tokenizer().encode(text)) for text in (made, "the cat")))
    assert SimpleNamespace(x=made).x.messages == QUESTION
