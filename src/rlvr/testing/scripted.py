"""Rollouts without a model: the policy says what a script tells it to. For tests of environments."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rlvr.environments.base import Environment
from rlvr.errors import ConfigError
from rlvr.rollout.engine import SampledTurn
from rlvr.types import Example, Trajectory


def play_script(
    environment: Environment,
    turns: Sequence[str],
    *,
    example: Example | None = None,
    max_completion_tokens: int = 100_000,
) -> Trajectory:
    """Plays one rollout in which the policy says `turns`, one after the other.

        trajectory = play_script(env, [tool_call("search", query="Paris"), "It is 7."])
        assert env.rubric.score(trajectory)["exact_match"] == 1

    All else is as in training: prompt, chat template, reading and running of tool calls, stopping. The tokenizer has a
    token for each byte, and a ChatML template with the tool calls of Hermes and Qwen.

    Args:
        example: a row of the environment; by default its first one to train on.
        max_completion_tokens: where the rollout is cut.

    Raises:
        ConfigError: the rollout goes on after the last turn.
    """
    from rlvr.rollout.chat import ChatRenderer
    from rlvr.rollout.episodes import play
    from rlvr.testing.tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    end = tokenizer.eos_token_id
    script = [[*tokenizer.encode(turn, add_special_tokens=False), end] for turn in turns]
    (rollout,) = play(
        environment,
        [environment.train_dataset[0] if example is None else example],
        engine=ScriptedEngine([script], end_id=end),
        renderer=ChatRenderer(tokenizer, tools=environment.tools),
        max_completion_tokens=max_completion_tokens,
    )
    return rollout.trajectory


def tool_call(name: str, **arguments: Any) -> str:
    """A call as a policy writes it, in the format of Hermes and Qwen."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


class ScriptedEngine:
    """A rollout engine that samples `script[index]`: the token ids of one turn after the other, cut to the budget.

    At each step it hands back one pending sequence, the one submitted last, so that order is not what one expects.

    Args:
        script: for each sequence, its turns.
        end_id: the end-of-turn token.
        with_logprobs: whether it gives log-probabilities: made-up ones, of each token always the same.
    """

    name = "scripted"

    def __init__(self, script: Sequence[Sequence[Sequence[int]]], *, end_id: int, with_logprobs: bool = True):
        self.script = [list(turns) for turns in script]
        self.end_id, self.with_logprobs = end_id, with_logprobs
        self.sequences: list[list[int]] = []  # all ids of each, the prompt's included
        self.handed_back: list[int] = []

    @contextmanager
    def open(self, prompt_ids: Sequence[Sequence[int]], *, max_completion_tokens: int) -> Iterator[ScriptedEngine]:
        self.sequences = [list(ids) for ids in prompt_ids]
        self._limits = [len(ids) + max_completion_tokens for ids in prompt_ids]
        self._budgets: dict[int, int] = {}  # of the sequences that are pending
        yield self

    @property
    def pending(self) -> int:
        return len(self._budgets)

    def submit(self, index: int, new_ids: Sequence[int], max_new_tokens: int) -> None:
        self.sequences[index] += new_ids
        room = self._limits[index] - len(self.sequences[index])
        if index in self._budgets or not 1 <= max_new_tokens <= room:
            raise ConfigError(
                f"sequence {index} was submitted for {max_new_tokens} tokens; it has room for {room}, and must not be "
                "pending."
            )
        self._budgets[index] = max_new_tokens

    def step(self) -> list[SampledTurn]:
        index, budget = self._budgets.popitem()
        if not self.script[index]:
            raise ConfigError(f"the script of rollout {index} is at its end, and the rollout goes on. Add a turn.")
        ids = list(self.script[index].pop(0)[:budget])
        self.sequences[index] += ids
        self.handed_back.append(index)
        logprobs = [-(token + 1) / 100 for token in ids] if self.with_logprobs else None
        return [SampledTurn(index, ids, ids[-1] == self.end_id, logprobs)]
