"""Mathematics with answers that math-verify checks: GSM8K, MATH, or data of their kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlvr.environments.base import Environment
from rlvr.environments.loading import Row, load_rows
from rlvr.environments.math.sample import sample_problems
from rlvr.errors import DataError
from rlvr.rewards.math import boxed, math_equal
from rlvr.rewards.rubric import Rubric, WeightedReward
from rlvr.rewards.text import tagged
from rlvr.types import Trajectory

SAMPLE = "sample"
DEFAULT_DATASETS = "openai/gsm8k,main,train"
DEFAULT_EVAL_DATASETS = "openai/gsm8k,main,test"
SYSTEM_PROMPT = "Solve the problem step by step. Put the final answer, alone, in \\boxed{}."
QUESTION_COLUMNS = ("question", "problem", "prompt")
ANSWER_COLUMNS = ("answer", "solution")
KEPT_COLUMNS = ("level", "subject", "type", "source")


def math(
    *,
    datasets: str = DEFAULT_DATASETS,
    eval_datasets: str | None = None,
    question_column: str | None = None,
    answer_column: str | None = None,
    system_prompt: str = SYSTEM_PROMPT,
    format_weight: float = 0.1,
    seed: int = 0,
    sample_size: int = 2000,
    sample_eval_size: int = 200,
) -> Environment:
    """Makes the environment.

    Args:
        datasets: `path,name,split;...`, local files, or `sample`: word problems made on the spot.
        eval_datasets: held-out problems, written alike; by default those of the default dataset and of the sample.
        question_column: by default question, problem or prompt.
        answer_column: by default answer or solution. In a worked solution the answer is what stands after `####`
            (GSM8K), or in the last `\\boxed{}` (MATH).
        system_prompt: put before every problem.
        format_weight: weight of an answer in `\\boxed{}` or `<answer>` tags, beside 1 for a right one.
        seed: of the sample.
        sample_size: problems of the sample; `sample_eval_size` those held out.

    Raises:
        DataError: a dataset, column or row that cannot be used.
    """
    if eval_datasets is None:
        eval_datasets = {DEFAULT_DATASETS: DEFAULT_EVAL_DATASETS, SAMPLE: SAMPLE}.get(datasets)

    def load(spec: str, *, held_out: bool) -> list[Row]:
        if spec == SAMPLE:
            return sample_problems(sample_eval_size if held_out else sample_size, seed=seed, held_out=held_out)
        rows = load_rows(spec, split="test" if held_out else "train")
        return _prepared(rows, spec, question_column=question_column, answer_column=answer_column)

    train = load(datasets, held_out=False)
    held_out = load(eval_datasets, held_out=True) if eval_datasets else None
    return Environment(
        name="math",
        train_dataset=train,
        eval_dataset=held_out,
        rubric=Rubric(correct, WeightedReward(answer_format, format_weight, name="format")),
        system_prompt=system_prompt or None,
        max_turns=1,
        group_metrics_by="level" if "level" in train[0] else None,
    )


def correct(trajectory: Trajectory) -> float:
    """1 if the final answer is equal to the row's."""
    return float(math_equal(trajectory.text, trajectory.example["answer"]))


def answer_format(trajectory: Trajectory) -> float:
    """1 if there is an answer in `\\boxed{}` or in `<answer>` tags."""
    return float(bool(boxed(trajectory.text) or tagged(trajectory.text)))


def final_answer(solution: str) -> str:
    """The answer of a worked solution: after `####`, or in the last `\\boxed{}`; else the text itself."""
    if "####" in solution:
        return solution.rpartition("####")[2].strip().replace(",", "")
    return boxed(solution) or solution.strip()


def _prepared(rows: list[Row], spec: str, *, question_column: str | None, answer_column: str | None) -> list[Row]:
    question = _column(rows, spec, question_column, QUESTION_COLUMNS, "--question-column")
    answer = _column(rows, spec, answer_column, ANSWER_COLUMNS, "--answer-column")
    prepared = []
    for number, row in enumerate(rows, 1):
        asked, solution = row.get(question), row.get(answer)
        if isinstance(solution, (int, float)) and not isinstance(solution, bool):
            solution = str(solution)
        for column, value in ((question, asked), (answer, solution)):
            if not isinstance(value, str) or not value.strip():
                raise DataError(f"row {number} of {spec!r} has {value!r} in {column!r}; a text is needed.")
        kept: dict[str, Any] = {column: row[column] for column in KEPT_COLUMNS if column in row}
        prepared.append({"question": asked, "answer": final_answer(str(solution)), **kept})
    return prepared


def _column(rows: list[Row], spec: str, named: str | None, usual: Sequence[str], option: str) -> str:
    candidates = [named] if named else list(usual)
    for column in candidates:
        if column in rows[0]:
            return column
    raise DataError(
        f"{spec!r} has no column {' or '.join(map(repr, candidates))}; its columns: {', '.join(rows[0])}. "
        f"Name it with {option}."
    )
