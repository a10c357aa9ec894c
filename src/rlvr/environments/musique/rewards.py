"""MuSiQue's scores, from 0 to 1 (None: nothing to measure), and the reward that combines them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields

from rlvr.errors import EnvironmentDefinitionError
from rlvr.rewards import text
from rlvr.rewards.rubric import Rubric, WeightedReward
from rlvr.types import Trajectory


def exact_match(trajectory: Trajectory) -> float:
    """Exact match of the final answer with the answer or an alias; 0 without a final answer."""
    answer = _answer(trajectory)
    return 0.0 if answer is None else text.exact_match(answer, trajectory.example["references"])


def f1(trajectory: Trajectory) -> float:
    """F1 of the final answer, the best over the answer and its aliases; 0 without a final answer."""
    answer = _answer(trajectory)
    return 0.0 if answer is None else text.f1(answer, trajectory.example["references"])


def retrieval_recall(trajectory: Trajectory) -> float | None:
    """Share of the supporting documents that the policy has seen."""
    return recall(trajectory.state["seen"], trajectory.example["supporting"])


def retrieval_precision(trajectory: Trajectory) -> float | None:
    """Share of the documents seen that are supporting; 0 where none was seen."""
    return precision(trajectory.state["seen"], trajectory.example["supporting"])


def citation_recall(trajectory: Trajectory) -> float | None:
    """Share of the supporting documents that the answer cites."""
    return recall(_citations(trajectory), trajectory.example["supporting"])


def citation_precision(trajectory: Trajectory) -> float | None:
    """Share of the documents cited that are supporting; 0 where none is cited."""
    return precision(_citations(trajectory), trajectory.example["supporting"])


def support_f1(trajectory: Trajectory) -> float | None:
    """MuSiQue's support F1: harmonic mean of citation precision and citation recall."""
    p, r = citation_precision(trajectory), citation_recall(trajectory)
    if p is None or r is None:
        return None
    return 2 * p * r / (p + r) if p + r else 0.0


def format_reward(trajectory: Trajectory) -> float:
    """1 if the rollout gave a final answer that is not empty, and no tool call failed."""
    return float(bool((_answer(trajectory) or "").strip()) and trajectory.failed_calls == 0)


def turns(trajectory: Trajectory) -> float:
    """Number of assistant turns."""
    return float(len(trajectory.turns))


def precision(found: Collection[int], wanted: Collection[int]) -> float | None:
    if not wanted:
        return None
    return len(set(found) & set(wanted)) / len(set(found)) if found else 0.0


def recall(found: Collection[int], wanted: Collection[int]) -> float | None:
    return len(set(found) & set(wanted)) / len(set(wanted)) if wanted else None


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Weights of the combined reward. `citation` weighs support F1."""

    exact_match: float = 0.9
    f1: float = 1.0
    retrieval_recall: float = 1.0
    retrieval_precision: float = 0.4
    citation: float = 0.6
    format: float = 0.1

    def __post_init__(self) -> None:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        negative = [name for name, value in values.items() if not value >= 0]
        if negative or not any(values.values()):
            raise EnvironmentDefinitionError(
                f"the weights of MuSiQue's reward are {values}; none may be below 0, and one must be above."
            )


SCORES = {
    "exact_match": exact_match,
    "f1": f1,
    "retrieval_recall": retrieval_recall,
    "retrieval_precision": retrieval_precision,
    "citation": support_f1,
    "format": format_reward,
}
"""What each of the weights weighs."""


def musique_rubric(weights: Weights) -> Rubric:
    """The combined reward, which is trained on, and every score by itself at weight 0.

    reward = hops / 2 · Σ weight · score / Σ weight, over the scores that apply.
    """

    def reward(trajectory: Trajectory) -> float:
        scores = {name: score(trajectory) for name, score in SCORES.items()}
        applicable = [(getattr(weights, name), score) for name, score in scores.items() if score is not None]
        total = sum(weight for weight, _ in applicable)
        mean = sum(weight * score for weight, score in applicable) / total if total else 0.0
        return trajectory.example["hops"] / 2 * mean

    metrics = (f1, support_f1, retrieval_recall, retrieval_precision, citation_precision, citation_recall)
    return Rubric(
        (exact_match, 0.0),  # first: what counts as solved, for pass@1
        reward,
        *((metric, 0.0) for metric in metrics),
        WeightedReward(format_reward, 0.0, name="format"),
        (turns, 0.0),
    )


def _answer(trajectory: Trajectory) -> str | None:
    return trajectory.state.get("answer")


def _citations(trajectory: Trajectory) -> list[int]:
    return trajectory.state.get("citations", [])
