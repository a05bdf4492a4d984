"""Files that are either whole or absent: write beside, flush to disk, rename.

After `os.rename` a reader sees the old state or the new one. The rename itself survives a power cut only once the
parent directory has been flushed, and it must not overtake the data: hence file, directory, rename, parent, in
that order.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import itertools
import json
import math
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from rlhf_fast.train import distributed, fsdp
from rlhf_fast.train.errors import UserError
from rlhf_fast.train.lora import FILES as ADAPTER
from rlhf_fast.train.lora import adapter_weights, merged_weights, save_adapter
from rlhf_fast.train.model import quiet_transformers

# One file per model: a reader never has to ask whether all the shards are there.
ONE_SHARD = "1000GB"
WEIGHTS = "model.safetensors"
SUMMARY = "stage.json"  # a finished stage's
LOCK = ".lock"
PARTIAL = ".partial-"  # in the name of whatever is being written or removed, behind a dot


def claim_output(path: str | Path) -> Path:
    """The directory to write to, not made yet. UserError if something is already there, a killed process's lock aside."""
    path = Path(path)
    if path.is_file():
        raise UserError(f"output directory {path} is a file; give a new directory")
    if path.is_dir() and not all(file.name == LOCK or PARTIAL in file.name for file in path.iterdir()):
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
    partial = beside(path)
    partial.mkdir()
    try:
        yield partial
        flush_tree(partial)
        os.rename(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    flush(path.parent)


@contextmanager
def write_file(path: str | Path) -> Iterator[Path]:
    """Yield the name of a file beside `path`; on success it takes the place of `path`, on failure it is removed."""
    path = Path(path)
    partial = beside(path)
    try:
        yield partial
        flush(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    flush(path.parent)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as strict JSON, atomically: numbers that JSON does not know become "nan", "inf", "-inf"."""
    text = to_json(value)
    with write_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def to_json(value: Any) -> str:
    """The text that `write_json` writes."""
    return json.dumps(finite_json(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


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


def stage_summary(directory: str | Path) -> dict[str, Any]:
    """What the stage that made `directory` says of itself; nothing where no stage did."""
    path = Path(directory) / SUMMARY
    return read_json(path) if path.is_file() else {}


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

    Files that already stand there, such as a log, stay; `model.safetensors` appears last. An adapter is merged into what is
    written there, and written on its own beside it. Of several processes, which all call it, one writes.
    """
    sharded = fsdp.is_sharded(model)
    if not distributed.is_main() and not sharded:
        return
    weights, adapter = merged_weights(model), adapter_weights(model)
    if sharded:
        weights, adapter = fsdp.full_state(weights or model.state_dict(keep_vars=True)), fsdp.full_state(adapter)
    if not distributed.is_main():
        return
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    partial = beside(path / "model")
    try:
        with quiet_transformers():
            model.save_pretrained(partial, state_dict=weights, max_shard_size=ONE_SHARD)
            tokenizer.save_pretrained(partial)
            if adapter:
                save_adapter(partial / ADAPTER, model, adapter)
        flush_tree(partial)
        if (path / ADAPTER).exists():
            discard(path / ADAPTER)
        for file in sorted(partial.iterdir(), key=lambda file: file.suffix == ".safetensors"):
            os.replace(file, path / file.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    flush(path)


def discard(path: Path) -> None:
    """Remove a directory that others may be reading: it is gone at once, or still whole."""
    partial = beside(path)
    os.rename(path, partial)
    shutil.rmtree(partial)


def remove_partials(*directories: Path) -> None:
    """Remove what killed processes were writing or discarding there."""
    for path in [path for directory in directories for path in directory.glob(f".*{PARTIAL}*")]:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def beside(path: Path) -> Path:
    """The name under which this process prepares `path`."""
    return path.with_name(f".{path.name}{PARTIAL}{os.getpid()}")


def numbered(path: str | Path) -> Iterator[Path]:
    """path, path-2, path-3, ..."""
    yield (path := Path(path))
    yield from (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))


def digest(path: str | Path) -> str:
    """SHA-256 of a file."""
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, made and removed here; it is released with the process, however that ends.

    UserError if another process holds it. A lock of `fcntl.lockf` is not inherited by forked workers, which would keep it
    alive after their parent has been killed.
    """
    file = _take(path)
    try:
        file.truncate(0)
        file.write(f"{os.getpid()} on {platform.node()}")
        file.flush()
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


def _take(path: Path) -> TextIO:
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read(100)
            file.close()
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise UserError(
                    f"{path} cannot be locked ({error.strerror}); give a directory on another disk"
                ) from None
            raise UserError(f"{path.parent} is in use by process {holder}; wait for it or stop it") from None
        # Its holder may have removed the file between the two calls: then this is the lock of nothing.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()


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
