"""What an environment is: task, tools, stopping, scoring."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlvr.errors import DataError, EnvironmentDefinitionError
from rlvr.rewards.rubric import Rubric
from rlvr.types import Example, Message, StopReason, Trajectory

Rows = Sequence[Example]
"""Anything with `len()` and integer indexing that gives rows: a list of dicts, or a `datasets.Dataset`."""


@dataclass(kw_only=True)
class Environment:
    """A task with verifiable rewards. Make an instance, or a subclass that overrides a method.

    Args:
        name: the name it is known by.
        train_dataset: rows to train on. A row has `prompt` (a string or messages) or `question` (a string), and
            whatever columns the rewards read, by convention `answer`.
        eval_dataset: rows held out for evaluation; None if there are none.
        rubric: what a trajectory is worth.
        system_prompt: put before every prompt that has no system message of its own.
        tools: functions with type hints and a Google-style docstring, or the JSON schemas of tools whose calls
            `respond` answers, with a tool message for each. A parameter called `state` is not shown to
            the model: the rollout's state is passed for it.
        max_turns: assistant messages at most.
        max_tool_failures: failed tool calls allowed, one more ends the rollout; None for no limit.
        tool_timeout_s: seconds that one tool call may take.
        group_metrics_by: a column of the rows; evaluation gives every metric for each of its values too.
        keeps_order: train on the rows in their order (a curriculum) and not in a random one.
    """

    name: str
    train_dataset: Rows
    rubric: Rubric
    eval_dataset: Rows | None = None
    system_prompt: str | None = None
    tools: Sequence[Callable[..., Any] | Mapping[str, Any]] = field(default=())
    max_turns: int = 10
    max_tool_failures: int | None = None
    tool_timeout_s: float = 60.0
    group_metrics_by: str | None = None
    keeps_order: bool = False

    def __post_init__(self) -> None:
        if len(self.train_dataset) == 0:
            raise DataError(f"the train dataset of environment {self.name!r} is empty.")
        if self.eval_dataset is not None and len(self.eval_dataset) == 0:
            raise DataError(f"the eval dataset of environment {self.name!r} is empty; leave it out, or give rows.")
        if self.max_turns < 1:
            raise EnvironmentDefinitionError(f"max_turns is {self.max_turns}; it must be at least 1.")
        if self.max_tool_failures is not None and self.max_tool_failures < 0:
            raise EnvironmentDefinitionError(
                f"max_tool_failures is {self.max_tool_failures}; it must be at least 0, or None for no limit."
            )
        if not self.tool_timeout_s > 0:  # also when it is not a number
            raise EnvironmentDefinitionError(f"tool_timeout_s is {self.tool_timeout_s}; it must be above 0.")
        if len({callable(tool) for tool in self.tools}) > 1:
            raise EnvironmentDefinitionError(
                "tools holds functions and schemas; rlvr runs the calls of functions, and respond answers those of "
                "schemas, not both. Call the functions in respond, and give their schemas."
            )
        self.messages(self.train_dataset[0])

    def messages(self, example: Example) -> list[Message]:
        """The prompt of a row, system prompt included.

        Raises:
            DataError: the row has neither `prompt` nor `question`.
        """
        prompt = example.get("prompt", example.get("question"))
        if not prompt or not isinstance(prompt, (str, list, tuple)):
            raise DataError(
                f"a row of environment {self.name!r} has no text in 'prompt' or 'question'; its columns: "
                f"{', '.join(map(str, example))}."
            )
        messages: list[Message] = (
            [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [_message(m) for m in prompt]
        )
        if self.system_prompt and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        return messages

    def new_state(self, example: Example) -> MutableMapping[str, Any]:
        """The state of one rollout, fresh. Tools, `respond` and rewards share it."""
        return {}

    def respond(self, trajectory: Trajectory) -> list[Message]:
        """What the environment says after a turn without calls of its functions; an empty list ends the rollout.

        For games and simulated users. Called off the main thread: it may wait for other services.
        """
        return []

    def stop_reason(self, trajectory: Trajectory) -> StopReason | None:
        """Checked after every turn and its tool calls; a reason ends the rollout.

        By default a rollout is complete once a tool or `respond` has set `state["done"]` to true.
        """
        return StopReason.COMPLETED if trajectory.state.get("done") else None


def _message(message: Mapping[str, Any]) -> Message:
    """Without the empty columns that Arrow adds to rows of messages."""
    return {key: value for key, value in message.items() if value is not None}  # type: ignore[return-value]
