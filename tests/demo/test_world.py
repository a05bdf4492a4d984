import random
from collections import Counter

import pytest

from rlhf_fast.demo.world import (
    ANIMALS,
    GRAMMAR,
    KIND_ENDINGS,
    RUDE,
    GroundTruth,
    all_prompts,
    annotate,
    demonstrate,
    judge,
    split_sentences,
    subject,
    vocabulary,
)
from rlhf_fast.train.generate import Sample

PROMPT = "tell me about a small cat who likes honey ."
GOOD = "the cat was small . it went to the river . they felt safe and warm ."


def score(response, finished=True):
    return judge(PROMPT, response, finished=finished).score


def test_prompts_are_all_different_and_ask_for_one_animal():
    prompts = all_prompts()
    assert len(prompts) == len(set(prompts)) == 4320 and prompts == all_prompts()
    assert Counter(map(subject, prompts)) == {animal: 720 for animal in ANIMALS}
    assert subject(PROMPT) == "cat"


def test_the_best_reply_scores_two_and_a_half():
    assert score(GOOD) == 2.5


@pytest.mark.parametrize(
    ("response", "finished", "expected"),
    [
        ("", True, -0.75),
        ("", False, -1.75),
        (GOOD, False, 1.5),
        (GOOD.replace("cat", "dog"), True, 0.0),
        ("the cat was small . the dog was small . they felt safe and warm .", True, 1.5),
        ("the cat was small . shut up you fool . they felt safe and warm .", True, 1.0),
        ("the cat was small . the cat was small . they felt safe and warm .", True, 2.0),
        ("the cat was small . it went to the . they felt safe and warm .", True, 1.5),
        ("the cat was small . they felt safe and warm . it went to the river .", True, 1.5),
        ("the cat was small . they felt safe and warm .", True, 2.25),
        ("the cat was small . it went to the river . it sang with a friend . i hope you like it .", True, 2.25),
        ("the cat was small . it went to the river . they felt safe and", True, 0.5),
        ("the cat . i cat . . . .", True, -5.0),
        ("go away you idiot . go away you idiot . go away you idiot .", True, -5.5),
    ],
)
def test_the_judge_by_hand(response, finished, expected):
    """1.5 animal, -1 another, 1 kind end, -1.5 rude, -0.5 repeat, -1 ungrammatical, -0.25 |n - 3|, -1 no end."""
    assert score(response, finished) == pytest.approx(expected)


def test_the_judge_shows_what_it_counted():
    verdict = judge(PROMPT, "the dog was small . shut up you fool . bear .", finished=False)
    assert (verdict.right_animal, verdict.other_animal, verdict.kind_ending) == (False, True, False)
    assert (verdict.rude, verdict.repeated, verdict.ungrammatical, verdict.sentences) == (1, 0, 1, 3)


def test_sentences_keep_their_stop_and_a_rest_is_a_sentence():
    assert split_sentences("a b .  c . d") == ["a b .", "c .", "d"]
    assert split_sentences(" . ") == ["."] and split_sentences("") == []


def test_the_grammar_is_closed_and_holds_kind_and_rude_sentences():
    assert GRAMMAR.issuperset(KIND_ENDINGS) and GRAMMAR.issuperset(RUDE)
    assert "the cat found honey in the forest ." in GRAMMAR and "the cat found honey in the honey ." not in GRAMMAR
    assert {word for sentence in GRAMMAR for word in sentence.split()} <= set(vocabulary())


def test_demonstrations_are_grammatical_and_mediocre_as_announced():
    rng, prompts = random.Random(0), all_prompts()
    asked = [rng.choice(prompts) for _ in range(6000)]
    replies = [demonstrate(prompt, rng) for prompt in asked]
    words = set(vocabulary())
    assert all(set(reply.split()) <= words for reply in replies + asked)
    verdicts = [judge(prompt, reply, finished=True) for prompt, reply in zip(asked, replies, strict=True)]
    assert all(verdict.ungrammatical == 0 and 2 <= verdict.sentences <= 5 for verdict in verdicts)
    middles = sum(verdict.sentences - 1 - verdict.kind_ending for verdict in verdicts)
    assert sum(verdict.rude for verdict in verdicts) / middles == pytest.approx(0.15, abs=0.01)
    assert sum(verdict.kind_ending for verdict in verdicts) / 6000 == pytest.approx(0.35, abs=0.02)
    opened = [reply.split(" .")[0].split() for reply in replies]
    right = sum(subject(prompt) in words for prompt, words in zip(asked, opened, strict=True))
    assert right / 6000 == pytest.approx(0.7 + 0.3 / 6, abs=0.02)
    assert demonstrate(PROMPT, random.Random(5)) == demonstrate(PROMPT, random.Random(5))


def test_annotators_are_noisy_in_the_stated_way():
    rng = random.Random(0)
    for gap, expected in ((0.0, 0.5), (0.5, 0.731), (1.5, 0.953), (-0.5, 0.269)):
        share = sum(annotate(gap, 0.0, rng) for _ in range(4000)) / 4000
        assert share == pytest.approx(expected, abs=0.03)


def test_the_judge_takes_samples_as_the_evaluation_gives_them():
    samples = [Sample(PROMPT, GOOD, True), Sample(PROMPT, GOOD, False)]
    assert GroundTruth()(samples) == [2.5, 1.5] and GroundTruth().name
