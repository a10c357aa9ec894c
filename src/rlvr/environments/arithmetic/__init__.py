"""Arithmetic: problems made on the spot, in several levels. The quickstart trains on it."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable
from typing import Any

from rlvr.environments.base import Environment
from rlvr.errors import DataError
from rlvr.rewards.rubric import Rubric, WeightedReward
from rlvr.rewards.text import tagged
from rlvr.types import Trajectory

HELD_OUT = 5  # one problem in so many is in the eval split
TAG_PROMPT = "Solve the problem. You may think first. Give the final number between <answer> and </answer>."


def _add(rng: random.Random, low: int, high: int) -> tuple[str, int]:
    a, b = rng.randint(low, high), rng.randint(low, high)
    return f"{a}+{b}", a + b


def _subtract(rng: random.Random, low: int, high: int) -> tuple[str, int]:
    a, b = rng.randint(low, high), rng.randint(low, high)
    return f"{a}-{b}", a - b


def _multiply(rng: random.Random, low: int, high: int) -> tuple[str, int]:
    a, b = rng.randint(low, high), rng.randint(2, 9)
    return f"{a}*{b}", a * b


def _mixed(rng: random.Random) -> tuple[str, int]:
    (product, value), c = _multiply(rng, 2, 99), rng.randint(10, 99)
    return (f"{c}+{product}", c + value) if rng.random() < 0.5 else (f"{product}-{c}", value - c)


LEVELS: dict[int, Callable[[random.Random], tuple[str, int]]] = {
    1: lambda rng: _add(rng, 0, 9),
    2: lambda rng: _add(rng, 10, 99),
    3: lambda rng: _subtract(rng, 10, 99),
    4: lambda rng: _multiply(rng, 10, 99),
    5: _mixed,
    6: lambda rng: _add(rng, 1000, 9999),
}
"""Level → problem and its value: 3+4, 17+25, 17-25, 17*6, 40+17*6 or 17*6-40, 1234+5678."""


def arithmetic(
    *,
    levels: str = "1,2,3",
    train_size: int = 2000,
    eval_size: int = 200,
    seed: int = 0,
    answer_format: str = "bare",
) -> Environment:
    """Makes the environment.

    Problems are split by a hash of the problem itself, a+b and b+a alike: no seed and no size puts a problem
    that is trained on into the eval split.

    Args:
        levels: which levels of `LEVELS`, separated by commas; rows are spread over them evenly.
        train_size: rows to train on. A small level repeats its problems.
        eval_size: rows held out, all different: fewer where a level does not have so many.
        seed: decides which problems are drawn.
        answer_format: "bare": the completion is the number; "tags": the number stands in `<answer>` tags.

    Raises:
        DataError: a level or an answer format that there is not, or a size below 1.
    """
    chosen = _parse_levels(levels)
    if answer_format not in ("bare", "tags"):
        raise DataError(f"answer_format is {answer_format!r}; allowed: bare, tags.")
    if min(train_size, eval_size) < len(chosen):
        raise DataError(
            f"train_size is {train_size} and eval_size {eval_size}; both must be at least the "
            f"number of levels, {len(chosen)}."
        )

    def exact_match(trajectory: Trajectory) -> float:
        number = _answer(trajectory.text, answer_format)
        return float(number is not None and int(number) == int(trajectory.example["answer"]))

    def correct_format(trajectory: Trajectory) -> float:
        return float(_answer(trajectory.text, answer_format) is not None)

    return Environment(
        name="arithmetic",
        train_dataset=_rows(chosen, train_size, seed=seed, held_out=False),
        eval_dataset=_rows(chosen, eval_size, seed=seed, held_out=True),
        rubric=Rubric(exact_match, WeightedReward(correct_format, 0.1, name="format")),
        system_prompt=TAG_PROMPT if answer_format == "tags" else None,
        max_turns=1,
        group_metrics_by="level",
    )


def is_held_out(problem: str) -> bool:
    """Whether a problem belongs to the eval split."""
    canonical = "+".join(sorted(problem.split("+")))
    return hashlib.sha256(canonical.encode()).digest()[0] % HELD_OUT == 0


def _rows(levels: list[int], size: int, *, seed: int, held_out: bool) -> list[dict[str, Any]]:
    rng = random.Random(f"{seed} {held_out}")
    rows: list[dict[str, Any]] = []
    for position, level in enumerate(levels):
        wanted = size // len(levels) + (position < size % len(levels))
        drawn: dict[str, dict[str, Any]] = {}
        repeated: list[dict[str, Any]] = []
        # Small levels run out of new problems: after many draws that bring none, what there is is all.
        misses = 0
        while len(drawn) + len(repeated) < wanted and misses < 2000:
            problem, value = LEVELS[level](rng)
            if is_held_out(problem) != held_out:
                continue
            row = {"question": f"{problem}=", "answer": str(value), "level": level}
            if problem not in drawn:
                drawn[problem], misses = row, 0
            elif held_out:
                misses += 1
            else:
                repeated.append(row)
        rows += [*drawn.values(), *repeated]
    rng.shuffle(rows)
    return rows


def _answer(text: str, answer_format: str) -> str | None:
    found = tagged(text) if answer_format == "tags" else text.strip()
    return found if found is not None and re.fullmatch(r"-?[0-9]{1,100}", found) else None


def _parse_levels(levels: str) -> list[int]:
    chosen: list[int] = []
    for part in str(levels).split(","):
        if not part.strip().isdecimal() or int(part) not in LEVELS:
            raise DataError(f"levels is {levels!r}; allowed: numbers from {min(LEVELS)} to {max(LEVELS)} with commas.")
        if int(part) not in chosen:
            chosen.append(int(part))
    return chosen
