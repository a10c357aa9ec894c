"""The host's side of a rollout: which sequence waits, which runs, and when a turn is over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rlvr.errors import ConfigError
from rlvr.rollout.engine import SampledTurn
from rlvr.rollout.grouped.runner import Row, Runner


@dataclass
class _Sequence:
    """Invariant: of prompt and completion, all tokens but `pending` are in the cache, and `pending` is never empty."""

    index: int
    group: int
    prompt_length: int  # tokens in the group's cache: the prompt without its last token, which starts the suffix
    pending: list[int]
    length: int = 0  # tokens in the suffix cache
    remaining: int = 0  # tokens that the current turn may still sample; 0: waiting for `submit`
    tokens: list[int] = field(default_factory=list)  # of the current turn
    logprobs: list[float] = field(default_factory=list)

    @property
    def completion_length(self) -> int:
        return self.length + len(self.pending) - 1

    def row(self) -> Row:
        return Row(self.pending[-1], self.index, self.group, self.prompt_length, self.length, self.remaining)


class GroupedSession:
    """A `RolloutSession` on a `Runner` whose cache is large enough for it. `prompts`, `group_of`: of `distinct`."""

    def __init__(
        self,
        runner: Runner,
        prompts: Sequence[Sequence[int]],
        group_of: Sequence[int],
        *,
        max_completion_tokens: int,
        eos_token_ids: Sequence[int],
        max_rows: int,
    ):
        self._runner, self._max_rows = runner, max_rows
        self._max_completion_tokens, self._eos = max_completion_tokens, frozenset(eos_token_ids)
        self._loaded: list[int] = []  # sequences of the runner's batch, in its order
        self._sequences = [
            _Sequence(index, group, len(prompts[group]) - 1, [prompts[group][-1]])
            for index, group in enumerate(group_of)
        ]
        runner.prefill([ids[:-1] for ids in prompts])
        runner.forget_seen()
        runner.mark_seen(range(len(group_of)), [prompts[group] for group in group_of])

    @property
    def pending(self) -> int:
        return sum(sequence.remaining > 0 for sequence in self._sequences)

    def submit(self, index: int, new_ids: Sequence[int], max_new_tokens: int) -> None:
        """As `RolloutSession.submit`.

        Raises:
            ConfigError: the sequence is still sampling, or there is no room for so many tokens.
        """
        sequence = self._sequences[index]
        if sequence.remaining > 0:
            raise ConfigError(
                f"sequence {index} was submitted while it is still sampling; wait until step returns it."
            )
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {max_new_tokens} for sequence {index}; it must be at least 1.")
        needed = sequence.completion_length + len(new_ids) + max_new_tokens
        if needed > self._max_completion_tokens:
            raise ConfigError(
                f"sequence {index} would hold {needed} completion tokens: {sequence.completion_length} there, "
                f"{len(new_ids)} appended, {max_new_tokens} to sample; the rollout was opened for "
                f"max_completion_tokens={self._max_completion_tokens}. Submit fewer, or open it for more."
            )
        sequence.pending.extend(new_ids)
        sequence.remaining, sequence.tokens, sequence.logprobs = max_new_tokens, [], []
        self._runner.mark_seen([index], [new_ids])
        self._loaded = []

    def step(self) -> list[SampledTurn]:
        """Samples at most `check_every` tokens for each running sequence."""
        running = [sequence for sequence in self._sequences if sequence.remaining > 0][: self._max_rows]
        if not running:
            return []
        self._extend([sequence for sequence in running if len(sequence.pending) > 1])
        running.sort(key=lambda sequence: sequence.group)
        if self._loaded != (indices := [sequence.index for sequence in running]):
            self._runner.load([sequence.row() for sequence in running])
            self._loaded = indices
        steps = min(self._runner.check_every, max(sequence.remaining for sequence in running))
        tokens, logprobs = self._runner.run(steps)
        turns = []
        for row, sequence in enumerate(running):
            turn = self._advance(sequence, [step[row] for step in tokens], [step[row] for step in logprobs])
            if turn is not None:
                turns.append(turn)
        return turns

    def _extend(self, sequences: Sequence[_Sequence]) -> None:
        if not sequences:
            return
        self._runner.extend([s.row() for s in sequences], [s.pending[:-1] for s in sequences])
        for sequence in sequences:
            sequence.length += len(sequence.pending) - 1
            sequence.pending = sequence.pending[-1:]

    def _advance(self, sequence: _Sequence, tokens: list[int], logprobs: list[float]) -> SampledTurn | None:
        """Takes what was sampled up to the end of the turn; the turn, if it is over."""
        count = min(sequence.remaining, len(tokens))
        count = next((i + 1 for i in range(count) if tokens[i] in self._eos), count)
        ended = tokens[count - 1] in self._eos
        sequence.tokens += tokens[:count]
        sequence.logprobs += logprobs[:count]
        sequence.length += count
        sequence.pending = [tokens[count - 1]]
        sequence.remaining = 0 if ended else sequence.remaining - count
        if sequence.remaining:
            return None
        return SampledTurn(sequence.index, sequence.tokens, ended, sequence.logprobs)


def distinct(prompt_ids: Sequence[Sequence[int]]) -> tuple[list[Sequence[int]], list[int]]:
    """The different prompts in order of appearance, and for each of `prompt_ids` which of them it is."""
    groups: dict[tuple[int, ...], int] = {}
    group_of = [groups.setdefault(tuple(ids), len(groups)) for ids in prompt_ids]
    return list(groups), group_of
