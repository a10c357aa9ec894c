"""Plays an environment to its end: turns, tool calls, replies, stopping. Token in, token out.

There is no barrier between turns. While the engine samples some conversations, the tools of others run off
the main thread, and a conversation is submitted again as soon as its own replies are there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field

from rlvr.environments.base import Environment
from rlvr.environments.tools import Workers
from rlvr.errors import DataError
from rlvr.rollout.chat import ChatRenderer
from rlvr.rollout.engine import RolloutEngine, RolloutSession, SampledTurn
from rlvr.rollout.rules import Game, Rules, assistant_message
from rlvr.rollout.tool_calls import ToolCallParser, parser_for, read_turn
from rlvr.types import Example, Message, StopReason, ToolCall, Trajectory, Turn


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """A trajectory and its token ids. The lists after `prompt_ids` all have the length C of the completion.

    `sampled_mask` is 1 where the policy sampled the token and 0 where the chat template wrote it. `logprobs`
    are in nats, 0.0 where the mask is 0; None if the engine gave none. `ended`: the last sampled turn came to
    its end-of-turn token; False means that the token budget cut it.
    """

    trajectory: Trajectory
    prompt_ids: list[int]
    completion_ids: list[int]
    sampled_mask: list[int]
    logprobs: list[float] | None
    ended: bool


def play(
    environment: Environment,
    examples: Sequence[Example],
    *,
    engine: RolloutEngine,
    renderer: ChatRenderer,
    max_completion_tokens: int,
    max_prompt_tokens: int | None = None,
    parser: str | ToolCallParser | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Rollout]:
    """Plays one rollout for each example, in their order. Examples given G times form groups.

    Replies that are not followed by another turn are in the trajectory no more than in the ids: those that a
    rollout ended with, and those that would not have left room for a token within `max_completion_tokens`.

    Args:
        examples: B rows of the environment.
        engine: samples the turns.
        renderer: made with the environment's tools.
        max_completion_tokens: sampled tokens and reply tokens of one rollout together.
        max_prompt_tokens: a longer prompt is an error.
        parser: of tool calls: as `get_parser` takes it; by default found from the chat template.
        on_progress: called with (rollouts finished, B).

    Raises:
        DataError: a prompt is longer than `max_prompt_tokens`.
        EnvironmentDefinitionError: a method of the environment or the parser raised, or the tools cannot be used.
        ConfigError: a parser was given, and the environment has no tools.
    """
    if not examples:
        return []
    player = _Player(environment, renderer, max_completion_tokens=max_completion_tokens, parser=parser)
    games = player.set_up(examples, max_prompt_tokens=max_prompt_tokens)
    waiting: dict[Future[list[Message]], _Game] = {}
    finished = 0
    with (
        engine.open([g.prompt_ids for g in games], max_completion_tokens=max_completion_tokens) as session,
        Workers() as workers,
    ):
        for game in games:
            session.submit(game.index, [], max_completion_tokens)
        while session.pending or waiting:
            if session.pending:
                for sampled in session.step():
                    game = games[sampled.index]
                    waiting[workers.start(player.after_turn(game, sampled, workers))] = game
            answered = wait(waiting, timeout=0 if session.pending else None, return_when=FIRST_COMPLETED).done
            # In the order of the examples: the order of threads must not decide what is sampled together.
            for future in sorted(answered, key=lambda future: waiting[future].index):
                game = waiting.pop(future)
                player.go_on(game, future.result(), session)
                finished += game.stop_reason is not None
            if answered and on_progress:
                on_progress(finished, len(games))
    return [game.rollout() for game in games]


@dataclass(kw_only=True)
class _Game(Game):
    prompt_ids: list[int]
    completion_ids: list[int] = field(default_factory=list)
    sampled_mask: list[int] = field(default_factory=list)
    logprobs: list[float] | None = field(default_factory=list)
    ended: bool = False

    def append(self, ids: Sequence[int], *, sampled: bool, logprobs: Sequence[float] | None = None) -> None:
        self.completion_ids += ids
        self.sampled_mask += [int(sampled)] * len(ids)
        if sampled and logprobs is None:
            self.logprobs = None
        elif self.logprobs is not None:
            self.logprobs += logprobs if logprobs is not None else [0.0] * len(ids)

    def rollout(self) -> Rollout:
        return Rollout(
            trajectory=self.trajectory,
            prompt_ids=self.prompt_ids,
            completion_ids=self.completion_ids,
            sampled_mask=self.sampled_mask,
            logprobs=self.logprobs,
            ended=self.ended,
        )


class _Player:
    """Between the rules, which know messages, and the engine, which knows token ids."""

    def __init__(
        self,
        environment: Environment,
        renderer: ChatRenderer,
        *,
        max_completion_tokens: int,
        parser: str | ToolCallParser | None,
    ):
        self.rules = Rules(environment)
        self.renderer = renderer
        self.budget = max_completion_tokens
        self.parser = parser_for(renderer, parser)

    def set_up(self, examples: Sequence[Example], *, max_prompt_tokens: int | None) -> list[_Game]:
        ids: dict[str, list[int]] = {}  # a group's prompt is tokenized once
        games = []
        for index, example in enumerate(examples):
            messages = self.rules.messages(example)
            text = self.renderer.prompt_text(messages)
            if text not in ids:
                ids[text] = self.renderer.encode(text)
            if max_prompt_tokens is not None and len(ids[text]) > max_prompt_tokens:
                raise DataError(
                    f"a prompt of environment {self.rules.environment.name!r} has {len(ids[text])} tokens, and "
                    f"max_prompt_tokens is {max_prompt_tokens}: {text[:200]!r}… "
                    "Raise --max-prompt-length, or leave such rows out."
                )
            games.append(_Game(index=index, trajectory=self.rules.begin(example, messages), prompt_ids=ids[text]))
        return games

    async def after_turn(self, game: _Game, sampled: SampledTurn, workers: Workers) -> list[Message]:
        """The replies to go on with; none if the rollout has ended."""
        game.append(sampled.token_ids, sampled=True, logprobs=sampled.logprobs)
        game.ended = sampled.ended
        message, calls = self._read(sampled)
        turn = Turn(message, tuple(calls))
        return await self.rules.after_turn(game, turn, ended=sampled.ended, workers=workers)

    def go_on(self, game: _Game, replies: list[Message], session: RolloutSession) -> None:
        """Submits the next turn, unless the rollout has ended or the replies leave no room for one."""
        if game.stop_reason is not None:
            return
        new_ids = self.renderer.reply_ids(replies)
        left = self.budget - len(game.completion_ids) - len(new_ids)
        if left < 1:
            game.stop(StopReason.TOKEN_BUDGET)
            return
        game.append(new_ids, sampled=False)
        session.submit(game.index, new_ids, left)

    def _read(self, sampled: SampledTurn) -> tuple[Message, list[ToolCall]]:
        ids = sampled.token_ids[:-1] if sampled.ended else sampled.token_ids
        if self.parser is None or not sampled.ended:
            return assistant_message(self._text(ids, skip_special_tokens=True), []), []
        content, calls = read_turn(self.parser, self._text(ids, skip_special_tokens=False))
        return assistant_message(content, calls), calls

    def _text(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        return self.renderer.tokenizer.decode(
            ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
