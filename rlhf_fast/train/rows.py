"""From a file or a data set of the hub to rows: a mapping each, with its number, or what keeps it from being one.

    FILE                               JSONL, plain or gzipped: one JSON object a line; numbers count lines
    FILE                               Parquet, through pyarrow; numbers count rows
    hub:OWNER/NAME[/CONFIG][:SPLIT]    a data set of the Hugging Face hub, through datasets, its split "train" unless another
                                       (or a part, as in train[:1000]) is named; numbers count rows

What a file is, its first bytes say, not its name. Numbers count from 1.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from rlhf_fast.train.errors import UserError

if TYPE_CHECKING:
    import pyarrow

WHOLE_ROW = "row"
FIELD = re.compile(r"[A-Za-z_]\w{0,30}")
HUB = "hub:"
HUB_NAME = re.compile(r"hub:(?P<name>[^/:\s]+/[^/:\s]+)(/(?P<config>[^/:\s]+))?(:(?P<split>\S+))?")
GZIP, PARQUET = b"\x1f\x8b", b"PAR1"
BATCH = 1024  # rows of a table that are unpacked at once
INSTALL = "pip install 'rlhf_fast[data]'"


class Flaw(Exception):
    """Why a row cannot be used. field: the key at fault, or "row" for the row as a whole."""

    def __init__(self, field: str, reason: str) -> None:
        self.field, self.reason = field, reason


@dataclass(frozen=True)
class Source:
    """Rows to be gone through once. unit: what their numbers count, "line" or "row"."""

    unit: str
    rows: Iterator[tuple[int, dict[str, Any] | Flaw]]


def is_hub(source: str | Path) -> bool:
    """Whether `source` names a data set of the hub and not a file."""
    return str(source).startswith(HUB)


def open_rows(source: str | Path) -> Source:
    """The rows of `source`, in any of the forms above.

    UserError, now or on the way through them: no such file, a directory, a damaged file, no such data set, no network, or
    a library that is not installed.
    """
    if is_hub(source):
        return Source("row", _hub_rows(str(source)))
    path = Path(source)
    with _explained(path), open(path, "rb") as file:
        start = file.read(4)
    return Source("row", _parquet_rows(path)) if start == PARQUET else Source("line", _json_rows(path, start))


class _explained:
    """Turns what goes wrong in reading a file into a UserError."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        path = self._path
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            raise UserError(f"data file {path} does not exist") from None
        if isinstance(error, IsADirectoryError):
            raise UserError(f"data file {path} is a directory; give a JSONL or Parquet file") from None
        if isinstance(error, PermissionError):
            raise UserError(f"data file {path} cannot be read: permission denied") from None
        if isinstance(error, EOFError | gzip.BadGzipFile | zlib.error):
            raise UserError(f"data file {path} is a damaged gzip file ({error}); fetch it again") from None
        if isinstance(error, OSError):
            raise UserError(f"data file {path} cannot be read: {error}") from None


# ----------------------------------------------------------------------------------------------------------- JSONL


def _json_rows(path: Path, start: bytes) -> Iterator[tuple[int, dict | Flaw]]:
    for number, line in _lines(path, gzipped=start.startswith(GZIP)):
        try:
            yield number, _json_object(line)
        except Flaw as flaw:
            yield number, flaw


def _lines(path: Path, gzipped: bool) -> Iterator[tuple[int, bytes]]:
    """(line number, bytes) of every line that is not blank. Split at \\n only: JSON strings may hold U+2028."""
    with _explained(path), _open(path, gzipped) as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield number, line.rstrip(b"\r\n")


def _open(path: Path, gzipped: bool) -> IO[bytes]:
    return gzip.open(path, "rb") if gzipped else open(path, "rb")


def _json_object(line: bytes) -> dict:
    try:
        row = json.loads(line.decode("utf-8"), object_pairs_hook=_once)
    except UnicodeDecodeError as error:
        raise Flaw(WHOLE_ROW, f"not UTF-8: byte 0x{line[error.start]:02x} at position {error.start}") from None
    except json.JSONDecodeError as error:
        raise Flaw(WHOLE_ROW, f"not JSON: {error.msg.removesuffix(' at')} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise Flaw(WHOLE_ROW, f"not usable JSON: {error}") from None
    if not isinstance(row, dict):
        raise Flaw(WHOLE_ROW, f"not a JSON object but {type_name(row)}")
    return row


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys differ: of a key given twice `json` would silently keep the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise Flaw(twice if FIELD.fullmatch(twice) else WHOLE_ROW, f"key {twice[:40]!r} is given twice")
    return found


def type_name(value: Any) -> str:
    """What a value is, in JSON's terms."""
    if value is None:
        return "null"
    names = {
        dict: "an object",
        list: "a list",
        str: "text",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), type(value).__name__)


# ---------------------------------------------------------------------------------------------------------- tables


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict | Flaw]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"data file {path} is a Parquet file, which needs pyarrow: {INSTALL}") from None
    number = 0
    try:
        with _explained(path), parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise UserError(f"data file {path} has more than one column {twice[0]!r}; rename one")
            for batch in file.iter_batches(batch_size=BATCH):
                for row in _unpacked(batch):
                    number += 1
                    yield number, row
    except pyarrow.ArrowException as error:
        raise UserError(f"data file {path} is a damaged Parquet file ({error}); fetch it again") from None


def _unpacked(batch: pyarrow.RecordBatch) -> Iterator[dict | Flaw]:
    try:
        yield from batch.to_pylist()
    except (ValueError, OverflowError) as error:  # of text that is no UTF-8, of a date that Python does not know
        if batch.num_rows > 1:
            for row in range(batch.num_rows):
                yield from _unpacked(batch.slice(row, 1))
        else:
            yield Flaw(WHOLE_ROW, f"cannot be unpacked: {error}")


def _hub_rows(source: str) -> Iterator[tuple[int, dict | Flaw]]:
    named = HUB_NAME.fullmatch(source)
    if named is None:
        raise UserError(f"data set {source!r} must be hub:OWNER/NAME, with /CONFIG and :SPLIT behind it if need be")
    try:
        import datasets
    except ImportError:
        raise UserError(f"data set {source} is read through datasets, which is not installed: {INSTALL}") from None
    try:
        table = datasets.load_dataset(named["name"], named["config"], split=named["split"] or "train")
        yield from enumerate(table, 1)
    # No network, name, configuration, split or right to it, a damaged file: the library has no common exception for them.
    except Exception as error:
        raise UserError(
            f"data set {source} cannot be loaded: {type(error).__name__}: {error}; look at its name, configuration and split "
            "and at the network, or give a JSONL or Parquet file"
        ) from None
