import json
import math
import os
import subprocess
import sys

import pytest
import tiny
from transformers import AutoModelForCausalLM

from rlhf_fast.train import checkpoint
from rlhf_fast.train.checkpoint import claim_output, read_json, save_model, write_directory, write_json
from rlhf_fast.train.errors import UserError


def test_a_new_or_empty_directory_can_be_claimed_and_is_not_made(tmp_path):
    assert claim_output(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert not (tmp_path / "a").exists()
    assert claim_output(tmp_path) == tmp_path


def test_claiming_refuses_files_and_directories_in_use(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="already holds files"):
        claim_output(tmp_path)
    with pytest.raises(UserError, match="is a file"):
        claim_output(tmp_path / "notes.txt")
    with pytest.raises(UserError, match="not a directory that can be written"):
        claim_output(tmp_path / "notes.txt" / "below")


def test_a_directory_appears_whole(tmp_path):
    with write_directory(tmp_path / "new" / "out") as partial:
        (partial / "one").write_text("1")
        assert not (tmp_path / "new" / "out").exists()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]
    assert (tmp_path / "new" / "out" / "one").read_text() == "1"


def test_a_failed_directory_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="stop"), write_directory(tmp_path / "out") as partial:
        (partial / "one").write_text("1")
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []


def test_a_directory_in_use_is_never_replaced(tmp_path):
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(UserError, match="already holds files"), write_directory(tmp_path):
        pytest.fail("the body must not run")
    assert (tmp_path / "kept").read_text() == "mine"


def test_everything_is_flushed_before_the_rename_and_the_parent_after_it(tmp_path, monkeypatch):
    steps = []
    flush, rename = checkpoint.flush, os.rename
    monkeypatch.setattr(checkpoint, "flush", lambda path: (steps.append(path.name), flush(path)))
    monkeypatch.setattr(os, "rename", lambda a, b: (steps.append("rename"), rename(a, b)))
    with write_directory(tmp_path / "out") as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "data").write_text("1")
    assert steps == ["data", "inner", partial.name, "rename", tmp_path.name]


def test_json_survives_and_numbers_that_are_not_finite_become_text(tmp_path):
    write_json(tmp_path / "a.json", {"x": math.nan, "y": [math.inf, -math.inf, 1.5], "ü": (1, None, True)})
    assert read_json(tmp_path / "a.json") == {"x": "nan", "y": ["inf", "-inf", 1.5], "ü": [1, None, True]}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", object())
    assert read_json(tmp_path / "a.json") == 1


def test_unreadable_json_is_a_user_error(tmp_path):
    (tmp_path / "bad.json").write_text("{")
    for name, words in (("absent.json", "does not exist"), ("bad.json", "not valid JSON"), (".", "is a directory")):
        with pytest.raises(UserError, match=words):
            read_json(tmp_path / name)


def test_a_saved_model_loads_with_plain_transformers_and_leaves_other_files_alone(tmp_path):
    (tmp_path / "log.jsonl").write_text("kept")
    model = tiny.model()
    save_model(tmp_path, model, tiny.tokenizer())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, value in model.state_dict().items():
        assert value.equal(loaded.state_dict()[name]), name
    assert (tmp_path / "log.jsonl").read_text() == "kept"
    assert {path.name for path in tmp_path.iterdir()} == {
        "log.jsonl",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_a_killed_save_leaves_no_weights_that_look_complete(tmp_path):
    """The process dies just before the weights would appear: config and tokenizer alone load as nothing."""
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[2])\n"
        "import tiny; from rlhf_fast.train import checkpoint\n"
        "replace = os.replace\n"
        "os.replace = lambda a, b: os._exit(9) if str(b).endswith('.safetensors') else replace(a, b)\n"
        "checkpoint.save_model(sys.argv[1], tiny.model(), tiny.tokenizer())\n"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path), os.path.dirname(tiny.__file__)]
    assert subprocess.run(arguments, capture_output=True).returncode == 9
    names = {path.name for path in tmp_path.iterdir()}
    assert "config.json" in names and "model.safetensors" not in names
    json.loads((tmp_path / "config.json").read_text())
