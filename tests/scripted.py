"""A rollout engine that plays from a script, for tests."""

from __future__ import annotations

from contextlib import contextmanager

from rlvr.rollout.engine import SampledTurn


class ScriptedEngine:
    """Samples `script[index]`: the token ids of one turn after the other, cut to the budget.

    At each step it hands back one pending sequence, the one submitted last, so that order is not what one
    expects.
    """

    name = "scripted"

    def __init__(self, script, *, end_id, with_logprobs=True):
        self.script, self.end_id, self.with_logprobs = (
            [list(turns) for turns in script],
            end_id,
            with_logprobs,
        )
        self.sequences: list[list[int]] = []
        self.handed_back: list[int] = []

    @contextmanager
    def open(self, prompt_ids, *, max_completion_tokens):
        self.sequences = [list(ids) for ids in prompt_ids]
        self.limits = [len(ids) + max_completion_tokens for ids in prompt_ids]
        self._pending: dict[int, int] = {}
        yield self

    @property
    def pending(self):
        return len(self._pending)

    def submit(self, index, new_ids, max_new_tokens):
        assert index not in self._pending
        assert max_new_tokens >= 1
        self.sequences[index] += new_ids
        assert len(self.sequences[index]) + max_new_tokens <= self.limits[index]
        self._pending[index] = max_new_tokens

    def step(self):
        index, budget = self._pending.popitem()
        ids = self.script[index].pop(0)[:budget]
        self.sequences[index] += ids
        self.handed_back.append(index)
        logprobs = [-(token + 1) / 100 for token in ids] if self.with_logprobs else None
        return [SampledTurn(index, ids, ids[-1] == self.end_id, logprobs)]
