"""The rules of a game with an environment: replies, tools, when it ends. The same whether the policy is a model that
samples token ids here (`episodes.py`) or a server that sends messages (`remote.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from rlvr.environments.base import Environment
from rlvr.environments.tools import Toolbox, ToolResult, Workers
from rlvr.errors import EnvironmentDefinitionError, InfrastructureError, RlvrError
from rlvr.types import Example, Message, StopReason, ToolCall, Trajectory, Turn

T = TypeVar("T")


@dataclass(kw_only=True)
class Game:
    """A rollout while it is being played. `index`: of the example, among those that are played."""

    index: int
    trajectory: Trajectory
    stop_reason: StopReason | None = None

    def add_turn(self, turn: Turn) -> None:
        self.trajectory = dataclasses.replace(self.trajectory, turns=(*self.trajectory.turns, turn))

    def set_replies(self, replies: Sequence[Message], *, failed_calls: int = 0) -> None:
        *before, last = self.trajectory.turns
        turn = dataclasses.replace(last, replies=tuple(replies), failed_calls=last.failed_calls + failed_calls)
        self.trajectory = dataclasses.replace(self.trajectory, turns=(*before, turn))

    def stop(self, reason: StopReason, *, failure: str | None = None) -> None:
        """Ends the rollout. Replies that are not followed by another turn are no part of it."""
        self.stop_reason = reason
        if self.trajectory.turns:
            self.set_replies(())
        self.trajectory = dataclasses.replace(self.trajectory, stop_reason=reason, failure=failure)


class Rules:
    """The rules of one environment, for all its games.

    Raises:
        EnvironmentDefinitionError: its tools cannot be used.
    """

    def __init__(self, environment: Environment):
        self.environment = environment
        functions = [tool for tool in environment.tools if callable(tool)]
        self.toolbox = Toolbox(functions, timeout_s=environment.tool_timeout_s)
        self.answers_calls = len(functions) < len(environment.tools)

    def messages(self, example: Example) -> list[Message]:
        return self._ask("messages", self.environment.messages, example)

    def begin(self, example: Example, messages: Sequence[Message]) -> Trajectory:
        """A trajectory without turns, with a state of its own."""
        state = self._ask("new_state", self.environment.new_state, example)
        return Trajectory(example, tuple(messages), state=state)

    async def after_turn(self, game: Game, turn: Turn, *, ended: bool, workers: Workers) -> list[Message]:
        """Records a turn, runs its tool calls or asks the environment, and decides whether the rollout ends.

        Args:
            turn: without replies yet.
            ended: the policy ended the turn; False: the token budget cut it.

        Returns:
            The replies to go on with; none if the rollout has ended.
        """
        game.add_turn(turn)
        if not ended:
            game.stop(StopReason.TOKEN_BUDGET)
            return []
        try:
            replies = await self._replies(game, turn.tool_calls, workers)
        except InfrastructureError as error:
            game.stop(StopReason.INFRASTRUCTURE, failure=str(error))
            return []
        reason = await workers.run(self._ask, "stop_reason", self.environment.stop_reason, game.trajectory)
        reason = reason or self._rule(game, turn.tool_calls, replies)
        if reason is not None:
            game.stop(reason)
            return []
        return replies

    async def _replies(self, game: Game, calls: Sequence[ToolCall], workers: Workers) -> list[Message]:
        """The turn's replies; the trajectory has them too, for `stop_reason` to see."""
        failed = 0
        replies: list[Message] = []
        for call in () if self.answers_calls else calls:  # one after the other: they share the rollout's state
            result = await self.toolbox.call(call, state=game.trajectory.state, workers=workers)
            failed += result.failed
            replies.append(_tool_message(call, result))
        if self.answers_calls or not calls:
            answer = await workers.run(self._ask, "respond", self.environment.respond, game.trajectory)
            replies = [dict(message) for message in answer or ()]  # type: ignore[misc]
            failed = sum(call.error is not None for call in calls)
        game.set_replies(replies, failed_calls=failed)
        return replies

    def _rule(self, game: Game, calls: Sequence[ToolCall], replies: Sequence[Message]) -> StopReason | None:
        limit = self.environment.max_tool_failures
        if limit is not None and game.trajectory.failed_calls > limit:
            return StopReason.TOOL_FAILURES
        if not calls and not replies:
            return StopReason.NO_TOOL_CALL if self.environment.tools else StopReason.END_OF_TURN
        return StopReason.MAX_TURNS if len(game.trajectory.turns) >= self.environment.max_turns else None

    def _ask(self, what: str, method: Callable[..., T], argument: Any) -> T:
        """Calls a method of the environment; what it raises is the environment's author's to repair."""
        try:
            return method(argument)
        except RlvrError:
            raise
        except Exception as error:
            raise EnvironmentDefinitionError(
                f"environment {self.environment.name!r} raised {type(error).__name__} in {what}(): {error}"
            ) from error


def assistant_message(content: str, calls: Sequence[ToolCall]) -> Message:
    """What the policy said; of its calls those that could be read."""
    message: Message = {"role": "assistant", "content": content}
    understood = [call.as_message_part() for call in calls if call.error is None]
    if understood:
        message["tool_calls"] = understood
    return message


def _tool_message(call: ToolCall, result: ToolResult) -> Message:
    message: Message = {"role": "tool", "name": call.name, "content": result.text}
    if call.call_id is not None:
        message["tool_call_id"] = call.call_id
    return message
