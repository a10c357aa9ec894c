"""MuSiQue: questions of 2 to 4 hops, answered with search tools over some 20 paragraphs. arXiv:2108.00573."""

from __future__ import annotations

from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from rlvr.environments.base import Environment
from rlvr.environments.musique.data import SAMPLE, UNANSWERABLE, load_questions
from rlvr.environments.musique.retrieval import Retriever, make_retriever
from rlvr.environments.musique.rewards import Weights, musique_rubric
from rlvr.environments.musique.tools import MusiqueTools, new_state
from rlvr.errors import DataError
from rlvr.types import Example

DEFAULT_DATASETS = "bdsaglam/musique,answerable,train"
DEFAULT_EVAL_DATASETS = "bdsaglam/musique,answerable,validation"
SYSTEM_PROMPT = (
    "Answer the question from documents that you find with the tools. It takes several steps: search for one fact at "
    "a time, and use what you find in the next search. When you know the answer, call complete with a short final "
    "answer and the numbers of the documents that it rests on."
)
UNANSWERABLE_PROMPT = f' If the documents do not hold the answer, the final answer is "{UNANSWERABLE}".'


class MusiqueEnvironment(Environment):
    """An environment whose rollouts start with their question's paragraphs."""

    def new_state(self, example: Example) -> MutableMapping[str, Any]:
        return new_state(example)


def musique(
    *,
    datasets: str = DEFAULT_DATASETS,
    eval_datasets: str | None = None,
    noise: float = 1.0,
    retriever: str | Retriever = "auto",
    answerable_only: bool = True,
    fewer_hops_first: bool = False,
    max_turns: int = 10,
    max_tool_failures: int | None = 5,
    weights: Weights | None = None,
    seed: int = 0,
    sample_size: int = 200,
    sample_eval_size: int = 60,
    sample_hops: str = "2,3,4",
    sample_paragraphs: int = 20,
    sample_words: int | None = None,
    cache_folder: str | Path | None = None,
) -> Environment:
    """Makes the environment.

    Args:
        datasets: `path,name,split;...`, local files in MuSiQue's format, or `sample`; see `load_questions`.
        eval_datasets: held-out questions, written alike; by default the validation split of the default
            dataset, and held-out questions of the sample for the sample.
        noise: share of the paragraphs that do not support the answer which is kept.
        retriever: a name that `make_retriever` knows, or a retriever.
        answerable_only: leaves out the questions that cannot be answered.
        fewer_hops_first: orders the train questions by their number of hops.
        max_turns: assistant messages at most.
        max_tool_failures: failed tool calls allowed.
        weights: of the combined reward.
        seed: decides noise and sample.
        sample_size: train questions of the sample; `sample_eval_size` those held out.
        sample_hops: numbers of hops of the sample's questions, with commas.
        sample_paragraphs: paragraphs of a question of the sample.
        sample_words: different words that the sample's names are made of; None: any.
        cache_folder: where embeddings are kept.

    Raises:
        DataError: a dataset that cannot be used.
        EnvironmentDefinitionError: a retriever or weights that cannot be used.
    """
    found = make_retriever(retriever, cache_folder=cache_folder) if isinstance(retriever, str) else retriever
    if eval_datasets is None:
        eval_datasets = {DEFAULT_DATASETS: DEFAULT_EVAL_DATASETS, SAMPLE: SAMPLE}.get(datasets)
    common: dict[str, Any] = {
        "noise": noise,
        "answerable_only": answerable_only,
        "seed": seed,
        "sample_hops": _hops(sample_hops),
        "sample_paragraphs": sample_paragraphs,
        "sample_words": sample_words,
    }
    train = load_questions(datasets, sample_size=sample_size, fewer_hops_first=fewer_hops_first, **common)
    held_out = None
    if eval_datasets:
        held_out = load_questions(eval_datasets, split="validation", sample_size=sample_eval_size, **common)
    return MusiqueEnvironment(
        name="musique",
        train_dataset=train,
        eval_dataset=held_out,
        rubric=musique_rubric(weights or Weights()),
        system_prompt=SYSTEM_PROMPT + ("" if answerable_only else UNANSWERABLE_PROMPT),
        tools=MusiqueTools(found).functions,
        max_turns=max_turns,
        max_tool_failures=max_tool_failures,
        group_metrics_by="hops",
        keeps_order=fewer_hops_first,
    )


def _hops(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in str(text).split(",")]
    if not all(part.isdecimal() for part in parts):
        raise DataError(f"sample_hops is {text!r}; give numbers with commas, for example 2,3,4.")
    return tuple(int(part) for part in parts)
