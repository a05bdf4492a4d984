"""From a user's JSONL file to token ids: read, check, split, tokenise, pad. Nothing else parses user files.

A row is one JSON object a line, in a plain or gzipped file:

    {"prompt", "chosen", "rejected"}    a preference pair; the replies stand without the prompt
    {"chosen", "rejected"}              the same as two whole dialogues "\\n\\nHuman: …\\n\\nAssistant: …" that
                                        differ in the last reply (arXiv 2204.05862)
    {"prompt", "completion"}            a demonstration; "response" is read as well as "completion"
    {"prompt"}                          a prompt

Every flaw of a row is named by line, field and reason; blank lines are not rows.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol, TypeVar

import torch

from rlhf_fast.train.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

HUMAN = "\n\nHuman:"
ASSISTANT = "\n\nAssistant:"
WHOLE_ROW = "row"
PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
BYTES = 256
SHOWN = 5


@dataclass(frozen=True)
class Preference:
    """Two replies to one prompt; people (or a judge) preferred `chosen`. line: counted from 1."""

    prompt: str
    chosen: str
    rejected: str
    line: int


@dataclass(frozen=True)
class Demonstration:
    """A prompt and a reply to imitate."""

    prompt: str
    response: str
    line: int


@dataclass(frozen=True)
class Prompt:
    """A prompt alone."""

    prompt: str
    line: int


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used, and why. field: the JSON key at fault, or "row" for the line as a whole."""

    path: str
    line: int
    field: str
    reason: str

    def __str__(self) -> str:
        place = "" if self.field == WHOLE_ROW else f"field '{self.field}': "
        return f"{self.path}:{self.line}: {place}{self.reason}"


@dataclass(frozen=True)
class DataSummary:
    """What became of a data file: it goes into `stage.json` and from there into the report."""

    path: str
    rows_read: int
    rows_used: int
    rows_train: int
    rows_heldout: int
    bad_rows: tuple[BadRow, ...] = ()
    truncated_prompts: int = 0
    truncated_responses: int = 0

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class HasPrompt(Protocol):
    @property
    def prompt(self) -> str: ...


Row = TypeVar("Row", bound=HasPrompt)


# ---------------------------------------------------------------- reading


def read_preferences(path: str | Path, *, bad_rows: str = "stop") -> tuple[list[Preference], tuple[BadRow, ...], int]:
    """Preference pairs of a file → (usable rows, flawed rows, number of rows read).

    bad_rows: "stop" raises UserError at flawed rows (how many, and the first five); "skip" returns them beside
    the usable ones. UserError in any case: no such file, a directory, broken gzip, an empty file, no usable row.
    """
    return _read(path, _preference, bad_rows)


def read_demonstrations(
    path: str | Path, *, bad_rows: str = "stop"
) -> tuple[list[Demonstration], tuple[BadRow, ...], int]:
    """As `read_preferences`, for demonstrations; of a preference pair that is the chosen reply."""
    return _read(path, _demonstration, bad_rows)


def read_prompts(path: str | Path, *, bad_rows: str = "stop") -> tuple[list[Prompt], tuple[BadRow, ...], int]:
    """As `read_preferences`, for prompts; preference and demonstration files give theirs."""
    return _read(path, _prompt, bad_rows)


class _Flaw(Exception):
    def __init__(self, field: str, reason: str) -> None:
        self.field, self.reason = field, reason


def _read(path: str | Path, parse: Callable[[dict, int], Row], bad_rows: str) -> tuple[list, tuple, int]:
    if bad_rows not in ("stop", "skip"):
        raise UserError(f"bad_rows must be stop or skip, got {bad_rows!r}")
    usable: list[Row] = []
    flawed: list[BadRow] = []
    for number, line in _lines(Path(path)):
        try:
            usable.append(parse(_json_object(line), number))
        except _Flaw as flaw:
            flawed.append(BadRow(str(path), number, flaw.field, flaw.reason))
    rows_read = len(usable) + len(flawed)
    if rows_read == 0:
        raise UserError(f"{path} is empty: it needs one JSON object a line")
    if not usable:
        raise UserError(f"{path}: none of its {rows_read} rows can be used; {_listing(flawed)}")
    if flawed and bad_rows == "stop":
        raise UserError(
            f"{path}: {len(flawed)} of {rows_read} rows cannot be used; {_listing(flawed)}; "
            "correct them, or leave them out with --bad_rows skip"
        )
    return usable, tuple(flawed), rows_read


def _listing(flawed: list[BadRow]) -> str:
    head = f"the first {SHOWN}: " if len(flawed) > SHOWN else ""
    return head + "; ".join("line " + str(row).removeprefix(f"{row.path}:") for row in flawed[:SHOWN])


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number, bytes) of every line that is not blank. Split at \\n only: JSON strings may hold U+2028."""
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield number, line.rstrip(b"\r\n")
    except FileNotFoundError:
        raise UserError(f"data file {path} does not exist") from None
    except IsADirectoryError:
        raise UserError(f"data file {path} is a directory; give a JSONL file") from None
    except PermissionError:
        raise UserError(f"data file {path} cannot be read: permission denied") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"data file {path} is a damaged gzip file ({error}); fetch it again") from None


def _open(path: Path) -> IO[bytes]:
    with open(path, "rb") as file:
        gzipped = file.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rb") if gzipped else open(path, "rb")


def _json_object(line: bytes) -> dict:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _Flaw(WHOLE_ROW, f"not UTF-8: byte 0x{line[error.start]:02x} at position {error.start}") from None
    except json.JSONDecodeError as error:
        raise _Flaw(WHOLE_ROW, f"not JSON: {error.msg.removesuffix(' at')} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise _Flaw(WHOLE_ROW, f"not usable JSON: {error}") from None
    if not isinstance(row, dict):
        raise _Flaw(WHOLE_ROW, f"not a JSON object but {_json_type(row)}")
    return row


def _json_type(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "text",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), "null")


def _text(row: dict, field: str, empty: str = "empty") -> str:
    if field not in row:
        raise _Flaw(field, f"missing; the row has {', '.join(map(repr, row)) or 'no field'}")
    value = row[field]
    if not isinstance(value, str):
        raise _Flaw(field, f"not text but {_json_type(value)}")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise _Flaw(field, "holds half of a surrogate pair, which is no character")
    if not value.strip():
        raise _Flaw(field, empty)
    return value


def _preference(row: dict, line: int) -> Preference:
    if "prompt" in row:
        prompt = _text(row, "prompt")
        chosen, rejected = (_text(row, field, empty="the reply is empty") for field in ("chosen", "rejected"))
    else:
        prompt, chosen = _dialogue(row, "chosen")
        other_prompt, rejected = _dialogue(row, "rejected")
        if prompt != other_prompt:
            raise _Flaw("rejected", "prompts differ: the two dialogues are not the same up to the last reply")
    if chosen.strip() == rejected.strip():
        raise _Flaw("rejected", "chosen equals rejected")
    return Preference(prompt, chosen, rejected, line)


def _dialogue(row: dict, field: str) -> tuple[str, str]:
    """Split a dialogue behind its last "Assistant:" → (prompt that ends in "Assistant:", last reply)."""
    before, marker, reply = _text(row, field).rpartition(ASSISTANT)
    if not marker:
        raise _Flaw(field, "a dialogue without an Assistant turn")
    if HUMAN in reply:
        raise _Flaw(field, "the dialogue ends with a Human turn")
    if not reply.strip():
        raise _Flaw(field, "the last reply is empty")
    return before + marker, reply


def _demonstration(row: dict, line: int) -> Demonstration:
    if "chosen" in row:
        pair = _preference(row, line)
        return Demonstration(pair.prompt, pair.chosen, line)
    field = "response" if "response" in row else "completion"
    return Demonstration(_text(row, "prompt"), _text(row, field, empty="the reply is empty"), line)


def _prompt(row: dict, line: int) -> Prompt:
    return Prompt(_preference(row, line).prompt if "chosen" in row else _text(row, "prompt"), line)


# ---------------------------------------------------------------- splitting


def split_heldout(rows: Sequence[Row], *, fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """(training rows, held-out rows), each in the order of `rows`.

    The side is a hash of the prompt and the seed: a prompt is never on both sides, and it is on the same side
    in every stage, every file and every order of rows. So `fraction` is met on average over distinct prompts.
    UserError: fraction outside [0, 1), no training row left, or no held-out row although fraction > 0.
    """
    if not 0 <= fraction < 1:
        raise UserError(f"heldout_fraction must be at least 0 and below 1, got {fraction}")
    sides: tuple[list[Row], list[Row]] = ([], [])
    for row in rows:
        sides[_unit_hash(row.prompt, seed) < fraction].append(row)
    train, heldout = sides
    if not train or (fraction > 0 and not heldout):
        raise UserError(
            f"splitting {len(rows)} rows by prompt at heldout_fraction {fraction} leaves {len(train)} for training "
            f"and {len(heldout)} held out; give more distinct prompts, another heldout_fraction or split_seed"
        )
    return train, heldout


def _unit_hash(text: str, seed: int) -> float:
    """A number in [0, 1) that depends on its arguments alone; Python's own hash changes with each process."""
    digest = hashlib.sha256(f"{seed}\n{text}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


# ---------------------------------------------------------------- tokens


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str, max_tokens: int) -> list[int]:
    """Token ids of a prompt, with the beginning-of-sequence token in front if the tokenizer has one.

    A prompt of more than `max_tokens` keeps its end, which the reply answers. UserError: no token at all.
    """
    ids = tokenizer.encode(text, add_special_tokens=False)
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    room = max_tokens - len(start)
    if not start and not ids:
        raise UserError(f"the tokenizer gives no token for the prompt {text[:60]!r}")
    return start + ids[max(0, len(ids) - room) :]


def encode_response(tokenizer: PreTrainedTokenizerBase, text: str, max_tokens: int) -> list[int]:
    """Token ids of a reply and the end-of-sequence token, at most `max_tokens` in all.

    A reply that is cut carries no end token: the model must not learn to stop there.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-sequence token, so a model cannot learn to stop")
    ids = tokenizer.encode(text, add_special_tokens=False)
    if ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(tokenizer.eos_token_id)
    return ids[:max_tokens]


def collate(sequences: Sequence[Sequence[int]], pad_id: int, side: str = "right") -> tuple[torch.Tensor, torch.Tensor]:
    """Pad B sequences to the longest, S → (ids int64 [B, S], mask bool [B, S], true at real tokens).

    side: where the padding goes; right for SFT and reward models, left for generation and PPO.
    """
    if side not in ("right", "left"):
        raise ValueError(f"side must be 'right' or 'left', got {side!r}")
    length = max(map(len, sequences), default=0)
    ids = torch.full((len(sequences), length), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(sequences), length), dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        place = slice(0, len(sequence)) if side == "right" else slice(length - len(sequence), length)
        ids[row, place] = torch.tensor(sequence, dtype=torch.int64)
        mask[row, place] = True
    return ids, mask


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer (arXiv 1508.07909, as in GPT-2): every text survives encode and decode.

    `<pad>`, `<bos>` and `<eos>` are three tokens of its own: with pad == eos a model never learns to stop
    (arXiv 2403.17031, detail 3). Its own call adds `<bos>`, as `encode_prompt` does. Few texts may give fewer
    than `vocab_size` tokens. UserError: vocab_size below 256 bytes + 3.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = [PAD, BOS, EOS]
    if vocab_size < BYTES + len(special):
        raise UserError(f"vocab_size must be at least {BYTES + len(special)} (256 bytes and 3 marks), got {vocab_size}")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=PAD, bos_token=BOS, eos_token=EOS, clean_up_tokenization_spaces=False
    )
