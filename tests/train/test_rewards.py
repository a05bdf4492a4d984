"""One reward from anything a user has, and the same numbers from it wherever it is used."""

import json
import sys

import pytest
import tiny
import torch
from torch import nn

from rlhf_fast.train import ppo
from rlhf_fast.train.config import from_dict
from rlhf_fast.train.errors import UserError
from rlhf_fast.train.evaluate import PairJudge, RewardJudge, compare_policies
from rlhf_fast.train.generate import Sample
from rlhf_fast.train.model import load_policy, load_scalar_model, reward_from_policy
from rlhf_fast.train.rewards import check_accuracy, make_reward, terms_of
from rlhf_fast.train.versus import EvaluateConfig, evaluate

SAMPLES = [Sample("the cat", " sat on a mat", True), Sample("a dog", " ran", False), Sample("hill", "", True)]
MODULE = """
def count_a(samples):
    return [s.response.count("a") for s in samples]
def of_texts(texts):
    return [len(text) for text in texts]
def of_replies(responses):
    return [len(text) for text in responses]
def of_both(prompts, responses):
    return [len(p) - len(r) for p, r in zip(prompts, responses)]
def with_default(responses, scale=2):
    return [scale * len(text) for text in responses]
def longer(prompts, first, second):
    return [len(a) - len(b) for a, b in zip(first, second)]
class Judge:
    name = "the class"
    def __call__(self, samples):
        return [1.0] * len(samples)
value = 3
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("rewards")
    tiny.save_base(root / "base")
    tiny.write_pairs(root / "pairs.jsonl")
    torch.manual_seed(0)
    model, tokenizer = reward_from_policy(root / "base")
    for name in ("reward", "poor"):
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    (root / "poor" / "stage.json").write_text(json.dumps({"results": {"accuracy": 0.41, "eval_pairs": 100}}))
    return root


@pytest.fixture(autouse=True)
def module_of_mine(tmp_path, monkeypatch):
    """A module of the user's, in the directory the command is called in."""
    (tmp_path / "words_of_mine.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path])
    yield
    sys.modules.pop("words_of_mine", None)


# ------------------------------------------------------------------------------------------------------- sources


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ("count_a", [3, 1, 0]),
        ("of_texts", [20, 9, 4]),
        ("of_replies", [13, 4, 0]),
        ("of_both", [-6, 1, 4]),
        ("with_default", [26, 8, 0]),
        ("Judge", [1, 1, 1]),
    ],
)
def test_a_function_is_called_as_its_parameters_ask(function, expected):
    assert make_reward(f"words_of_mine:{function}")(SAMPLES) == expected


def test_directories_modules_and_sums(files):
    alone = make_reward(str(files / "reward"))(SAMPLES)
    assert alone == RewardJudge(files / "reward")(SAMPLES)
    model, tokenizer = load_scalar_model(files / "reward")
    assert make_reward(model, tokenizer=tokenizer)(SAMPLES) == pytest.approx(alone, abs=1e-5)
    both = make_reward(f"{files / 'reward'}=2, words_of_mine:count_a=-0.5")
    assert both(SAMPLES) == pytest.approx([2 * a - 0.5 * b for a, b in zip(alone, [3, 1, 0], strict=True)])
    listed = make_reward([(model, 2.0), "words_of_mine:count_a=-0.5"], tokenizer=tokenizer)
    assert listed(SAMPLES) == pytest.approx(both(SAMPLES), abs=1e-5)
    assert both.name == "2 the reward model in reward/ + -0.5 words_of_mine:count_a"


class Counts(nn.Module):
    """A module of no library: the number of real tokens."""

    def forward(self, input_ids, attention_mask):
        return attention_mask.sum(1, keepdim=True).float()


def test_any_module_is_a_reward(files):
    tokenizer = load_policy(files / "base")[1]
    lengths = make_reward(Counts(), tokenizer=tokenizer)(SAMPLES)
    encoded = [len(tokenizer.encode(s.prompt + s.response, add_special_tokens=False)) + 1 + s.finished for s in SAMPLES]
    assert lengths == encoded


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("nowhere_at_all:f", "the module of 'nowhere_at_all:f' cannot be imported"),
        ("words_of_mine:absent", "has no function 'absent'"),
        ("words_of_mine:value", "has no function 'value'"),
        ("words_of_mine:count_a=many", "the weight of 'words_of_mine:count_a' must be a number, got 'many'"),
        ("./absent", "is not a directory"),
        (3, "a reward must be module:function"),
        ("words_of_mine:longer=0.5, words_of_mine:count_a", "compares two replies and gives no score"),
    ],
)
def test_what_is_no_reward_is_refused(source, words):
    with pytest.raises(UserError, match=words):
        make_reward(source)
    if source == 3:
        with pytest.raises(UserError, match="needs the tokenizer"):
            make_reward(Counts())


def test_terms():
    assert terms_of("a=1.5, m:f,b=-1") == [("a", 1.5), ("m:f", 1.0), ("b", -1.0)]
    assert terms_of(["a=2", ("b", 3.0), len]) == [("a", 2.0), ("b", 3.0), (len, 1.0)]


def test_a_yaml_list_is_a_sum():
    base = {"model": "m", "data": "d", "output_dir": "o"}
    config = from_dict(ppo.PPOConfig, base | {"reward": ["out/reward=1.0", "m:f=0.5"]})
    assert config.reward == "out/reward=1.0, m:f=0.5"
    with pytest.raises(UserError, match="'reward' must be text"):
        from_dict(ppo.PPOConfig, base | {"reward": [1]})
    with pytest.raises(UserError, match="'data' must be text"):
        from_dict(ppo.PPOConfig, base | {"data": ["a"]})


# -------------------------------------------------------------------------------------------------------- stages


def stage(files, out, **changes):
    chosen = {"model": str(files / "base"), "data": str(files / "pairs.jsonl"), "output_dir": str(out)}
    chosen |= {"heldout_fraction": 0.2, "batch_size": 8, "total_episodes": 8, "response_length": 12}
    return ppo.PPOConfig(**(chosen | {"num_ppo_epochs": 1, "missing_eos": "none"} | changes))


def test_ppo_takes_each_of_them(files, tmp_path):
    for number, reward in enumerate(("words_of_mine:count_a", f"{files / 'reward'}=1.0,words_of_mine:of_replies=0.1")):
        out = ppo.train(stage(files, tmp_path / str(number), reward=reward))
        assert json.loads((out / "stage.json").read_text())["config"]["reward"] == reward
    ppo.train(stage(files, tmp_path / "module"), reward=Counts())
    with pytest.raises(UserError, match="give either 'reward_model'"):
        ppo.train(stage(files, tmp_path / "none"))
    with pytest.raises(UserError, match="give either 'reward_model'"):
        ppo.train(stage(files, tmp_path / "two", reward="words_of_mine:count_a", reward_model=str(files / "reward")))


def test_the_score_that_ppo_logs_is_what_the_same_object_says_of_the_replies(files, tmp_path):
    reward = make_reward(f"{files / 'reward'}=0.5,words_of_mine:count_a=2")
    seen = []

    def remember(samples):
        seen.extend(samples)
        return reward(samples)

    out = ppo.train(stage(files, tmp_path / "ppo"), reward=remember)
    said = reward(seen[:8])
    assert tiny.read_log(out)[0]["objective/scores"] == pytest.approx(sum(said) / 8, abs=1e-4)


def test_a_reward_model_below_the_bar_is_refused_before_anything_is_written(files, tmp_path):
    words = r"orders 41\.0% of 100 held-out pairs as labelled, below min_reward_accuracy 0\.5"
    with pytest.raises(UserError, match=words):
        ppo.train(stage(files, tmp_path / "ppo", reward_model=str(files / "poor")))
    with pytest.raises(UserError, match=words):
        ppo.train(stage(files, tmp_path / "ppo", reward=f"{files / 'poor'}=1,words_of_mine:count_a"))
    assert not (tmp_path / "ppo").exists()
    ppo.train(stage(files, tmp_path / "ppo", reward_model=str(files / "poor"), min_reward_accuracy=None))
    check_accuracy(files / "poor", 0.41)
    check_accuracy(files / "reward", 0.99)  # states nothing


# ---------------------------------------------------------------------------------------------------- comparison


def test_best_of_n_picks_with_the_reward_and_is_judged(files, tmp_path):
    def run(best_of):
        config = EvaluateConfig(
            before=str(files / "base"),
            after=str(files / "base"),
            data=str(files / "pairs.jsonl"),
            output_dir=str(tmp_path / str(best_of)),
            heldout_fraction=0,
            response_length=12,
            temperature=1.0,
            reward="words_of_mine:count_a",
            judge="words_of_mine:of_replies",
            best_of=best_of,
        )
        return json.loads((evaluate(config) / "evaluation.json").read_text())

    one, eight = run(1), run(8)
    assert (one["win_rate"], one["ties"]) == (0.5, 40) and one["best_of"] == 1
    assert eight["reward_after"] > one["reward_after"] + 0.5 and eight["low"] <= eight["win_rate"] <= eight["high"]
    with pytest.raises(UserError, match="picked by a reward"):
        compare_policies(files / "base", files / "base", ["the cat"], lambda samples: [0.0] * len(samples), best_of=2)


def test_a_judge_of_pairs_is_asked_in_both_orders():
    before = [Sample("p", text, True) for text in ("aa", "aaaa", "aa", "b")]
    after = [Sample("p", text, True) for text in ("aaa", "a", "bb", "b")]
    longer = make_reward("words_of_mine:longer")
    assert isinstance(longer, PairJudge) and longer.verdicts(before, after) == [1, -1, 0, 0]
    first = PairJudge("who comes first", lambda prompts, one, other: [1.0] * len(prompts))
    assert first.verdicts(before, after) == [0, 0, 0, 0]
    with pytest.raises(UserError, match="one finite number for each of 4 pairs"):
        PairJudge("short", lambda prompts, one, other: [1.0]).verdicts(before, after)


def test_a_judge_of_pairs_compares_policies(files):
    judge = make_reward("words_of_mine:longer")
    result = compare_policies(files / "base", files / "base", ["the cat", "a dog"], judge, response_length=8)
    assert result["win_rate"] == 0.5 and result["judge"] == "words_of_mine:longer"
