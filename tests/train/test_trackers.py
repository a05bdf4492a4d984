"""Whoever gets the numbers of a run gets each step once, also where the run was killed in between."""

import csv
import io
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest

from rlhf_fast.train import trackers
from rlhf_fast.train.errors import UserError
from rlhf_fast.train.record import Progress, RunLog, undisturbed
from rlhf_fast.train.trackers import Entry, check, parse

REPLIES = [{"score": 0.5, "prompt": "p | q", "response": "first\nline"}, {"score": -1.0, "prompt": "r", "response": ""}]


def log_of(steps):
    return "".join(json.dumps({"step": step, "seconds": step / 2, "loss": 1 / step}) + "\n" for step in steps).encode()


def rows_of(directory):
    with (directory / "log.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def events_of(directory):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(directory / "tensorboard")).Reload()


# --------------------------------------------------------------------------------------------------------- names


def test_names_are_read_once_each():
    assert parse("csv, tensorboard ,csv") == ["csv", "tensorboard"]
    assert parse("none") == parse("") == []


@pytest.mark.parametrize(
    ("report_to", "words"),
    [
        ("csvv", "names a tracker 'csvv' that is not known: did you mean 'csv'?"),
        ("all", "'all' that is not known; the trackers are tensorboard, csv, wandb, trackio"),
        ("none, csv", "names trackers beside 'none'"),
    ],
)
def test_a_wrong_name_is_refused(report_to, words):
    with pytest.raises(UserError) as error:
        check(report_to)
    assert words in str(error.value)


def test_a_tracker_that_is_not_installed_is_refused_with_what_to_do(monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    check("csv")
    with pytest.raises(UserError, match="trackio is not installed; pip install trackio, or leave it out"):
        check("csv, trackio")


# ----------------------------------------------------------------------------------------------------- the files


def test_csv_has_a_column_for_every_name_that_ever_came(tmp_path):
    log = RunLog(tmp_path, report_to="csv")
    log.log(1, {"loss": 0.1})
    log.log(2, {"loss": 0.2, "eval/kl": 3.0})
    log.log(3, {"loss": 0.3})
    log.close()
    rows = rows_of(tmp_path)
    assert [list(row.values()) for row in rows] == [["1", "0.1", ""], ["2", "0.2", "3.0"], ["3", "0.3", ""]]
    assert list(rows[0]) == ["step", "loss", "eval/kl"] and not (tmp_path / "tensorboard").exists()


def test_after_a_kill_every_step_and_every_reply_is_there_once(tmp_path):
    log = RunLog(tmp_path, report_to="tensorboard, csv")
    for step in range(1, 6):  # a checkpoint after 3, killed after 5
        log.log(step, {"seconds": step / 2, "loss": 1 / step}, REPLIES if step in (2, 4) else ())
    with (tmp_path / "completions.jsonl").open("a") as file:
        file.write('{"step": 6, "scor')  # killed while writing
    again = RunLog(tmp_path, log_of([1, 2, 3]), 3, report_to="tensorboard, csv")
    for step in (4, 5, 6):
        again.log(step, {"seconds": step / 2, "loss": 1 / step}, REPLIES if step in (4, 6) else ())
    again.close()
    assert [int(row["step"]) for row in rows_of(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert [float(row["loss"]) for row in rows_of(tmp_path)] == [1 / step for step in range(1, 7)]
    lines = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert lines == [{"step": step, **row} for step in (2, 4, 6) for row in REPLIES]
    events = events_of(tmp_path)
    losses = events.Scalars("loss")
    assert [event.step for event in losses] == [1, 2, 3, 4, 5, 6]
    assert losses[5].wall_time - losses[0].wall_time == pytest.approx(2.5, abs=1e-3)
    assert [event.step for event in events.Tensors("completions/text_summary")] == [2, 4, 6]


def test_a_tracker_asked_for_later_is_told_the_whole_run(tmp_path):
    RunLog(tmp_path, report_to="none").close()
    log = RunLog(tmp_path, log_of([1, 2]), 2, report_to="csv, tensorboard")
    log.log(3, {"seconds": 1.5, "loss": 1 / 3})
    log.close()
    assert [int(row["step"]) for row in rows_of(tmp_path)] == [1, 2, 3]
    assert [event.step for event in events_of(tmp_path).Scalars("loss")] == [1, 2, 3]


def test_numbers_that_are_not_finite_reach_the_trackers_again(tmp_path):
    log = RunLog(tmp_path, b'{"step": 1, "loss": "nan", "norm": "inf"}\n', 1, report_to="csv")
    log.close()
    assert rows_of(tmp_path) == [{"step": "1", "loss": "nan", "norm": "inf"}]


def test_a_run_that_begins_anew_forgets_the_replies_of_the_one_before(tmp_path):
    log = RunLog(tmp_path, report_to="none")
    log.log(1, {"loss": 1.0}, REPLIES)
    again = RunLog(tmp_path, report_to="none")
    again.close()
    assert (tmp_path / "completions.jsonl").read_text() == ""


# -------------------------------------------------------------------------------------------------- the services


class FakeRun:
    """A run of either service: it holds what it was told by step, and was told `seen` steps before."""

    def __init__(self, seen):
        self.resumed, self.step, self._next_step = seen > 0, seen + 1 if seen else 0, seen + 1
        self.told, self.finished = [], False

    def log(self, values, step):
        self.told.append((step, values))

    def finish(self):
        self.finished = True


def fake(monkeypatch, name, seen):
    """Put a module of that name in the place of the service, whose server has heard of `seen` steps."""
    module, runs = ModuleType(name), []

    def init(**options):
        runs.append(FakeRun(seen))
        runs[-1].options = options
        return runs[-1]

    module.init, module.Error, module.finish = init, RuntimeError, lambda: runs[-1].finish()
    module.Table = lambda columns, data: SimpleNamespace(columns=columns, data=data)
    monkeypatch.setitem(sys.modules, name, module)
    return runs


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_service_is_told_what_it_lacks_and_nothing_twice(tmp_path, monkeypatch, name):
    runs = fake(monkeypatch, name, seen=0)
    log = RunLog(tmp_path, report_to=name, title="ppo", config={"seed": 1})
    log.log(1, {"loss": 1.0}, REPLIES)
    log.close()
    first = runs[0]
    assert first.finished and first.options["config"] == {"seed": 1} and first.options["resume"] == "allow"
    (step, values), columns = first.told[0], ["score", "prompt", "response"]
    assert (step, values["loss"], values["completions"].columns) == (1, 1.0, columns)
    assert values["completions"].data == [list(row.values()) for row in REPLIES]

    for seen, expected in ((1, [2, 3, 4]), (3, [4]), (5, []), (0, [1, 2, 3, 4])):
        runs = fake(monkeypatch, name, seen)
        again = RunLog(tmp_path, log_of([1, 2, 3]), 3, report_to=name, title="ppo")
        again.log(4, {"loss": 0.25})
        again.close()
        assert [step for step, _ in runs[0].told] == expected
        assert runs[0].options["name"] == first.options["name"]
    anew = fake(monkeypatch, name, seen=0)
    RunLog(tmp_path, report_to=name, title="ppo").close()
    assert anew[0].options["name"] != first.options["name"]


def test_wandb_that_cannot_begin_says_what_to_do(tmp_path, monkeypatch):
    fake(monkeypatch, "wandb", seen=0)

    def init(**options):
        raise RuntimeError("no API key")

    monkeypatch.setattr(sys.modules["wandb"], "init", init)
    with pytest.raises(UserError, match="wandb cannot begin: no API key; log in with `wandb login`, or set WANDB_MODE"):
        RunLog(tmp_path, report_to="csv, wandb")


@pytest.mark.parametrize("seen_by_the_first", [2, 3])
def test_trackio_itself_holds_each_step_once(tmp_path, monkeypatch, seen_by_the_first):
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    monkeypatch.setenv("TRACKIO_PROJECT", f"steps-{seen_by_the_first}-{tmp_path.name}")
    log = RunLog(tmp_path, report_to="trackio", title="ppo")
    for step in range(1, seen_by_the_first + 1):
        log.log(step, {"seconds": step / 2, "loss": 1 / step}, REPLIES if step == 2 else ())
    log.close()
    again = RunLog(tmp_path, log_of([1, 2]), 2, report_to="trackio", title="ppo")
    for step in (3, 4):
        again.log(step, {"seconds": step / 2, "loss": 1 / step})
    again.close()
    project, name = f"steps-{seen_by_the_first}-{tmp_path.name}", json.loads((tmp_path / "trackers.json").read_text())
    told = SQLiteStorage.get_logs(project, name["name"])
    assert [(row["step"], row["loss"]) for row in told] == [(step, 1 / step) for step in (1, 2, 3, 4)]


def test_wandb_itself_takes_a_run_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    log = RunLog(tmp_path, log_of([1]), 1, report_to="wandb", title="ppo")
    log.log(2, {"loss": 0.5}, REPLIES)
    log.close()
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


# ------------------------------------------------------------------------------------------------------- screen


@pytest.mark.parametrize("terminal", [False, True])
def test_replies_are_shown_as_a_table_and_cannot_steer_the_terminal(monkeypatch, terminal):
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal)
    progress = Progress("ppo", 9, stream)
    evil = {"score": -0.12345, "prompt": "a\x1b[31mb", "response": "[bold]x[/bold] \x07" + "long " * 100}
    progress.show(3, [evil] * 9)
    progress.close()
    text = stream.getvalue()
    assert "ppo 3" in text and "-0.123" in text and "[bold]x[/bold]" in text and "…" in text
    assert "\x1b[31mb" not in text and "\x07" not in text
    assert text.count("-0.123") == 4


def test_a_table_on_the_screen_draws_no_random_number():
    import random

    import numpy as np

    random.seed(3)
    np.random.seed(3)
    expected = (random.getstate(), np.random.get_state()[1].tolist())
    Progress("ppo", 9, io.StringIO()).show(1, REPLIES)
    with undisturbed():
        random.random()
        np.random.rand()
    assert (random.getstate(), np.random.get_state()[1].tolist()) == expected


def test_a_table_for_tensorboard_has_a_line_a_row():
    assert trackers.markdown(*Entry(1, {}, REPLIES).table()).splitlines() == [
        "| score | prompt | response |",
        "| --- | --- | --- |",
        "| 0.5 | p \\| q | first line |",
        "| -1.0 | r |  |",
    ]
