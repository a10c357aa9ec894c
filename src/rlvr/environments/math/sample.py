"""Word problems made on the spot: no download. Each is a chain of steps on one number."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from typing import Any

NAMES = "Ada Ben Chloe Dan Elif Farid Gita Hugo Ines Jonas Kira Liam Mona Nils Olga Pablo".split()  # noqa: SIM905
THINGS = "apples books stickers coins shells pencils marbles stamps buttons postcards".split()  # noqa: SIM905
HELD_OUT = 5  # one problem in so many is held out

Step = Callable[[random.Random, str, str, int], "tuple[str, int]"]


def _buy(rng: random.Random, name: str, things: str, count: int) -> tuple[str, int]:
    bags, each = rng.randint(2, 9), rng.randint(2, 12)
    return f"{name} buys {bags} bags with {each} {things} in each.", count + bags * each


def _give(rng: random.Random, name: str, things: str, count: int) -> tuple[str, int]:
    given = rng.randint(1, max(1, count - 1))
    return f"{name} gives away {given} {things}.", count - given


def _find(rng: random.Random, name: str, things: str, count: int) -> tuple[str, int]:
    found = rng.randint(3, 40)
    return f"A friend brings {found} more {things}.", count + found


def _double(rng: random.Random, name: str, things: str, count: int) -> tuple[str, int]:
    return f"Then {name} doubles the number of {things}.", count * 2


def _share(rng: random.Random, name: str, things: str, count: int) -> tuple[str, int]:
    divisors = [d for d in range(2, 7) if count % d == 0]
    if not divisors or not count:
        return _find(rng, name, things, count)
    friends = rng.choice(divisors)
    return f"{name} puts the {things} into {friends} equal heaps and keeps one heap.", count // friends


STEPS: tuple[Step, ...] = (_buy, _give, _find, _double, _share)


def sample_problems(size: int, *, seed: int = 0, held_out: bool = False) -> list[dict[str, Any]]:
    """Word problems of 1 to 4 steps, all different; `level` is the number of steps.

    Whether a problem is held out is decided by a hash of its text: no seed puts a problem into both splits.
    """
    rng = random.Random(f"{seed} {held_out}")
    rows: dict[str, dict[str, Any]] = {}
    while len(rows) < size:
        level = len(rows) % 4 + 1
        name, things, count = rng.choice(NAMES), rng.choice(THINGS), rng.randint(5, 60)
        sentences = [f"{name} has {count} {things}."]
        for step in rng.choices(STEPS, k=level):
            sentence, count = step(rng, name, things, count)
            sentences.append(sentence)
        question = " ".join([*sentences, f"How many {things} does {name} have now?"])
        if (hashlib.sha256(question.encode()).digest()[0] % HELD_OUT == 0) == held_out:
            rows.setdefault(question, {"question": question, "answer": str(count), "level": level})
    return list(rows.values())
