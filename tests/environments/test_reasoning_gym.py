from __future__ import annotations

import pytest

from rlvr.environments.reasoning_gym.plugin import rlvr_environment, rlvr_environment_availability
from rlvr.errors import DataError, EnvironmentDefinitionError
from rlvr.types import Trajectory, Turn

TASKS = [
    "leg_counting",
    "countdown",
    "mini_sudoku",
    "word_ladder",
    "chain_sum",
    "knights_knaves",
    "maze",
    "rubiks_cube",
]


def scores(env, row, text):
    return env.rubric.score(Trajectory(row, (), (Turn({"role": "assistant", "content": text}),)))


@pytest.mark.parametrize("task", TASKS)
def test_tasks(task):
    import datasets

    env = rlvr_environment(task, train_size=4, eval_size=3)
    assert env.name == f"reasoning-gym:{task}"
    assert len(env.train_dataset) == 4
    for row in [*env.train_dataset, *env.eval_dataset]:
        right = scores(env, row, f"so <answer>{row['answer']}</answer>")
        assert right["format"] == 1
        assert right["score"] >= 0.99 or task in ("countdown", "rubiks_cube")  # some have no single answer
        wrong = scores(env, row, "no idea")
        assert wrong["format"] == 0
        assert wrong["score"] <= 0.01  # what the library gives for trying
    assert datasets.Dataset.from_list(env.train_dataset).column_names == ["question", "answer", "split", "index"]


def test_the_library_scores_each_row_by_its_own_entry():
    env = rlvr_environment("chain_sum", train_size=20, eval_size=20)
    first, second = env.train_dataset[:2]
    assert scores(env, first, f"<answer>{first['answer']}</answer>")["score"] == 1
    assert scores(env, first, f"<answer>{second['answer']}</answer>")["score"] < 1
    held_out = env.eval_dataset[-1]
    assert scores(env, held_out, f"<answer>{held_out['answer']}</answer>")["score"] == 1


def test_no_question_is_in_both_splits():
    env = rlvr_environment(
        "chain_sum",
        train_size=300,
        eval_size=300,
        config='{"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}',
    )
    train = {row["question"] for row in env.train_dataset}
    assert not train & {row["question"] for row in env.eval_dataset or ()}
    assert len(env.eval_dataset or ()) < 300


def test_seeds():
    first, again, other = (rlvr_environment("chain_sum", train_size=5, eval_size=1, seed=s) for s in (1, 1, 2))
    assert first.train_dataset == again.train_dataset != other.train_dataset


@pytest.mark.parametrize(
    ("task", "options", "error", "message"),
    [
        ("leg_count", {}, EnvironmentDefinitionError, "no task 'leg_count'.*leg_counting"),
        ("", {}, EnvironmentDefinitionError, "write reasoning-gym:TASK"),
        ("chain_sum", {"config": "{"}, DataError, "is not JSON"),
        ("chain_sum", {"config": "[]"}, DataError, "must be a JSON object"),
        ("chain_sum", {"config": '{"min_terms": -4}'}, DataError, "refuses"),
        ("chain_sum", {"config": '{"no_such": 1}'}, DataError, "refuses"),
    ],
)
def test_bad_options(task, options, error, message):
    with pytest.raises(error, match=message):
        rlvr_environment(task, **options)


def test_availability(monkeypatch):
    assert rlvr_environment_availability() is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert 'pip install "rlvr[reasoning-gym]"' in rlvr_environment_availability()


def test_an_answer_that_the_library_cannot_score_counts_0(monkeypatch, caplog):
    from reasoning_gym.arithmetic.chain_sum import ChainSumDataset

    def broken(self, answer, entry):
        raise IndexError("no such cell")

    monkeypatch.setattr(ChainSumDataset, "score_answer", broken)
    env = rlvr_environment("chain_sum", train_size=1, eval_size=1)
    assert scores(env, env.train_dataset[0], "<answer>?</answer>") == {"score": 0, "format": 1}
    assert "no such cell" in caplog.text
