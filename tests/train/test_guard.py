"""The guard stops PPO when the judge and the reward part, keeps the best policy, and cries no wolf."""

import json
import random
import re
from itertools import pairwise

import pytest
import tiny
from transformers import AutoModelForCausalLM

from rlhf_fast.train import guard, ppo
from rlhf_fast.train.errors import UserError
from rlhf_fast.train.evaluate import PairJudge
from rlhf_fast.train.guard import Guard

ROWS = 200


def seen(update, scores, reward, start=None):
    """One look, as `Guard` remembers it."""
    samples = [guard.Sample("p", "r", True)] * len(scores)
    return guard._record(
        update, samples, start or [0.0] * len(scores), list(scores), [reward] * len(scores), float(update)
    )


def watched(*history, patience=None):
    return Guard(None, None, [], [], None, None, patience, list(history))


def scores(mean, seed):
    noise = random.Random(seed)
    return [mean + noise.gauss(0, 1) for _ in range(ROWS)]


# --------------------------------------------------------------------------------------------------------- rule


def test_it_is_silent_while_both_rise_and_while_both_fall():
    rising = watched(*(seen(i, scores(0.3 * i, i), 0.5 * i) for i in range(5)))
    assert rising.alarm() is None and rising.best["update"] == 4
    falling = watched(seen(0, scores(2.0, 0), 3.0), seen(5, scores(0.5, 1), 2.0))
    assert falling.alarm() is None and falling.best["update"] == 0


def test_it_speaks_when_the_judge_falls_while_the_reward_rises():
    history = [seen(0, scores(0.0, 0), 0.0), seen(4, scores(1.5, 1), 1.0), seen(8, scores(0.8, 2), 2.0)]
    warned = watched(*history)
    assert warned.history[-1]["eval/win_rate"] > 0.5  # in time
    assert "the judge's score fell from" in warned.alarm() and "(update 4)" in warned.alarm()
    assert warned.conclusion()["best_update"] == 4 and warned.conclusion()["alarm"] == warned.alarm()


def test_it_speaks_when_the_policy_gets_worse_than_its_start():
    assert watched(seen(0, scores(0.0, 0), 0.0), seen(1, scores(-0.5, 1), 0.5)).alarm() is not None


def test_a_step_too_large_from_which_the_policy_recovers_is_no_alarm():
    history = [seen(0, scores(0.0, 0), 0.0), seen(1, scores(1.0, 1), 1.0)]
    fall = watched(*history, seen(2, scores(-1.0, 2), 0.9))
    assert fall.alarm() is None  # the reward fell as well
    assert watched(*fall.history, seen(3, scores(-0.3, 3), 2.0)).alarm() is None
    assert watched(*fall.history, seen(3, scores(-1.3, 3), 2.0)).alarm() is not None


def test_chance_alone_rarely_alarms():
    """A policy that no longer changes is looked at twenty times and always compared with the luckiest of its looks."""
    alarms = 0
    for run in range(100):
        history = [seen(0, scores(-1.0, 9999), 0.0)]
        for update in range(1, 21):
            history.append(seen(update, scores(0.0, 100 * run + update), 0.1 * update))
            if watched(*history).alarm():
                alarms += 1
                break
    assert alarms <= 25


def flat(update, judge, reward):
    """A look at which all prompts say the same."""
    return seen(update, [judge] * ROWS, reward)


def test_patience_counts_looks_that_are_no_better_while_the_reward_is_above_that_of_the_best():
    history = [flat(0, 0.0, 0.0), flat(1, 1.0, 1.0), flat(2, 0.9, 1.1), flat(3, 1.0, 1.2)]
    assert watched(*history).early_stop() is None  # nobody asked
    assert watched(*history, patience=3).early_stop() is None
    stopped = watched(*history, patience=2)
    assert stopped.early_stop() == (
        "at 2 looks in a row the judge's score was not above the 1 of update 1 (now 1) while the reward was above its 1 "
        "(now 1.2)"
    )
    assert stopped.conclusion() | {"alarm": None, "best_update": 1} == stopped.conclusion()
    assert stopped.conclusion()["early_stop"] == stopped.early_stop()
    assert watched(*history[:3], patience=1).early_stop() is not None
    assert watched(*history[:3], patience=2).early_stop() is None
    assert watched(*history, flat(4, 1.1, 1.3), patience=1).early_stop() is None  # the best so far


def test_patience_does_not_run_out_before_the_policy_was_better_than_its_start():
    history = [flat(0, 1.0, 0.0), flat(1, 0.9, 1.0), flat(2, 0.8, 1.1)]
    assert watched(*history, patience=1).early_stop() is None
    history += [flat(3, 1.1, 1.2), flat(4, 1.0, 1.3)]
    assert watched(*history[:-1], patience=1).early_stop() is None
    assert "of update 3" in watched(*history, patience=1).early_stop()


def test_patience_begins_anew_where_the_reward_is_no_higher():
    history = [flat(0, 0.0, 0.0), flat(1, 1.0, 1.0), flat(2, 0.9, 1.1), flat(3, 0.9, 1.0), flat(4, 0.9, 1.1)]
    assert watched(*history, patience=2).early_stop() is None
    assert watched(*history, flat(5, 0.5, 1.1), patience=2).early_stop() is not None


def test_patience_is_sooner_than_a_fall_that_chance_does_not_explain():
    likes = {0: 100, 1: 120, 2: 118, 3: 115}  # the prompts, of all, on which the judge likes the policy
    looks = [seen(i, [1.0] * liked + [0.0] * (ROWS - liked), 0.1 * i) for i, liked in likes.items()]
    slow = watched(*looks, patience=2)
    assert slow.alarm() is None and "of update 1" in slow.early_stop()


@pytest.mark.parametrize(("patience", "low", "high"), [(2, 80, 90), (5, 25, 45), (10, 2, 15)])
def test_patience_stops_most_policies_that_no_longer_change(patience, low, high):
    """Why nobody is given it unasked: of twenty looks at one policy, judged and paid by chance alone."""
    chance, stops = random.Random(patience), 0
    for _ in range(200):
        history = [flat(0, -1.0, -1.0)]
        for update in range(1, 21):
            history.append(flat(update, chance.gauss(0, 1), chance.gauss(0, 1)))
            if watched(*history, patience=patience).early_stop():
                stops += 1
                break
    assert low <= stops / 2 <= high


# -------------------------------------------------------------------------------------------------------- stage


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("guard")
    tiny.save_base(root / "base")
    tiny.write_pairs(root / "pairs.jsonl", count=80)
    return root


def run(files, out, judge, **changes):
    chosen = {"model": str(files / "base"), "data": str(files / "pairs.jsonl"), "output_dir": str(out)}
    chosen |= {"heldout_fraction": 0.3, "batch_size": 32, "total_episodes": 12 * 32, "response_length": 12}
    chosen |= {"missing_eos": "none", "kl_coef": 0.0, "learning_rate": 1e-2, "temperature": 1.0, "eval_every": 1}
    chosen |= {"num_ppo_epochs": 2}
    return ppo.train(ppo.PPOConfig(**(chosen | changes)), reward=count_a, judge=judge)


def count_a(samples):
    return [sample.response.count("a") for sample in samples]


def against_a(samples):
    """A judge to whom the reward is a mistake, from a certain number on."""
    return [-float(sample.response.count("a")) for sample in samples]


def test_it_stops_keeps_the_best_and_says_so(files, tmp_path, capsys):
    out = run(files, tmp_path / "ppo", against_a)
    looks = [line for line in tiny.read_log(out) if "eval/win_rate" in line]
    assert len(looks) < 12 and looks[-1]["step"] == len(tiny.read_log(out))
    for look in looks:
        assert 0 <= look["eval/win_rate_lo"] <= look["eval/win_rate"] <= look["eval/win_rate_hi"] <= 1
    results = json.loads((out / "stage.json").read_text())["results"]
    assert "the judge's score fell" in results["alarm"]
    kept = AutoModelForCausalLM.from_pretrained(out).state_dict()
    best = AutoModelForCausalLM.from_pretrained(out / "best").state_dict()
    base = AutoModelForCausalLM.from_pretrained(files / "base").state_dict()
    assert all(kept[name].equal(best[name]) for name in kept)
    if results["best_update"] == 0:
        assert all(kept[name].equal(base[name]) for name in base)
    assert "over-optimisation" in capsys.readouterr().err


def test_what_was_seen_is_written_down_and_taken_up_again(files, tmp_path):
    out = run(files, tmp_path / "ppo", count_a, total_episodes=4 * 32)
    looks = [json.loads(line) for line in (out / "looks.jsonl").read_text().splitlines()]
    assert [look["update"] for look in looks] == [0, 1, 2, 3, 4] and len(looks[0]["start"]) == len(looks[0]["scores"])
    for look, line in zip(looks[1:], tiny.read_log(out), strict=True):
        assert look["eval/judge"] == line["eval/judge"] == pytest.approx(sum(look["scores"]) / len(look["scores"]))
    again = Guard(None, None, [], [], None, out)
    again.begin(3)
    assert again.history == looks[:4] and len((out / "looks.jsonl").read_text().splitlines()) == 4


def test_a_run_that_was_killed_sees_the_same(files, tmp_path, monkeypatch):
    options = {"total_episodes": 5 * 32, "save_every": 0.0, "eval_every": 2}
    whole = run(files, tmp_path / "whole", count_a, **options)
    optimize, calls = ppo.optimize, []

    def killed(*arguments, **named):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return optimize(*arguments, **named)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ppo, "optimize", killed)
        run(files, tmp_path / "killed", count_a, **options)
    again = run(files, tmp_path / "killed", count_a, **options)
    for name in ("model.safetensors", "looks.jsonl", "best/model.safetensors"):
        assert (again / name).read_bytes() == (whole / name).read_bytes(), name


def test_it_only_warns_where_that_is_asked_and_once_a_look(files, tmp_path, capsys):
    out = run(files, tmp_path / "ppo", against_a, guard="warn", total_episodes=8 * 32, eval_every=2)
    told = re.findall(r"ppo update (\d+): over-optimisation", capsys.readouterr().err)
    assert len(tiny.read_log(out)) == 8 and len(told) >= 2 and set(told) <= {"2", "4", "6", "8"}
    kept, best = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (out, out / "best"))
    assert any(not kept[name].equal(best[name]) for name in kept)


def test_patience_stops_keeps_the_best_and_says_that_it_proves_nothing(files, tmp_path, capsys):
    asked = []

    def once_better(samples):
        asked.append(samples)
        return [float(len(asked) > 2)] * len(samples)  # the first look asks twice; then the same for ever

    out = run(files, tmp_path / "ppo", once_better, patience=2)
    log, results = tiny.read_log(out), json.loads((out / "stage.json").read_text())["results"]
    assert results["alarm"] is None and results["best_update"] == 1 and "2 looks in a row" in results["early_stop"]
    above = [line["eval/reward"] > log[0]["eval/reward"] for line in log]
    assert above[-2:] == [True, True] and not any(map(all, pairwise(above[:-1]))) and len(log) < 12
    kept, best, base = (
        AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (out, out / "best", files / "base")
    )
    assert all(kept[name].equal(best[name]) for name in kept) and any(not kept[name].equal(base[name]) for name in kept)
    said = capsys.readouterr().err
    assert f"ppo update {len(log)}: early stopping, which is no proof of over-optimisation: at 2 looks" in said
    assert said.count("over-optimisation") == 1


def test_patience_needs_looks_and_leave_to_stop(files, tmp_path):
    with pytest.raises(UserError, match="'patience' 2 counts looks of the judge, and eval_every is 0"):
        run(files, tmp_path / "ppo", None, patience=2, eval_every=0)
    with pytest.raises(UserError, match="'patience' 2 stops training, which guard warn never does"):
        run(files, tmp_path / "ppo", count_a, patience=2, guard="warn")
    with pytest.raises(UserError, match="'patience' must be at least 1, got 0"):
        run(files, tmp_path / "ppo", count_a, patience=0)


def test_a_judge_that_agrees_lets_it_run_and_changes_nothing(files, tmp_path):
    judged = run(files, tmp_path / "judged", count_a, total_episodes=5 * 32, eval_every=2)
    alone = run(files, tmp_path / "alone", None, total_episodes=5 * 32, eval_every=0)
    assert (judged / "model.safetensors").read_bytes() == (alone / "model.safetensors").read_bytes()
    steps = [line["step"] for line in tiny.read_log(judged) if "eval/win_rate" in line]
    assert steps == [2, 4, 5]
    assert json.loads((judged / "stage.json").read_text())["results"]["alarm"] is None
    assert not any("eval/win_rate" in line for line in tiny.read_log(alone))


def test_a_judge_of_pairs_can_watch(files, tmp_path):
    fewer = PairJudge("fewer a", lambda prompts, one, other: [b.count("a") - a.count("a") for a, b in zip(one, other)])  # noqa: B905
    results = json.loads((run(files, tmp_path / "ppo", fewer) / "stage.json").read_text())["results"]
    assert results["alarm"]


def test_it_needs_a_judge_and_prompts_that_no_stage_saw(files, tmp_path):
    with pytest.raises(UserError, match="'eval_every' needs a judge"):
        run(files, tmp_path / "ppo", None)
    with pytest.raises(UserError, match="needs held-out prompts"):
        run(files, tmp_path / "ppo", count_a, heldout_fraction=0.0)
    record = {"config": {"heldout_fraction": 0.3, "split_seed": 0}, "data": {}}
    (files / "base" / "stage.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="may be among those it has seen"):
        run(files, tmp_path / "ppo", count_a, split_seed=1)
    with pytest.raises(UserError, match="may be among those it has seen"):
        run(files, tmp_path / "ppo", count_a, heldout_fraction=0.5)
    (files / "base" / "stage.json").unlink()
    assert not (tmp_path / "ppo").exists()
