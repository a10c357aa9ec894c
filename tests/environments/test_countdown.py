from __future__ import annotations

import itertools
from fractions import Fraction

import pytest

from rlvr.environments.countdown import calculate
from rlvr.environments.countdown.plugin import rlvr_environment
from rlvr.errors import DataError
from rlvr.types import Trajectory, Turn


def reachable(numbers) -> set[Fraction]:
    """Every value that the numbers give, each used once."""
    if len(numbers) == 1:
        return {Fraction(numbers[0])}
    found = set()
    for i, j in itertools.permutations(range(len(numbers)), 2):
        rest = [n for k, n in enumerate(numbers) if k not in (i, j)]
        a, b = numbers[i], numbers[j]
        for value in [a + b, a - b, a * b] + ([Fraction(a) / b] if b else []):
            found |= reachable([*rest, value])
    return found


def test_every_puzzle_has_a_solution():
    env = rlvr_environment(train_size=30, eval_size=10)
    for row in [*env.train_dataset, *env.eval_dataset]:
        assert Fraction(row["target"]) in reachable(row["numbers"])
        assert str(row["target"]) in row["question"]
    assert len(env.train_dataset) == 30
    assert {len(row["numbers"]) for row in rlvr_environment(numbers=4, train_size=5, eval_size=1).train_dataset} == {4}


def test_splits_never_overlap():
    def puzzles(name):
        rows = [row for seed in range(3) for row in getattr(rlvr_environment(seed=seed, train_size=500), name)]
        return {(tuple(sorted(row["numbers"])), row["target"]) for row in rows}

    assert not puzzles("train_dataset") & puzzles("eval_dataset")


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1 + 2*3", (7, [1, 2, 3])),
        ("(1+2)/3", (1, [1, 2, 3])),
        ("1/3*3 = 1", (1, [1, 3, 3])),
        ("8÷4×2−1", (3, [1, 2, 4, 8])),
        ("2/(1-1)", None),
        ("-3+5", None),
        ("2**9", None),
        ("__import__('os').getpid()", None),
        ("a+1", None),
        ("1.5+1", None),
        ("True+1", None),
        ("1+", None),
        ("", None),
        ("1" + "+1" * 200, None),
        ("(" * 190 + "1", None),
    ],
)
def test_calculate(expression, value):
    assert calculate(expression) == value


@pytest.mark.parametrize(
    ("text", "solved", "form"),
    [
        ("so <answer>(3+4)*5</answer>", 1, 1),
        ("so <answer>5*(4+3) = 35</answer>", 1, 1),
        ("so <answer>35</answer>", 0, 1),
        ("so <answer>5*5+5+5</answer>", 0, 1),
        ("so <answer>3*5+4*5</answer>", 0, 1),
        ("so (3+4)*5", 0, 0),
        ("so <answer>three</answer>", 0, 0),
    ],
)
def test_rewards(text, solved, form):
    env = rlvr_environment(train_size=1, eval_size=1)
    row = {"question": "q", "numbers": [3, 4, 5], "target": 35}
    trajectory = Trajectory(row, (), (Turn({"role": "assistant", "content": text}),))
    assert env.rubric.score(trajectory) == {"solved": solved, "format": form}


@pytest.mark.parametrize("options", [{"numbers": 1}, {"numbers": 7}, {"largest": 5}, {"train_size": 0}])
def test_bad_options(options):
    with pytest.raises(DataError, match="numbers must be from 2 to 6"):
        rlvr_environment(**options)
