"""The device's side of a rollout: prompts in, suffixes extended, tokens sampled. It knows rows, not turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlvr.rollout.engine import SamplingSettings
from rlvr.rollout.grouped.attention import Decode, Extend, Plan, Prefill
from rlvr.rollout.grouped.cache import Cache, CacheShape
from rlvr.rollout.grouped.sampling import draw

PREFILL_TOKENS = 8192  # packed prompts of one forward pass: enough to fill a GPU, little activation memory
EXTEND_TOKENS = 4096  # padded tokens of one forward pass: their mask has a row of keys for each


@dataclass(frozen=True)
class Row:
    """One sequence as a batch holds it: all but its last token is in the cache.

    `length` counts its suffix tokens in the cache, `remaining` what it may still sample.
    """

    token: int
    slot: int
    group: int
    prompt_length: int
    length: int
    remaining: int


class RowState:
    """The rows of a batch on the device, in tensors that keep their address. Capacities, then views of B rows."""

    FIELDS = ("token", "slot", "prompt_length", "length", "remaining", "done")

    def __init__(self, rows: int, steps: int, device: torch.device):
        self.rows, self.steps = rows, steps
        self.values = torch.zeros((len(self.FIELDS), rows), dtype=torch.int64, device=device)
        self.step = torch.zeros(1, dtype=torch.int64, device=device)  # of the current run
        self.tokens = torch.zeros((steps, rows), dtype=torch.int64, device=device)
        self.logprobs = torch.zeros((steps, rows), dtype=torch.float32, device=device)

    def view(self, rows: int) -> dict[str, Tensor]:
        return dict(zip(self.FIELDS, self.values[:, :rows], strict=True))

    def load(self, rows: Sequence[Row], size: int, spare_slot: int) -> None:
        """Puts `rows` in place and fills up to `size` with rows that are done from the start."""
        values = [[row.token, row.slot, row.prompt_length, row.length, row.remaining, 0] for row in rows]
        values += [[0, spare_slot, 0, 0, 0, 1]] * (size - len(rows))
        self.values[:, :size] = torch.tensor(values, device=self.values.device).T


class Runner:
    """Runs one model over one cache. Made by the engine; kept from one rollout to the next while it is large enough.

    Args:
        model: from `causal_lm`, in `rollout_mode` whenever a method runs.
        check_every: token steps between two looks of the host.
    """

    def __init__(
        self,
        model: Any,
        shape: CacheShape,
        *,
        sampling: SamplingSettings,
        eos_token_ids: Sequence[int],
        generator: torch.Generator,
        check_every: int,
    ):
        weight = model.get_input_embeddings().weight
        self.model, self.sampling, self.generator, self.check_every = model, sampling, generator, check_every
        self.decoder = getattr(model, model.base_model_prefix)
        self.softcap = getattr(model.config, "final_logit_softcapping", None)
        self.device = weight.device
        self.cache = Cache(shape, dtype=model.dtype, device=self.device)
        self.state = RowState(self.row_capacity(shape), check_every, self.device)
        self.eos = torch.tensor(list(eos_token_ids), dtype=torch.int64, device=self.device)
        self._true = torch.ones((), dtype=torch.bool, device=self.device)
        self.seen: Tensor | None = None
        if sampling.repetition_penalty != 1.0:
            self.seen = torch.zeros((shape.slots, model.config.vocab_size), dtype=torch.bool, device=self.device)
        self.rows: Sequence[Row] = ()
        self.longest = 0  # no row of the batch has more suffix tokens in the cache

    @staticmethod
    def row_capacity(shape: CacheShape) -> int:
        """The most rows that a batch can have, those that only fill it included."""
        return shape.slots

    @property
    def spare_slot(self) -> int:
        return self.cache.shape.slots - 1

    def prefill(self, prompts: Sequence[Sequence[int]]) -> None:
        """Fills the prompt cache: group g with `prompts[g]`, each computed once, several in one packed row."""
        packed: list[int] = []
        positions: list[int] = []
        spans: list[tuple[int, int, int]] = []

        def flush() -> None:
            if packed:
                starts = torch.tensor([0, *(end for _, _, end in spans)], dtype=torch.int32, device=self.device)
                self._hidden(packed, positions, Prefill(self.cache, tuple(spans), starts))
            for values in (packed, positions, spans):
                values.clear()

        for group, prompt in enumerate(prompts):
            if not prompt:
                continue
            if len(packed) + len(prompt) > PREFILL_TOKENS:
                flush()
            spans.append((group, len(packed), len(packed) + len(prompt)))
            packed.extend(prompt)
            positions.extend(range(len(prompt)))
        flush()

    def extend(self, rows: Sequence[Row], new_ids: Sequence[Sequence[int]]) -> None:
        """Appends `new_ids[i]` (at least one) to the suffix of `rows[i]`, computing only them."""
        order = sorted(range(len(rows)), key=lambda i: len(new_ids[i]))
        while order:
            width = len(new_ids[order[-1]])
            count = max(1, min(len(order), EXTEND_TOKENS // width))
            chosen, order = order[-count:], order[:-count]
            self._extend([rows[i] for i in chosen], [new_ids[i] for i in chosen], width)

    def _extend(self, rows: Sequence[Row], new_ids: Sequence[Sequence[int]], width: int) -> None:
        def tensor(values: Any) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=self.device)

        starts = [row.prompt_length + row.length for row in rows]
        where = [(i, j) for i, ids in enumerate(new_ids) for j in range(len(ids))]
        plan = Extend(
            cache=self.cache,
            slots=tensor([row.slot for row in rows]),
            groups=tensor([row.group for row in rows]),
            prompt_lengths=tensor([row.prompt_length for row in rows]),
            lengths=tensor([row.length for row in rows]),
            token_rows=tensor([i for i, _ in where]),
            token_columns=tensor([j for _, j in where]),
            total=max(row.length + len(ids) for row, ids in zip(rows, new_ids, strict=True)),
        )
        self._hidden(
            [[*ids, *[0] * (width - len(ids))] for ids in new_ids],
            [[start + min(j, len(ids) - 1) for j in range(width)] for start, ids in zip(starts, new_ids, strict=True)],
            plan,
        )

    def mark_seen(self, slots: Sequence[int], ids: Sequence[Sequence[int]]) -> None:
        """Tells the repetition penalty which tokens the sequences hold."""
        if self.seen is not None:
            flat = [(slot, token) for slot, tokens in zip(slots, ids, strict=True) for token in tokens]
            if flat:
                where = torch.tensor(flat, device=self.device)
                self.seen[where[:, 0], where[:, 1]] = True

    def forget_seen(self) -> None:
        if self.seen is not None:
            self.seen.zero_()

    def load(self, rows: Sequence[Row]) -> None:
        """Makes these the batch. Rows of a group must be neighbours."""
        self._place(rows, len(rows))

    def _place(self, rows: Sequence[Row], size: int) -> None:
        self.rows = rows
        self.longest = max(row.length for row in rows)
        self.state.load(rows, size, self.spare_slot)

    def run(self, steps: int) -> tuple[list[list[int]], list[list[float]]]:
        """Samples `steps` tokens for every row: tokens and log-probabilities, step by step, row by row.

        A row that ended or used up its tokens on the way stands still; what is reported for it from then on is noise.
        """
        self.state.step.zero_()
        self._run(steps)
        self.longest += steps
        count = len(self.rows)
        return self.state.tokens[:steps, :count].tolist(), self.state.logprobs[:steps, :count].tolist()

    def _run(self, steps: int) -> None:
        for step in range(1, steps + 1):
            total = min(self.longest + step, self.cache.shape.suffix_tokens)  # a row that is full stands still
            self.token_step(self._eager_plan(total), len(self.rows))

    def _eager_plan(self, total: int) -> Decode:
        view = self.state.view(len(self.rows))
        spans: list[tuple[int, int, int, int]] = []
        for index, row in enumerate(self.rows):
            if spans and spans[-1][0] == row.group:
                spans[-1] = (*spans[-1][:3], index + 1)
            else:
                spans.append((row.group, row.prompt_length, index, index + 1))
        return Decode(self.cache, view["slot"], view["prompt_length"], view["length"], tuple(spans), total)

    def token_step(self, plan: Plan, size: int) -> None:
        """Embedding, layers, head and sampling for the first `size` rows of the state, and the state moved on."""
        row = self.state.view(size)
        tokens, logprobs = self._sample(plan, row)
        self.state.tokens[:, :size].index_copy_(0, self.state.step, tokens[None])
        self.state.logprobs[:, :size].index_copy_(0, self.state.step, logprobs[None])
        self.state.step.add_(1)

        standing = row["done"] > 0
        moved = 1 - row["done"]
        row["token"].copy_(torch.where(standing, row["token"], tokens))
        row["length"].add_(moved)
        row["remaining"].sub_(moved)
        ended = (tokens[:, None] == self.eos).any(dim=1) | (row["remaining"] <= 0)
        row["done"].copy_(standing | ended)
        if self.seen is not None:
            # a Python True would be copied from the host, which no CUDA graph can record
            self.seen.index_put_((row["slot"], row["token"]), self._true)

    def _sample(self, plan: Plan, row: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        positions = row["prompt_length"] + row["length"]
        hidden = self._decode(row["token"][:, None], positions[:, None], plan)
        logits = self.model.get_output_embeddings()(hidden[:, -1])
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        seen = None if self.seen is None else self.seen[row["slot"]]
        return draw(logits, self.sampling, generator=self.generator, seen=seen)

    def _hidden(self, ids: Any, positions: Any, plan: Plan) -> Tensor:
        """A forward pass over ids from the host, one row or several."""
        ids, positions = (torch.tensor(values, device=self.device) for values in (ids, positions))
        if ids.ndim == 1:
            ids, positions = ids[None], positions[None]
        return self._decode(ids, positions, plan)

    def _decode(self, ids: Tensor, positions: Tensor, plan: Plan) -> Tensor:
        output = self.decoder(input_ids=ids, position_ids=positions, use_cache=False, rollout_plan=plan)
        return output.last_hidden_state
