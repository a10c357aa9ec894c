"""The user's own questions and answers as an environment."""

from __future__ import annotations

import inspect
import json
import random
from collections.abc import Callable
from typing import Any

from rlvr.environments.base import Environment
from rlvr.environments.loading import Row, load_rows
from rlvr.errors import DataError, EnvironmentDefinitionError
from rlvr.imports import import_named
from rlvr.rewards.rubric import RewardFunction, Rubric, WeightedReward
from rlvr.rewards.text import answer_in, contains_answer, f1, same_answer
from rlvr.types import Trajectory

QUESTION_COLUMNS = ("question", "prompt")
REFERENCES = "references"  # the column that the text rewards read: a list of strings


def _scored_by(score: Callable[[str, list[str]], float], name: str) -> WeightedReward:
    def reward(trajectory: Trajectory) -> float:
        return score(answer_in(trajectory.text), trajectory.example[REFERENCES])

    return WeightedReward(reward, 1.0, name=name)


REWARDS = {
    "exact-match": _scored_by(same_answer, "exact_match"),
    "f1": _scored_by(f1, "f1"),
    "contains": _scored_by(contains_answer, "contains"),
}


def dataset(
    *,
    datasets: str,
    reward: str = "exact-match",
    question_column: str | None = None,
    answer_column: str = "answer",
    system_prompt: str | None = None,
    eval_datasets: str | None = None,
    eval_fraction: float = 0.1,
    seed: int = 0,
) -> Environment:
    """Makes the environment; everything that can be wrong with the data is found here.

    The text rewards compare what stands in the last `<answer>` tags of a completion, or the whole completion
    where there are none. An answer may be a text, a number, or a list of texts that all count; exact-match
    compares numbers by value.

    Args:
        datasets: `path[,name[,split]]`, several separated by `;`; see `load_rows`.
        reward: exact-match, f1, contains, or `module:function` (also `file.py:function`): a function that
            takes a trajectory, or one that takes completions and columns as TRL's reward functions do.
        question_column: text or messages; by default `question`, else `prompt`.
        answer_column: not needed by a function.
        system_prompt: put before every question.
        eval_datasets: held-out rows, written like `datasets`; the `test` split where a dataset names none.
        eval_fraction: share of the questions held out where `eval_datasets` is not given; 0 for none.
        seed: decides which.

    Raises:
        DataError: a dataset, column or row that cannot be used.
        EnvironmentDefinitionError: the reward is not known or cannot be loaded.
    """
    if not datasets:
        raise DataError("the environment 'dataset' needs --datasets, for example --datasets my.jsonl.")
    if not 0 <= eval_fraction < 1:
        raise DataError(f"eval_fraction is {eval_fraction}; allowed: from 0 up to, and without, 1.")
    chosen = REWARDS[reward] if reward in REWARDS else WeightedReward(load_reward(reward))
    columns: dict[str, Any] = {
        "question_column": question_column,
        "answer_column": answer_column,
        "needs_answer": reward in REWARDS,
    }
    train = _check(load_rows(datasets), datasets, **columns)
    held_out: list[Row] = []
    if eval_datasets:
        held_out = _check(load_rows(eval_datasets, split="test"), eval_datasets, **columns)
    elif eval_fraction:
        train, held_out = _hold_out(train, eval_fraction, seed)
    return Environment(
        name="dataset",
        train_dataset=train,
        eval_dataset=held_out or None,
        rubric=Rubric(chosen),
        system_prompt=system_prompt or None,
        max_turns=1,
    )


def load_reward(spec: str) -> RewardFunction:
    """The reward function that `module:function` or `file.py:function` names, as one that takes a trajectory.

    Raises:
        EnvironmentDefinitionError: it cannot be found or loaded, or is no function.
    """
    if ":" not in spec:
        raise EnvironmentDefinitionError(
            f"unknown reward {spec!r}; allowed: {', '.join(REWARDS)}, or 'module:function' of your own."
        )
    function = import_named(spec, what="reward")
    if not callable(function):
        raise EnvironmentDefinitionError(f"reward {spec!r} is of type {type(function).__name__}; name a function.")
    return from_trl(function) if _is_trl_style(function) else function


def from_trl(function: Callable[..., Any]) -> RewardFunction:
    """A reward function in TRL's form, `(prompts, completions, **columns) -> list`, as one of a trajectory.

    It is given conversations: each completion is a list of messages.
    """
    takes_all = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())
    names = set(inspect.signature(function).parameters)

    def reward(trajectory: Trajectory) -> float | None:
        given = {name: [value] for name, value in trajectory.example.items()}
        given |= {"prompts": [list(trajectory.prompt)], "completions": [trajectory.completion]}
        values = function(**(given if takes_all else {k: v for k, v in given.items() if k in names}))
        if not isinstance(values, (list, tuple)) or len(values) != 1:
            raise ValueError(f"one completion was given, so a list of one reward must come back; got {values!r}")
        return values[0]

    reward.__name__ = getattr(function, "__name__", type(function).__name__)
    return reward


def _is_trl_style(function: Callable[..., Any]) -> bool:
    return "completions" in inspect.signature(function).parameters


def _check(
    rows: list[Row], spec: str, *, question_column: str | None, answer_column: str, needs_answer: bool
) -> list[Row]:
    """The rows with the column `prompt`, and `references` if need be; the first bad row is an error."""
    present = list(dict.fromkeys(column for row in rows for column in row))
    candidates = [question_column] if question_column else list(QUESTION_COLUMNS)
    question = next((column for column in candidates if column in present), None)
    if question is None:
        raise DataError(
            f"{spec!r} has no column {' or '.join(map(repr, candidates))}; its columns: "
            f"{', '.join(present)}. Name the one with the questions with --question-column."
        )
    if question != "prompt" and "prompt" in present and not needs_answer:
        raise DataError(
            f"{spec!r} has a column 'prompt', which a reward function may read, and the questions in {question!r} "
            "would replace it. Rename it, or use --question-column prompt."
        )
    if needs_answer and answer_column not in present:
        raise DataError(
            f"{spec!r} has no column {answer_column!r}; its columns: {', '.join(present)}. "
            "Name the one with the answers with --answer-column."
        )
    checked = []
    for number, row in enumerate(rows, 1):
        where = f"row {number} of {spec!r}"
        added = {"prompt": _question(row.get(question), question, where)}
        if needs_answer:
            added[REFERENCES] = _references(row.get(answer_column), answer_column, where)
        checked.append({**row, **added})
    return checked


def _question(value: Any, column: str, where: str) -> Any:
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} has {value!r} in {column!r}, and half a surrogate pair is no character: {error}. Mend the row."
        ) from error
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, list) and value and all(isinstance(m, dict) and m.get("role") for m in value):
        return value
    raise DataError(f"{where} has {value!r} in {column!r}; a question is a text that is not empty, or messages.")


def _references(value: Any, column: str, where: str) -> list[str]:
    values = value if isinstance(value, (list, tuple)) else [value]
    texts = [_text(item) for item in values if isinstance(item, (str, int, float)) and not isinstance(item, bool)]
    if not texts or len(texts) < len(values) or not any(text.strip() for text in texts):
        raise DataError(
            f"{where} has {value!r} in {column!r}; an answer is a text, a number, or a list of texts, and not empty."
        )
    return texts


def _text(value: str | int | float) -> str:
    """Files of columns keep whole numbers as floats: 42.0 is 42."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _hold_out(rows: list[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Splits by question: rows that ask the same are on the same side."""
    questions = list(dict.fromkeys(str(row["prompt"]) for row in rows))
    if len(questions) < 2:
        return rows, []
    count = min(max(round(len(questions) * fraction), 1), len(questions) - 1)
    held_out = set(random.Random(seed).sample(questions, count))
    return (
        [row for row in rows if str(row["prompt"]) not in held_out],
        [row for row in rows if str(row["prompt"]) in held_out],
    )
