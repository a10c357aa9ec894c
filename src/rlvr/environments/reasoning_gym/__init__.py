"""The procedural tasks of the library reasoning-gym, scored by the library itself."""

from __future__ import annotations

import difflib
import json
import logging
from typing import Any

from rlvr.environments.base import Environment
from rlvr.errors import DataError, EnvironmentDefinitionError
from rlvr.rewards.rubric import Rubric, WeightedReward
from rlvr.rewards.text import tagged
from rlvr.types import Trajectory

logger = logging.getLogger(__name__)

SYSTEM_PROMPT = "Solve the problem. You may think first. Give the final answer between <answer> and </answer>."


def reasoning_gym(
    task: str,
    *,
    train_size: int = 2000,
    eval_size: int = 200,
    seed: int = 0,
    config: str = "",
    format_weight: float = 0.1,
) -> Environment:
    """Makes the environment of one task.

    Args:
        task: a dataset of reasoning-gym, for example leg_counting.
        train_size: problems to train on.
        eval_size: problems held out: of another seed, those that are among the train problems left out.
        seed: decides which problems are made.
        config: the task's own settings as a JSON object, for example `{"min_animals": 5}`.
        format_weight: weight of an answer in `<answer>` tags, beside 1 for the task's own score.

    Raises:
        EnvironmentDefinitionError: there is no such task.
        DataError: the settings are not a JSON object, or the task refuses them.
    """
    import reasoning_gym as library
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        close = difflib.get_close_matches(task, DATASETS, n=3) or sorted(DATASETS)[:5]
        raise EnvironmentDefinitionError(
            f"reasoning-gym has no task {task!r}; write reasoning-gym:TASK with one of its {len(DATASETS)} tasks, for "
            f"example {', '.join(close)}."
        )
    settings = _settings(config)
    try:
        train = library.create_dataset(task, size=train_size, seed=seed, **settings)
        held_out = library.create_dataset(task, size=eval_size, seed=seed + 1_000_003, **settings)
        entries = {"train": list(train), "eval": list(held_out)}
    except Exception as error:  # the library checks settings with bare asserts
        raise DataError(f"task {task!r} of reasoning-gym refuses {settings}: {error}") from error
    train_rows = [_row(entry, "train", i) for i, entry in enumerate(entries["train"])]
    known = {row["question"] for row in train_rows}
    eval_rows = [row for i, e in enumerate(entries["eval"]) if (row := _row(e, "eval", i))["question"] not in known]

    def score(trajectory: Trajectory) -> float:
        entry = entries[trajectory.example["split"]][trajectory.example["index"]]
        try:
            return float(train.score_answer(answer=tagged(trajectory.text), entry=entry))
        except Exception as error:  # some tasks raise over an answer that they cannot read
            logger.warning("task %r of reasoning-gym could not score an answer, which counts 0: %s", task, error)
            return 0.0

    return Environment(
        name=f"reasoning-gym:{task}",
        train_dataset=train_rows,
        eval_dataset=eval_rows or None,
        rubric=Rubric(score, WeightedReward(answer_format, format_weight, name="format")),
        system_prompt=SYSTEM_PROMPT,
        max_turns=1,
    )


def answer_format(trajectory: Trajectory) -> float:
    """1 if there is an answer in `<answer>` tags."""
    return float(bool(tagged(trajectory.text)))


def _row(entry: dict[str, Any], split: str, index: int) -> dict[str, Any]:
    """The entry's metadata stays behind: every task has other columns in it."""
    return {"question": entry["question"], "answer": str(entry["answer"]), "split": split, "index": index}


def _settings(config: str) -> dict[str, Any]:
    try:
        settings = json.loads(config or "{}")
    except json.JSONDecodeError as error:
        raise DataError(f"config is {config!r}, which is not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise DataError(f"config is {config!r}; it must be a JSON object.")
    return settings
