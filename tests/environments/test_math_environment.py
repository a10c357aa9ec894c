from __future__ import annotations

import json
import re

import pytest

from rlvr.environments.math import final_answer
from rlvr.environments.math.plugin import rlvr_environment, rlvr_environment_availability
from rlvr.environments.math.sample import sample_problems
from rlvr.errors import DataError
from rlvr.types import Trajectory, Turn


def scores(env, row, text):
    turn = Turn({"role": "assistant", "content": text})
    return env.rubric.score(Trajectory(row, tuple(env.messages(row)), (turn,)))


def solve(question: str) -> int:
    """Reads a made-up problem sentence by sentence."""
    count = 0
    for sentence in question.split(". "):
        numbers = [int(number) for number in re.findall(r"\d+", sentence)]
        if " has " in sentence:
            count = numbers[0]
        elif " buys " in sentence:
            count += numbers[0] * numbers[1]
        elif " gives away " in sentence:
            count -= numbers[0]
        elif "friend brings" in sentence:
            count += numbers[0]
        elif " doubles " in sentence:
            count *= 2
        elif " heaps " in sentence:
            assert count % numbers[0] == 0
            count //= numbers[0]
        else:
            assert sentence.startswith("How many")
    return count


def test_sample_answers_are_right():
    rows = sample_problems(200, seed=1)
    assert all(solve(row["question"]) == int(row["answer"]) >= 0 for row in rows)
    assert {row["level"] for row in rows} == {1, 2, 3, 4}
    assert len({row["question"] for row in rows}) == 200
    assert rows == sample_problems(200, seed=1) != sample_problems(200, seed=2)


def test_sample_splits_never_overlap():
    train = {row["question"] for seed in range(3) for row in sample_problems(300, seed=seed)}
    held_out = {row["question"] for seed in range(3) for row in sample_problems(300, seed=seed, held_out=True)}
    assert not train & held_out


def test_the_sample_environment():
    env = rlvr_environment(datasets="sample", sample_size=8, sample_eval_size=4)
    assert (len(env.train_dataset), len(env.eval_dataset), env.group_metrics_by) == (8, 4, "level")
    row = env.train_dataset[0]
    assert scores(env, row, f"so \\boxed{{{row['answer']}}}") == {"correct": 1, "format": 1}
    assert scores(env, row, f"so {row['answer']}") == {"correct": 1, "format": 0}
    assert scores(env, row, "\\boxed{-7}") == {"correct": 0, "format": 1}
    assert env.messages(row)[0]["role"] == "system"


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        ("3 + 4 = <<3+4=7>>7\n#### 1,234", "1234"),
        ("Thus $x = \\boxed{\\frac{1}{2}}$.", "\\frac{1}{2}"),
        (" 5 ", "5"),
    ],
)
def test_final_answers_of_solutions(solution, answer):
    assert final_answer(solution) == answer


def test_published_formats(tmp_path):
    gsm = tmp_path / "gsm.jsonl"
    gsm.write_text(json.dumps({"question": "3+4?", "answer": "so 7\n#### 7"}))
    env = rlvr_environment(datasets=str(gsm))
    assert list(env.train_dataset) == [{"question": "3+4?", "answer": "7"}]
    assert env.eval_dataset is None
    math = tmp_path / "math.jsonl"
    row = {"problem": "Half?", "solution": "It is $\\boxed{\\frac{1}{2}}$.", "level": "Level 1", "type": "Algebra"}
    math.write_text(json.dumps(row))
    env = rlvr_environment(datasets=str(math), eval_datasets=str(gsm))
    assert env.group_metrics_by == "level"
    assert scores(env, env.train_dataset[0], "\\boxed{0.5}")["correct"] == 1
    assert len(env.eval_dataset) == 1
    own = tmp_path / "own.jsonl"
    own.write_text(json.dumps({"ask": "3+4?", "gold": 7}))
    env = rlvr_environment(datasets=str(own), question_column="ask", answer_column="gold")
    assert env.train_dataset[0]["answer"] == "7"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a", "answer": "1"}, "no column 'question' or 'problem' or 'prompt'; its columns: text, answer"),
        ({"question": "a"}, "no column 'answer' or 'solution'"),
        ({"question": "a", "answer": None}, "row 1 .* has None in 'answer'"),
        ({"question": "", "answer": "1"}, "row 1 .* has '' in 'question'"),
    ],
)
def test_data_that_cannot_be_used(tmp_path, row, message):
    file = tmp_path / "bad.jsonl"
    file.write_text(json.dumps(row))
    with pytest.raises(DataError, match=message):
        rlvr_environment(datasets=str(file))


def test_availability(monkeypatch):
    from rlvr.environments.math import plugin

    assert rlvr_environment_availability() is None
    monkeypatch.setattr(plugin, "has_math_verify", lambda: False)
    assert 'pip install "rlvr[math]"' in rlvr_environment_availability()
