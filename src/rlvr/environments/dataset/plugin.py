"""Entry point of the environment `dataset`."""

from __future__ import annotations

from rlvr.environments.base import Environment
from rlvr.plugins.hookspecs import hookimpl


@hookimpl
def rlvr_environment(
    datasets: str = "",
    reward: str = "exact-match",
    question_column: str | None = None,
    answer_column: str = "answer",
    system_prompt: str | None = None,
    eval_datasets: str | None = None,
    eval_fraction: float = 0.1,
    seed: int = 0,
) -> Environment:
    """Your own questions and answers.

    Args:
        datasets: a .jsonl, .json, .parquet or .csv file, or path[,name[,split]] as datasets.load_dataset
            takes it; several separated by ';'.
        reward: exact-match, f1, contains, or my_module:my_function.
        question_column: column with the questions; by default question or prompt.
        answer_column: column with the answers.
        system_prompt: put before every question.
        eval_datasets: held-out rows, written like datasets.
        eval_fraction: share of the questions held out where eval_datasets is not given.
        seed: decides which questions are held out.
    """
    from rlvr.environments.dataset import dataset

    return dataset(
        datasets=datasets,
        reward=reward,
        question_column=question_column,
        answer_column=answer_column,
        system_prompt=system_prompt,
        eval_datasets=eval_datasets,
        eval_fraction=eval_fraction,
        seed=seed,
    )
