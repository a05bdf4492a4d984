"""The whole chain on a small preference file, and what it refuses before it starts."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest

from rlhf_fast.train import run as whole
from rlhf_fast.train.config import build, flatten, from_dict, to_dict
from rlhf_fast.train.data import read_preferences, read_prompts, split_heldout
from rlhf_fast.train.errors import UserError
from rlhf_fast.train.run import FROM_SCRATCH, RunConfig, configure, run

COLOURS = ["red", "green", "blue", "white", "black", "brown", "pink", "grey"]
THINGS = ["sky", "sea", "sun", "tree", "door", "car", "hat", "cup"]

SMALL = {
    "vocab_size": 280,
    "hidden_size": 16,
    "num_layers": 1,
    "num_heads": 2,
    "context_length": 64,
    "heldout_fraction": 0.25,
    "bad_rows": "skip",
    "sft": {"batch_size": 16, "num_train_epochs": 2, "learning_rate": 1e-3, "max_response_tokens": 24},
    "reward": {"batch_size": 16, "num_train_epochs": 2, "max_response_tokens": 24, "normalize_samples": 16},
    "ppo": {"batch_size": 8, "total_episodes": 16, "num_ppo_epochs": 1, "response_length": 8},
}


def write_rows(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def preference_rows():
    return [
        {
            "prompt": f"What is {colour} as a {thing}?",
            "chosen": f" A {colour} {thing}, thanks.",
            "rejected": f" {n} no.",
        }
        for n, (colour, thing) in enumerate((c, t) for c in COLOURS for t in THINGS)
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(config, output directory) of one whole run, with one flawed row in its data."""
    place = tmp_path_factory.mktemp("run")
    data = write_rows(place / "pairs.jsonl", [*preference_rows(), {"prompt": "p", "chosen": "", "rejected": "x"}])
    config = from_dict(RunConfig, SMALL | {"data": str(data), "output_dir": str(place / "out")})
    return config, run(config)


def read(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_run_leaves_every_stage_complete(finished):
    _, out = finished
    for stage in ("sft", "reward", "ppo"):
        assert read(out / stage / "stage.json")["stage"] == stage
        assert (out / stage / "model.safetensors").is_file()
    assert (out / "report.html").is_file() and (out / "base" / "model.safetensors").is_file()


def test_saved_config_makes_the_same_run(finished):
    config, out = finished
    assert configure(out / "config.yaml", {}) == config
    assert to_dict(configure(out / "config.yaml", {"output_dir": "other"}))["output_dir"] == "other"


def test_every_stage_holds_out_the_same_prompts(finished):
    config, out = finished
    prompts, _, _ = read_prompts(config.data, bad_rows="skip")
    train, heldout = split_heldout(prompts, fraction=config.heldout_fraction, seed=config.split_seed)
    for stage in ("sft", "reward", "ppo"):
        data = read(out / stage / "stage.json")["data"]
        assert (data["rows_train"], data["rows_heldout"]) == (len(train), len(heldout))
        assert [row["line"] for row in data["bad_rows"]] == [65]
    judged = [sample["prompt"] for sample in read(out / "evaluation.json")["samples"]]
    assert judged and set(judged) <= {row.prompt for row in heldout}


def test_stages_follow_the_runs_keys(finished):
    config, out = finished
    for stage in ("sft", "reward", "ppo"):
        saved = read(out / stage / "stage.json")["config"]
        assert (saved["seed"], saved["bad_rows"], saved["heldout_fraction"]) == (config.seed, "skip", 0.25)
    assert read(out / "sft" / "stage.json")["config"]["model"] == str(out / "base")
    assert read(out / "reward" / "stage.json")["config"]["model"] == str(out / "sft")
    assert read(out / "ppo" / "stage.json")["config"]["reward_model"] == str(out / "reward")


def test_without_a_judge_the_evaluation_says_whose_it_is(finished):
    _, out = finished
    evaluation = read(out / "evaluation.json")
    assert evaluation["judge_is_training_reward"] is True
    assert evaluation["kl"] == read(out / "ppo" / "stage.json")["results"]["objective/kl"]
    assert 0 <= evaluation["low"] <= evaluation["win_rate"] <= evaluation["high"] <= 1


def test_tokenizer_has_seen_no_heldout_prompt(finished, monkeypatch):
    config, _ = finished
    seen = []
    monkeypatch.setattr(whole, "train_tokenizer", lambda texts, size: seen.extend(texts))
    monkeypatch.setattr(whole, "create_llama", lambda *_, **__: None)
    rows, _, _ = read_preferences(config.data, bad_rows="skip")
    train, heldout = split_heldout(rows, fraction=config.heldout_fraction, seed=config.split_seed)
    whole.new_model(config, train)
    assert seen and not {row.prompt for row in heldout} & set(seen)


def test_results_load_with_plain_transformers(finished):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    _, out = finished
    tokenizer = AutoTokenizer.from_pretrained(out / "ppo")
    text = "What is a red door? A door, thanks."
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    for stage in ("base", "sft", "ppo"):
        assert AutoModelForCausalLM.from_pretrained(out / stage).config.vocab_size == len(tokenizer)
    assert AutoModelForSequenceClassification.from_pretrained(out / "reward").config.num_labels == 1


def test_a_finished_run_is_left_alone_and_one_with_another_config_refused(finished, capsys):
    config, out = finished
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert run(dataclasses.replace(config, save_every=7.0)) == out
    assert f"run: finished in {out}, nothing is left to do" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"another config: seed \(was 0, now 1\)\. Set it back"):
        run(dataclasses.replace(config, seed=1))
    with pytest.raises(UserError, match=r"ppo belongs to a run with another config: gamma \(was 1.0, now 0.5\)\. Set"):
        run(dataclasses.replace(config, ppo=dataclasses.replace(config.ppo, gamma=0.5)))
    with pytest.raises(UserError, match="sft belongs to a run that began with other inputs: 'model' has changed"):
        run(dataclasses.replace(config, model=str(out / "sft")))
    with pytest.raises(UserError, match="already holds files"):
        run(dataclasses.replace(config, resume=False))
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_run_killed_while_its_report_was_written_is_completed(finished, tmp_path):
    config, out = finished
    shutil.copytree(out, tmp_path / "out")
    config, out = dataclasses.replace(config, output_dir=str(tmp_path / "out")), tmp_path / "out"
    page, partial = out / "report.html", out / ".report.html.partial-7"
    evaluated = (out / "evaluation.json").stat().st_mtime_ns
    page.rename(partial)
    assert run(config) == out
    assert page.read_text() and not partial.exists(), "nothing was there"
    os.utime(page, ns=(0, evaluated - 1))
    assert run(config) == out
    assert page.stat().st_mtime_ns >= evaluated, "one was there, of the time before the evaluation"
    assert (out / "evaluation.json").stat().st_mtime_ns == evaluated


def test_a_stage_that_has_not_begun_may_be_changed(finished, tmp_path):
    """What stopped before PPO goes on as if PPO had had the new settings from the start."""
    config, out = finished
    for name in ("config.yaml", "base", "sft", "reward"):
        copy = shutil.copytree if (out / name).is_dir() else shutil.copy
        copy(out / name, tmp_path / name)
    changed = dataclasses.replace(config, ppo=dataclasses.replace(config.ppo, kl_coef=0.7), output_dir=str(tmp_path))
    assert run(changed) == tmp_path
    assert read(tmp_path / "ppo" / "stage.json")["config"]["kl_coef"] == 0.7
    assert configure(tmp_path / "config.yaml", {}) == changed
    assert (tmp_path / "sft" / "log.jsonl").read_bytes() == (out / "sft" / "log.jsonl").read_bytes()


def test_given_model_made_pairs_and_judge(finished, tmp_path):
    """A model to start from, demonstrations as data, pairs sampled in between, another judge than the reward model."""
    config, out = finished
    demonstrations = [{"prompt": row["prompt"], "response": row["chosen"]} for row in preference_rows()]
    output = tmp_path / "out"
    data = output / "demonstrations.jsonl"
    asked = []

    def make_pairs(sft_dir: Path) -> Path:
        asked.append(sft_dir)
        return write_rows(output / "pairs.jsonl", preference_rows())

    def judge(samples):
        return [float(len(sample.response)) for sample in samples]

    judge.name = "length"
    given = dataclasses.replace(config, model=str(out / "base"), data=str(data), output_dir=str(output))
    run(given, prepare=lambda: write_rows(data, demonstrations), make_pairs=make_pairs, judge=judge)
    assert asked == [output / "sft"]
    assert not (output / "base").exists()
    evaluation = read(output / "evaluation.json")
    assert (evaluation["judge"], evaluation["judge_is_training_reward"]) == ("length", False)
    assert evaluation["reward_agreement"]["pairs"] > 0
    assert read(output / "reward" / "stage.json")["config"]["data"] == str(output / "pairs.jsonl")


def test_dpo_takes_the_place_of_ppo_and_the_reward_model_judges_only_where_nobody_else_does(finished, tmp_path):
    config, out = finished
    settings = {"batch_size": 16, "num_train_epochs": 1, "max_response_tokens": 24}
    given = to_dict(config) | {"model": str(out / "sft"), "algorithm": "dpo", "dpo": settings}
    made = run(from_dict(RunConfig, given | {"output_dir": str(tmp_path / "own")}))
    evaluation = read(made / "evaluation.json")
    assert evaluation["judge_is_training_reward"] and evaluation["kl"] is None and not (made / "ppo").exists()
    assert read(made / "dpo" / "stage.json")["config"]["model"] == str(made / "sft")
    assert read(made / "report.json")["headline"]["preference_accuracy"]["value"] >= 0

    def judge(samples):
        return [float(len(sample.response)) for sample in samples]

    made = run(from_dict(RunConfig, given | {"output_dir": str(tmp_path / "other")}), judge=judge)
    assert not (made / "reward").exists() and not read(made / "evaluation.json")["judge_is_training_reward"]
    assert {name for name in ("sft", "dpo", "report.html") if (made / name).exists()} == {"sft", "dpo", "report.html"}


# ---------------------------------------------------------------- config


def test_new_model_gets_its_own_settings_and_a_given_one_the_stages(tmp_path):
    needed = {"data": "d", "output_dir": "o"}
    assert flatten(FROM_SCRATCH).items() <= flatten(to_dict(configure(None, needed))).items()
    assert configure(None, needed | {"model": "gpt2"}) == build(RunConfig, None, needed | {"model": "gpt2"})
    (tmp_path / "c.yaml").write_text("model: gpt2\n")
    assert configure(tmp_path / "c.yaml", needed).ppo == RunConfig(data="d", output_dir="o").ppo


def test_flags_win_over_the_settings_of_a_new_model():
    config = configure(None, {"data": "d", "output_dir": "o", "ppo.learning_rate": 0.5})
    assert config.ppo.learning_rate == 0.5


def test_help_states_the_settings_of_a_new_model():
    text = whole.describe_from_scratch()
    assert all(f"  --{name} {value}\n" in text + "\n" for name, value in flatten(FROM_SCRATCH).items())


# ---------------------------------------------------------------- refusals


def broken(change: dict, tmp_path: Path) -> RunConfig:
    data = write_rows(tmp_path / "pairs.jsonl", preference_rows())
    return from_dict(RunConfig, SMALL | {"data": str(data), "output_dir": str(tmp_path / "out")} | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": "absent.jsonl"}, "does not exist"),
        ({"device": "warp"}, "not known to torch"),
        ({"model": "./absent"}, "not a directory"),
        ({"heldout_fraction": 1e-9}, "0 held out"),
        ({"context_length": 24}, "leave no room"),
        ({"num_heads": 3}, "multiple of"),
        ({"ppo": SMALL["ppo"] | {"num_mini_batches": 3}}, "multiple of"),
    ],
)
def test_refused_before_anything_is_written(tmp_path, change, message):
    config = broken(change, tmp_path)
    with pytest.raises(UserError, match=message):
        run(config)
    assert not (tmp_path / "out").exists()


def test_demonstrations_alone_are_no_data_for_a_run(tmp_path):
    data = write_rows(tmp_path / "d.jsonl", [{"prompt": "a", "response": "b"}])
    with pytest.raises(UserError, match="'chosen': missing"):
        run(broken({"data": str(data), "bad_rows": "stop"}, tmp_path))
