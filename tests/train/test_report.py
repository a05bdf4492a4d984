"""The report of runs that went well, badly, halfway or were damaged: as files, as parsed HTML and in a browser."""

import copy
import functools
import http.server
import json
import math
import random
import re
import shutil
import subprocess
import threading
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rlhf_fast.train.errors import UserError
from rlhf_fast.train.report import write_report
from rlhf_fast.train.report.curves import CURVES
from rlhf_fast.train.report.plot import Series, line_chart, moving_average, nice_ticks, number

NASTY = [
    "<script>alert(1)</script> & \"double\" 'single' <!-- <svg><title>",
    "<img src=http://example.invalid/x.png onerror=alert(2)>",
    "🦊👩‍👩‍👧‍👦 e\u0301 قصة עברית \u202eright-to-left override",
    "x" * 5000,
    "multi\nline\n\ttext with $title and {braces} and %s",
]


# ---------------------------------------------------------------------------------------------------- fake runs


def log_lines(stage: str, steps: int, seed: int = 0) -> list[dict]:
    """A log with every metric that the report draws; the values move smoothly with some noise."""
    noise = random.Random(seed)
    metrics = [line.metric for curve in CURVES[stage] for line in curve.lines]
    lines = []
    for step in range(1, steps + 1):
        level = 0.5 + math.exp(-step / 10)
        line = {"step": step, "seconds": 0.1 * step, "cpu_seconds": 0.1 * step}
        line |= {metric: level + noise.gauss(0, 0.02) for metric in metrics if "eval" not in metric}
        if step % 5 == 0:
            line |= {metric: level for metric in metrics if "eval" in metric}
        lines.append(line)
    return lines


def flaws(count: int) -> list[dict]:
    return [{"path": "pairs.jsonl", "line": i + 2, "field": "chosen", "reason": f"flaw <{i}>"} for i in range(count)]


def write_stage(directory: Path, stage: str, *, steps: int = 30, flawed: int = 0) -> None:
    directory.mkdir(parents=True)
    lines = log_lines(stage, steps)
    (directory / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = {"path": "pairs.jsonl", "rows_read": 1000 + flawed, "rows_used": 1000, "rows_train": 900}
    data |= {"rows_heldout": 100, "bad_rows": flaws(flawed), "truncated_prompts": 1, "truncated_responses": 2}
    accuracy = {"accuracy": 0.8, "accuracy_low": 0.71, "accuracy_high": 0.87, "eval_pairs": 100}
    summary = {
        "stage": stage,
        "config": {"learning_rate": 3e-4, "target_kl": 0.6, "data": "pairs.jsonl", "empty": None},
        "command": "rlhf-fast run --data 'my pairs.jsonl' --output_dir out",
        "started": "2030-01-02T03:04:05+00:00",
        "seconds": 60.0,
        "cpu_seconds": 59.0,
        "versions": {"rlhf_fast": "1.2.3", "torch": "2.13.0", "build": {"compiler": "gcc 12", "cuda": None}},
        "device": "cpu",
        "threads": 1,
        "parameters": 111232,
        "data": data,
        "results": accuracy if stage in ("reward", "dpo") else {"loss": 0.5},
    }
    (directory / "stage.json").write_text(json.dumps(summary))


def evaluation(low: float = 0.78, rate: float = 0.85, high: float = 0.9, *, same: bool = False) -> dict:
    noise = random.Random(1)
    texts = [*NASTY, ""]
    samples = [
        {
            "prompt": f"prompt {i} {texts[i % len(texts)]}",
            "before": texts[i % len(texts)],
            "after": texts[(i + 1) % len(texts)],
            **{"judge_before": i - 5, "judge_after": 2.0, "reward_before": -0.25, "reward_after": 0.75},
        }
        for i in range(12)
    ]
    scores = {"score_before": 1.0, "score_after": 2.0, "reward_before": -0.25, "reward_after": 0.75}
    result = {"judge": "the <i>exact</i> judge", "judge_is_training_reward": same, "pairs": 100, **scores}
    result |= {"wins": 80, "ties": 10, "losses": 10, "win_rate": rate, "low": low, "high": high, "kl": 2.5}
    for side in ("before", "after"):
        result |= {f"length_{side}": 20.0, f"eos_rate_{side}": 0.95, f"distinct_1_{side}": 0.3}
        result |= {f"distinct_2_{side}": 0.6, f"scores_{side}": [noise.gauss(side == "after", 1) for _ in range(100)]}
    agreement = {"agreement": 0.9, "low": 0.83, "high": 0.95, "pairs": 100}
    return result | {
        "reward_agreement": None if same else agreement,
        "samples": samples,
        "worst_samples": samples[-1:],
    }


def make_run(
    directory: Path, *, steps: int = 30, flawed: int = 2, stages=("sft", "reward", "ppo"), judged=None
) -> Path:
    for stage in stages:
        write_stage(directory / stage, stage, steps=steps, flawed=flawed)
    (directory / "config.yaml").write_text("seed: 0\nppo:\n  kl_coef: 0.2 # <price>\n")
    if {"ppo", "dpo"} & set(stages):
        (directory / "evaluation.json").write_text(json.dumps(evaluation() if judged is None else judged))
    return directory


@pytest.fixture
def run(tmp_path) -> Path:
    return make_run(tmp_path / "run <b>&amp;")


# ------------------------------------------------------------------------------------------------ reading pages


class Page(HTMLParser):
    """A report as a browser would see it: visible text, tags, ids; refuses tags that do not match."""

    VOID = frozenset(["meta", "link", "br", "img", "circle", "line", "path", "polyline", "i"])

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.text, self.ids, self.tags, self.attributes, self.open = "", [], [], [], []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value for key, value in attrs if key == "id"]
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


SVG = re.compile(r"(<svg[^>]*>)(.*?)</svg>", flags=re.DOTALL)


def read_page(directory: Path, *, charts: bool = True) -> Page:
    """charts: with what is inside of them, which `plots` checks as well, and faster."""
    html = (directory / "report.html").read_text(encoding="utf-8")
    page = Page(html if charts else SVG.sub(r"\1</svg>", html))
    check_markup(page.tags, page.ids, page.attributes)
    return page


def check_markup(tags, ids, attributes) -> None:
    assert len(ids) == len(set(ids))
    assert not {"script", "img", "iframe", "object"} & set(tags)
    assert not [value for key, value in attributes if key in ("src", "href", "srcset") and value != "data:,"]


def read_json(directory: Path) -> dict:
    def refuse(constant):
        raise AssertionError(f"report.json holds {constant}, which is not JSON")

    return json.loads((directory / "report.json").read_text(encoding="utf-8"), parse_constant=refuse)


def plots(directory: Path) -> dict[str, ElementTree.Element]:
    """Every chart by id, after checking that it is well-formed, named, and drawn inside its own frame."""
    found = {}
    for svg in SVG.finditer((directory / "report.html").read_text(encoding="utf-8")):
        root = ElementTree.fromstring(svg[0])
        assert root.get("role") == "img"
        title = root.find("{*}title")
        assert title.get("id") == root.get("aria-labelledby")
        assert len(title.text) > 10
        check_coordinates(root)
        found[root.get("id")] = root
    inside = [element for root in found.values() for element in root.iter()]
    attributes = [item for element in inside for item in element.attrib.items()]
    tags = [element.tag.rpartition("}")[2] for element in inside]
    check_markup(tags, [value for key, value in attributes if key == "id"], attributes)
    return found


def check_coordinates(root: ElementTree.Element) -> None:
    _, _, width, height = map(float, root.get("viewBox").split())
    for element in root.iter():
        across = [float(element.get(key)) for key in ("x", "x1", "x2", "cx") if element.get(key)]
        down = [float(element.get(key)) for key in ("y", "y1", "y2", "cy") if element.get(key)]
        points = [pair.split(",") for pair in (element.get("points") or "").split()]
        points += re.findall(r"[ML](-?[\d.e]+),(-?[\d.e]+)", element.get("d") or "")
        across += [float(x) for x, _ in points]
        down += [float(y) for _, y in points]
        assert all(-5 <= x <= width + 5 for x in across), ElementTree.tostring(element)
        assert all(-5 <= y <= height + 5 for y in down), ElementTree.tostring(element)


def chart_id(stage: str, metric: str) -> str:
    return f"{stage}-{metric}".replace("/", "-").replace("_", "-")


PPO_RUN, DPO_RUN = ("sft", "reward", "ppo"), ("sft", "dpo")


def charts_of(stages) -> set[str]:
    return {chart_id(stage, curve.lines[0].metric) for stage in stages for curve in CURVES[stage]}


EXPECTED = charts_of(PPO_RUN)
HEADLINE = {"win_rate", "reward_accuracy", "reward_agreement"}


# --------------------------------------------------------------------------------------------------- whole runs


def test_a_whole_run_shows_every_plot(run):
    assert write_report(run) == run / "report.html"
    assert set(plots(run)) == EXPECTED | HEADLINE | {"ppo-score-kl", "judge-scores"}
    page, summary = read_page(run), read_json(run)
    assert summary["verdict"]["title"] == "PPO made the policy better."
    assert summary["problems"] == []
    assert summary["headline"]["win_rate"] == {"value": 0.85, "low": 0.78, "high": 0.9}
    assert summary["headline"]["kl"] == 2.5
    assert summary["headline"]["seconds"] == 180
    for shown in ("85.0%", "78.0–90.0%", "80.0%", "71.0–87.0%", "90.0%", "2.5 nats", "3 min 0 s", "gcc 12", "1.2.3"):
        assert shown in page.text
    assert "the judge (the <i>exact</i> judge) preferred the new reply in 85.0%" in page.text
    assert "kl_coef: 0.2 # <price>" in page.text
    assert page.text.count("rlhf-fast run --data 'my pairs.jsonl' --output_dir out") == 1
    assert "80 wins, 10 ties, 10 losses; a tie counts half" in page.text


def test_every_plot_says_how_to_read_it(run):
    write_report(run)
    html = (run / "report.html").read_text()
    figures = re.findall(r"<figure>.*?</figure>", html, flags=re.DOTALL)
    drawn = [figure for figure in figures if "<svg" in figure]
    assert len(drawn) == len(EXPECTED) + 2
    assert all(re.search(r'<p class="how">[^<]{40,}</p>', figure) for figure in drawn)
    assert all(re.search(r'<ul class="legend"><li>', figure) for figure in drawn)


def test_a_real_run_has_every_metric_that_is_drawn(tmp_path):
    """The names in CURVES are those the stages log, and nothing on the page of a real run is missing or damaged."""
    from rlhf_fast.train.config import from_dict
    from rlhf_fast.train.run import RunConfig, run

    pairs = [{"prompt": f"Say {i}.", "chosen": f" {i} please", "rejected": f" no {i}"} for i in range(48)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    small = {"vocab_size": 280, "hidden_size": 8, "num_layers": 1, "num_heads": 1, "context_length": 64, "threads": 1}
    stages = {
        "sft": {"batch_size": 16, "num_train_epochs": 1, "logging_steps": 1, "max_response_tokens": 16},
        "reward": {
            "batch_size": 16,
            "num_train_epochs": 1,
            "normalize_samples": 8,
            "max_response_tokens": 16,
            "logging_steps": 1,
        },
        "ppo": {
            "batch_size": 8,
            "num_mini_batches": 1,
            "total_episodes": 24,
            "response_length": 4,
            "min_reward_accuracy": None,
            "eval_every": 1,
            "judge": "tiny:count_letters",
            "guard": "warn",
        },
    }
    files = {"data": str(tmp_path / "pairs.jsonl"), "output_dir": str(tmp_path / "out")}
    out = run(from_dict(RunConfig, small | stages | files))
    for stage in PPO_RUN:
        logged = set().union(*(json.loads(line) for line in (out / stage / "log.jsonl").read_text().splitlines()))
        assert logged >= {line.metric for curve in CURVES[stage] for line in curve.lines}
    assert set(plots(out)) == EXPECTED | {"win_rate", "reward_accuracy", "ppo-score-kl", "ppo-judge-kl", "judge-scores"}
    summary = read_json(out)
    assert summary["problems"] == []
    assert {stage["status"] for stage in summary["stages"].values()} == {"complete"}
    assert not [check for check in summary["checks"] if "finite" in check["text"]]
    assert "nobody" in summary["verdict"]["title"] or "trained on" in summary["verdict"]["title"]


def test_a_run_with_dpo_has_its_own_stages_and_words(tmp_path):
    write_report(
        make_run(tmp_path / "run", stages=DPO_RUN, judged=evaluation() | {"kl": None, "reward_agreement": None})
    )
    page, summary = read_page(tmp_path / "run"), read_json(tmp_path / "run")
    assert summary["verdict"]["title"] == "DPO made the policy better." and summary["problems"] == []
    assert (
        set(summary["headline"]) >= {"win_rate", "preference_accuracy"} and "reward_accuracy" not in summary["headline"]
    )
    assert set(plots(tmp_path / "run")) == charts_of(DPO_RUN) | {"win_rate", "preference_accuracy", "judge-scores"}
    assert "after DPO" in page.text and "direct preference optimisation" in page.text
    assert "PPO" not in page.text and "not run" not in page.text
    write_report(make_run(tmp_path / "same", stages=("sft", "reward", "dpo"), judged=evaluation(same=True)))
    assert "which learned from the same pairs as DPO" in read_page(tmp_path / "same").text


@pytest.mark.parametrize(("advantage", "method"), [("gae", "PPO"), ("grpo", "GRPO"), ("rloo", "RLOO")])
def test_a_policy_stage_is_named_after_its_advantage(run, advantage, method):
    summary = json.loads((run / "ppo" / "stage.json").read_text())
    summary["config"]["advantage"] = advantage
    (run / "ppo" / "stage.json").write_text(json.dumps(summary))
    write_report(run)
    assert read_json(run)["verdict"]["title"] == f"{method} made the policy better."
    assert f"before {method}" in read_page(run).text


def test_a_dpo_stage_alone_is_known_by_its_log(tmp_path):
    write_stage(tmp_path / "mine", "dpo")
    (tmp_path / "mine" / "stage.json").unlink()
    write_report(tmp_path / "mine")
    assert set(read_json(tmp_path / "mine")["stages"]) == {"dpo"}


@pytest.mark.parametrize(
    ("judged", "level", "title"),
    [
        (evaluation(), "good", "PPO made the policy better."),
        (evaluation(0.1, 0.2, 0.3), "bad", "PPO made the policy worse."),
        (evaluation(0.45, 0.52, 0.58), "unclear", "No clear difference before and after PPO."),
        (evaluation(same=True), "warning", "PPO raised the reward model's score; nobody independent"),
        (evaluation(0.1, 0.2, 0.3, same=True), "bad", "PPO lowered the very score it was trained on."),
        (evaluation(0.45, 0.52, 0.58, same=True), "unclear", "PPO did not clearly change even the score"),
        (evaluation() | {"judge_is_training_reward": None}, "warning", "PPO made the policy better."),
        ({}, "open", "PPO finished, and nothing has judged the result."),
        (evaluation() | {"low": 0.95}, "open", "PPO finished, and nothing has judged the result."),
    ],
)
def test_the_verdict_claims_no_more_than_was_measured(tmp_path, judged, level, title):
    write_report(make_run(tmp_path / "run", judged=judged))
    verdict = read_json(tmp_path / "run")["verdict"]
    assert verdict["level"] == level
    assert verdict["title"].startswith(title)
    page = read_page(tmp_path / "run")
    assert verdict["title"] in page.text
    assert verdict["text"] in page.text


def test_the_reward_model_as_judge_is_called_out(tmp_path):
    write_report(make_run(tmp_path / "run", judged=evaluation(same=True)))
    page, summary = read_page(tmp_path / "run"), read_json(tmp_path / "run")
    assert "the very model that PPO optimised" in page.text
    assert any("cannot tell better replies" in check["text"] and not check["passed"] for check in summary["checks"])
    assert "reward_agreement" not in summary["headline"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"score_after": 0.0}, "Over-optimisation"),
        ({"reward_after": -1.0}, "PPO did not raise the score"),
        ({"eos_rate_after": 0.3}, "Only 30.0% of the replies"),
        ({"length_after": 60.0}, "much longer"),
        ({"length_after": 5.0}, "much shorter"),
        ({"distinct_2_after": 0.1}, "more alike"),
        ({"reward_agreement": {"agreement": 0.5, "low": 0.4, "high": 0.6, "pairs": 90}}, "not clearly order replies"),
    ],
)
def test_checks_find_what_is_wrong(tmp_path, change, words):
    write_report(make_run(tmp_path / "good"))
    assert all(check["passed"] for check in read_json(tmp_path / "good")["checks"])
    write_report(make_run(tmp_path / "run", judged=evaluation() | change))
    failed = [check["text"] for check in read_json(tmp_path / "run")["checks"] if not check["passed"]]
    assert len(failed) == 1
    assert words in failed[0]
    assert failed[0] in read_page(tmp_path / "run").text


def test_a_policy_that_pleased_only_the_reward_model_is_named(tmp_path):
    write_report(make_run(tmp_path / "run", judged=evaluation(0.1, 0.2, 0.3)))
    assert "reward hacking" in read_json(tmp_path / "run")["verdict"]["text"]


# ------------------------------------------------------------------------------------------------- partial runs


@pytest.mark.parametrize("stages", [("sft",), ("sft", "reward")])
def test_a_partial_run_reports_what_is_there(tmp_path, stages):
    write_report(make_run(tmp_path / "run", stages=stages))
    summary = read_json(tmp_path / "run")
    assert summary["verdict"]["title"] == "PPO has not run yet."
    assert summary["problems"] == []
    assert set(summary["stages"]) == set(stages)
    drawn = {name.split("-")[0] for name in plots(tmp_path / "run") if "-" in name}
    assert drawn == set(stages)
    assert "not run" in read_page(tmp_path / "run").text


def test_the_directory_of_one_stage_is_enough(tmp_path):
    write_stage(tmp_path / "mine", "reward")
    write_report(tmp_path / "mine")
    summary = read_json(tmp_path / "mine")
    assert set(summary["stages"]) == {"reward"}
    assert summary["problems"] == []
    (tmp_path / "mine/stage.json").unlink()
    write_report(tmp_path / "mine")
    assert set(read_json(tmp_path / "mine")["stages"]) == {"reward"}


def test_one_point_curves(tmp_path):
    write_report(make_run(tmp_path / "run", steps=1))
    assert "sft-loss" in plots(tmp_path / "run")
    assert "ppo-score-kl" not in plots(tmp_path / "run")


def test_no_sample_and_no_flaw(tmp_path):
    judged = evaluation() | {"samples": [], "worst_samples": []}
    write_report(make_run(tmp_path / "run", flawed=0, judged=judged))
    page = read_page(tmp_path / "run")
    assert "No row was flawed." in page.text
    assert "article" not in page.tags


def test_a_thousand_flawed_rows_are_all_listed_and_folded_away(tmp_path):
    write_report(make_run(tmp_path / "run", flawed=1000))
    html = (tmp_path / "run/report.html").read_text()
    folded = re.search(r"<details><summary>1,000 flawed rows were left out</summary>.*?</details>", html, re.DOTALL)
    assert [f"flaw &lt;{i}&gt;" in folded[0] for i in range(1000)] == [True] * 1000
    assert len(read_json(tmp_path / "run")["data"]["flawed_rows"]) == 1000  # once, though three stages name them


def test_few_flawed_rows_are_in_plain_sight(run):
    write_report(run)
    html = (run / "report.html").read_text()
    unfolded = re.sub(r"<details>.*?</details>", "", html, flags=re.DOTALL)
    assert "pairs.jsonl:2" in unfolded
    assert "flaw &lt;1&gt;" in unfolded


def test_a_long_log_stays_a_light_page(tmp_path):
    write_report(make_run(tmp_path / "run", steps=5000))
    assert (tmp_path / "run/report.html").stat().st_size < 2e6
    for plot in plots(tmp_path / "run").values():
        for line in plot.iter("{*}polyline"):
            assert len(line.get("points").split()) <= 500


# ------------------------------------------------------------------------------------------------- hostile text


def test_text_of_users_and_models_is_shown_as_it_is(run):
    write_report(run)
    page = read_page(run)
    for sample in NASTY:
        assert sample in page.text
    assert "(empty)" in page.text
    assert run.name in page.text


def test_characters_that_no_page_may_hold_are_replaced(tmp_path):
    judged = evaluation()
    judged["samples"][0]["before"] = "bell \x07 escape \x1b zero \x00 half \ud800 delete \x7f none \uffff"
    write_report(make_run(tmp_path / "run", judged=judged))
    text = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert "bell ␇ escape ␛ zero ␀ half \ufffd delete \ufffd none \ufffd" in text
    read_page(tmp_path / "run")


# ------------------------------------------------------------------------------------------------- damaged runs


def test_what_is_no_run_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for path, message in (("empty", "is not a run"), ("file", "is a file"), ("absent", "does not exist")):
        with pytest.raises(UserError, match=message):
            write_report(tmp_path / path)
    assert list((tmp_path / "empty").iterdir()) == []


def test_an_interrupted_run_is_named_as_such(run):
    (run / "evaluation.json").unlink()
    (run / "ppo/stage.json").unlink()
    log = run / "ppo/log.jsonl"
    log.write_text(log.read_text()[:-40])
    write_report(run)
    summary, page = read_json(run), read_page(run)
    assert summary["verdict"]["title"] == "PPO has not finished."
    assert "after step 29" in summary["verdict"]["text"]
    assert summary["stages"]["ppo"]["status"] == "unfinished"
    assert summary["headline"]["seconds"] == pytest.approx(120 + 2.9)
    assert [problem for problem in summary["problems"] if problem.startswith("ppo/log.jsonl: 1 line (30)")]
    assert [problem for problem in summary["problems"] if problem.startswith("ppo/stage.json is missing")]
    assert all(problem in page.text for problem in summary["problems"])
    assert "ppo-objective-scores" in plots(run)


@pytest.mark.parametrize("name", ["config.yaml", "evaluation.json", "sft/stage.json", "reward/log.jsonl"])
@pytest.mark.parametrize("content", [None, b"", b"{", b"[1]", b'"\xff\xfe', b"[" * 100_000])
def test_a_missing_or_damaged_file_is_reported(run, name, content):
    if content is None:
        (run / name).unlink()
    else:
        (run / name).write_bytes(content)
    write_report(run)
    problems = read_json(run)["problems"]
    optional = name == "config.yaml" and content != b'"\xff\xfe'  # shown as text, whatever it is
    assert any(problem.startswith(name) for problem in problems) != optional
    page = read_page(run)
    assert all(problem in page.text for problem in problems)
    assert plots(run)


def test_numbers_that_are_none_are_marked_and_named(run):
    log = run / "ppo/log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    lines[4]["objective/kl"] = "nan"
    lines[9]["objective/kl"] = "-inf"
    for line in lines:
        line["loss/value_avg"] = "nan"
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_report(run)
    drawn = plots(run)
    assert len(drawn["ppo-objective-kl"].findall("{*}path[@class='broken']")) == 2
    assert "no finite value" in drawn["ppo-loss-value-avg"].find("{*}title").text
    failed = [check["text"] for check in read_json(run)["checks"] if not check["passed"]]
    assert "ppo: objective/kl is not a finite number at step 5, 10." in failed
    assert any(
        text.startswith("ppo: loss/value_avg is not a finite number at step 1, 2, 3, 4, 5, …") for text in failed
    )


@pytest.mark.parametrize("values", [[0.0] * 30, [1e308, -1e308] * 15, [1e-320] * 30, [5.0] * 29 + [5.0 + 1e-15]])
def test_extreme_values_are_drawn(run, values):
    lines = [{"step": i, "loss": value} for i, value in enumerate(values)]
    (run / "sft/log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_report(run)
    assert "sft-loss" in plots(run)


def test_of_a_resumed_run_the_later_record_of_a_step_counts(run):
    log = run / "sft/log.jsonl"
    log.write_text(log.read_text() + json.dumps({"step": 3, "loss": 77.0}) + "\n")
    write_report(run)
    series = read_json(run)["stages"]["sft"]["charts"][0]["series"][0]
    assert (series["points"], series["highest"]) == (30, 77.0)


def test_wrong_types_anywhere_never_stop_the_report(tmp_path):
    """Replace values in the run's JSON at random; the report must come out whole every time."""
    pick = random.Random(0)
    odd = [None, True, -1, 0, 1e400, 10**400, -math.inf, "text", "nan", "", [], [None], {}, {"a": {"b": 1}}, [[1]]]

    def places(value, path=()):
        if isinstance(value, dict | list):
            for key in value if isinstance(value, dict) else range(len(value)):
                yield (*path, key)
                yield from places(value[key], (*path, key))

    def spoil(value):
        value = copy.deepcopy(value)
        for _ in range(3):
            *path, last = pick.choice(list(places(value)))
            functools.reduce(lambda inner, key: inner[key], path, value)[last] = copy.deepcopy(pick.choice(odd))
        return value

    good = make_run(tmp_path / "good", steps=3)
    targets = ["evaluation.json", "sft/stage.json", "reward/stage.json", "ppo/stage.json"]
    contents = {target: json.loads((good / target).read_text()) for target in targets}
    lines = [json.loads(line) for line in (good / "ppo/log.jsonl").read_text().splitlines()]
    for _ in range(150):
        for target in targets:
            (good / target).write_text(json.dumps(spoil(contents[target])))
        (good / "ppo/log.jsonl").write_text("\n".join(json.dumps(line) for line in spoil(lines)))
        write_report(good)
        read_json(good)
        read_page(good, charts=False)
        plots(good)


@pytest.mark.parametrize(
    ("said", "guard", "passed", "words"),
    [
        ({"alarm": None}, "stop", True, "never fell clearly while the reward rose (best: update 3)"),
        (
            {"alarm": None, "early_stop": None},
            "stop",
            True,
            "never fell clearly while the reward rose (best: update 3)",
        ),
        ({"alarm": "it fell", "early_stop": "none left"}, "stop", False, "the policy of update 3 kept: it fell."),
        ({"alarm": "it fell"}, "warn", False, "and PPO went on: it fell."),
        (
            {"alarm": None, "early_stop": "none left"},
            "stop",
            True,
            "Early stopping ended PPO, and the policy of update 3 was kept: none left. That is no proof of over-optimisation.",
        ),
    ],
)
def test_early_stopping_and_the_alarm_are_told_apart(run, said, guard, passed, words):
    path = run / "ppo" / "stage.json"
    summary = json.loads(path.read_text())
    path.write_text(
        json.dumps(summary | {"config": {"guard": guard}, "results": {"loss": 0.5, "best_update": 3.0} | said})
    )
    write_report(run)
    (found,) = [check for check in read_json(run)["checks"] if words in check["text"]]
    assert found["passed"] is passed
    others = {"Early stopping", "never fell clearly", "PPO was stopped", "PPO went on"}
    assert sum(any(other in check["text"] for other in others) for check in read_json(run)["checks"]) == 1


def test_writing_again_replaces_the_report_and_touches_nothing_else(run):
    write_report(run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.stem != "report"}
    (run / "report.html").write_text("old")
    write_report(run)
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.stem != "report"}
    assert before == after
    assert "PPO made the policy better." in read_page(run).text


# -------------------------------------------------------------------------------------------------------- plots


def test_moving_average_has_no_lag_and_keeps_a_straight_line():
    line = [(float(x), 2.0 * x) for x in range(30)]
    assert moving_average(line, 5)[2:-2] == line[2:-2]
    assert moving_average(line, 5)[0] == (0.0, 2.0)
    assert moving_average(line, 1) == line


def test_smoothing_is_drawn_over_the_raw_points_only_where_there_are_many():
    def lines(count):
        series = Series("loss", [(i, i % 3) for i in range(count)], "noisy")
        return line_chart("c", "Chart", [series], x_label="step", y_label="nats").count("<polyline")

    assert (lines(19), lines(20)) == (1, 2)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3, 17), (0.995, 1.012), (0, 3e-6), (-1e300, 1e300), (7, 7.001)])
def test_ticks_are_few_round_and_inside(low, high):
    ticks = nice_ticks(low, high)
    assert 2 <= len(ticks) <= 6
    assert all(low <= tick <= high for tick in ticks)
    step = ticks[1] - ticks[0]
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-6)
    assert mantissa == pytest.approx(1, rel=1e-3) or round(mantissa) in (2, 5)
    decimals = None if step < 1e-4 or step > 1e6 else max(0, -math.floor(math.log10(step) + 1e-9))
    assert len({number(tick, decimals=decimals) for tick in ticks}) == len(ticks)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (1.2345, "1.23"),
        (-0.05, "−0.05"),
        (1234567, "1,234,567"),
        (2e-5, "2e−5"),
        (1e9, "1e9"),
        (99.96, "100"),
    ],
)
def test_numbers_are_short(value, shown):
    assert number(value) == shown


# ------------------------------------------------------------------------------------------------------ browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--virtual-time-budget=5000",
    "--enable-logging=stderr",
    "--v=0",
    "--dump-dom",
]

# Loads the report in a frame as wide as a phone and one as wide as a desktop, opens what is folded and measures.
PROBE = """<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,"><body><script>
const results = [];
for (const width of [400, 1200]) {
  const frame = document.createElement("iframe");
  frame.style = `width: ${width}px; height: 900px; border: 0`;
  frame.onload = () => {
    const inner = frame.contentDocument;
    inner.querySelectorAll("details").forEach(each => each.open = true);
    results.push({
      width,
      scroll: inner.documentElement.scrollWidth,
      loaded: frame.contentWindow.performance.getEntriesByType("resource").map(each => each.name),
      plots: [...inner.querySelectorAll("svg")].map(each => {
        const box = each.getBoundingClientRect();
        return [each.id, box.width, box.height];
      }),
    });
    const out = document.querySelector("pre") || document.body.appendChild(document.createElement("pre"));
    out.textContent = JSON.stringify(results);
  };
  frame.src = "report.html";
  document.body.appendChild(frame);
}
</script>"""


def look(directory: Path, profile: Path) -> tuple[list[dict], list[str], set[str]]:
    """Open report.html in Chromium -> (measurements by width, console messages, paths asked of the server)."""
    (directory / "probe.html").write_text(PROBE)
    asked = set()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            asked.add(self.path)

    handler = functools.partial(Handler, directory=str(directory))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/probe.html"
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        server.shutdown()
    measured = re.search(r"<pre>(.*?)</pre>", done.stdout, re.DOTALL)
    assert measured, done.stdout[-2000:] + done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(measured[1].replace("&amp;", "&")), console, asked


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed, so the page cannot be opened in a browser")
def test_a_browser_shows_every_plot_and_loads_nothing(run, tmp_path):
    write_report(run)
    measured, console, asked = look(run, tmp_path / "profile")
    assert console == []
    assert asked == {"/probe.html", "/report.html"}
    assert sorted(each["width"] for each in measured) == [400, 1200]
    for each in measured:
        assert each["loaded"] == []
        assert each["scroll"] <= each["width"]
        assert {name for name, _, _ in each["plots"]} == set(plots(run))
        assert all(width > 100 and height > 30 for _, width, height in each["plots"])


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed, so the page cannot be opened in a browser")
def test_the_browser_check_notices_a_bad_page(tmp_path):
    bad = '<!doctype html><body><img src="other.png"><svg id="flat" width="0"></svg><script>missing()</script>'
    (tmp_path / "report.html").write_text(bad)
    measured, console, asked = look(tmp_path, tmp_path / "profile")
    assert "/other.png" in asked
    assert any("missing is not defined" in line for line in console)
    assert all(each["loaded"] and each["plots"][0][1] == 0 for each in measured)
