"""Files that are either whole or absent: write beside, flush to disk, rename.

After `os.rename` a reader sees the old state or the new one. The rename itself survives a power cut only once the
parent directory has been flushed, and it must not overtake the data: hence file, directory, rename, parent, in
that order.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf_fast.train.errors import UserError
from rlhf_fast.train.model import quiet_transformers

# One file per model: a reader never has to ask whether all the shards are there.
ONE_SHARD = "1000GB"


def claim_output(path: str | Path) -> Path:
    """The directory to write to, not made yet. UserError if something is already there."""
    path = Path(path)
    if path.is_file():
        raise UserError(f"output directory {path} is a file; give a new directory")
    if path.is_dir() and any(path.iterdir()):
        raise UserError(f"output directory {path} already holds files; give a new directory or remove it first")
    existing = next(parent for parent in [path, *path.absolute().parents] if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"output directory {path} cannot be made: {existing} is not a directory that can be written")
    return path


@contextmanager
def write_directory(path: str | Path) -> Iterator[Path]:
    """Yield a temporary directory beside `path`; on success it becomes `path`, on failure it is removed.

    UserError if `path` already holds something: it is never overwritten.
    """
    path = claim_output(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        yield partial
        flush_tree(partial)
        os.rename(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    flush(path.parent)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as strict JSON, atomically: numbers that JSON does not know become "nan", "inf", "-inf"."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    text = json.dumps(finite_json(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    partial.write_text(text, encoding="utf-8")
    flush(partial)
    os.replace(partial, path)
    flush(path.parent)


def read_json(path: str | Path) -> Any:
    """What `write_json` wrote. UserError: missing, not UTF-8, not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; is its stage complete?") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a directory; a JSON file is needed") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None


def finite_json(value: Any) -> Any:
    """`value` with every non-finite float as text, so that any JSON reader accepts it."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): finite_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite_json(inner) for inner in value]
    return value


def save_model(path: str | Path, model: Any, tokenizer: Any) -> None:
    """Add a model and its tokenizer, in Hugging Face format, to the directory `path` (made if absent).

    Files that already stand there, such as a log, stay; `model.safetensors` appears last.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    partial = path / f".model.partial-{os.getpid()}"
    try:
        with quiet_transformers():
            model.save_pretrained(partial, max_shard_size=ONE_SHARD)
            tokenizer.save_pretrained(partial)
        flush_tree(partial)
        for file in sorted(partial.iterdir(), key=lambda file: file.suffix == ".safetensors"):
            os.replace(file, path / file.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    flush(path)


def flush_tree(path: Path) -> None:
    """Flush every file and directory below `path`, and `path` itself, to disk."""
    for directory, _, files in os.walk(path, topdown=False):
        for name in files:
            flush(Path(directory) / name)
        flush(Path(directory))


def flush(path: Path) -> None:
    """Wait until a file's content, or a directory's list of names, is on disk (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
