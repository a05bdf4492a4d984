"""The demo's world: someone asks about an animal, someone tells three sentences, and everything about it is known.

Because the judge is a program, it can be asked as often as one likes whether training made the replies better, and
whether the reward model that was learnt from noisy labels agrees with it. A reader can check each verdict by eye:

    prompt   tell me about a small cat who likes honey .
    reply    the cat was small . it went to the river . they felt safe and warm .

Demonstrations are mediocre on purpose (wrong animal, rude sentences), so that there is something left to learn
from preferences.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

ANIMALS = ("bear", "cat", "dog", "fox", "frog", "owl")
ADJECTIVES = ("brave", "busy", "calm", "clever", "happy", "kind", "little", "old", "quiet", "shy", "small", "young")
THINGS = ("apples", "boats", "books", "bread", "games", "honey", "kites", "music", "rain", "songs", "soup", "stars")
PLACES = ("forest", "garden", "hill", "market", "river", "village")
VERBS = ("danced", "played", "rested", "sang", "talked", "walked")
REQUESTS = ("tell me about", "write about", "describe", "say something about", "i want to hear about")
PROMPT = "{request} a {adjective} {animal} who likes {thing} ."
OPENINGS = ("the {animal} was {adjective} .", "there was a {adjective} {animal} .")
MIDDLES = (
    "the {animal} found {thing} in the {place} .",
    "it went to the {place} .",
    "it {verb} with a friend .",
    "the {animal} liked {thing} very much .",
)
KIND_ENDINGS = ("everyone was happy .", "they felt safe and warm .", "i hope you like it .")
RUDE = ("shut up you fool .", "go away you idiot .", "this is a stupid question .")
WANTED_SENTENCES = 3


@dataclass(frozen=True)
class Verdict:
    """What the judge saw in one reply. `score` is a fixed sum of it, at most 2.5."""

    right_animal: bool
    other_animal: bool
    kind_ending: bool
    rude: int  # sentences
    repeated: int  # sentences that stood there before
    ungrammatical: int  # sentences outside the grammar
    sentences: int
    finished: bool

    @property
    def score(self) -> float:
        return (
            1.5 * self.right_animal
            - 1.0 * self.other_animal
            + 1.0 * self.kind_ending
            - 1.5 * self.rude
            - 0.5 * self.repeated
            - 1.0 * self.ungrammatical
            - 0.25 * abs(self.sentences - WANTED_SENTENCES)
            - 1.0 * (not self.finished)
        )


class Reply(Protocol):
    """What the judge needs of a sample."""

    @property
    def prompt(self) -> str: ...
    @property
    def response(self) -> str: ...
    @property
    def finished(self) -> bool: ...


class GroundTruth:
    """The judge in the form the evaluation asks for: replies in, one score each out."""

    name = "ground truth of the demo world"

    def __call__(self, samples: Iterable[Reply]) -> list[float]:
        return [judge(sample.prompt, sample.response, finished=sample.finished).score for sample in samples]


def all_prompts() -> list[str]:
    """Every prompt of the world, 4320 of them, always in the same order."""
    return [
        PROMPT.format(request=request, adjective=adjective, animal=animal, thing=thing)
        for request, adjective, animal, thing in itertools.product(REQUESTS, ADJECTIVES, ANIMALS, THINGS)
    ]


def vocabulary() -> list[str]:
    """Every word that a prompt, a demonstration or a judge's grammar can hold, sorted."""
    lists = (ANIMALS, ADJECTIVES, THINGS, PLACES, VERBS)
    patterns = (PROMPT, *REQUESTS, *OPENINGS, *MIDDLES, *KIND_ENDINGS, *RUDE)
    fixed = {word for pattern in patterns for word in pattern.split() if not word.startswith("{")}
    return sorted(fixed.union(*lists))


def demonstrate(prompt: str, rng: random.Random) -> str:
    """A mediocre reply: the asked animal in 70 %, 15 % of the middle sentences rude, a kind ending in 35 %."""
    asked = subject(prompt)
    words = {
        "animal": asked if rng.random() < 0.7 else rng.choice(ANIMALS),
        "adjective": rng.choice(ADJECTIVES),
        "thing": rng.choice(THINGS),
    }
    sentences = [rng.choice(OPENINGS).format(**words)]
    for _ in range(rng.randint(1, 3)):
        if rng.random() < 0.15:
            sentences.append(rng.choice(RUDE))
        else:
            sentences.append(rng.choice(MIDDLES).format(place=rng.choice(PLACES), verb=rng.choice(VERBS), **words))
    if rng.random() < 0.35:
        sentences.append(rng.choice(KIND_ENDINGS))
    return " ".join(sentences)


def judge(prompt: str, response: str, *, finished: bool) -> Verdict:
    """The exact verdict on a reply. `finished`: the writer stopped by itself and was not cut off."""
    words = set(response.split())
    sentences = split_sentences(response)
    asked = subject(prompt)
    return Verdict(
        right_animal=asked in words,
        other_animal=any(animal in words for animal in ANIMALS if animal != asked),
        kind_ending=bool(sentences) and sentences[-1] in KIND_ENDINGS,
        rude=sum(sentence in RUDE for sentence in sentences),
        repeated=len(sentences) - len(set(sentences)),
        ungrammatical=sum(sentence not in GRAMMAR for sentence in sentences),
        sentences=len(sentences),
        finished=finished,
    )


def annotate(score_a: float, score_b: float, rng: random.Random, *, noise: float = 0.5) -> bool:
    """True if a human-like annotator prefers A: with probability sigmoid((score_a - score_b) / noise).

    The Bradley-Terry model of choice; noise 0.5 makes annotators agree with the judge in about four of five pairs.
    """
    return rng.random() < 1 / (1 + math.exp((score_b - score_a) / noise))


def subject(prompt: str) -> str:
    """The animal a prompt asks about."""
    (animal,) = set(prompt.split()) & set(ANIMALS)
    return animal


def split_sentences(text: str) -> list[str]:
    """Sentences with their full stop; words after the last full stop are a sentence too (never a grammatical one)."""
    pieces = [" ".join(piece.split()) for piece in text.split(".")]
    tail = pieces.pop()
    return [f"{piece} ." if piece else "." for piece in pieces] + ([tail] if tail else [])


def _expand(patterns: Sequence[str]) -> set[str]:
    words = {"animal": ANIMALS, "adjective": ADJECTIVES, "thing": THINGS, "place": PLACES, "verb": VERBS}
    return {
        pattern.format(**dict(zip(words, chosen, strict=True)))
        for pattern in patterns
        for chosen in itertools.product(*(words[name] if f"{{{name}}}" in pattern else [""] for name in words))
    }


GRAMMAR = frozenset(_expand(OPENINGS + MIDDLES + KIND_ENDINGS + RUDE))
