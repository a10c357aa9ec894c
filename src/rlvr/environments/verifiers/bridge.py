"""Runs rollouts of the verifiers library with turns that somebody else samples.

verifiers' own rollout loop runs, unchanged, as a coroutine: set-up, tools, stop conditions, clean-up. Its client
does not call a server. It hands the conversation out, and waits until the policy's turn is handed in.
"""

from __future__ import annotations

import asyncio
import json
import queue
import threading
import time
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

import verifiers as vf
from verifiers.clients import Client
from verifiers.errors import OverlongPromptError
from verifiers.types import Response, ResponseMessage, ToolCall

from rlvr.errors import EnvironmentDefinitionError
from rlvr.types import Message, Turn

T = TypeVar("T")


class Background:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, name="rlvr-verifiers", daemon=True).start()

    def start(self, coroutine: Coroutine[Any, Any, T]) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()


class VerifiersRollout:
    """One rollout of a verifiers environment.

    Args:
        environment: of verifiers.
        row: of its dataset.
        background: where it runs.
    """

    def __init__(self, environment: vf.Environment, row: Mapping[str, Any], background: Background):
        self._environment, self._background = environment, background
        self._events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._answer: asyncio.Future[Response] | None = None
        self._conversation: list[Message] | None = None
        self._handed_in = 0
        self._scored = False
        self.final_state: Any = None  # verifiers' state, once the rollout has ended
        background.start(self._run(dict(row)))

    def hand_in(self, turn: Turn) -> list[Message]:
        """Gives the policy's turn to verifiers.

        Returns:
            The messages that follow it; none if the rollout has ended.

        Raises:
            EnvironmentDefinitionError: the environment rewrites its conversation.
        """
        if self._conversation is None:
            self._conversation = self._next_conversation()
        if self.final_state is not None:  # it ended before a first turn
            return []
        self._handed_in += 1
        self._reply(_response(turn, self._handed_in, truncated=False))
        before, self._conversation = self._conversation, self._next_conversation()
        if self.final_state is not None:
            return []
        kept = self._conversation[: len(before)]
        rest = self._conversation[len(before) :]
        if kept != before or not rest or rest[0]["role"] != "assistant":
            raise EnvironmentDefinitionError(
                "it rewrites its conversation between turns, so the policy could not be trained on what it has seen. "
                "Environments of this kind cannot be used."
            )
        return rest[1:]

    def first_conversation(self) -> list[Message]:
        """What the rollout starts with; waits for its set-up."""
        if self._conversation is None:
            self._conversation = self._next_conversation()
        return self._conversation

    def finish(self, turns: tuple[Turn, ...]) -> Any:
        """verifiers' final state. A rollout that was stopped from outside counts as one that ran out of tokens."""
        self.first_conversation()
        while self.final_state is None:
            if self._handed_in < len(turns):
                turn = turns[self._handed_in]
                self._handed_in += 1
                self._reply(_response(turn, self._handed_in, truncated=True))
            else:
                self._reply(OverlongPromptError("the rollout's token budget is used up"))
            self._next_conversation()
        return self.final_state

    def score(self, turns: tuple[Turn, ...]) -> Any:
        """The final state with `reward` and `metrics`, by the environment's own rubric."""
        state = self.finish(turns)
        if not self._scored:
            self._background.run(self._environment.rubric.score_rollout(state))
            self._background.run(self._environment.rubric.cleanup(state))
            self._scored = True
        return state

    async def ask(self, conversation: list[Any]) -> Response:
        """Called by the client: waits for the policy's turn."""
        self._answer = asyncio.get_running_loop().create_future()
        self._events.put([as_message(message) for message in conversation])
        return await self._answer

    async def _run(self, row: dict[str, Any]) -> None:
        try:
            client = _PolicyClient(self)
            state = await self._environment.rollout(row, client, "policy", {})
        except BaseException as error:
            self._events.put(error)
        else:
            self._events.put(_Ended(state))

    def _next_conversation(self) -> list[Message]:
        event = self._events.get()
        if isinstance(event, BaseException):
            self._events.put(event)  # for whoever asks again
            raise event
        if isinstance(event, _Ended):
            self.final_state = event.state
            return []
        return event

    def _reply(self, answer: Response | Exception) -> None:
        waiting = self._answer

        def give() -> None:
            if waiting is None or waiting.done():
                return  # verifiers gave the rollout up, by its own time limit
            if isinstance(answer, Exception):
                waiting.set_exception(answer)
            else:
                waiting.set_result(answer)

        self._background.loop.call_soon_threadsafe(give)


class _Ended:
    def __init__(self, state: Any):
        self.state = state


class _PolicyClient(Client):
    """The client that verifiers' loop asks for a turn."""

    def __init__(self, rollout: VerifiersRollout):
        super().__init__(rollout)

    def setup_client(self, config: Any) -> Any:
        return config

    async def to_native_tool(self, tool: Any) -> Any:
        return tool

    async def to_native_prompt(self, messages: Any) -> tuple[Any, dict[str, Any]]:
        return messages, {}

    async def get_native_response(
        self, prompt: Any, model: str, sampling_args: Any, tools: Any = None, **rest: Any
    ) -> Any:
        return await self.client.ask(prompt)

    async def raise_from_native_response(self, response: Any) -> None:
        return None

    async def from_native_response(self, response: Any) -> Response:
        return response

    async def close(self) -> None:
        return None


def as_message(message: Any) -> Message:
    """A message of verifiers (an object or a dict) as a chat template takes it.

    Raises:
        EnvironmentDefinitionError: it holds something that is not text.
    """
    content = message.get("content")
    if isinstance(content, list):
        if any(part.get("type") != "text" for part in content):
            raise EnvironmentDefinitionError("its messages hold images or sound; only text can be used.")
        content = "".join(part.get("text") for part in content)
    converted: Message = {"role": message["role"], "content": content or ""}
    calls = message.get("tool_calls")
    if calls:
        converted["tool_calls"] = [_as_part(call) for call in calls]
    if message.get("tool_call_id"):
        converted["tool_call_id"] = message["tool_call_id"]
    return converted


def _as_part(call: Any) -> dict[str, Any]:
    function = call.get("function") or call
    arguments = function["arguments"]
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError:
            arguments = {"text": arguments}
    return {"type": "function", "id": call.get("id"), "function": {"name": function["name"], "arguments": arguments}}


def _response(turn: Turn, number: int, *, truncated: bool) -> Response:
    calls = [
        ToolCall(
            id=call.call_id or f"call{number % 100:02d}{position % 1000:03d}",
            name=call.name or "unknown",
            arguments=json.dumps(dict(call.arguments)) if call.error is None else f"unreadable: {call.error}",
        )
        for position, call in enumerate(turn.tool_calls)
    ]
    message = ResponseMessage(
        content=turn.message.get("content") or "",
        tool_calls=calls or None,
        finish_reason="length" if truncated else "tool_calls" if calls else "stop",
        is_truncated=truncated,
    )
    return Response(id="", created=int(time.time()), model="policy", message=message)
