"""Evaluation: plays held-out examples N times each and says what share was solved. It generates and scores, no more.

An attempt passes if the first reward function of the environment's rubric gives it 1 or more: an environment puts
first what "solved" means (its weight may be 0).
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from math import comb
from typing import Any, Literal, Protocol

from rlvr.environments.base import Environment
from rlvr.errors import ConfigError
from rlvr.rollout.engine import RolloutEngine
from rlvr.rollout.intervals import Interval, interval, share_interval
from rlvr.rollout.tool_calls import ToolCallParser
from rlvr.types import Example, StopReason, Trajectory

PASSING = 1.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ScoredTrajectory:
    """An attempt at an example. `reward` and `passed` are None where it does not count: infrastructure failed."""

    example: int  # index of the row
    attempt: int = 0  # at this example, from 0
    trajectory: Trajectory
    rewards: Mapping[str, float | None]
    reward: float | None
    passed: bool | None
    tokens: int  # of the completion
    adapter: str | None = None  # hash of the weights that sampled it (`rlvr.tracking.adapter_hash`), where known


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What an evaluation found.

    `metrics` maps `reward`, each reward function's name and `pass@k` to means over the examples, for k = 1, 2, 4, 8, …
    and N, the attempts at each. `intervals` has their 95% confidence intervals (see `rlvr.rollout.intervals`), where
    there are two examples or more. `groups` and `group_intervals` have the same for each value of
    `Environment.group_metrics_by`.
    """

    metrics: dict[str, float]
    intervals: dict[str, Interval]
    groups: dict[str, dict[str, float]]
    group_intervals: dict[str, dict[str, Interval]]
    stop_reasons: dict[str, float]  # shares of all attempts
    split: Literal["train", "eval"]  # that the examples are from
    examples: int
    samples: int
    excluded: int  # attempts that infrastructure failures took out
    tokens: int  # of all completions
    trajectories: list[ScoredTrajectory] = field(repr=False)

    def as_json(self) -> dict[str, Any]:
        """Without the trajectories."""
        names = ("metrics", "intervals", "groups", "group_intervals", "stop_reasons")
        counts = ("split", "examples", "samples", "excluded", "tokens")
        return {name: getattr(self, name) for name in (*names, *counts)}


@dataclass(frozen=True)
class Played:
    """A finished rollout. `index`: of the example, among those that were to be played."""

    index: int
    trajectory: Trajectory
    tokens: int  # of the completion


Plays = Generator[Played, None, None]


class Player(Protocol):
    """Plays an environment with one policy."""

    def play(self, environment: Environment, examples: Sequence[Example], wanted: Sequence[int]) -> Plays:
        """Plays the examples whose indices are wanted; each is given as soon as it can be, in any order."""
        ...


@dataclass(frozen=True, kw_only=True)
class LocalPlayer:
    """Plays with a policy in this process, a batch after the other.

    Which examples are in a batch, and its seed, do not depend on what is wanted: of a batch that was half kept, all is
    played again, so that an evaluation that goes on samples what it would have sampled.

    Args:
        engine_for: the rollout engine, its random numbers set to a seed.
        renderer: a `ChatRenderer` made with the environment's tools.
        parser: of tool calls; by default found from the chat template.
        batch_size: rollouts that are played at the same time.
        seed: the batches' own seeds follow from it.
    """

    engine_for: Callable[[int], RolloutEngine]
    renderer: Any
    max_completion_tokens: int
    parser: ToolCallParser | None = None
    batch_size: int = 64
    seed: int = 0

    def play(self, environment: Environment, examples: Sequence[Example], wanted: Sequence[int]) -> Plays:
        from rlvr.rollout.episodes import play

        missing = set(wanted)
        for start in range(0, len(examples), self.batch_size):
            batch = range(start, min(start + self.batch_size, len(examples)))
            if missing.isdisjoint(batch):
                continue
            rollouts = play(
                environment,
                [examples[index] for index in batch],
                engine=self.engine_for(_batch_seed(self.seed, start)),
                renderer=self.renderer,
                max_completion_tokens=self.max_completion_tokens,
                parser=self.parser,
            )
            for index, rollout in zip(batch, rollouts, strict=True):
                if index in missing:
                    yield Played(index, rollout.trajectory, len(rollout.completion_ids))


def _batch_seed(seed: int, start: int) -> int:
    """63 bits, unrelated between batches: attempts at one example may be in several."""
    return random.Random(f"{seed}/{start}").getrandbits(63)


def evaluate_policy(
    environment: Environment,
    player: Player,
    *,
    samples: int = 1,
    limit: int | None = None,
    only: Sequence[int] | None = None,
    adapter: str | None = None,
    done: Iterable[ScoredTrajectory] = (),
    keep: Callable[[ScoredTrajectory], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Plays the held-out examples and scores them.

    Args:
        environment: its `eval_dataset` is played; the train dataset if there is none.
        player: plays with the policy; its settings decide between greedy and random.
        samples: N, attempts at each example.
        limit: examples to play, from the first; None for all.
        only: indices of the examples to play, among those; None for all.
        adapter: the hash of the policy's weights, None where it is not known.
        done: attempts made earlier, which are not made again.
        keep: takes each attempt when it is scored.
        on_progress: called with (attempts there are, all).

    Raises:
        RewardError: a reward function failed.
    """
    rows = evaluation_rows(environment, limit)
    if evaluation_split(environment) == "train":
        logger.warning(
            "environment %r has no held-out examples: those of the train split are played.", environment.name
        )
    played_rows = range(len(rows)) if only is None else only
    attempts = [(example, attempt) for example in played_rows for attempt in range(samples)]
    scored = {(item.example, item.attempt): item for item in done}
    wanted = [index for index, attempt in enumerate(attempts) if attempt not in scored]
    examples = [rows[example] for example, _ in attempts]
    with closing(player.play(environment, examples, wanted)) as finished:
        for played in finished:
            example, attempt = attempts[played.index]
            item = score(
                environment, example, played.trajectory, tokens=played.tokens, attempt=attempt, adapter=adapter
            )
            scored[example, attempt] = item
            if keep is not None:
                keep(item)
            if on_progress is not None:
                on_progress(len(scored), len(attempts))
    return summarise(environment, rows, [scored[attempt] for attempt in attempts], samples=samples)


def evaluation_split(environment: Environment) -> Literal["train", "eval"]:
    return "train" if environment.eval_dataset is None else "eval"


def evaluation_rows(environment: Environment, limit: int | None) -> list[Example]:
    dataset = environment.eval_dataset if environment.eval_dataset is not None else environment.train_dataset
    return [dataset[index] for index in range(len(dataset) if limit is None else min(limit, len(dataset)))]


def score(
    environment: Environment,
    example: int,
    trajectory: Trajectory,
    *,
    tokens: int,
    attempt: int = 0,
    adapter: str | None = None,
) -> ScoredTrajectory:
    rubric = environment.rubric
    rewards: dict[str, float | None] = dict.fromkeys(rubric.names)
    reward = passed = None
    if trajectory.stop_reason is not StopReason.INFRASTRUCTURE:
        rewards = rubric.score(trajectory)
        reward = rubric.total(rewards)
        first = rewards[rubric.names[0]]
        passed = first is not None and first >= PASSING
    return ScoredTrajectory(
        example=example,
        attempt=attempt,
        trajectory=trajectory,
        rewards=rewards,
        reward=reward,
        passed=passed,
        tokens=tokens,
        adapter=adapter,
    )


def summarise(
    environment: Environment, rows: Sequence[Example], scored: Sequence[ScoredTrajectory], *, samples: int
) -> Evaluation:
    """The numbers of scored attempts."""
    groups: dict[str, list[ScoredTrajectory]] = {}
    if environment.group_metrics_by is not None:
        for item in scored:
            value = rows[item.example].get(environment.group_metrics_by)
            groups.setdefault(f"{environment.group_metrics_by}={value}", []).append(item)
    measured = {name: _measure(members, samples) for name, members in sorted(groups.items())}
    reasons = Counter(str(item.trajectory.stop_reason) for item in scored)
    metrics, intervals = _measure(scored, samples)
    return Evaluation(
        metrics=metrics,
        intervals=intervals,
        groups={name: means for name, (means, _) in measured.items()},
        group_intervals={name: intervals for name, (_, intervals) in measured.items()},
        stop_reasons={reason: count / len(scored) for reason, count in sorted(reasons.items())},
        split=evaluation_split(environment),
        examples=len({item.example for item in scored}),
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


def _measure(scored: Sequence[ScoredTrajectory], samples: int) -> tuple[dict[str, float], dict[str, Interval]]:
    """Means over the attempts that count, and their intervals. A metric that applied to no attempt is left out."""
    values = {"reward": _by_example((item.example, item.reward) for item in scored)}
    for name in scored[0].rewards if scored else ():
        key = f"rewards/{name}" if name in values or name.startswith("pass@") else name  # the total has its own name
        values[key] = _by_example((item.example, item.rewards[name]) for item in scored)
    means = {name: sum(map(sum, lists)) / sum(map(len, lists)) for name, lists in values.items() if lists}
    intervals = {name: interval(lists) for name, lists in values.items() if lists}
    outcomes = _by_example((item.example, item.passed) for item in scored)
    for k in _ks(samples):
        counted = [passed for passed in outcomes if len(passed) >= k]
        if counted:
            estimates = [pass_at_k(len(passed), int(sum(passed)), k) for passed in counted]
            means[f"pass@{k}"] = sum(estimates) / len(estimates)
            made = sum(map(len, counted))
            intervals[f"pass@{k}"] = share_interval([[estimate] for estimate in estimates], attempts=made)
    return means, {name: bounds for name, bounds in intervals.items() if bounds is not None}


def _by_example(values: Iterable[tuple[int, float | None]]) -> list[list[float]]:
    """The values that are there, a list for each example that has any."""
    lists: dict[int, list[float]] = {}
    for example, value in values:
        if value is not None:
            lists.setdefault(example, []).append(value)
    return list(lists.values())


def _ks(samples: int) -> list[int]:
    """1, 2, 4, … and the number of attempts."""
    return [*(2**power for power in range(samples.bit_length()) if 2**power < samples), samples]
