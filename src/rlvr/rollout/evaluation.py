"""Evaluation: plays held-out examples N times each and says what share was solved. It generates and scores, no more.

An attempt passes if the first reward function of the environment's rubric gives it 1 or more: an environment puts
first what "solved" means (its weight may be 0).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import comb
from typing import Any

from rlvr.environments.base import Environment
from rlvr.errors import ConfigError
from rlvr.rollout.engine import RolloutEngine
from rlvr.rollout.tool_calls import ToolCallParser
from rlvr.types import Example, StopReason, Trajectory

PASSING = 1.0


@dataclass(frozen=True)
class ScoredTrajectory:
    """An attempt at an example. `reward` and `passed` are None where it does not count: infrastructure failed."""

    example: int  # index of the row
    trajectory: Trajectory
    rewards: Mapping[str, float | None]
    reward: float | None
    passed: bool | None
    tokens: int  # of the completion


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What an evaluation found.

    `metrics` maps `reward`, each reward function's name and `pass@1` to means over the examples, and `pass@N` too
    where there were N > 1 attempts. `groups` has the same for each value of `Environment.group_metrics_by`.
    """

    metrics: dict[str, float]
    groups: dict[str, dict[str, float]]
    stop_reasons: dict[str, float]  # shares of all attempts
    examples: int
    samples: int
    excluded: int  # attempts that infrastructure failures took out
    tokens: int  # of all completions
    trajectories: list[ScoredTrajectory] = field(repr=False)

    def as_json(self) -> dict[str, Any]:
        """Without the trajectories."""
        names = ("metrics", "groups", "stop_reasons", "examples", "samples", "excluded", "tokens")
        return {name: getattr(self, name) for name in names}


def evaluate_policy(
    environment: Environment,
    engine: RolloutEngine,
    renderer: Any,
    *,
    max_completion_tokens: int,
    samples: int = 1,
    limit: int | None = None,
    batch_size: int = 64,
    parser: str | ToolCallParser | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Plays the held-out examples and scores them.

    Args:
        environment: its `eval_dataset` is played; the train dataset if there is none.
        engine: samples; its settings decide between greedy and random.
        renderer: a `ChatRenderer` made with the environment's tools.
        samples: N, attempts at each example.
        limit: examples to play, from the first; None for all.
        batch_size: rollouts that are played at the same time.
        parser: of tool calls; by default found from the chat template.
        on_progress: called with (attempts played, all).

    Raises:
        RewardError: a reward function failed.
    """
    from rlvr.rollout.episodes import play

    rows = evaluation_rows(environment, limit)
    attempts = [index for index in range(len(rows)) for _ in range(samples)]
    scored: list[ScoredTrajectory] = []
    for start in range(0, len(attempts), batch_size):
        batch = attempts[start : start + batch_size]
        rollouts = play(
            environment,
            [rows[index] for index in batch],
            engine=engine,
            renderer=renderer,
            max_completion_tokens=max_completion_tokens,
            parser=parser,
        )
        for index, rollout in zip(batch, rollouts, strict=True):
            scored.append(score(environment, index, rollout.trajectory, tokens=len(rollout.completion_ids)))
        if on_progress is not None:
            on_progress(len(scored), len(attempts))
    return summarise(environment, rows, scored, samples=samples)


def evaluation_rows(environment: Environment, limit: int | None) -> list[Example]:
    dataset = environment.eval_dataset if environment.eval_dataset is not None else environment.train_dataset
    return [dataset[index] for index in range(len(dataset) if limit is None else min(limit, len(dataset)))]


def score(environment: Environment, example: int, trajectory: Trajectory, *, tokens: int) -> ScoredTrajectory:
    rubric = environment.rubric
    if trajectory.stop_reason is StopReason.INFRASTRUCTURE:
        return ScoredTrajectory(example, trajectory, dict.fromkeys(rubric.names), None, None, tokens)
    rewards = rubric.score(trajectory)
    first = rewards[rubric.names[0]]
    passed = first is not None and first >= PASSING
    return ScoredTrajectory(example, trajectory, rewards, rubric.total(rewards), passed, tokens)


def summarise(
    environment: Environment, rows: Sequence[Example], scored: Sequence[ScoredTrajectory], *, samples: int
) -> Evaluation:
    """The numbers of scored attempts."""
    groups: dict[str, list[ScoredTrajectory]] = {}
    if environment.group_metrics_by is not None:
        for item in scored:
            value = rows[item.example].get(environment.group_metrics_by)
            groups.setdefault(f"{environment.group_metrics_by}={value}", []).append(item)
    reasons = Counter(str(item.trajectory.stop_reason) for item in scored)
    return Evaluation(
        metrics=_means(scored, samples),
        groups={name: _means(members, samples) for name, members in sorted(groups.items())},
        stop_reasons={reason: count / len(scored) for reason, count in sorted(reasons.items())},
        examples=len(rows),
        samples=samples,
        excluded=sum(item.passed is None for item in scored),
        tokens=sum(item.tokens for item in scored),
        trajectories=list(scored),
    )


def pass_at_k(attempts: int, passed: int, k: int) -> float:
    """Chance that one of k attempts passes, estimated without bias from n ≥ k attempts (Chen et al. 2021,
    arXiv:2107.03374): 1 - C(n - c, k) / C(n, k).

    Raises:
        ConfigError: fewer attempts than k.
    """
    if not 1 <= k <= attempts:
        raise ConfigError(f"pass@{k} was asked for with {attempts} attempts an example; k is from 1 to the attempts.")
    return 1.0 - comb(attempts - passed, k) / comb(attempts, k)


def _means(scored: Sequence[ScoredTrajectory], samples: int) -> dict[str, float]:
    """Means over the attempts that count. A metric that applied to no attempt is left out."""
    names = list(scored[0].rewards) if scored else []
    values = {"reward": [item.reward for item in scored]}
    values |= {name: [item.rewards[name] for item in scored] for name in names}
    means = {}
    for name, column in values.items():
        applicable = [value for value in column if value is not None]
        if applicable:
            means[name] = sum(applicable) / len(applicable)
    for k in sorted({1, samples}):
        estimates = _pass_estimates(scored, k)
        if estimates:
            means[f"pass@{k}"] = sum(estimates) / len(estimates)
    return means


def _pass_estimates(scored: Sequence[ScoredTrajectory], k: int) -> list[float]:
    """One for each example with k attempts that count."""
    attempts: dict[int, list[bool]] = {}
    for item in scored:
        if item.passed is not None:
            attempts.setdefault(item.example, []).append(item.passed)
    return [pass_at_k(len(passed), sum(passed), k) for passed in attempts.values() if len(passed) >= k]
