"""From a user's rows to token ids: recognise, check, split, tokenise, pad. `rows` reads the files, `chat` renders conversations.

Of a row, its fields say what it is (the forms are those of TRL's "dataset formats"):

    {"prompt", "chosen", "rejected"}    a preference pair; the replies stand without the prompt
    {"chosen", "rejected"}              the same without a prompt of its own, which is what the two have in common: of dialogues
                                        "\\n\\nHuman: …\\n\\nAssistant: …" (arXiv 2204.05862) all but the last reply, of other
                                        texts the words with which both begin
    {"prompt", "completion"}            a demonstration; "response" is read as well as "completion"
    {"messages"}                        a demonstration: a conversation, of which the last reply is learnt
    {"text"}                            a demonstration without a prompt
    {"prompt"}                          a prompt

In place of text, a conversation may stand: a list of {"role": "system" | "user" | "assistant", "content": text}. Then "prompt"
ends with a message of the user, and "chosen", "rejected" and "completion" are one message of the assistant; without a prompt
they are whole conversations that differ in the last message.

Every flaw of a row is named by line (in a table: row), field and reason; blank lines are not rows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import torch

from rlhf_fast.train.errors import UserError
from rlhf_fast.train.rows import WHOLE_ROW, Flaw, open_rows, type_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

HUMAN = "\n\nHuman:"
ASSISTANT = "\n\nAssistant:"
PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
BYTES = 256
SHOWN = 5
ROLES = ("system", "user", "assistant")
# What a conversation may hold and no stage reads: training as if it were not there would teach something else.
UNREAD = dict.fromkeys(("tools", "tool_calls", "tool_call_id", "function_call"), "calls of tools")
UNREAD |= dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), "multi-modal data")
UNREAD_IN_MESSAGE = UNREAD | dict.fromkeys(
    ("thinking", "reasoning", "reasoning_content"), "reasoning beside the content"
)


class Message(NamedTuple):
    """One turn of a conversation. role: one of ROLES."""

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """A prompt in messages. field, reply_field: the keys that it and a reply to imitate were read from."""

    messages: tuple[Message, ...]
    field: str = dataclasses.field(default="messages", compare=False)
    reply_field: str = dataclasses.field(default="completion", compare=False)


class Rendered(str):
    """A conversation as a chat template writes it: its tokens are all of the prompt, a beginning mark among them.

    messages: what was rendered; the side of a split hangs on them, not on the template.
    """

    messages: tuple[Message, ...]

    def __new__(cls, text: str, messages: tuple[Message, ...]) -> Rendered:
        rendered = super().__new__(cls, text)
        rendered.messages = messages
        return rendered

    def __getnewargs__(self) -> tuple[str, tuple[Message, ...]]:  # copies and pickles keep what was rendered
        return str(self), self.messages


@dataclass(frozen=True)
class Preference:
    """Two replies to one prompt; people (or a judge) preferred `chosen`. line: counted from 1; of a table, the row."""

    prompt: str | Conversation
    chosen: str
    rejected: str
    line: int


@dataclass(frozen=True)
class Demonstration:
    """A prompt and a reply to imitate; a text that stands alone is a reply to the prompt ""."""

    prompt: str | Conversation
    response: str
    line: int


@dataclass(frozen=True)
class Prompt:
    """A prompt alone."""

    prompt: str | Conversation
    line: int


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used, and why. field: the key at fault ("chosen", "messages[2].role"), or "row" for all of it."""

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
    def prompt(self) -> str | Conversation: ...


Row = TypeVar("Row", bound=HasPrompt)


class Renderer(Protocol):
    """What writes the conversations of a file as text for a model; it is `chat.Chat`."""

    def render(self, row: Row, path: str | Path) -> Row: ...

    def check_read(self, path: str | Path) -> None: ...

    def adopt(self, tokenizer: PreTrainedTokenizerBase, name: str | Path) -> bool: ...


# ---------------------------------------------------------------- reading


def read_preferences(
    path: str | Path, *, bad_rows: str = "stop", chat: Renderer | None = None
) -> tuple[list[Preference], tuple[BadRow, ...], int]:
    """Preference pairs of a file or data set (see `rows`) → (usable rows, flawed rows, number of rows read).

    bad_rows: "stop" raises UserError at flawed rows (how many, and the first five); "skip" returns them beside
    the usable ones. chat: renders conversations to text; without it their prompts stay a `Conversation`.
    UserError in any case: what `rows` cannot read, an empty file, no usable row, a chat template that does not fit.
    """
    return _read(path, _preference, lambda row: row, bad_rows, chat)


def read_demonstrations(
    path: str | Path, *, bad_rows: str = "stop", chat: Renderer | None = None
) -> tuple[list[Demonstration], tuple[BadRow, ...], int]:
    """As `read_preferences`, for demonstrations; of a preference pair that is the chosen reply."""

    def narrow(row: Preference | Demonstration) -> Demonstration:
        return Demonstration(row.prompt, row.chosen, row.line) if isinstance(row, Preference) else row

    return _read(path, _demonstration, narrow, bad_rows, chat)


def read_prompts(
    path: str | Path, *, bad_rows: str = "stop", chat: Renderer | None = None
) -> tuple[list[Prompt], tuple[BadRow, ...], int]:
    """As `read_preferences`, for prompts; preference and demonstration files give theirs."""
    return _read(path, _prompt, lambda row: Prompt(row.prompt, row.line), bad_rows, chat)


def _read(
    path: str | Path,
    parse: Callable[[dict, int], Any],
    narrow: Callable[[Any], Row],
    bad_rows: str,
    chat: Renderer | None,
) -> tuple[list[Row], tuple[BadRow, ...], int]:
    """A row is narrowed to what a stage reads once all of it was looked at: a flawed pair is flawed in every stage."""
    if bad_rows not in ("stop", "skip"):
        raise UserError(f"bad_rows must be stop or skip, got {bad_rows!r}")
    usable: list[Row] = []
    flawed: list[BadRow] = []
    source = open_rows(path)
    for number, found in source.rows:
        try:
            if isinstance(found, Flaw):
                raise found
            row = parse(found, number)
            if chat is not None and isinstance(row.prompt, Conversation):
                row = chat.render(row, path)
            usable.append(narrow(row))
        except Flaw as flaw:
            flawed.append(BadRow(str(path), number, flaw.field, flaw.reason))
    rows_read, listing = len(usable) + len(flawed), _listing(flawed, source.unit)
    if rows_read == 0:
        raise UserError(f"{path} is empty: it needs one {'JSON object a line' if source.unit == 'line' else 'row'}")
    if not usable:
        raise UserError(f"{path}: none of its {rows_read} rows can be used; {listing}")
    if flawed and bad_rows == "stop":
        raise UserError(
            f"{path}: {len(flawed)} of {rows_read} rows cannot be used; {listing}; "
            "correct them, or leave them out with --bad_rows skip"
        )
    if chat is not None:
        chat.check_read(path)
    return usable, tuple(flawed), rows_read


def _listing(flawed: list[BadRow], unit: str) -> str:
    head = f"the first {SHOWN}: " if len(flawed) > SHOWN else ""
    return head + "; ".join(f"{unit} " + str(row).removeprefix(f"{row.path}:") for row in flawed[:SHOWN])


# ---------------------------------------------------------------- forms of rows


def _text(row: dict, field: str, empty: str = "empty") -> str:
    if field not in row:
        raise _missing(row, field)
    return _string(row[field], field, empty)


def _missing(row: dict, field: str) -> Flaw:
    return Flaw(field, f"missing; the row has {', '.join(repr(name[:40]) for name in row) or 'no field'}")


def _string(value: Any, field: str, empty: str = "empty") -> str:
    if not isinstance(value, str):
        raise Flaw(field, f"not text but {type_name(value)}")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise Flaw(field, "holds half of a surrogate pair, which is no character")
    if not value.strip():
        raise Flaw(field, empty)
    return value


def _preference(row: dict, line: int) -> Preference:
    prompt, chosen, rejected = _pair(row)
    if chosen.strip() == rejected.strip():
        raise Flaw("rejected", "chosen equals rejected")
    return Preference(prompt, chosen, rejected, line)


def _pair(row: dict) -> tuple[str | Conversation, str, str]:
    """(prompt, chosen, rejected) of a row in any of its forms."""
    lists = [isinstance(row.get(field), list) for field in ("chosen", "rejected")]
    if isinstance(row.get("prompt"), list):
        return _asked(row, "prompt"), _answer(row, "chosen"), _answer(row, "rejected")
    # Beside whole conversations a prompt in text repeats the question; TRL's maybe_extract_prompt passes over it too.
    if (all(lists) and isinstance(row.get("prompt", ""), str)) or (any(lists) and "prompt" not in row):
        return _common_messages(row)
    if "prompt" in row:
        return _text(row, "prompt"), *(_text(row, field, "the reply is empty") for field in ("chosen", "rejected"))
    if ASSISTANT in _text(row, "chosen") or ASSISTANT in _text(row, "rejected"):
        (prompt, chosen), (other_prompt, rejected) = _dialogue(row, "chosen"), _dialogue(row, "rejected")
        if prompt != other_prompt:
            raise Flaw("rejected", "prompts differ: the two dialogues are not the same up to the last reply")
        return prompt, chosen, rejected
    return _common_words(row)


def _dialogue(row: dict, field: str) -> tuple[str, str]:
    """Split a dialogue behind its last "Assistant:" → (prompt that ends in "Assistant:", last reply)."""
    before, marker, reply = _text(row, field).rpartition(ASSISTANT)
    if not marker:
        raise Flaw(field, "a dialogue without an Assistant turn")
    if HUMAN in reply:
        raise Flaw(field, "the dialogue ends with a Human turn")
    if not reply.strip():
        raise Flaw(field, "the last reply is empty")
    return before + marker, reply


def common_length(one: Sequence, other: Sequence) -> int:
    """How many items two sequences have in common from their start."""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return sum(1 for _ in pairs)


def _common_words(row: dict) -> tuple[str, str, str]:
    """The words with which two texts begin as their prompt, and what follows as replies, the space in front among it.

    TRL's `extract_prompt` (trl/data_utils.py) takes all common characters; here no word is cut in two, because its halves are
    other tokens than the word.
    """
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    length = common_length(chosen, rejected)
    if (chosen[length : length + 1] + rejected[length : length + 1]).strip():
        length = max((i for i in range(length) if chosen[i].isspace()), default=0)
    shared = chosen[:length].rstrip()
    if not shared:
        raise Flaw(
            "chosen", "a dialogue without an Assistant turn, and no word in common with rejected to serve as the prompt"
        )
    replies = chosen[len(shared) :], rejected[len(shared) :]
    for field, reply in zip(("chosen", "rejected"), replies, strict=True):
        if not reply.strip():
            raise Flaw(field, "the reply is empty: the other text begins with this one")
    return shared, *replies


# Conversations.


def _common_messages(row: dict) -> tuple[Conversation, str, str]:
    """What two conversations have in common as their prompt, and the last message of each (TRL's `extract_prompt`)."""
    _refuse_unread(row, UNREAD)
    sides = [_messages(row, field) for field in ("chosen", "rejected")]
    shared = common_length(*sides)
    if sides[0] == sides[1]:
        raise Flaw("rejected", "chosen equals rejected")
    for field, side in zip(("chosen", "rejected"), sides, strict=True):
        if len(side) != shared + 1:
            raise Flaw(
                field,
                f"the two conversations have the first {shared} messages in common and this one has {len(side)}; they must "
                "differ in the last message alone",
            )
    replies = [_reply(side[-1], field) for field, side in zip(("chosen", "rejected"), sides, strict=True)]
    return _ending_with_user(sides[0][:shared], "chosen"), *replies


def _messages(row: dict, field: str) -> tuple[Message, ...]:
    if field not in row:
        raise _missing(row, field)
    value = row[field]
    if not isinstance(value, list):
        raise Flaw(field, f"not a list of messages but {type_name(value)}")
    if not value:
        raise Flaw(field, "holds no message")
    messages = tuple(_message(message, f"{field}[{i}]") for i, message in enumerate(value))
    for i, message in enumerate(messages[1:], 1):
        if message.role == "system":
            raise Flaw(f"{field}[{i}].role", "a message of the system must come first")
    return messages


def _message(value: Any, place: str) -> Message:
    if not isinstance(value, dict):
        raise Flaw(place, f"not a message, an object with role and content, but {type_name(value)}")
    _refuse_unread(value, UNREAD_IN_MESSAGE, f"{place}.")
    for name in ("role", "content"):
        if name not in value:
            raise Flaw(f"{place}.{name}", _missing(value, name).reason.replace("the row", "the message"))
    role, content = value["role"], value["content"]
    if role in ("tool", "function"):
        raise Flaw(f"{place}.role", f"is {role!r}: calls of tools are not read")
    if not isinstance(role, str) or role not in ROLES:
        shown = repr(role[:40]) if isinstance(role, str) else type_name(role)
        raise Flaw(f"{place}.role", f"must be {', '.join(ROLES[:-1])} or {ROLES[-1]}, not {shown}")
    if isinstance(content, list):
        raise Flaw(f"{place}.content", "is a list of parts: multi-modal messages are not read, content must be text")
    return Message(role, _string(content, f"{place}.content", _emptiness(role)))


def _emptiness(role: str) -> str:
    return "the reply is empty" if role == "assistant" else "empty"


def _refuse_unread(found: dict, kinds: dict[str, str], prefix: str = "") -> None:
    for name, kind in kinds.items():
        if found.get(name):
            raise Flaw(f"{prefix}{name}", f"{kind}: not read in conversations; leave out such rows, or the field")


def _asked(row: dict, field: str) -> Conversation:
    _refuse_unread(row, UNREAD)
    return _ending_with_user(_messages(row, field), field)


def _ending_with_user(messages: tuple[Message, ...], field: str) -> Conversation:
    if not messages:
        raise Flaw(field, "a conversation without a message of the user in front of the reply")
    if messages[-1].role != "user":
        raise Flaw(
            f"{field}[{len(messages) - 1}].role",
            f"is {messages[-1].role!r}: the message before a reply must be the user's",
        )
    return Conversation(messages, field)


def _answer(row: dict, field: str) -> str:
    """The one message of the assistant that a field holds."""
    messages = _messages(row, field)
    if len(messages) > 1:
        raise Flaw(
            field, f"holds {len(messages)} messages; beside a prompt in messages it must be one, of the assistant"
        )
    return _reply(messages[0], f"{field}[0]")


def _reply(message: Message, place: str) -> str:
    if message.role != "assistant":
        raise Flaw(place, f"ends with a message of the {message.role}; the last one must be the assistant's")
    return message.content


def _whole(row: dict, field: str) -> tuple[Conversation, str]:
    """(prompt, last reply) of a conversation."""
    _refuse_unread(row, UNREAD)
    messages = _messages(row, field)
    reply = _reply(messages[-1], field)
    return dataclasses.replace(_ending_with_user(messages[:-1], field), reply_field=field), reply


def _is_pair(row: dict) -> bool:
    return "chosen" in row or "rejected" in row


def _demonstration(row: dict, line: int) -> Preference | Demonstration:
    if _is_pair(row):
        return _preference(row, line)
    if row.get("label") is False:
        raise Flaw("label", "is false: a reply that was not liked is nothing to imitate; leave such rows out")
    if "messages" in row:
        return Demonstration(*_whole(row, "messages"), line)
    if "text" in row and "prompt" not in row:
        return Demonstration("", _text(row, "text"), line)
    field = "response" if "response" in row else "completion"
    if isinstance(row.get("prompt"), list):
        prompt = dataclasses.replace(_asked(row, "prompt"), reply_field=field)
        return Demonstration(prompt, _answer(row, field), line)
    return Demonstration(_text(row, "prompt"), _text(row, field, empty="the reply is empty"), line)


def _prompt(row: dict, line: int) -> Preference | Demonstration | Prompt:
    if _is_pair(row):
        return _preference(row, line)
    if "messages" in row:
        answered = _messages(row, "messages")[-1].role == "assistant"
        return Demonstration(*_whole(row, "messages"), line) if answered else Prompt(_asked(row, "messages"), line)
    return Prompt(_asked(row, "prompt") if isinstance(row.get("prompt"), list) else _text(row, "prompt"), line)


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
        sides[_unit_hash(_asked_text(row), seed) < fraction].append(row)
    train, heldout = sides
    if not train or (fraction > 0 and not heldout):
        raise UserError(
            f"splitting {len(rows)} rows by prompt at heldout_fraction {fraction} leaves {len(train)} for training "
            f"and {len(heldout)} held out; give more distinct prompts, another heldout_fraction or split_seed"
        )
    return train, heldout


def _asked_text(row: Any) -> str:
    """What the side of a row hangs on: its prompt, or its text where it has none."""
    prompt = row.prompt
    if isinstance(prompt, Conversation | Rendered):
        return json.dumps(prompt.messages)
    return prompt or row.response


def _unit_hash(text: str, seed: int) -> float:
    """A number in [0, 1) that depends on its arguments alone; Python's own hash changes with each process."""
    digest = hashlib.sha256(f"{seed}\n{text}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


# ---------------------------------------------------------------- tokens


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str, max_tokens: int) -> list[int]:
    """Token ids of a prompt, with the beginning-of-sequence token in front if the tokenizer has one.

    What a chat template has rendered gets none beside its own, as `apply_chat_template` gives none.
    A prompt of more than `max_tokens` keeps its end, which the reply answers. UserError: no token at all.
    """
    ids = tokenizer.encode(text, add_special_tokens=False)
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    if isinstance(text, Rendered):
        start = start if ids[: len(start)] == start else []
        ids = ids[len(start) :]
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


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, *, turn_marks: tuple[str, str] | None = None
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer (arXiv 1508.07909, as in GPT-2): every text survives encode and decode.

    `<pad>`, `<bos>` and `<eos>` are three tokens of its own: with pad == eos a model never learns to stop
    (arXiv 2403.17031, detail 3). Its own call adds `<bos>`, as `encode_prompt` does. Few texts may give fewer
    than `vocab_size` tokens. turn_marks: two more tokens of its own, with which a turn of a conversation begins and ends; the
    latter takes the place of `<eos>` as the end. UserError: vocab_size below 256 bytes and these marks.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = [PAD, BOS, EOS, *(turn_marks or ())]
    if vocab_size < BYTES + len(special):
        least = f"{BYTES + len(special)} (256 bytes and {len(special)} marks)"
        raise UserError(f"vocab_size must be at least {least}, got {vocab_size}")
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
    marks = {"pad_token": PAD, "bos_token": BOS, "eos_token": turn_marks[1] if turn_marks else EOS}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **marks, clean_up_tokenization_spaces=False)
