"""Reading, checking, splitting, tokenising and padding of users' data."""

from __future__ import annotations

import gzip
import json

import pytest
import torch
from transformers import AutoTokenizer

from rlhf_fast.train.data import (
    BadRow,
    DataSummary,
    Demonstration,
    Preference,
    Prompt,
    collate,
    encode_prompt,
    encode_response,
    read_demonstrations,
    read_preferences,
    read_prompts,
    split_heldout,
    train_tokenizer,
)
from rlhf_fast.train.errors import UserError

TALK = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: a joke?\n\nAssistant:"
PAIR = {"prompt": "Name a colour.", "chosen": "Red.", "rejected": "No."}
DIALOGUES = {"chosen": TALK + " A hen walks in.", "rejected": TALK + " Go away."}


def jsonl(path, *rows):
    """Write rows, given as objects, text or bytes, one a line."""
    lines = [
        row if isinstance(row, bytes) else row.encode() if isinstance(row, str) else json.dumps(row).encode()
        for row in rows
    ]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def refusal(call, *arguments, **keywords) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments, **keywords)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---------------------------------------------------------------- accepted forms


def test_preference_with_prompt(tmp_path):
    rows, bad, read = read_preferences(jsonl(tmp_path / "d.jsonl", PAIR))
    assert rows == [Preference("Name a colour.", "Red.", "No.", 1)]
    assert (bad, read) == ((), 1)


def test_dialogues_are_split_behind_the_last_assistant(tmp_path):
    rows, _, _ = read_preferences(jsonl(tmp_path / "d.jsonl", DIALOGUES))
    assert rows == [Preference(TALK, " A hen walks in.", " Go away.", 1)]


def test_demonstrations_from_all_three_forms(tmp_path):
    path = jsonl(tmp_path / "d.jsonl", {"prompt": "p", "completion": "c"}, {"prompt": "q", "response": "r"}, DIALOGUES)
    rows, _, _ = read_demonstrations(path)
    assert rows == [
        Demonstration("p", "c", 1),
        Demonstration("q", "r", 2),
        Demonstration(TALK, " A hen walks in.", 3),
    ]


def test_prompts_from_all_forms(tmp_path):
    path = jsonl(tmp_path / "d.jsonl", {"prompt": "p"}, {"prompt": "q", "completion": "c"}, PAIR, DIALOGUES)
    rows, _, _ = read_prompts(path)
    assert rows == [Prompt("p", 1), Prompt("q", 2), Prompt("Name a colour.", 3), Prompt(TALK, 4)]


@pytest.mark.parametrize("name", ["d.jsonl.gz", "named_otherwise.jsonl"])
def test_gzip_is_recognised_by_its_content(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(json.dumps(PAIR).encode()))
    assert len(read_preferences(tmp_path / name)[0]) == 1


def test_byte_order_mark_windows_ends_blank_lines_and_line_separator(tmp_path):
    path = tmp_path / "d.jsonl"
    odd = json.dumps(PAIR | {"chosen": "a\u2028b\x0c\x85c"}, ensure_ascii=False).encode()
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(PAIR).encode() + b"\r\n\r\n  \n" + odd)
    rows, bad, read = read_preferences(path)
    assert [(row.line, row.chosen) for row in rows] == [(1, "Red."), (4, "a\u2028b\x0c\x85c")]
    assert (bad, read) == ((), 2)


# ---------------------------------------------------------------- flaws

FLAWS = {
    "broken UTF-8": (b'{"prompt": "caf\xe9"}', "row", "not UTF-8: byte 0xe9 at position 15"),
    "cut line": ('{"prompt": "Name a', "row", "not JSON: Unterminated string starting at column 12"),
    "text": ("hello", "row", "not JSON: Expecting value at column 1"),
    "too deep": ("[" * 100_000, "row", "not usable JSON: "),
    "list": ([1], "row", "not a JSON object but a list"),
    "null": ("null", "row", "not a JSON object but null"),
    "no fields": ({}, "chosen", "missing; the row has no field"),
    "missing chosen": (
        {"prompt": "p", "rejected": "r"},
        "chosen",
        "missing; the row has 'prompt', 'rejected'",
    ),
    "missing rejected": ({"chosen": TALK + " a"}, "rejected", "missing; the row has 'chosen'"),
    "number": (PAIR | {"rejected": 7}, "rejected", "not text but a number"),
    "chat messages": (PAIR | {"chosen": [{"role": "user"}]}, "chosen", "not text but a list"),
    "null field": (PAIR | {"prompt": None}, "prompt", "not text but null"),
    "empty prompt": (PAIR | {"prompt": " \n"}, "prompt", "empty"),
    "empty reply": (PAIR | {"chosen": ""}, "chosen", "the reply is empty"),
    "half a surrogate pair": (PAIR | {"chosen": "\ud83d"}, "chosen", "holds half of a surrogate pair"),
    "empty last reply": (DIALOGUES | {"rejected": TALK + "  "}, "rejected", "the last reply is empty"),
    "prompts differ": (
        DIALOGUES | {"rejected": "\n\nHuman: x\n\nAssistant: y"},
        "rejected",
        "prompts differ",
    ),
    "second reply": (DIALOGUES | {"rejected": TALK + " a\n\nAssistant: b"}, "rejected", "prompts differ"),
    "same reply": (PAIR | {"chosen": "No. "}, "rejected", "chosen equals rejected"),
    "same dialogue": (DIALOGUES | {"rejected": DIALOGUES["chosen"]}, "rejected", "chosen equals rejected"),
    "no turn": ({"chosen": "hi", "rejected": "ho"}, "chosen", "a dialogue without an Assistant turn"),
    "human last": (
        DIALOGUES | {"chosen": TALK + " a\n\nHuman: b"},
        "chosen",
        "the dialogue ends with a Human turn",
    ),
}


@pytest.mark.parametrize(("row", "field", "reason"), FLAWS.values(), ids=FLAWS)
def test_each_flaw_is_named_by_line_field_and_reason(tmp_path, row, field, reason):
    path = jsonl(tmp_path / "d.jsonl", PAIR, row, PAIR)
    rows, (bad,), read = read_preferences(path, bad_rows="skip")
    assert ([row.line for row in rows], read) == ([1, 3], 3)
    assert (bad.path, bad.line, bad.field) == (str(path), 2, field)
    assert bad.reason.startswith(reason)
    assert f"line 2: {'' if field == 'row' else f'field {field!r}: '}{reason}" in refusal(read_preferences, path)


@pytest.mark.parametrize("read", [read_demonstrations, read_prompts])
def test_flawed_pair_is_flawed_in_every_stage(tmp_path, read):
    path = jsonl(tmp_path / "d.jsonl", PAIR, PAIR | {"rejected": ""})
    assert [bad.line for bad in read(path, bad_rows="skip")[1]] == [2]


def test_demonstration_without_reply(tmp_path):
    path = jsonl(tmp_path / "d.jsonl", {"prompt": "p"})
    assert "field 'completion': missing; the row has 'prompt'" in refusal(read_demonstrations, path)


def test_stop_shows_how_many_the_first_five_and_the_way_out(tmp_path):
    path = jsonl(tmp_path / "d.jsonl", PAIR, *["broken"] * 7)
    message = refusal(read_preferences, path)
    assert "7 of 8 rows cannot be used; the first 5: line 2: not JSON" in message
    assert "line 6:" in message and "line 7:" not in message
    assert message.endswith("--bad_rows skip")


def test_bad_row_reads_as_a_place_in_a_file():
    assert str(BadRow("d.gz", 17, "chosen", "the reply is empty")) == "d.gz:17: field 'chosen': the reply is empty"
    assert str(BadRow("d.gz", 17, "row", "not JSON")) == "d.gz:17: not JSON"


def test_file_without_a_usable_row_is_refused_even_when_skipping(tmp_path):
    path = jsonl(tmp_path / "d.jsonl", "x", "y")
    assert "none of its 2 rows can be used; line 1: not JSON" in refusal(read_preferences, path, bad_rows="skip")


@pytest.mark.parametrize("content", [b"", b"\n \n", gzip.compress(b"")])
def test_empty_file(tmp_path, content):
    (tmp_path / "d").write_bytes(content)
    assert "is empty" in refusal(read_preferences, tmp_path / "d", bad_rows="skip")


def test_files_that_cannot_be_read(tmp_path):
    whole = gzip.compress(json.dumps(PAIR).encode() * 100)
    (tmp_path / "cut.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "damaged.gz").write_bytes(whole[:12] + b"\xff\xff\xff" + whole[15:])
    (tmp_path / "checksum.gz").write_bytes(whole[:-8] + b"\0" * 8)
    assert "does not exist" in refusal(read_preferences, tmp_path / "absent")
    assert "is a directory" in refusal(read_preferences, tmp_path)
    for name in ("cut.gz", "damaged.gz", "checksum.gz"):
        assert "is a damaged gzip file" in refusal(read_preferences, tmp_path / name)


def test_unknown_way_with_bad_rows(tmp_path):
    assert "must be stop or skip" in refusal(read_preferences, jsonl(tmp_path / "d", PAIR), bad_rows="ignore")


def test_summary_is_plain_json(tmp_path):
    summary = DataSummary("d", 3, 2, 1, 1, (BadRow("d", 2, "row", "not JSON"),), truncated_prompts=1)
    assert json.loads(json.dumps(summary.as_dict())) == {
        "path": "d",
        "rows_read": 3,
        "rows_used": 2,
        "rows_train": 1,
        "rows_heldout": 1,
        "bad_rows": [{"path": "d", "line": 2, "field": "row", "reason": "not JSON"}],
        "truncated_prompts": 1,
        "truncated_responses": 0,
    }


# ---------------------------------------------------------------- split


def prompts(count: int) -> list[Prompt]:
    return [Prompt(f"prompt {number}", number) for number in range(count)]


def test_split_is_the_same_for_every_order_and_keeps_it():
    rows = prompts(200)
    train, heldout = split_heldout(rows, fraction=0.2, seed=3)
    assert sorted(train + heldout, key=lambda row: row.line) == rows
    assert train == sorted(train, key=lambda row: row.line)
    assert set(split_heldout(rows[::-1], fraction=0.2, seed=3)[1]) == set(heldout)
    assert split_heldout(rows, fraction=0.2, seed=4)[1] != heldout


def test_prompt_is_never_on_both_sides():
    rows = prompts(100) + [Prompt(row.prompt, row.line + 1000) for row in prompts(100)]
    train, heldout = split_heldout(rows, fraction=0.3, seed=0)
    assert not {row.prompt for row in train} & {row.prompt for row in heldout}


def test_split_does_not_depend_on_the_process():
    # Written down once: the side of a prompt must not move between processes and versions either.
    assert [row.line for row in split_heldout(prompts(20), fraction=0.25, seed=0)[1]] == [
        1,
        9,
        10,
        11,
        13,
        14,
        18,
    ]


def test_split_meets_the_fraction_on_average():
    heldout = split_heldout(prompts(4000), fraction=0.1, seed=0)[1]
    assert 330 <= len(heldout) <= 470  # 400 ± 3.7 standard deviations


def test_split_refuses_to_leave_a_side_empty():
    assert "leaves 1 for training and 0 held out" in refusal(split_heldout, prompts(1), fraction=1e-9, seed=0)
    assert "leaves 0 for training and 1 held out" in refusal(split_heldout, prompts(1), fraction=1 - 1e-9, seed=0)
    assert split_heldout(prompts(3), fraction=0.0, seed=0) == (prompts(3), [])


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_split_fraction_out_of_range(fraction):
    assert "heldout_fraction" in refusal(split_heldout, prompts(3), fraction=fraction, seed=0)


# ---------------------------------------------------------------- tokens

TEXT = "The quick brown fox jumps over the lazy dog. How are you today, my friend?"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT] * 3, 300)


def test_tokenizer_special_tokens_are_distinct(tokenizer):
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3
    assert 259 < len(tokenizer) <= 300


@pytest.mark.parametrize("text", [TEXT, "naïve 🙂\n\n\ttabs  and   spaces ", "\x00\u2028", "the a .  ,"])
def test_every_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_tokenizer_is_the_same_after_saving(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"] == encode_prompt(tokenizer, TEXT, 999)
    assert (loaded.pad_token, loaded.bos_token, loaded.eos_token) == ("<pad>", "<bos>", "<eos>")


def test_tokenizer_with_too_few_words():
    assert "vocab_size must be at least 259" in refusal(train_tokenizer, [TEXT], 258)
    assert len(train_tokenizer([], 300)) == 259


def test_long_prompt_keeps_its_end_and_its_beginning_mark(tokenizer):
    whole = encode_prompt(tokenizer, TEXT, 999)
    assert whole[0] == tokenizer.bos_token_id
    assert encode_prompt(tokenizer, TEXT, len(whole)) == whole
    assert encode_prompt(tokenizer, TEXT, 5) == [tokenizer.bos_token_id, *whole[-4:]]
    assert encode_prompt(tokenizer, TEXT, 1) == [tokenizer.bos_token_id]


def test_prompt_of_a_tokenizer_without_beginning_mark(tokenizer):
    plain = train_tokenizer([TEXT], 300)
    plain.bos_token = None
    assert encode_prompt(plain, TEXT, 4) == tokenizer.encode(TEXT, add_special_tokens=False)[-4:]
    assert "gives no token" in refusal(encode_prompt, plain, "", 4)


def test_cut_reply_has_no_end_mark(tokenizer):
    whole = encode_response(tokenizer, TEXT, 999)
    assert whole[-1] == tokenizer.eos_token_id and whole.count(tokenizer.eos_token_id) == 1
    assert encode_response(tokenizer, TEXT, len(whole)) == whole
    assert encode_response(tokenizer, TEXT, len(whole) - 1) == whole[:-1]
    assert encode_response(tokenizer, TEXT, 3) == whole[:3]


def test_reply_that_brings_its_end_mark_gets_no_second(tokenizer):
    assert encode_response(tokenizer, TEXT + "<eos>", 999) == encode_response(tokenizer, TEXT, 999)


def test_reply_needs_an_end_mark():
    endless = train_tokenizer([TEXT], 300)
    endless.eos_token = None
    assert "no end-of-sequence token" in refusal(encode_response, endless, TEXT, 9)


def test_prompt_and_reply_join_as_one_text(tokenizer):
    joined = encode_prompt(tokenizer, TALK, 999) + encode_response(tokenizer, " A hen.", 999)
    assert tokenizer.decode(joined) == f"<bos>{TALK} A hen.<eos>"


@pytest.mark.parametrize(
    ("side", "ids", "mask"),
    [
        ("right", [[7, 0, 0], [4, 5, 6], [0, 0, 0]], [[1, 0, 0], [1, 1, 1], [0, 0, 0]]),
        ("left", [[0, 0, 7], [4, 5, 6], [0, 0, 0]], [[0, 0, 1], [1, 1, 1], [0, 0, 0]]),
    ],
)
def test_collate(side, ids, mask):
    got_ids, got_mask = collate([[7], [4, 5, 6], []], pad_id=0, side=side)
    assert (got_ids.dtype, got_mask.dtype) == (torch.int64, torch.bool)
    assert (got_ids.tolist(), got_mask.int().tolist()) == (ids, mask)


def test_collate_marks_a_real_token_that_looks_like_padding():
    assert collate([[0, 3, 0], [1]], pad_id=0)[1].tolist() == [[True, True, True], [True, False, False]]


def test_collate_nothing_and_unknown_side():
    assert collate([], pad_id=0)[0].shape == (0, 0)
    with pytest.raises(ValueError, match="side"):
        collate([[1]], pad_id=0, side="middle")
