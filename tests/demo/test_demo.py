"""The demo's plumbing on a fraction of its data; its quality at full size is the business of `rlhf-fast demo`."""

import json
from functools import partial

import pytest

from rlhf_fast import demo
from rlhf_fast.demo import (
    DemoConfig,
    build_model,
    build_tokenizer,
    next_free,
    run_demo,
    settings,
    write_demonstrations,
    write_pairs,
)
from rlhf_fast.demo.world import GroundTruth, all_prompts, judge, vocabulary
from rlhf_fast.train import dpo, ppo, sft
from rlhf_fast.train.checkpoint import save_model
from rlhf_fast.train.config import from_dict
from rlhf_fast.train.data import encode_prompt, encode_response, read_demonstrations, read_preferences
from rlhf_fast.train.errors import UserError
from rlhf_fast.train.evaluate import compare_policies
from rlhf_fast.train.run import taken


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """A policy that has learnt the grammar's beginnings: two hundred updates are enough to differ between replies."""
    root = tmp_path_factory.mktemp("policy")
    data = write_demonstrations(root / "demonstrations.jsonl", seed=0, count=1500)
    tokenizer = build_tokenizer()
    save_model(root / "base", build_model(tokenizer, seed=0), tokenizer)
    options = demo.SFT | {"num_train_epochs": 2}
    return sft.train(
        sft.SFTConfig(model=str(root / "base"), data=str(data), output_dir=str(root / "sft"), threads=1, **options)
    )


def test_every_word_is_one_token_and_survives():
    tokenizer = build_tokenizer()
    assert len(tokenizer) == len(vocabulary()) + 4
    text = all_prompts()[77]
    ids = encode_prompt(tokenizer, text, 64)
    assert len(ids) == 1 + len(text.split()) and ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text
    reply = "the cat was small . everyone was happy ."
    assert encode_response(tokenizer, reply, 64)[-1] == tokenizer.eos_token_id
    assert tokenizer.unk_token_id not in tokenizer.encode(" ".join(vocabulary()))


def test_the_model_is_small_and_decided_by_the_seed():
    models = [build_model(build_tokenizer(), seed=seed) for seed in (1, 1, 2)]
    assert models[0].num_parameters() == 110_080
    weights = [model.transformer.h[0].mlp.c_fc.weight for model in models]
    assert weights[0].equal(weights[1]) and not weights[0].equal(weights[2])


def test_demonstrations_are_decided_by_the_seed_and_readable(tmp_path):
    paths = [write_demonstrations(tmp_path / str(i), seed=seed, count=50) for i, seed in enumerate((4, 4, 5))]
    texts = [path.read_text() for path in paths]
    assert texts[0] == texts[1] != texts[2]
    rows, bad, read = read_demonstrations(paths[0])
    assert len(rows) == read == 50 and not bad


def test_pairs_are_replies_of_the_policy_ordered_by_annotators_with_noise(policy, tmp_path):
    first, second = (write_pairs(tmp_path / name, policy, seed=3, count=400) for name in "ab")
    assert first.read_text() == second.read_text()
    rows, _, _ = read_preferences(first)
    assert 300 < len(rows) <= 400
    gaps = [
        judge(row.prompt, row.chosen, finished=True).score - judge(row.prompt, row.rejected, finished=True).score
        for row in rows
    ]
    decided = [gap > 0 for gap in gaps if gap]
    assert 0.75 < sum(decided) / len(decided) < 1


def test_the_settings_are_a_valid_run_on_one_thread(tmp_path):
    config = settings(tmp_path, DemoConfig(seed=9))
    assert (config.seed, config.threads, config.eval_prompts) == (9, 1, 512)
    assert config.ppo.temperature == config.reward.temperature and config.ppo.response_length == demo.REPLY_TOKENS


@pytest.mark.parametrize("algorithm", ["ppo", "grpo", "rloo", "dpo"])
def test_every_algorithm_has_its_settings(tmp_path, algorithm):
    config = settings(tmp_path, DemoConfig(algorithm=algorithm))
    assert config.algorithm == ("dpo" if algorithm == "dpo" else "ppo")
    assert config.ppo.advantage == (algorithm if algorithm in ("grpo", "rloo") else "gae")


def judged(policy, tmp_path, train, config) -> tuple[float, float]:
    """The judge's mean score before and after."""
    out = train(config)
    prompts = all_prompts()[::34]
    result = compare_policies(policy, out, prompts, GroundTruth(), response_length=demo.REPLY_TOKENS)
    return result["score_before"], result["score_after"]


def test_dpo_learns_what_the_annotators_like(policy, tmp_path):
    pairs = write_pairs(tmp_path / "pairs.jsonl", policy, seed=0, count=1500)
    files = {"model": str(policy), "data": str(pairs), "output_dir": str(tmp_path / "dpo"), "threads": 1}
    config = from_dict(dpo.DPOConfig, files | demo.DPO | {"batch_size": 16})
    before, after = judged(policy, tmp_path, dpo.train, config)
    assert after > before + 0.1


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_groups_of_replies_learn_what_the_judge_likes(policy, tmp_path, kind):
    data = write_demonstrations(tmp_path / "prompts.jsonl", seed=1, count=300)
    files = {"model": str(policy), "data": str(data), "output_dir": str(tmp_path / kind), "threads": 1}
    fewer = {"total_episodes": 12 * 128, "num_ppo_epochs": 2, "learning_rate": 1e-3, "kl_coef": 0.05}
    config = from_dict(ppo.PPOConfig, files | demo.PPO | demo.GROUPED[kind] | fewer)
    before, after = judged(policy, tmp_path, partial(ppo.train, reward=GroundTruth()), config)
    assert after > before + 0.3


def test_a_small_demo_leaves_everything_a_run_leaves(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "DEMONSTRATIONS", 400)
    monkeypatch.setattr(demo, "PAIRS", 200)
    monkeypatch.setattr(demo, "SFT", demo.SFT | {"num_train_epochs": 1})
    monkeypatch.setattr(demo, "REWARD", demo.REWARD | {"num_train_epochs": 1, "normalize_samples": 32})
    monkeypatch.setattr(demo, "PPO", demo.PPO | {"total_episodes": 64, "batch_size": 32})
    monkeypatch.setattr(demo, "SHARED", demo.SHARED | {"eval_prompts": 30})
    out = run_demo(DemoConfig(output_dir=str(tmp_path / "demo"), seed=1))
    names = {path.name for path in out.iterdir()}
    assert names >= {
        "demonstrations.jsonl",
        "pairs.jsonl",
        "base",
        "sft",
        "reward",
        "ppo",
        "config.yaml",
        "report.html",
    }
    evaluation = json.loads((out / "evaluation.json").read_text())
    assert evaluation["judge"] == GroundTruth.name and not evaluation["judge_is_training_reward"]
    assert evaluation["pairs"] == 30 and 0 <= evaluation["low"] <= evaluation["win_rate"] <= evaluation["high"] <= 1


def test_a_directory_in_use_is_refused_and_kept(tmp_path):
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(UserError, match="already holds files"):
        run_demo(DemoConfig(output_dir=str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_second_demo_does_not_take_the_place_of_the_first_unless_that_was_killed(tmp_path):
    place, config = tmp_path / "demo", DemoConfig()
    assert next_free(str(place), config) == place
    for name in ("demo", "demo-2"):
        (tmp_path / name).mkdir()
    assert next_free(str(place), config) == tmp_path / "demo-3"
    with taken(settings(tmp_path / "demo-2", config), tmp_path / "demo-2"):
        pass
    assert next_free(str(place), config) == tmp_path / "demo-2"
    assert (
        next_free(str(place), DemoConfig(seed=1))
        == next_free(str(place), DemoConfig(resume=False))
        == tmp_path / "demo-3"
    )
    (tmp_path / "demo-2" / "evaluation.json").write_text("{}")
    assert next_free(str(place), config) == tmp_path / "demo-2", "its report is missing"
    (tmp_path / "demo-2" / "report.html").write_text("")
    assert next_free(str(place), config) == tmp_path / "demo-3"
