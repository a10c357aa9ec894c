"""Entry point of the environment `musique`."""

from __future__ import annotations

from rlvr.environments.base import Environment
from rlvr.plugins.hookspecs import hookimpl


@hookimpl
def rlvr_environment(
    datasets: str = "bdsaglam/musique,answerable,train",
    eval_datasets: str | None = None,
    noise: float = 1.0,
    retriever: str = "auto",
    answerable_only: bool = True,
    fewer_hops_first: bool = False,
    max_turns: int = 10,
    max_tool_failures: int = 5,
    exact_match_weight: float = 0.9,
    f1_weight: float = 1.0,
    retrieval_recall_weight: float = 1.0,
    retrieval_precision_weight: float = 0.4,
    citation_weight: float = 0.6,
    format_weight: float = 0.1,
    seed: int = 0,
    sample_size: int = 200,
    sample_eval_size: int = 60,
    sample_hops: str = "2,3,4",
    sample_paragraphs: int = 20,
    sample_words: int | None = None,
) -> Environment:
    """Multi-hop questions, answered with search tools (MuSiQue).

    Args:
        datasets: path,name,split;... as datasets.load_dataset takes them, local files in MuSiQue's format, or
            sample: made-up questions, for tests and demonstrations.
        eval_datasets: held-out questions, written like datasets.
        noise: share of the paragraphs that do not support the answer which is kept, 0 to 1.
        retriever: auto, lexical, semantic[/MODEL], hybrid[/MODEL] or golden.
        answerable_only: leave out the questions that cannot be answered.
        fewer_hops_first: train on questions of fewer hops first.
        max_turns: assistant messages at most.
        max_tool_failures: failed tool calls allowed.
        exact_match_weight: weight of the answer's exact match in the reward.
        f1_weight: weight of the answer's F1.
        retrieval_recall_weight: weight of the share of supporting documents that were found.
        retrieval_precision_weight: weight of the share of found documents that are supporting.
        citation_weight: weight of the F1 of the cited documents.
        format_weight: weight of a rollout without failed calls and with a final answer.
        seed: decides which paragraphs are kept, and the sample.
        sample_size: questions of the sample to train on.
        sample_eval_size: questions of the sample held out.
        sample_hops: numbers of hops in the sample, with commas.
        sample_paragraphs: paragraphs of a question in the sample.
        sample_words: different words that the sample's names are made of; by default any.
    """
    from rlvr.environments.musique import musique
    from rlvr.environments.musique.rewards import Weights

    return musique(
        datasets=datasets,
        eval_datasets=eval_datasets,
        noise=noise,
        retriever=retriever,
        answerable_only=answerable_only,
        fewer_hops_first=fewer_hops_first,
        max_turns=max_turns,
        max_tool_failures=max_tool_failures,
        weights=Weights(
            exact_match=exact_match_weight,
            f1=f1_weight,
            retrieval_recall=retrieval_recall_weight,
            retrieval_precision=retrieval_precision_weight,
            citation=citation_weight,
            format=format_weight,
        ),
        seed=seed,
        sample_size=sample_size,
        sample_eval_size=sample_eval_size,
        sample_hops=sample_hops,
        sample_paragraphs=sample_paragraphs,
        sample_words=sample_words,
    )
