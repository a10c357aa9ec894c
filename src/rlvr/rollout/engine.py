"""What a rollout engine is: token ids in, sampled token ids out, for many sequences that stop and go on.

A sequence is opened with its prompt. It is *submitted* with a token budget, sampled until it ends its turn, and
handed back by `step`. It may then be submitted again with new tokens (a tool's result) after what it holds already.
There is no barrier: sequences that were handed back and submitted again run beside those that are still sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How tokens are drawn, as in TRL's `GRPOConfig`. `temperature=0` is greedy.

    `top_k=0` and `min_p=None` mean off.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0


@dataclass(frozen=True)
class SampledTurn:
    """What one submission sampled.

    `token_ids` ends with the end-of-turn token where the model produced one (`ended`); otherwise the token budget
    cut it. `logprobs` are of the sampled tokens, in nats, at the sampling temperature; None where the engine does not
    give them.
    """

    index: int
    token_ids: list[int]
    ended: bool
    logprobs: list[float] | None = None


class RolloutSession(Protocol):
    """Sequences that share one engine for the length of a rollout."""

    @property
    def pending(self) -> int:
        """Sequences submitted and not yet handed back."""
        ...

    def submit(self, index: int, new_ids: Sequence[int], max_new_tokens: int) -> None:
        """Appends `new_ids` to sequence `index` (none at its first turn) and samples on, `max_new_tokens` at most."""
        ...

    def step(self) -> list[SampledTurn]:
        """Samples on for a while; the turns that ended meanwhile, possibly none."""
        ...


class RolloutEngine(Protocol):
    """Opens sessions. `name` is what a run's summary calls it."""

    name: str

    def open(
        self, prompt_ids: Sequence[Sequence[int]], *, max_completion_tokens: int
    ) -> AbstractContextManager[RolloutSession]:
        """One sequence for each prompt. Equal prompts form a group, whose prompt an engine may compute once.

        Args:
            prompt_ids: B lists of token ids, without padding.
            max_completion_tokens: the most that a sequence will hold after its prompt, sampled and appended tokens
                together: what an engine has to reserve memory for.
        """
        ...


def sample_all(
    engine: RolloutEngine, prompt_ids: Sequence[Sequence[int]], *, max_completion_tokens: int
) -> list[SampledTurn]:
    """One turn of every prompt, in their order."""
    turns: list[SampledTurn] = []
    with engine.open(prompt_ids, max_completion_tokens=max_completion_tokens) as session:
        for index in range(len(prompt_ids)):
            session.submit(index, [], max_completion_tokens)
        while session.pending:
            turns += session.step()
    return sorted(turns, key=lambda turn: turn.index)
