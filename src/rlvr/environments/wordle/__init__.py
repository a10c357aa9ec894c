"""Wordle: the policy guesses a word of five letters, and the environment answers."""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter
from collections.abc import MutableMapping
from typing import Any

from rlvr.environments.base import Environment
from rlvr.environments.wordle.words import WORDS
from rlvr.errors import DataError
from rlvr.rewards.rubric import Rubric, WeightedReward
from rlvr.rewards.text import tagged
from rlvr.types import Example, Message, Trajectory

HELD_OUT = 5  # one word in so many is held out
LENGTH = 5
RULES = (
    "Guess my English word of five letters. You have {guesses} guesses. Write each as <guess>word</guess>. I answer "
    "with a letter for each place: G, the letter is right; Y, it is in the word, but elsewhere; X, it is not in it."
)


def wordle(
    *,
    guesses: int = 6,
    train_size: int | None = None,
    eval_size: int | None = None,
    seed: int = 0,
    progress_weight: float = 0.2,
    format_weight: float = 0.1,
) -> Environment:
    """Makes the environment. Whether a word is held out is decided by a hash of it.

    Args:
        guesses: guesses at most.
        train_size: words to train on; all by default.
        eval_size: words held out; all by default.
        seed: of the order.
        progress_weight: weight of the most letters that a guess had right, as a share, beside 1 for the word.
        format_weight: weight of the share of turns that held a proper guess.

    Raises:
        DataError: a number below 1.
    """
    if min(guesses, 1 if train_size is None else train_size, 1 if eval_size is None else eval_size) < 1:
        raise DataError(f"guesses is {guesses}, train_size {train_size}, eval_size {eval_size}; at least 1 is needed.")
    return Wordle(
        name="wordle",
        train_dataset=_rows(train_size, guesses, seed=seed, held_out=False),
        eval_dataset=_rows(eval_size, guesses, seed=seed, held_out=True),
        rubric=Rubric(
            solved,
            (progress, progress_weight),
            WeightedReward(guess_format, format_weight, name="format"),
            (turns, 0.0),
        ),
        max_turns=guesses,
    )


class Wordle(Environment):
    """`state["guesses"]`: the proper guesses, in order."""

    def new_state(self, example: Example) -> MutableMapping[str, Any]:
        return {"guesses": []}

    def respond(self, trajectory: Trajectory) -> list[Message]:
        guess = (tagged(trajectory.text, "guess") or "").lower()
        if not re.fullmatch(f"[a-z]{{{LENGTH}}}", guess):
            return [{"role": "user", "content": "That is no guess. Write <guess>word</guess>, with five letters."}]
        trajectory.state["guesses"].append(guess)
        if guess == trajectory.example["answer"]:
            trajectory.state["done"] = True
            return []
        marks = feedback(guess, trajectory.example["answer"])
        return [{"role": "user", "content": f"{' '.join(guess.upper())}\n{' '.join(marks)}"}]


def feedback(guess: str, answer: str) -> str:
    """G, Y or X for each letter. A letter is marked Y only as often as the answer has it elsewhere."""
    left = Counter(a for g, a in zip(guess, answer, strict=True) if g != a)
    marks = []
    for g, a in zip(guess, answer, strict=True):
        if g == a:
            marks.append("G")
        elif left[g] > 0:
            left[g] -= 1
            marks.append("Y")
        else:
            marks.append("X")
    return "".join(marks)


def solved(trajectory: Trajectory) -> float:
    """1 if the word was found."""
    return float(trajectory.example["answer"] in trajectory.state["guesses"])


def progress(trajectory: Trajectory) -> float:
    """The most letters that a guess had in their right places, as a share of five."""
    marks = [feedback(guess, trajectory.example["answer"]) for guess in trajectory.state["guesses"]]
    return max((mark.count("G") for mark in marks), default=0) / LENGTH


def guess_format(trajectory: Trajectory) -> float:
    """Share of the turns that held a proper guess."""
    return len(trajectory.state["guesses"]) / max(1, len(trajectory.turns))


def turns(trajectory: Trajectory) -> float:
    """Number of turns."""
    return float(len(trajectory.turns))


def _rows(size: int | None, guesses: int, *, seed: int, held_out: bool) -> list[dict[str, Any]]:
    words = [w for w in WORDS if (hashlib.sha256(w.encode()).digest()[0] % HELD_OUT == 0) == held_out]
    random.Random(seed).shuffle(words)
    return [{"question": RULES.format(guesses=guesses), "answer": word} for word in words[:size]]
