"""A rubric: named reward functions with weights. Weight 0 means: a metric, logged and not trained on."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from rlvr.errors import EnvironmentDefinitionError, RewardError
from rlvr.types import Trajectory

RewardFunction = Callable[[Trajectory], "float | bool | None"]
"""Trajectory → reward. None: not applicable to this trajectory, which is then left out of the sum."""

LARGEST = (2 - 2**-23) * 2.0**127  # that float32 holds, in which rewards are trained on


@dataclass(frozen=True)
class WeightedReward:
    function: RewardFunction
    weight: float = 1.0
    name: str = ""

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise EnvironmentDefinitionError(
                f"a reward function must be callable with a trajectory; got {type(self.function).__name__}."
            )
        if inspect.iscoroutinefunction(self.function):
            raise EnvironmentDefinitionError(
                f"reward function {reward_name(self.function)!r} is async; rubric functions are synchronous. "
                "Call the async code with asyncio.run inside it."
            )
        if not math.isfinite(self.weight):
            raise EnvironmentDefinitionError(
                f"the weight of reward {self.name or reward_name(self.function)!r} is {self.weight}; "
                "it must be finite."
            )
        if not self.name:
            object.__setattr__(self, "name", reward_name(self.function))


class Rubric:
    """Scores a trajectory with each of its reward functions.

        Rubric(exact_match, (format_reward, 0.2), (number_of_turns, 0.0))

    Args:
        rewards: functions, `(function, weight)` pairs or `WeightedReward`s. Names must be unique.

    Raises:
        EnvironmentDefinitionError: no function, a name twice, an async function, or every weight 0.
    """

    def __init__(self, *rewards: RewardFunction | tuple[RewardFunction, float] | WeightedReward):
        self.rewards = tuple(_as_weighted(reward) for reward in rewards)
        names = self.names
        if not names:
            raise EnvironmentDefinitionError("a rubric needs at least one reward function.")
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise EnvironmentDefinitionError(
                f"reward names appear twice in the rubric: {', '.join(repeated)}. "
                "Give one of them a name: WeightedReward(function, weight, name=...)."
            )
        if all(reward.weight == 0 for reward in self.rewards):
            raise EnvironmentDefinitionError(
                "every reward of the rubric has weight 0, so there is nothing to train on; give one a weight."
            )

    @property
    def names(self) -> list[str]:
        return [reward.name for reward in self.rewards]

    @property
    def weights(self) -> list[float]:
        return [reward.weight for reward in self.rewards]

    def score(self, trajectory: Trajectory) -> dict[str, float | None]:
        """Each reward by name.

        Raises:
            RewardError: a function raised, or returned something that is not a finite number or None.
        """
        return {reward.name: call_reward(reward, trajectory) for reward in self.rewards}

    def total(self, scores: Mapping[str, float | None]) -> float | None:
        """Weighted sum over the scores that apply; None where none does."""
        applicable = [reward.weight * score for reward in self.rewards if (score := scores[reward.name]) is not None]
        return float(sum(applicable)) if applicable else None


def call_reward(reward: WeightedReward, trajectory: Trajectory) -> float | None:
    try:
        value = reward.function(trajectory)
    except Exception as error:
        raise RewardError(
            f"reward function {reward.name!r} raised {type(error).__name__}: {error}\n"
            f"  example: {shorten(trajectory.example)}\n  completion: {shorten(trajectory.completion)}"
        ) from error
    problem = reward_problem(value)
    if problem:
        raise RewardError(
            f"reward function {reward.name!r} returned {problem}; a reward is a finite number, or None for "
            f"'not applicable'.\n  example: {shorten(trajectory.example)}\n"
            f"  completion: {shorten(trajectory.completion)}"
        )
    return None if value is None else float(value)


def reward_problem(value: Any) -> str | None:
    """What is wrong with a value that a reward function returned; None if nothing is."""
    if value is None or isinstance(value, bool):
        return None
    if not isinstance(value, Real):
        item = getattr(value, "item", None)  # one-element arrays and tensors are numbers too
        if item is None or getattr(value, "size", None) is None or getattr(value, "ndim", 1) != 0:
            return f"{shorten(value)} of type {type(value).__name__}"
        value = item()
        if not isinstance(value, Real):
            return f"{shorten(value)} of type {type(value).__name__}"
    try:
        number = float(value)
    except OverflowError:  # a whole number beyond any float
        number = math.inf
    if abs(number) <= LARGEST:
        return None
    return f"{number}, which float32 cannot hold" if math.isfinite(number) else f"{number}"


def reward_name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)


def shorten(value: object, limit: int = 300) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text)} characters)"


def _as_weighted(reward: RewardFunction | tuple[RewardFunction, float] | WeightedReward) -> WeightedReward:
    if isinstance(reward, WeightedReward):
        return reward
    if isinstance(reward, tuple):
        return WeightedReward(reward[0], float(reward[1]))
    return WeightedReward(reward)


def combine(rubrics: Iterable[Rubric]) -> Rubric:
    """One rubric with the functions of all."""
    return Rubric(*(reward for rubric in rubrics for reward in rubric.rewards))
