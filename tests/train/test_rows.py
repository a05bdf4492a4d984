"""Rows of tables and data sets; those of JSONL files are in test_data.py, damaged ones of all kinds in bad_rows.py."""

import builtins
import json
import sys
import types

import pytest
import tiny

from rlhf_fast.train import sft
from rlhf_fast.train.data import Preference, read_demonstrations, read_preferences, read_prompts
from rlhf_fast.train.errors import UserError
from rlhf_fast.train.resume import sources
from tests.train import bad_rows

PAIR = {"prompt": "Name a colour.", "chosen": "Red.", "rejected": "No."}
TALK = {"messages": [tiny.user("the cat"), tiny.assistant("ran")]}


def refused(words, call, *arguments, **options):
    with pytest.raises(UserError, match=words) as caught:
        call(*arguments, **options)
    return str(caught.value)


# -------------------------------------------------------------------------------------------------------- JSON


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "a", "prompt": "b"}', "line 1: field 'prompt': key 'prompt' is given twice"),
        ('{"prompt": "a", "x y": 1, "x y": 1}', "line 1: key 'x y' is given twice"),
        ('{"prompt": NaN}', "field 'prompt': not text but a number"),
        ('{"prompt": 1' + "0" * 5000 + "}", "line 1: not usable JSON: Exceeds the limit"),
    ],
)
def test_what_json_lets_pass(tmp_path, line, words):
    (tmp_path / "d").write_text(line)
    refused(words, read_prompts, tmp_path / "d")


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt", "replies"),
    [
        ("The sky is blue.", "The sky is green.", "The sky is", (" blue.", " green.")),
        ("The sky is grey.", "The sky is green.", "The sky is", (" grey.", " green.")),
        ("a b", "a b c d", None, "field 'chosen': the reply is empty: the other text begins with this one"),
        ("blue", "black", None, "field 'chosen': a dialogue without an Assistant turn, and no word in common"),
    ],
)
def test_texts_without_a_prompt_begin_with_it(tmp_path, chosen, rejected, prompt, replies):
    path = tiny.write_rows(tmp_path / "d", [{"chosen": chosen, "rejected": rejected}])
    if prompt is None:
        refused(replies, read_preferences, path)
    else:
        assert read_preferences(path)[0] == [Preference(prompt, *replies, 1)]


def test_a_reply_that_was_not_liked_is_no_demonstration(tmp_path):
    rows = [{"prompt": "p", "completion": "c", "label": liked} for liked in (True, False)]
    words = refused("line 2: field 'label': is false", read_demonstrations, tiny.write_rows(tmp_path / "d", rows))
    assert "1 of 2 rows" in words


# ----------------------------------------------------------------------------------------------------- Parquet


def table(path, columns):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.table(columns) if isinstance(columns, dict) else columns, path)
    return path


def test_parquet_is_recognised_by_its_content_and_counted_in_rows(tmp_path):
    path = table(tmp_path / "d.jsonl", {name: [text, text, None] for name, text in PAIR.items()})
    rows, (bad,), read = read_preferences(path, bad_rows="skip")
    assert rows == [Preference("Name a colour.", "Red.", "No.", line) for line in (1, 2)] and read == 3
    assert (bad.line, bad.field, bad.reason) == (3, "prompt", "not text but null")
    assert "1 of 3 rows cannot be used; row 3: field 'prompt'" in refused("row 3", read_preferences, path)


def test_parquet_holds_conversations(tmp_path):
    turns = [{**turn, "tool_calls": None} for turn in TALK["messages"]]
    rows, _, _ = read_demonstrations(table(tmp_path / "d", {"messages": [turns] * 3, "tools": [None] * 3}))
    assert [row.line for row in rows] == [1, 2, 3]
    assert (rows[0].prompt.messages, rows[0].response) == ((("user", "the cat"),), "ran")


def test_parquet_whose_text_is_not_utf8(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    texts = pyarrow.array([b"fine", b"caf\xe9", b"fine"]).view(pyarrow.string())
    _, (bad,), read = read_prompts(table(tmp_path / "d", {"prompt": texts}), bad_rows="skip")
    assert (read, bad.line, bad.field) == (3, 2, "row") and "cannot be unpacked: 'utf-8' codec" in bad.reason


def test_parquet_that_cannot_be_read(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    whole = table(tmp_path / "d", {name: [text] * 100 for name, text in PAIR.items()}).read_bytes()
    (tmp_path / "cut").write_bytes(whole[: len(whole) // 2])
    refused("data file .*cut is a damaged Parquet file", read_preferences, tmp_path / "cut")
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["prompt", "prompt"])
    refused("more than one column 'prompt'", read_prompts, table(tmp_path / "twice", twice))
    refused(
        "is empty: it needs one row", read_prompts, table(tmp_path / "none", {"prompt": pyarrow.array([], "string")})
    )


@pytest.mark.parametrize(("source", "library"), [("d.parquet", "pyarrow"), ("hub:owner/name", "datasets")])
def test_a_library_that_is_not_installed(tmp_path, monkeypatch, source, library):
    (tmp_path / "d.parquet").write_bytes(b"PAR1")
    original = builtins.__import__

    def without(name, *rest, **options):
        if name.partition(".")[0] == library:
            raise ImportError(name)
        return original(name, *rest, **options)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(builtins, "__import__", without)
    refused(rf"{source}.*{library}.*pip install 'rlhf_fast\[data\]'", read_prompts, source)


# --------------------------------------------------------------------------------------------------------- hub


def test_a_data_set_of_the_hub(monkeypatch):
    asked = []

    def load_dataset(*names, **options):
        asked.append((*names, options["split"]))
        return [PAIR, PAIR | {"chosen": ""}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    for source in ("hub:o/n", "hub:o/n:test", "hub:o/n/c", "hub:o/n/c:train[:10%]"):
        rows, (bad,), _ = read_preferences(source, bad_rows="skip")
        assert len(rows) == 1 and str(bad) == f"{source}:2: field 'chosen': the reply is empty"
    assert asked == [("o/n", None, "train"), ("o/n", None, "test"), ("o/n", "c", "train"), ("o/n", "c", "train[:10%]")]


@pytest.mark.parametrize("source", ["hub:", "hub:name", "hub:a/b/c/d", "hub:a/b:", "hub:a b/c"])
def test_a_name_that_is_none(source):
    refused("must be hub:OWNER/NAME", read_prompts, source)


def test_a_data_set_that_cannot_be_fetched(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    refused("data set hub:owner/absent cannot be loaded: .*; look at its name", read_prompts, "hub:owner/absent")


def test_datasets_reads_what_it_is_asked_for(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    tiny.write_rows(tmp_path / "owner" / "name" / "train.jsonl", [TALK] * 3)
    tiny.write_rows(tmp_path / "owner" / "name" / "test.jsonl", [TALK])
    assert [len(read_demonstrations(f"hub:owner/name{split}")[0]) for split in ("", ":test", ":train[1:]")] == [3, 1, 2]
    refused("cannot be loaded: ValueError: Unknown split", read_demonstrations, "hub:owner/name:absent")


def test_a_stage_on_a_data_set(tmp_path, base, monkeypatch):
    rows = [json.loads(line) for line in tiny.write_pairs(tmp_path / "d").read_text().splitlines()]
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=lambda *_, **__: rows))
    config = tiny.stage_config(sft.SFTConfig, tmp_path, base, pairs=1, data="hub:o/n", max_response_tokens=24)
    assert sources(config)["data"] == "hub:o/n"
    summary = json.loads((sft.train(config) / "stage.json").read_text())
    assert summary["data"]["path"] == "hub:o/n" and summary["data"]["rows_read"] == 40


# -------------------------------------------------------------------------------------------------------- fuzz


def test_flawed_rows_are_named_and_good_ones_read(tmp_path):
    """A share of what `python -m tests.train.bad_rows` does."""
    counts, wrong = bad_rows.play(600, seed=0, place=tmp_path)
    assert not wrong, "\n".join(wrong[:5])
    assert set(counts) == set(bad_rows.KINDS) and min(counts.values()) >= 3
