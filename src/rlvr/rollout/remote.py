"""Plays an environment with a model behind an API: messages out, a message in. There are no token ids.

Turns, tools, stopping and scoring are those of local rollouts (`rules.py`). The token budget is kept by the server's
own counts: what a prompt has grown by since the first turn, plus the turn's completion. So a reply is counted once
the next turn has been sampled, and that turn may end beyond the budget by as many tokens as the reply has: it then
counts as cut.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rlvr.environments.base import Environment
from rlvr.environments.tools import Workers, tool_schema
from rlvr.errors import EndpointError, InfrastructureError
from rlvr.rollout.api import ChatClient, ChatReply, Endpoint
from rlvr.rollout.chat import with_call_ids
from rlvr.rollout.engine import SamplingSettings
from rlvr.rollout.evaluation import Played
from rlvr.rollout.rules import Game, Rules, assistant_message
from rlvr.types import Example, Message, StopReason, Trajectory, Turn

HOPELESS = 32
"""So many rollouts in a row without an answer: the server is gone, and the others would only wait for nothing."""


@dataclass(frozen=True, kw_only=True)
class RemotePlayer:
    """A `Player`.

    Args:
        sampling: what differs from its defaults is sent, beside the temperature. `top_k`, `min_p` and
            `repetition_penalty` are vLLM's additions to the API.
        concurrency: rollouts in play at the same time; each has one request under way at most.
        seed: sent with each request, plus the number of the attempt; None sends none.
    """

    endpoint: Endpoint
    sampling: SamplingSettings
    max_completion_tokens: int
    concurrency: int = 16
    seed: int | None = None

    def play(
        self, environment: Environment, examples: Sequence[Example], wanted: Sequence[int]
    ) -> Generator[Played, None, None]:
        """As `Player.play`, in the order in which rollouts end.

        Raises:
            EndpointError: the server refused a request, or has not answered for `HOPELESS` rollouts in a row.
        """
        rules = Rules(environment)
        options = self._options(environment)
        queue = iter(wanted)
        in_play: set[Future[_Game]] = set()
        failures = 0
        with Workers() as workers, _client(self.endpoint, self.concurrency, workers) as client:
            while True:
                while len(in_play) < self.concurrency and (index := next(queue, None)) is not None:
                    game = _Game(index=index, trajectory=_begin(rules, examples[index]))
                    in_play.add(workers.start(self._rollout(game, rules, options, client, workers)))
                if not in_play:
                    return
                ended, in_play = wait(in_play, return_when=FIRST_COMPLETED)
                for game in sorted((future.result() for future in ended), key=lambda game: game.index):
                    yield Played(game.index, game.trajectory, game.tokens)
                    failures = failures + 1 if game.stop_reason is StopReason.INFRASTRUCTURE else 0
                    if failures >= HOPELESS:
                        raise EndpointError(f"{failures} rollouts in a row have failed. {game.trajectory.failure}")

    async def _rollout(
        self, game: _Game, rules: Rules, options: Mapping[str, Any], client: ChatClient, workers: Workers
    ) -> _Game:
        try:
            while game.stop_reason is None:
                reply = await client.complete({**options, **self._request(game)})
                game.count(reply)
                ended = not reply.cut and game.tokens <= self.max_completion_tokens
                calls = reply.calls if ended else ()
                turn = Turn(assistant_message(reply.text, calls), calls)
                await rules.after_turn(game, turn, ended=ended, workers=workers)
                if game.stop_reason is None and game.tokens >= self.max_completion_tokens:
                    game.stop(StopReason.TOKEN_BUDGET)
        except InfrastructureError as error:
            game.stop(StopReason.INFRASTRUCTURE, failure=str(error))
        return game

    def _options(self, environment: Environment) -> dict[str, Any]:
        """What all requests have in common."""
        options: dict[str, Any] = {"model": self.endpoint.model, "temperature": self.sampling.temperature}
        usual = SamplingSettings()
        for name in ("top_p", "top_k", "min_p", "repetition_penalty"):
            if getattr(self.sampling, name) != getattr(usual, name):
                options[name] = getattr(self.sampling, name)
        if environment.tools:
            options["tools"] = [_api_tool(tool_schema(t) if callable(t) else t) for t in environment.tools]
        return options

    def _request(self, game: _Game) -> dict[str, Any]:
        request = {
            "messages": api_messages(game.trajectory),
            "max_tokens": self.max_completion_tokens - game.tokens,
        }
        return request if self.seed is None else {**request, "seed": self.seed + game.index}


@dataclass(kw_only=True)
class _Game(Game):
    prompt_tokens: int | None = None  # of the first request
    tokens: int = 0  # of the completion so far

    def count(self, reply: ChatReply) -> None:
        if self.prompt_tokens is None:
            self.prompt_tokens = reply.prompt_tokens
        self.tokens = reply.prompt_tokens - self.prompt_tokens + reply.completion_tokens


@contextmanager
def _client(endpoint: Endpoint, connections: int, workers: Workers) -> Iterator[ChatClient]:
    client = ChatClient(endpoint, connections=connections)
    try:
        yield client
    finally:
        workers.start(client.close()).result()


def _begin(rules: Rules, example: Example) -> Trajectory:
    return rules.begin(example, rules.messages(example))


def api_messages(trajectory: Trajectory) -> list[dict[str, Any]]:
    """The conversation so far as the API takes it.

    Every call has an id, and arguments that are a JSON text. One that could not be read is there without arguments:
    the API wants an answer to each, and that answer says what was wrong.
    """
    messages: list[Message] = list(trajectory.prompt)
    for turn in trajectory.turns:
        message = turn.message
        if turn.tool_calls:
            message = {**message, "tool_calls": [call.as_message_part() for call in turn.tool_calls]}
        messages += [message, *turn.replies]
    return [_api_message(message) for message in with_call_ids(messages)]


def _api_message(message: Message) -> dict[str, Any]:
    if message["role"] == "tool":
        return {name: value for name, value in message.items() if name != "name"}
    if not message.get("tool_calls"):
        return dict(message)
    return {**message, "tool_calls": [_api_call(call) for call in message["tool_calls"]]}


def _api_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = function["arguments"]
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {**call, "type": "function", "function": {**function, "arguments": text}}


def _api_tool(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Without what OpenAI's API does not know: the type of what is returned."""
    function = {name: value for name, value in schema["function"].items() if name != "return"}
    return {"type": "function", "function": function}
