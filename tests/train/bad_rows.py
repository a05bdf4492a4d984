"""Rows of users, flawed in every way that was thought of: each is named by line and field, and the others of the file are read.

    python -m tests.train.bad_rows --rows 5000        a new seed; every kind of flaw in turn
    python -m tests.train.bad_rows --rows 50 --seed 7 --kinds role mutated

A row of one of TRL's forms, texts or messages, is put among good ones into a file, as different systems write files: with a byte
order mark, Windows' line ends, blank lines, no last line end, gzipped. What counts: a flawed row stops the reading with one line
that names its line and field, or is left out alone where that was asked for; a good one is read as it was written; whole files
that are damaged are refused. Any exception but UserError is a fault. Prints one table, and exits 1 at a fault.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import gzip
import importlib.util
import json
import random
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from rlhf_fast.train.chat import Chat
from rlhf_fast.train.data import read_demonstrations, read_preferences, read_prompts
from rlhf_fast.train.errors import UserError
from tests.train import tiny

ALL, DEMONSTRATED = (read_preferences, read_demonstrations, read_prompts), (read_demonstrations,)
TEXT_FIELDS = ("prompt", "chosen", "rejected", "completion", "response", "text")
ODD = [
    "naïve",
    "🙂",
    "\u2028",
    "\x00",
    "\x7f",
    "\u200b",
    "中文",
    "\t",
    '"',
    "\\",
    "{}",
    "NaN",
    "\u0301",
    "\ufeff",
    "a" * 3000,
    "</s>",
]
WHITE = ["", " ", "\n\t", "\u3000", "\u2028"]
NOT_TEXT = [7, 1.5, True, None, {}, {"role": "user"}, 10**400, float("nan"), float("inf")]
SURROGATES = ["\ud83d", "\udfff", "a\ud800b"]


@dataclass
class Row:
    """A good row. fields: what it is read from; chat: of these, the ones that hold messages."""

    values: dict[str, Any]
    readers: tuple[Callable, ...]

    @property
    def fields(self) -> list[str]:
        return [name for name in self.values if name in TEXT_FIELDS or name == "messages"]

    @property
    def chat(self) -> list[str]:
        return [name for name in self.fields if isinstance(self.values[name], list)]


def words(rng: random.Random) -> str:
    chosen = rng.choices(tiny.WORDS, k=rng.randint(1, 4)) + ([rng.choice(ODD)] if rng.random() < 0.3 else [])
    return " ".join([*chosen, str(rng.randrange(10**6))])


def turns(rng: random.Random, last: str = "user") -> list[dict]:
    """A conversation that ends with a message of the user or of the assistant."""
    system = [{"role": "system", "content": words(rng)}] if rng.random() < 0.3 else []
    before = [turn for _ in range(rng.randrange(3)) for turn in (tiny.user(words(rng)), tiny.assistant(words(rng)))]
    answer = [tiny.assistant(words(rng))] if last == "assistant" else []
    return [*system, *before, tiny.user(words(rng)), *answer]


def text_pair(rng: random.Random) -> Row:
    return Row({"prompt": words(rng), "chosen": f"{words(rng)}!", "rejected": f"{words(rng)}?"}, ALL)


def dialogues(rng: random.Random) -> Row:
    prompt = f"\n\nHuman: {words(rng)}\n\nAssistant: {words(rng)}\n\nHuman: {words(rng)}\n\nAssistant:"
    return Row({"chosen": f"{prompt} {words(rng)}!", "rejected": f"{prompt} {words(rng)}?"}, ALL)


def chat_pair(rng: random.Random) -> Row:
    replies = {name: [tiny.assistant(words(rng) + name)] for name in ("chosen", "rejected")}
    return Row({"prompt": turns(rng)} | replies, ALL)


def chat_dialogues(rng: random.Random) -> Row:
    start = turns(rng)
    return Row({name: [*start, tiny.assistant(words(rng) + name)] for name in ("chosen", "rejected")}, ALL)


def demonstration(rng: random.Random) -> Row:
    return Row({"prompt": words(rng), rng.choice(["completion", "response"]): words(rng)}, DEMONSTRATED)


def chat_demonstration(rng: random.Random) -> Row:
    return Row({"prompt": turns(rng), "completion": [tiny.assistant(words(rng))]}, DEMONSTRATED)


def messages(rng: random.Random) -> Row:
    return Row({"messages": turns(rng, "assistant")}, DEMONSTRATED)


def text(rng: random.Random) -> Row:
    return Row({"text": words(rng)}, DEMONSTRATED)


def prompt(rng: random.Random) -> Row:
    return Row({"prompt": rng.choice([words, turns])(rng)}, (read_prompts,))


CHAT_FORMS = (chat_pair, chat_dialogues, chat_demonstration, messages)
FORMS = (text_pair, dialogues, demonstration, text, prompt, *CHAT_FORMS)

# A kind of flaw: given a good row -> the line that stands for it, and the field at fault (a pattern), None where there is none.
Kind = Callable[[Row, random.Random], tuple[bytes, str | None]]
KINDS: dict[str, tuple[Kind, tuple[Callable[[random.Random], Row], ...]]] = {}


def kind(*forms: Callable[[random.Random], Row]) -> Callable[[Kind], Kind]:
    """Register a kind of flaw, for rows of `forms`."""

    def register(function: Kind) -> Kind:
        KINDS[function.__name__.strip("_").replace("_", " ")] = (function, forms or FORMS)
        return function

    return register


def written(values: Any, rng: random.Random | None = None) -> bytes:
    """As JSON; strings that UTF-8 cannot hold are escaped."""
    readable = rng is not None and rng.random() < 0.5
    return json.dumps(values, ensure_ascii=not readable).encode("utf-8")


# ------------------------------------------------------------------------------------------------------ good rows


@kind()
def good(row: Row, rng: random.Random):
    more = {"id": rng.randrange(9), "score": rng.choice([None, 1.5, float("nan"), -(10**300)]), "nested": {"a": [[[]]]}}
    return written(row.values | (more if rng.random() < 0.5 else {}), rng), None


@kind(*CHAT_FORMS)
def good_with_empty_extras(row: Row, rng: random.Random):
    values = copy.deepcopy(row.values)
    for name in row.chat:
        for turn in values[name]:
            turn |= {"tool_calls": rng.choice([None, []]), "name": None}
    return written(values | {"tools": rng.choice([None, []]), "images": None}, rng), None


# -------------------------------------------------------------------------------------------------- JSON and bytes


@kind()
def truncated(row: Row, rng: random.Random):
    line = written(row.values, rng)
    return line[: rng.randrange(1, len(line))], "row"


@kind()
def broken_utf8(row: Row, rng: random.Random):
    line = written(row.values, rng)
    place = line.rindex(b'"')
    return line[:place] + rng.choice([b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80"]) + line[place:], "row"


@kind()
def another_encoding(row: Row, rng: random.Random):
    return json.dumps(row.values).encode(rng.choice(["utf-16-le", "utf-16-be", "utf-32-le"])), "row"


@kind()
def control_characters(row: Row, rng: random.Random):
    line = written(row.values)
    place = line.rindex(b'"')
    return line[:place] + rng.choice([b"\x00", b"\x01", b"\t", b"\x1f"]) + line[place:], "row"


@kind()
def no_object(row: Row, rng: random.Random):
    return written(rng.choice([[row.values], 7, None, True, "text", [], float("nan"), *row.values.values()])), "row"


@kind()
def other_syntax(row: Row, rng: random.Random):
    line = written(row.values)
    return rng.choice(
        [
            line + b",",
            line + line,
            line[:-1] + b",}",
            b"// " + line,
            repr(row.values).encode("unicode_escape"),
            b"[" + line,
        ]
    ), "row"


@kind()
def noise(row: Row, rng: random.Random):
    return b"x" + bytes(
        rng.choice([b for b in range(256) if b not in b"\r\n"]) for _ in range(rng.randint(1, 80))
    ), "row"


@kind()
def nested_too_deep(row: Row, rng: random.Random):
    depth = rng.choice([20_000, 200_000])
    inside = b"[" * depth + b"]" * depth if rng.random() < 0.5 else b'{"a":' * depth + b"1" + b"}" * depth
    return written(row.values)[:-1] + b', "extra": ' + inside + b"}", "row"


@kind()
def huge_number(row: Row, rng: random.Random):
    return written(row.values)[:-1] + b', "extra": ' + b"9" * rng.choice([4301, 50_000]) + b"}", "row"


@kind()
def key_twice(row: Row, rng: random.Random):
    field = rng.choice(list(row.values))
    return written(row.values)[:-1] + b", " + written({field: row.values[field]})[1:], field


# --------------------------------------------------------------------------------------------------------- fields


def missing_field(row: Row, rng: random.Random):
    """Without its prompt a pair may be one of another form."""
    field = rng.choice([name for name in row.fields if name != "prompt" or len(row.fields) < 3])
    return written({name: value for name, value in row.values.items() if name != field}), missing_as(row, field)


def missing_as(row: Row, field: str) -> str:
    if field == "rejected" or (field == "chosen" and read_preferences in row.readers):
        return "chosen|rejected"
    return "completion|prompt" if field in ("completion", "response", "prompt", "text", "messages") else field


kind(text_pair, dialogues, chat_pair, chat_dialogues, demonstration, chat_demonstration, prompt)(missing_field)


@kind()
def wrong_type(row: Row, rng: random.Random):
    field = rng.choice(row.fields)
    return written(row.values | {field: rng.choice(NOT_TEXT)}), field


@kind(text_pair, dialogues, demonstration, text)
def list_for_text(row: Row, rng: random.Random):
    field = rng.choice([name for name in row.fields if name != "prompt"])
    values = row.values | {field: rng.choice([[], ["a"], [1], [tiny.assistant("a")], [[]]])}
    return written(values), "chosen|rejected" if field in ("chosen", "rejected") else field


@kind(text_pair, dialogues, demonstration, text)
def white_text(row: Row, rng: random.Random):
    field = rng.choice(row.fields)
    return written(row.values | {field: rng.choice(WHITE)}, rng), field


@kind(text_pair, dialogues, demonstration, text)
def half_a_character(row: Row, rng: random.Random):
    field = rng.choice(row.fields)
    return written(row.values | {field: row.values[field] + rng.choice(SURROGATES)}), field


@kind(text_pair, dialogues, chat_pair, chat_dialogues)
def equal_replies(row: Row, rng: random.Random):
    return written(row.values | {"rejected": row.values["chosen"]}), "rejected"


@kind(dialogues)
def wrong_dialogue(row: Row, rng: random.Random):
    field = rng.choice(row.fields)
    value = rng.choice([words(rng), row.values[field] + "\n\nHuman: a", "\n\nAssistant: a" + row.values[field]])
    return written(row.values | {field: value}), "chosen|rejected"


@kind(demonstration, chat_demonstration, messages, text)
def not_liked(row: Row, rng: random.Random):
    return written(row.values | {"label": False}), "label"


# --------------------------------------------------------------------------------------------------- conversations


def changed(row: Row, rng: random.Random, change: Callable[[list, int], None]) -> tuple[bytes, str]:
    """One message of one of the conversations of a row changed."""
    values = copy.deepcopy(row.values)
    field = rng.choice(row.chat)
    place = rng.randrange(len(values[field]))
    change(values[field], place)
    return written(values), "chosen|rejected" if field in ("chosen", "rejected") else field


@kind(*CHAT_FORMS)
def no_message(row: Row, rng: random.Random):
    wrong = rng.choice([None, 7, "text", [], ["user", "hi"], {}, {"from": "human", "value": "hi"}])

    def change(found: list, place: int) -> None:
        found[place] = wrong

    return changed(row, rng, change)


@kind(*CHAT_FORMS)
def role(row: Row, rng: random.Random):
    wrong = rng.choice(["tool", "function", "human", "gpt", "User", "", None, 7, [], {}, "\ud800", "x" * 5000, True])
    return changed(row, rng, lambda found, place: found[place].update(role=wrong))


@kind(*CHAT_FORMS)
def content(row: Row, rng: random.Random):
    wrong = rng.choice([*NOT_TEXT, *WHITE, *SURROGATES, [], [{"type": "text", "text": "a"}], [{"type": "image"}]])
    return changed(row, rng, lambda found, place: found[place].update(content=wrong))


@kind(*CHAT_FORMS)
def part_of_a_message(row: Row, rng: random.Random):
    name = rng.choice(["role", "content"])
    return changed(row, rng, lambda found, place: found[place].pop(name))


@kind(*CHAT_FORMS)
def tools_or_pictures(row: Row, rng: random.Random):
    more = rng.choice(["tool_calls", "function_call", "tool_call_id", "images", "audio", "reasoning_content"])
    if rng.random() < 0.3:
        more = rng.choice(["tools", "images", "video"])
        return written(row.values | {more: [{"name": "f"}]}), more
    return changed(row, rng, lambda found, place: found[place].update({more: "x"}))


@kind(*CHAT_FORMS)
def mark_of_a_turn(row: Row, rng: random.Random):
    mark = rng.choice(["<|im_start|>", "<|im_end|>"])

    def change(found: list, place: int) -> None:
        found[place]["content"] += mark

    return changed(row, rng, change)


@kind(*CHAT_FORMS)
def order_of_turns(row: Row, rng: random.Random):
    values = copy.deepcopy(row.values)
    field = rng.choice(row.chat)
    flaw = rng.choice(["empty", "system", "reply", "nested"])
    if flaw == "empty":
        values[field] = []
    elif flaw == "system":
        values[field].append({"role": "system", "content": "a"})
    elif flaw == "reply":
        values[field].append(tiny.user("a") if values[field][-1]["role"] == "assistant" else tiny.assistant("a"))
    else:
        values[field] = [values[field]]
    return written(values), "chosen|rejected" if field in ("chosen", "rejected") else field


# ----------------------------------------------------------------------------------------------------------- files


@cache
def tokenizer():
    return tiny.chat_tokenizer()


def chat() -> Chat:
    return Chat(tokenizer, "tiny")


def wrapped(lines: list[bytes], rng: random.Random) -> bytes:
    """Lines as one of many systems writes a file."""
    end = rng.choice([b"\n", b"\n", b"\r\n"])
    whole = rng.choice([b"", b"\xef\xbb\xbf"]) + end.join(lines) + rng.choice([b"", end, end * 3])
    return gzip.compress(whole, 1) if rng.random() < 0.2 else whole


def read(reader: Callable, path: Path, mode: str) -> tuple[list, tuple] | str:
    """Usable and flawed rows, or the message of the error. Another exception is let through."""
    try:
        usable, flawed, _ = reader(path, bad_rows=mode, chat=chat())
    except UserError as error:
        return str(error)
    return usable, flawed


def play_row(name: str, rng: random.Random, path: Path) -> str | None:
    """What is wrong with how a row of this kind was read, if anything."""
    flaw, forms = KINDS[name]
    row = rng.choice(forms)(rng)
    line, field = flaw(row, rng)
    neighbours = [
        written(rng.choice((text_pair, chat_pair, dialogues))(rng).values, rng) for _ in range(rng.randint(1, 3))
    ]
    if read_prompts in row.readers and len(row.readers) == 1:
        neighbours.append(written(prompt(rng).values))
    lines = neighbours[:]
    place = rng.randrange(len(lines) + 1)
    lines.insert(place, line)
    while rng.random() < 0.3:
        blank = rng.randrange(len(lines) + 1)
        lines.insert(blank, rng.choice([b"", b"  "]))
        place += blank <= place
    path.write_bytes(wrapped(lines, rng))
    reader, number = rng.choice(row.readers), place + 1
    strict, lenient = (read(reader, path, mode) for mode in ("stop", "skip"))
    return judge(field, number, len(neighbours), strict, lenient)


def judge(field: str | None, number: int, others: int, strict: Any, lenient: Any) -> str | None:
    if isinstance(lenient, str):
        return f"refused though it was to be skipped: {lenient}"
    usable, flawed = lenient
    if field is None:
        return None if not isinstance(strict, str) and len(usable) == others + 1 else f"refused: {strict}"
    if len(usable) != others or [row.line for row in flawed] != [number]:
        return f"line {number} is flawed, and these were said to be: {list(map(str, flawed))}"
    if not re.match(rf"({field})\b", flawed[0].field):
        return f"field {field} is flawed, and this was said: {flawed[0]}"
    if not isinstance(strict, str) or f"1 of {others + 1} rows cannot be used; line {number}: " not in strict:
        return f"line {number} is flawed, and this was said: {strict}"
    json.dumps([str(row) for row in flawed], ensure_ascii=False).encode("utf-8")  # as a report holds it
    return None


def play_mutated(rng: random.Random, path: Path) -> str | None:
    """Bytes of one line changed at random: whatever comes of it, the lines beside it are read."""
    lines = [written(rng.choice((text_pair, chat_pair, dialogues, chat_dialogues))(rng).values, rng) for _ in range(4)]
    place = rng.randrange(4)
    line = bytearray(lines[place])
    for _ in range(rng.randint(1, 12)):
        at = rng.randrange(len(line))
        line[at : at + rng.randrange(3)] = bytes(rng.choice([9, *range(32, 256)]) for _ in range(rng.randrange(3)))
    lines[place] = bytes(line)
    path.write_bytes(b"\n".join(lines))
    found = read(rng.choice(ALL), path, "skip")
    if isinstance(found, str):
        return f"refused though it was to be skipped: {found}"
    beside = {row.line for row in found[0]} - {place + 1}
    return None if beside == {1, 2, 3, 4} - {place + 1} else f"line {place + 1} was changed; read were {sorted(beside)}"


def play_damaged(rng: random.Random, path: Path) -> str | None:
    """A whole file that is not what it seems: one sentence, or rows."""
    lines = [written(text_pair(rng).values, rng) for _ in range(30)]
    whole = b"\n".join(lines)
    packed = gzip.compress(whole)
    damage = rng.choice(
        ["cut gzip", "changed gzip", "gzip twice", "zip", "head of parquet", "noise", "one list", "no line end"]
    )
    at = rng.randrange(10, len(packed))
    path.write_bytes(
        {
            "cut gzip": packed[:at],
            "changed gzip": packed[:at] + bytes([packed[at] ^ rng.randrange(1, 256)]) + packed[at + 1 :],
            "gzip twice": gzip.compress(packed),
            "zip": b"PK\x03\x04" + packed,
            "head of parquet": b"PAR1" + whole,
            "noise": rng.randbytes(rng.randint(1, 3000)),
            "one list": b"[\n" + b",\n".join(lines) + b"\n]",
            "no line end": whole.replace(b"\n", b"\r"),
        }[damage]
    )
    found = read(rng.choice(ALL), path, "stop")
    # A bit of gzip's header may be changed without a loss.
    return (
        None
        if isinstance(found, str) or (damage == "changed gzip" and len(found[0]) == 30)
        else f"{damage}: read as rows"
    )


def play_parquet(rng: random.Random, path: Path) -> str | None:
    """A flawed row of a table, which has no syntax to be wrong."""
    import pyarrow
    from pyarrow import parquet

    form = rng.choice((text_pair, dialogues, chat_pair, chat_dialogues))
    rows = [form(rng).values for _ in range(4)]
    place, field = rng.randrange(4), rng.choice(list(rows[0]))
    if flawed := rng.random() < 0.8:
        empty = [None, []] if isinstance(rows[0][field], list) else [None, "", " "]
        rows[place][field] = rng.choice(empty)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    found = read(rng.choice(ALL), path, "skip")
    if isinstance(found, str):
        return found
    bad = [(row.line, row.field.partition("[")[0]) for row in found[1]]
    fields = (field, "chosen", "rejected") if isinstance(rows[0]["chosen"], list) else (field,)
    right = len(bad) == 1 and bad[0][0] == place + 1 and bad[0][1] in fields if flawed else not bad
    return None if right and len(found[0]) == 4 - flawed else f"row {place + 1}, {field}: {list(map(str, found[1]))}"


# These make files of their own.
FILES = {"mutated": play_mutated, "damaged file": play_damaged}
if importlib.util.find_spec("pyarrow"):
    FILES["parquet"] = play_parquet
KINDS |= dict.fromkeys(FILES, (None, ()))


def play(
    rows: int, *, seed: object, place: Path, kinds: list[str] | None = None
) -> tuple[collections.Counter, list[str]]:
    """How many rows of each kind were tried, and what went wrong."""
    kinds, counts, wrong = kinds or list(KINDS), collections.Counter(), []
    path = place / "rows"
    for number in range(rows):
        name, rng = kinds[number % len(kinds)], random.Random(f"{seed} {number}")
        counts[name] += 1
        try:
            fault = FILES[name](rng, path) if name in FILES else play_row(name, rng, path)
        except Exception:
            fault = traceback.format_exc(limit=-4)
        if fault:
            wrong.append(f"row {number}, {name}: {fault}")
    return counts, wrong


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.train.bad_rows", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--seed", default=str(time.time_ns() % 10**9))
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    given = parser.parse_args()

    started = time.monotonic()
    with tempfile.TemporaryDirectory() as place, contextlib.suppress(KeyboardInterrupt):
        counts, wrong = play(given.rows, seed=given.seed, place=Path(place), kinds=given.kinds)
        for fault in wrong:
            print(fault, file=sys.stderr)
        print(f"seed {given.seed}; rows of each kind, and how many were not treated as they must be")
        for name, count in counts.items():
            print(f"{name:<28}{count:>7}{sum(f', {name}: ' in fault for fault in wrong):>7}")
        print(f"{'all':<28}{counts.total():>7}{len(wrong):>7}")
    print(f"{time.monotonic() - started:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
