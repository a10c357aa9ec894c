"""Reward functions as TRL calls them: over a batch, with the dataset's columns as keywords. Checked, never trusted."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from rlvr.errors import RewardError
from rlvr.rewards.rubric import WeightedReward, call_reward, reward_name, reward_problem, shorten
from rlvr.types import StopReason, Trajectory

BatchReward = Callable[..., Any]

TRL_KEYWORDS = (
    "prompts",
    "completions",
    "completion_ids",
    "trainer_state",
    "log_extra",
    "log_metric",
    "environments",
)


def batch_reward(reward: WeightedReward) -> BatchReward:
    """A rubric's function as TRL calls reward functions, over the batch's `trajectory` column.

    A trajectory that infrastructure cut short gets None: it is excluded from training, not scored 0.
    """

    def over_batch(trajectory: Sequence[Trajectory], **_: Any) -> list[float | None]:
        return [None if t.stop_reason is StopReason.INFRASTRUCTURE else call_reward(reward, t) for t in trajectory]

    over_batch.__name__ = reward.name
    return over_batch


def checked(function: Any) -> Any:
    """Wraps a user's TRL-style reward function so that a bad return value stops the run with a name.

    Model ids and reward models pass unchanged.
    """
    if isinstance(function, str) or not callable(function) or hasattr(function, "parameters"):
        return function
    name = reward_name(_unwrap_partial(function))

    if inspect.iscoroutinefunction(_unwrap_partial(function)) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004 - an async __call__ of an instance
    ):

        async def checked_async(**batch: Any) -> list[float | None]:
            try:
                values = await function(**batch)
            except Exception as error:
                raise _raised(name, error, batch) from error
            return check_values(name, values, batch)

        checked_async.__name__ = name
        return checked_async

    def checked_sync(**batch: Any) -> list[float | None]:
        try:
            values = function(**batch)
        except Exception as error:
            raise _raised(name, error, batch) from error
        return check_values(name, values, batch)

    checked_sync.__name__ = name
    return checked_sync


def check_values(name: str, values: Any, batch: dict[str, Any]) -> list[float | None]:
    """The values as floats.

    Raises:
        RewardError: not a sequence, not one value a completion, or a value that is no finite number and not None.
    """
    completions = batch["completions"]
    try:
        values = list(values)
    except TypeError:
        raise RewardError(
            f"reward function {name!r} returned {shorten(values)} of type {type(values).__name__}; it must return a "
            f"list with one number (or None) for each of the {len(completions)} completions."
        ) from None
    if len(values) != len(completions):
        raise RewardError(
            f"reward function {name!r} returned {len(values)} values for {len(completions)} completions; it must "
            "return one for each."
        )
    for index, value in enumerate(values):
        problem = reward_problem(value)
        if problem:
            raise RewardError(
                f"reward function {name!r} returned {problem} for completion {index}; a reward is a finite number, "
                f"or None for 'not applicable'.\n{_example(batch, index)}"
            )
    return [None if value is None else float(value) for value in values]


def _raised(name: str, error: Exception, batch: dict[str, Any]) -> RewardError:
    return RewardError(
        f"reward function {name!r} raised {type(error).__name__}: {error}\n"
        f"The batch's first row:\n{_example(batch, 0)}"
    )


def _example(batch: dict[str, Any], index: int) -> str:
    columns = {
        key: values[index]
        for key, values in batch.items()
        if key not in TRL_KEYWORDS and isinstance(values, (list, tuple)) and index < len(values)
    }
    return (
        f"  prompt: {shorten(batch['prompts'][index])}\n  example: {shorten(columns)}\n"
        f"  completion: {shorten(batch['completions'][index])}"
    )


def _unwrap_partial(function: Any) -> Any:
    while isinstance(function, functools.partial):
        function = function.func
    return function
