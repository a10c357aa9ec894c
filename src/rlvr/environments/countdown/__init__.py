"""Countdown: reach a number from given numbers with + - * /. Made on the spot, checked by calculating."""

from __future__ import annotations

import ast
import hashlib
import random
from fractions import Fraction
from typing import Any

from rlvr.environments.base import Environment
from rlvr.errors import DataError
from rlvr.rewards.rubric import Rubric, WeightedReward
from rlvr.rewards.text import tagged
from rlvr.types import Trajectory

HELD_OUT = 5  # one puzzle in so many is held out
MAX_EXPRESSION = 200  # characters


def countdown(
    *,
    numbers: int = 3,
    largest: int = 50,
    train_size: int = 2000,
    eval_size: int = 200,
    seed: int = 0,
    format_weight: float = 0.1,
) -> Environment:
    """Makes the environment. Every puzzle has a solution that uses each number exactly once.

    Whether a puzzle is held out is decided by a hash of it: no seed puts one into both splits.

    Args:
        numbers: how many numbers a puzzle has, 2 to 6.
        largest: the largest of them.
        train_size: puzzles to train on.
        eval_size: puzzles held out.
        seed: decides which.
        format_weight: weight of an expression that can be calculated, beside 1 for a right one.

    Raises:
        DataError: a number out of its range.
    """
    if not 2 <= numbers <= 6 or largest < 10 or min(train_size, eval_size) < 1:
        raise DataError(
            f"numbers is {numbers}, largest {largest}, train_size {train_size}, eval_size {eval_size}; numbers must "
            "be from 2 to 6, largest at least 10, and the sizes at least 1."
        )
    return Environment(
        name="countdown",
        train_dataset=_puzzles(train_size, numbers, largest, seed=seed, held_out=False),
        eval_dataset=_puzzles(eval_size, numbers, largest, seed=seed, held_out=True),
        rubric=Rubric(solved, WeightedReward(expression_format, format_weight, name="format")),
        max_turns=1,
    )


def solved(trajectory: Trajectory) -> float:
    """1 if the expression in the last `<answer>` tags uses each number exactly once and gives the target."""
    calculated = calculate(tagged(trajectory.text) or "")
    if calculated is None:
        return 0.0
    value, used = calculated
    return float(value == trajectory.example["target"] and used == sorted(trajectory.example["numbers"]))


def expression_format(trajectory: Trajectory) -> float:
    """1 if there is an expression in `<answer>` tags that can be calculated."""
    return float(calculate(tagged(trajectory.text) or "") is not None)


def calculate(expression: str) -> tuple[Fraction, list[int]] | None:
    """The value of an expression, exactly, and the numbers in it, sorted; None if it is not one.

    Whole numbers, + - * /, and parentheses; nothing else is looked at, and nothing is executed. What stands after
    an equals sign is left out.
    """
    expression = expression.split("=")[0].strip().replace("×", "*").replace("÷", "/").replace("−", "-")
    if not expression or len(expression) > MAX_EXPRESSION:
        return None
    used: list[int] = []
    try:
        value = _value(ast.parse(expression, mode="eval").body, used)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None
    return value, sorted(used)


def _value(node: ast.expr, used: list[int]) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left, used), _value(node.right, used)
        if isinstance(node.op, ast.Add):
            return left + right
        if isinstance(node.op, ast.Sub):
            return left - right
        if isinstance(node.op, ast.Mult):
            return left * right
        if isinstance(node.op, ast.Div):
            return left / right
    raise ValueError("not an expression of whole numbers, + - * / and parentheses")


def _puzzles(size: int, count: int, largest: int, *, seed: int, held_out: bool) -> list[dict[str, Any]]:
    rng = random.Random(f"{seed} {held_out}")
    rows: list[dict[str, Any]] = []
    while len(rows) < size:
        numbers = [rng.randint(1, largest) for _ in range(count)]
        target = _reachable(rng, numbers)
        digest = hashlib.sha256(f"{sorted(numbers)} {target}".encode()).digest()
        if target is None or (digest[0] % HELD_OUT == 0) != held_out:
            continue
        question = (
            f"Use the numbers {', '.join(map(str, numbers))}, each exactly once, with + - * / and parentheses to "
            f"make {target}. You may think first. Give the expression between <answer> and </answer>."
        )
        rows.append({"question": question, "numbers": numbers, "target": target})
    return rows


def _reachable(rng: random.Random, numbers: list[int]) -> int | None:
    """Combines the numbers at random, in whole numbers; None where the result is out of range."""
    values = list(numbers)
    while len(values) > 1:
        rng.shuffle(values)
        a, b = values.pop(), values.pop()
        results = [a + b, abs(a - b), a * b]
        if b and a % b == 0:
            results.append(a // b)
        values.append(rng.choice(results))
    return values[0] if 1 <= values[0] <= 999 else None
