import hashlib
import json
import math
import os
import subprocess
import sys

import pytest
import tiny
from transformers import AutoModelForCausalLM

from rlhf_fast.train import checkpoint
from rlhf_fast.train.checkpoint import (
    LOCK,
    claim_output,
    digest,
    discard,
    locked,
    numbered,
    read_json,
    remove_partials,
    save_model,
    write_directory,
    write_file,
    write_json,
)
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


def test_what_a_process_leaves_that_was_killed_at_once_is_in_nobodys_way(tmp_path):
    (tmp_path / LOCK).write_text("1 on elsewhere")
    (tmp_path / ".config.yaml.partial-1").write_text("s")
    assert claim_output(tmp_path) == tmp_path


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


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a"
    for content in ("one", "two"):
        with write_file(path) as partial:
            partial.write_text(content)
            assert not path.exists() or path.read_text() == "one"
        assert path.read_text() == content
    with pytest.raises(RuntimeError, match="stop"), write_file(path) as partial:
        partial.write_text("half")
        raise RuntimeError("stop")
    assert path.read_text() == "two" and list(tmp_path.iterdir()) == [path]


def test_what_is_discarded_is_gone_at_once(tmp_path, monkeypatch):
    (tmp_path / "old" / "inner").mkdir(parents=True)
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda path: None)
    discard(tmp_path / "old")
    monkeypatch.undo()
    assert not (tmp_path / "old").exists() and len(list(tmp_path.iterdir())) == 1
    remove_partials(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_only_partials_are_removed(tmp_path):
    for name in (".a.partial-12", "a.partial-12", ".partial", ".hidden"):
        (tmp_path / name).write_text("")
    (tmp_path / ".link.partial-3").symlink_to(tmp_path.parent)
    remove_partials(tmp_path, tmp_path / "absent")
    assert {path.name for path in tmp_path.iterdir()} == {"a.partial-12", ".partial", ".hidden"}


def test_names_are_numbered(tmp_path):
    names = numbered(tmp_path / "a")
    assert [next(names).name for _ in range(3)] == ["a", "a-2", "a-3"]


def test_digest_is_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc" * 10**6)
    assert digest(tmp_path / "a") == hashlib.sha256(b"abc" * 10**6).hexdigest()


HOLDER = """
import sys, time
from pathlib import Path
from rlhf_fast.train.checkpoint import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_lock_is_held_by_one_process_and_dies_with_it(tmp_path):
    lock = tmp_path / LOCK
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(lock)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"{tmp_path} is in use by process {holder.pid} on "), locked(lock):
            pytest.fail("the body must not run")
    finally:
        holder.kill()
        holder.communicate()
    assert lock.exists()
    with locked(lock):
        assert lock.read_text().startswith(f"{os.getpid()} on ")
    assert not lock.exists()


def test_a_lock_removed_by_its_holder_is_not_taken_for_held(tmp_path, monkeypatch):
    """Between opening and locking it the file may have gone: the lock of a file without a name keeps nobody away."""
    lock, lockf, first = tmp_path / LOCK, checkpoint.fcntl.lockf, []

    def late(file, how):
        if not first:
            first.append(lock.unlink())
        lockf(file, how)

    monkeypatch.setattr(checkpoint.fcntl, "lockf", late)
    with locked(lock):
        assert lock.exists()


def test_a_disk_without_locks_is_named(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(checkpoint.fcntl, "lockf", none)
    with (
        pytest.raises(UserError, match=r"\.lock cannot be locked \(No locks available\); give a directory"),
        locked(tmp_path / LOCK),
    ):
        pytest.fail("the body must not run")


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
    replace, made = os.replace, (tiny.model(), tiny.tokenizer())
    pid = os.fork()
    if pid == 0:
        try:
            os.replace = lambda a, b: os._exit(9) if str(b).endswith(".safetensors") else replace(a, b)
            checkpoint.save_model(tmp_path, *made)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    names = {path.name for path in tmp_path.iterdir()}
    assert "config.json" in names and "model.safetensors" not in names
    json.loads((tmp_path / "config.json").read_text())
