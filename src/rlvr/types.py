"""The records that a rollout leaves. Plain data, frozen, no torch: everything else is built on these."""

from __future__ import annotations

import json
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypedDict

Example = Mapping[str, Any]
"""One row of a dataset: the environment's own columns."""


class Message(TypedDict, total=False):
    """A chat message as chat templates take it."""

    role: str  # "system", "user", "assistant" or "tool"
    content: str
    tool_calls: list[dict[str, Any]]  # [{"type": "function", "function": {"name": ..., "arguments": {...}}}]
    name: str  # of the tool, in a tool message
    tool_call_id: str  # in a tool message, where the model gave its call an id


class StopReason(str, Enum):
    """Why a rollout ended. Logged as a share of all rollouts."""

    END_OF_TURN = "end_of_turn"  # the model ended its turn and the environment has nothing to say
    COMPLETED = "completed"  # the environment was satisfied, for example by a final-answer tool
    NO_TOOL_CALL = "no_tool_call"  # an environment with tools, and the model called none
    MAX_TURNS = "max_turns"
    TOKEN_BUDGET = "token_budget"  # max_completion_tokens were used up
    TOOL_FAILURES = "tool_failures"  # more failed tool calls than the environment allows
    INFRASTRUCTURE = "infrastructure"  # not the model's fault: excluded from training and counted

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class ToolCall:
    """A parsed tool call. `error` is set, and `arguments` is empty, where the model's text could not be parsed."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None
    call_id: str | None = None  # where the format has one (Mistral)

    def as_message_part(self) -> dict[str, Any]:
        part = {"type": "function", "function": {"name": self.name, "arguments": dict(self.arguments)}}
        return part if self.call_id is None else {**part, "id": self.call_id}


@dataclass(frozen=True)
class Turn:
    """One assistant message and the replies it caused (tool results, or what the environment said)."""

    message: Message
    tool_calls: tuple[ToolCall, ...] = ()
    replies: tuple[Message, ...] = ()
    failed_calls: int = 0  # calls that could not be parsed, were refused, raised, or timed out


@dataclass(frozen=True)
class Trajectory:
    """The record of one rollout, complete once `stop_reason` is set.

    `state` is the rollout's own scratch pad, made by `Environment.new_state`: tools and `respond` write to it and
    reward functions read it.
    """

    example: Example
    prompt: tuple[Message, ...]
    turns: tuple[Turn, ...] = ()
    stop_reason: StopReason | None = None
    state: MutableMapping[str, Any] = field(default_factory=dict)
    failure: str | None = None  # what failed, where `stop_reason` is infrastructure

    @property
    def completion(self) -> list[Message]:
        """Everything after the prompt, tool results included, in order."""
        return [message for turn in self.turns for message in (turn.message, *turn.replies)]

    @property
    def text(self) -> str:
        """The last assistant message's text."""
        return self.turns[-1].message.get("content") or "" if self.turns else ""

    @property
    def tool_calls(self) -> list[ToolCall]:
        return [call for turn in self.turns for call in turn.tool_calls]

    @property
    def failed_calls(self) -> int:
        return sum(turn.failed_calls for turn in self.turns)


def conversation_text(messages: list[Message] | tuple[Message, ...]) -> str:
    """The messages as a person reads them: role, text, tool calls and tool results, a blank line between."""
    blocks = []
    for message in messages:
        label = message["role"] if "name" not in message else f"{message['role']} {message['name']}"
        lines = [message["content"]] if message.get("content") else []
        for call in message.get("tool_calls") or ():
            function = call["function"]
            lines.append(f"→ {function['name']}({json.dumps(function['arguments'], ensure_ascii=False)})")
        blocks.append(f"[{label}] " + "\n".join(lines))
    return "\n\n".join(blocks)
