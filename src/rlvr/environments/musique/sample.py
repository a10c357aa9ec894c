"""Made-up questions in MuSiQue's format, for tests and demonstrations. Nothing in them is true."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from rlvr.errors import DataError

HELD_OUT = 5  # one first entity in so many is in the held-out split
WORDS_OF_A_PARAGRAPH = 4  # at most: two people have two each


@dataclass(frozen=True)
class _Relation:
    source: str
    target: str
    phrase: str  # how a question speaks of it
    fact: str  # how a paragraph tells it


RELATIONS = (
    _Relation("work", "person", "the author of {x}", "{x} was written by {y}."),
    _Relation("work", "person", "the main character of {x}", "The main character of {x} is {y}."),
    _Relation("person", "city", "the birthplace of {x}", "{x} was born in {y}."),
    _Relation("person", "person", "the teacher of {x}", "{x} was taught by {y}."),
    _Relation("person", "person", "the spouse of {x}", "{x} married {y}."),
    _Relation("city", "country", "the country of {x}", "{x} is a city in {y}."),
    _Relation("city", "river", "the river of {x}", "{x} lies on the river {y}."),
    _Relation("country", "city", "the capital of {x}", "The capital of {x} is {y}."),
    _Relation("country", "person", "the president of {x}", "The president of {x} is {y}."),
)
_FILLERS = {
    "work": (
        "{x} is a novel that appeared in {year}.",
        "{x} won a prize in {year}.",
        "{x} has {n} chapters.",
    ),
    "person": ("{x} retired in {year}.", "{x} owned {n} clocks.", "{x} first travelled abroad in {year}."),
    "city": ("{x} has {n} bridges.", "{x} was founded in {year}.", "{x} holds a fair with {n} stalls."),
    "country": ("{x} has {n} provinces.", "{x} adopted its flag in {year}.", "{x} has {n} lighthouses."),
    "river": ("{x} is {n} kilometres long.", "{x} was last flooded in {year}.", "{x} has {n} locks."),
}
_SYLLABLES = (  # noqa: SIM905
    "ba bel cor da dor el fa fen gal hol im jor ka kel lo lun mar mi nor ol pa per qui ra ros sel ta tor ul va "
    "vin wen yor zan"
).split()
_ADJECTIVES = "Silent Golden Broken Winter Hidden Paper Crimson Distant Hollow Velvet Iron Pale".split()  # noqa: SIM905
_NOUNS = "Harbor Orchard Lantern Compass Garden Mirror Station Letter Island Clock Bridge Feather".split()  # noqa: SIM905


def sample_questions(
    size: int,
    *,
    seed: int = 0,
    hops: Sequence[int] = (2, 3, 4),
    paragraphs: int = 20,
    sentences: int = 3,
    words: int | None = None,
    held_out: bool = False,
    unanswerable: float = 0.0,
) -> list[dict[str, Any]]:
    """Questions about people, places and works that do not exist.

    Every hop is told by one paragraph. The others are about other entities and tell the same kinds of facts;
    some share a word of their title with one that matters. Whether a question is held out is decided by a
    hash of the entity that it starts from: no seed puts a question into both splits.

    Args:
        size: number of questions.
        seed: the same seed gives the same questions.
        hops: how many hops; questions take turns.
        paragraphs: paragraphs of a question, at least as many as hops.
        sentences: sentences of a paragraph, the fact included.
        words: names are made of so many different words, at least 4 for each paragraph; None: of any. Few words
            make a set that a tiny model can learn to read.
        held_out: makes questions of the held-out split.
        unanswerable: share of the questions whose last supporting paragraph is missing.

    Raises:
        DataError: a number that makes no sense.
    """
    if size < 1 or not hops or min(hops) < 1 or max(hops) > 6 or paragraphs < max(hops) or sentences < 1:
        raise DataError(
            f"a sample of {size} questions with {', '.join(map(str, hops)) or 'no'} hops, {paragraphs} paragraphs and "
            f"{sentences} sentences cannot be made; at least 1 question, 1 to 6 hops, as many paragraphs as hops, and "
            "1 sentence are needed."
        )
    if words is not None and words < WORDS_OF_A_PARAGRAPH * paragraphs:
        raise DataError(
            f"names of {words} words are too few for {paragraphs} paragraphs a question; at least "
            f"{WORDS_OF_A_PARAGRAPH * paragraphs} are needed, or fewer paragraphs."
        )
    rng = random.Random(f"{seed} {held_out}")
    rows = []
    for number in range(size):
        row = _Question(rng, hops[number % len(hops)], sentences, words, held_out).row(paragraphs)
        row["id"] = f"{hops[number % len(hops)]}hop__sample_{seed}_{'eval' if held_out else 'train'}_{number}"
        if rng.random() < unanswerable:
            missing = row["question_decomposition"][-1]["paragraph_support_idx"]
            row["paragraphs"] = [p for p in row["paragraphs"] if p["idx"] != missing]
            row["answerable"] = False
        rows.append(row)
    return rows


class _Question:
    """One question and the little world around it."""

    def __init__(self, rng: random.Random, hops: int, sentences: int, words: int | None, held_out: bool):
        self.rng, self.sentences = rng, sentences
        self.vocabulary = _vocabulary(words) if words is not None else None
        self.names: set[str] = set()
        self.words: set[str] = set()
        self.relations = self._chain(hops)
        start = self._name(self.relations[0].source)
        while _is_held_out(start) != held_out:
            self.names.clear()
            self.words.clear()
            start = self._name(self.relations[0].source)
        self.entities = [start, *(self._name(relation.target) for relation in self.relations)]

    def row(self, count: int) -> dict[str, Any]:
        pairs = zip(self.relations, self.entities, self.entities[1:], strict=False)
        told = [(relation, source, self._paragraph(relation, source, target)) for relation, source, target in pairs]
        others = [self._distractor() for _ in range(count - len(told))]
        order = [*((title, text, True) for _, title, text in told), *((*other, False) for other in others)]
        self.rng.shuffle(order)
        paragraphs = [
            {"idx": idx, "title": title, "paragraph_text": text, "is_supporting": supporting}
            for idx, (title, text, supporting) in enumerate(order)
        ]
        index = {p["title"]: p["idx"] for p in paragraphs}
        asked = self.entities[0]
        for relation in self.relations:
            asked = relation.phrase.format(x=asked)
        answer, kind = self.entities[-1], self.relations[-1].target
        return {
            "id": "",
            "question": f"{'Who' if kind == 'person' else 'What'} is {asked}?",
            "answer": answer,
            "answer_aliases": _aliases(answer, kind),
            "answerable": True,
            "paragraphs": paragraphs,
            "question_decomposition": [
                {
                    "id": hop,
                    "question": relation.phrase.format(x=source),
                    "answer": self.entities[hop + 1],
                    "paragraph_support_idx": index[source],
                }
                for hop, (relation, source, _) in enumerate(told)
            ],
        }

    def _chain(self, hops: int) -> list[_Relation]:
        while True:  # rivers lead nowhere, so some walks end early
            chain: list[_Relation] = []
            options: list[_Relation] = [r for r in RELATIONS if r.source == "work"]
            while options and len(chain) < hops:
                chain.append(self.rng.choice(options))
                options = [r for r in RELATIONS if r.source == chain[-1].target and r not in chain]
            if len(chain) == hops:
                return chain

    def _distractor(self) -> tuple[str, str]:
        relation = self.rng.choice(RELATIONS)
        kinds = [self.relations[0].source, *(step.target for step in self.relations)]
        same = [entity for entity, kind in zip(self.entities, kinds, strict=True) if kind == relation.source]
        like = self.rng.choice(same) if same and self.rng.random() < 0.5 else None
        title = self._name(relation.source, like=like)
        return title, self._paragraph(relation, title, self._name(relation.target))

    def _paragraph(self, relation: _Relation, source: str, target: str) -> str:
        fillers = list(_FILLERS[relation.source])
        self.rng.shuffle(fillers)
        sentences = [
            filler.format(x=source, year=self.rng.randint(1700, 1990), n=self.rng.randint(3, 90))
            for filler in fillers[: self.sentences - 1]
        ]
        sentences.insert(self.rng.randint(0, len(sentences)), relation.fact.format(x=source, y=target))
        return " ".join(sentences)

    def _name(self, kind: str, like: str | None = None) -> str:
        """A name that this question does not have yet; `like` lends its last word."""
        while True:
            name = self._draw(kind)
            if like and kind in ("person", "work"):  # the others have one word of their own
                name = " ".join([*name.split()[:-1], like.split()[-1]])
            if name not in self.names:
                self.names.add(name)
                return name

    def _draw(self, kind: str) -> str:
        if kind == "work":
            return f"The {self.rng.choice(_ADJECTIVES)} {self.rng.choice(_NOUNS)} of {self._word()}"
        if kind == "person":
            return f"{self._word()} {self._word()}"
        return {"city": "Port {}", "country": "Republic of {}", "river": "{}"}[kind].format(self._word())

    def _word(self) -> str:
        while True:
            word = self.rng.choice(self.vocabulary) if self.vocabulary else _new_word(self.rng)
            if word not in self.words:
                self.words.add(word)
                return word


def _new_word(rng: random.Random) -> str:
    return "".join(rng.choice(_SYLLABLES) for _ in range(rng.choice((2, 3)))).capitalize()


@cache
def _vocabulary(size: int) -> tuple[str, ...]:
    """The same for every seed, so that a model knows the words of questions that it has not seen."""
    rng = random.Random("words")
    found: dict[str, None] = {}
    while len(found) < size:
        found[_new_word(rng)] = None
    return tuple(found)


def _aliases(answer: str, kind: str) -> list[str]:
    if kind == "person":
        first, last = answer.split()
        return [f"{first[0]}. {last}", last]
    if kind == "river":
        return [f"River {answer}"]
    return [answer.split()[-1]]


def _is_held_out(name: str) -> bool:
    return hashlib.sha256(name.encode()).digest()[0] % HELD_OUT == 0
