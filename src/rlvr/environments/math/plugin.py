"""Entry point of the environment `math`."""

from __future__ import annotations

from rlvr.environments.base import Environment
from rlvr.plugins.hookspecs import hookimpl
from rlvr.rewards.math import MISSING, has_math_verify


@hookimpl
def rlvr_environment(
    datasets: str = "openai/gsm8k,main,train",
    eval_datasets: str | None = None,
    question_column: str | None = None,
    answer_column: str | None = None,
    system_prompt: str = "Solve the problem step by step. Put the final answer, alone, in \\boxed{}.",
    format_weight: float = 0.1,
    seed: int = 0,
    sample_size: int = 2000,
    sample_eval_size: int = 200,
) -> Environment:
    """Mathematics with answers that math-verify checks.

    Args:
        datasets: path,name,split;... as datasets.load_dataset takes them, local files, or sample: word problems
            made on the spot.
        eval_datasets: held-out problems, written like datasets.
        question_column: by default question, problem or prompt.
        answer_column: by default answer or solution; a worked solution will do.
        system_prompt: put before every problem.
        format_weight: weight of an answer in \\boxed{}.
        seed: of the sample.
        sample_size: problems of the sample to train on.
        sample_eval_size: problems of the sample held out.
    """
    from rlvr.environments.math import math

    return math(
        datasets=datasets,
        eval_datasets=eval_datasets,
        question_column=question_column,
        answer_column=answer_column,
        system_prompt=system_prompt,
        format_weight=format_weight,
        seed=seed,
        sample_size=sample_size,
        sample_eval_size=sample_eval_size,
    )


@hookimpl
def rlvr_environment_availability() -> str | None:
    return None if has_math_verify() else MISSING
