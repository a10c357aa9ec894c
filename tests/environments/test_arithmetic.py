from __future__ import annotations

import pytest

from rlvr.environments.arithmetic import LEVELS, TAG_PROMPT, arithmetic, is_held_out
from rlvr.environments.arithmetic.plugin import rlvr_environment
from rlvr.errors import DataError
from rlvr.types import Trajectory, Turn


def said(row, text):
    turn = Turn({"role": "assistant", "content": text})
    return Trajectory(row, ({"role": "user", "content": row["question"]},), (turn,))


def operands(row):
    return tuple(sorted(row["question"].rstrip("=").split("+")))


@pytest.mark.parametrize("level", LEVELS)
def test_answers_are_right(level):
    env = arithmetic(levels=str(level), train_size=300, eval_size=20)
    assert len(env.train_dataset) == 300
    for row in [*env.train_dataset, *env.eval_dataset]:
        assert int(row["answer"]) == eval(row["question"].rstrip("="))
        assert row["level"] == level
    assert env.messages(env.train_dataset[0]) == [{"role": "user", "content": env.train_dataset[0]["question"]}]


def test_no_problem_is_in_both_splits_whatever_the_seeds():
    train = {operands(row) for seed in range(3) for row in arithmetic(levels="1,2", seed=seed).train_dataset}
    held_out = {operands(row) for seed in range(3, 6) for row in arithmetic(levels="1,2", seed=seed).eval_dataset}
    assert not train & held_out
    assert held_out


def test_about_a_fifth_is_held_out():
    problems = [f"{a}+{b}" for a in range(100) for b in range(100)]
    assert 0.15 < sum(map(is_held_out, problems)) / len(problems) < 0.25
    assert is_held_out("3+14") == is_held_out("14+3")


def test_the_seed_decides():
    rows = [arithmetic(seed=seed).train_dataset for seed in (0, 0, 1)]
    assert rows[0] == rows[1] != rows[2]


def test_levels_are_even_and_eval_rows_are_different():
    env = arithmetic(levels="2, 4,2", train_size=101, eval_size=40)
    assert [sum(row["level"] == level for row in env.train_dataset) for level in (2, 4)] == [51, 50]
    assert len({row["question"] for row in env.eval_dataset}) == 40
    small = arithmetic(levels="1", train_size=500, eval_size=200)
    assert len(small.train_dataset) == 500
    assert 5 < len(small.eval_dataset) < 50


@pytest.mark.parametrize(
    ("text", "exact", "form"),
    [
        ("12", 1, 1),
        (" 12\n", 1, 1),
        ("012", 1, 1),
        ("13", 0, 1),
        ("12.", 0, 0),
        ("it is 12", 0, 0),
        ("", 0, 0),
        ("١٢", 0, 0),
    ],
)
def test_bare_answers(text, exact, form):
    scores = arithmetic().rubric.score(said({"question": "5+7=", "answer": "12"}, text))
    assert scores == {"exact_match": exact, "format": form}


@pytest.mark.parametrize(
    ("text", "exact", "form"),
    [
        ("so <answer>-2</answer>", 1, 1),
        ("<answer>2</answer>", 0, 1),
        ("-2", 0, 0),
        ("<answer>minus 2</answer>", 0, 0),
    ],
)
def test_tagged_answers(text, exact, form):
    env = arithmetic(answer_format="tags")
    assert env.messages(env.train_dataset[0])[0] == {"role": "system", "content": TAG_PROMPT}
    assert env.rubric.score(said({"question": "5-7=", "answer": "-2"}, text)) == {
        "exact_match": exact,
        "format": form,
    }
    assert env.rubric.weights == [1.0, 0.1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": "9"}, "levels is '9'; allowed: numbers from 1 to 6"),
        ({"levels": "one"}, "levels is 'one'"),
        ({"levels": ""}, "levels is ''"),
        ({"answer_format": "xml"}, "allowed: bare, tags"),
        ({"train_size": 0}, "train_size is 0"),
        ({"eval_size": -1}, "eval_size -1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(DataError, match=message):
        rlvr_environment(**options)


def test_the_plugin_makes_it():
    env = rlvr_environment(levels="1", train_size=10, eval_size=5)
    assert (env.name, len(env.train_dataset), env.group_metrics_by) == ("arithmetic", 10, "level")
