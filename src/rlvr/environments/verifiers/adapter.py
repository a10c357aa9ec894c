"""Environments of the verifiers library, 0.2: their datasets, tools, rubrics and stop conditions, with our rollouts.

Works: `SingleTurnEnv`, `MultiTurnEnv`, `ToolEnv`, `StatefulToolEnv` and what is built on them, with text messages and
rewards of single rollouts. Refused: `EnvGroup`, completion models, rewards and advantages of groups, tools that differ
between rows, and environments that rewrite their conversation or call a model by themselves.
"""

from __future__ import annotations

import json
import logging
import signal
from collections.abc import Mapping, MutableMapping
from typing import Any

import verifiers as vf

from rlvr.environments.base import Environment
from rlvr.environments.verifiers.bridge import Background, VerifiersRollout, as_message
from rlvr.errors import DataError, EnvironmentDefinitionError, InfrastructureError
from rlvr.rewards.rubric import RewardFunction, Rubric, WeightedReward
from rlvr.types import Example, Message, StopReason, Trajectory

logger = logging.getLogger(__name__)

NO_LIMIT = 1_000_000
ROLLOUT = "verifiers"  # the key of the rollout in a trajectory's state
STOP_REASONS = {
    "no_tools_called": StopReason.NO_TOOL_CALL,
    "max_turns_reached": StopReason.MAX_TURNS,
    "prompt_too_long": StopReason.TOKEN_BUDGET,
    "max_total_completion_tokens_reached": StopReason.TOKEN_BUDGET,
}


def load_verifiers(env_id: str, *, arguments: Mapping[str, Any] | None = None) -> Environment:
    """An installed environment of verifiers by its id.

    Args:
        env_id: as `verifiers.load_environment` takes it.
        arguments: of the environment's own `load_environment`.

    Raises:
        EnvironmentDefinitionError: it is not installed, fails to load, or is of a kind that cannot be used.
        DataError: it has no train dataset.
    """
    # verifiers sets handlers of its own for Ctrl-C and SIGTERM with each environment
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        environment = vf.load_environment(env_id, **dict(arguments or {}))
    except Exception as error:
        raise EnvironmentDefinitionError(
            f"the verifiers environment {env_id!r} cannot be loaded: {str(error).rstrip('.')}. "
            "Install its package, and look at its arguments."
        ) from error
    finally:
        for number, handler in handlers.items():
            if handler is not None:
                signal.signal(number, handler)
    return from_verifiers(environment, name=env_id)


def from_verifiers(environment: vf.Environment, *, name: str = "") -> Environment:
    """An environment object of verifiers as one of ours.

    Raises:
        EnvironmentDefinitionError: it is of a kind that cannot be used.
        DataError: it has no train dataset.
    """
    name = name or getattr(environment, "env_id", None) or type(environment).__name__
    problem = _problem(environment)
    if problem:
        raise EnvironmentDefinitionError(f"the verifiers environment {name!r} cannot be used: {problem}")
    if environment.dataset is None and environment.dataset_source is None:
        raise DataError(f"the verifiers environment {name!r} has no train dataset.")
    train = environment.get_dataset().to_list()
    has_eval = environment.eval_dataset is not None or environment.eval_dataset_source is not None
    held_out = environment.get_eval_dataset().to_list() if has_eval else None
    if any(_has_own_tools(row) for row in [*train, *(held_out or ())]):
        raise EnvironmentDefinitionError(
            f"the verifiers environment {name!r} cannot be used: its rows have tools of their own; they must share "
            "the environment's."
        )
    return VerifiersEnvironment(
        name=f"verifiers:{name}",
        train_dataset=train,
        eval_dataset=held_out,
        rubric=_rubric(environment),
        tools=[_schema(tool) for tool in environment.tool_defs or ()],
        max_turns=NO_LIMIT,  # verifiers' own stop conditions decide
        verifiers_environment=environment,
    )


class VerifiersEnvironment(Environment):
    """Hands every turn to verifiers, and its replies back."""

    def __init__(self, *, verifiers_environment: vf.Environment, **settings: Any):
        self._verifiers, self._background = verifiers_environment, Background()
        super().__init__(**settings)

    def messages(self, example: Example) -> list[Message]:
        prompt = example["prompt"]
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return [as_message(message) for message in messages]

    def new_state(self, example: Example) -> MutableMapping[str, Any]:
        return {ROLLOUT: VerifiersRollout(self._verifiers, example, self._background)}

    def respond(self, trajectory: Trajectory) -> list[Message]:
        rollout: VerifiersRollout = trajectory.state[ROLLOUT]
        if len(trajectory.turns) == 1:
            first = rollout.first_conversation()
            if first and first != [as_message(message) for message in trajectory.prompt]:
                raise EnvironmentDefinitionError(
                    f"environment {self.name!r} changes its prompt when a rollout starts; the policy has seen another."
                )
        replies = rollout.hand_in(trajectory.turns[-1])
        if rollout.final_state is not None:
            error = rollout.final_state.get("error")
            if error is not None or rollout.final_state.get("timed_out"):
                raise InfrastructureError(f"verifiers ended a rollout of {self.name!r}: {error or 'timed out'}")
        called = iter([call.name for call in trajectory.turns[-1].tool_calls])
        return [{**reply, "name": next(called, "")} if reply["role"] == "tool" else reply for reply in replies]

    def stop_reason(self, trajectory: Trajectory) -> StopReason | None:
        state = trajectory.state[ROLLOUT].final_state
        if state is None:
            return None
        if isinstance(self._verifiers, vf.SingleTurnEnv):
            return StopReason.END_OF_TURN
        return STOP_REASONS.get(state.get("stop_condition"), StopReason.COMPLETED)


def _problem(environment: Any) -> str | None:
    if isinstance(environment, vf.EnvGroup):
        return "it is an EnvGroup; train its members one by one."
    if not isinstance(environment, vf.MultiTurnEnv):
        return f"{type(environment).__name__} is not built on verifiers' MultiTurnEnv."
    if getattr(environment, "message_type", "chat") != "chat":
        return "it is made for completion models, without a chat."
    for method in ("get_prompt_messages", "get_model_response", "add_model_response"):
        if getattr(type(environment), method) is not getattr(vf.MultiTurnEnv, method):
            return f"it overrides {method}, so its turns are not one growing conversation with one policy."
    if environment.requires_group_rollouts or environment.provides_advantages:
        return "its rubric scores whole groups; only rewards of single rollouts can be used."
    return None


def _rubric(environment: vf.Environment) -> Rubric:
    """The environment's own reward, and each of its functions as a metric."""

    def reward(trajectory: Trajectory) -> float:
        return float(trajectory.state[ROLLOUT].score(trajectory.turns)["reward"])

    def metric(name: str) -> RewardFunction:
        def read(trajectory: Trajectory) -> float | None:
            return (trajectory.state[ROLLOUT].score(trajectory.turns)["metrics"] or {}).get(name)

        return read

    names = dict.fromkeys(environment.rubric._get_reward_func_names())
    metrics = [WeightedReward(metric(n), 0.0, name=n if n != "reward" else "reward_function") for n in names]
    return Rubric(reward, *metrics)


def _schema(tool: Any) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": function}


def _has_own_tools(row: Mapping[str, Any]) -> bool:
    info = row.get("info")
    if isinstance(info, str):
        info = json.loads(info or "{}")
    return isinstance(info, Mapping) and bool(info.get("tool_defs"))
