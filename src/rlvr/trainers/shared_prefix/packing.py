"""A micro-batch with each distinct prompt once: which token goes where in the packed row.

Rows that share a prompt form a group. A group is laid out as its *trunk*, the prompt without its last token,
followed by one *branch* for each completion: the prompt's last token and the completion without its last
token.

    row 0: a b c | x y      trunk   branch 0   branch 1
    row 1: a b c | z        a b     c x        c
                  predicts          x y        z

Every branch token predicts exactly one label, so any head that takes one label a position scores the packed
row as it is; what the repeated prompt token costs, the missing last completion token saves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -100  # the label of a position that is not scored, as in torch and transformers


@dataclass(frozen=True)
class Group:
    """One prompt's place in the packed row: `trunk` tokens from `start`, then its branches' lengths."""

    start: int
    trunk: int
    branches: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.start + self.trunk + sum(self.branches)


@dataclass(frozen=True, kw_only=True)
class PackedRows:
    """A micro-batch of B rows as one row of N tokens.

    Attributes:
        input_ids, position_ids, labels: (1, N). A branch continues at its trunk's positions. Labels are those
            that the position itself predicts (already shifted), `IGNORED` in trunks.
        slots: (N,), where each position's prediction belongs in the flattened (B, C) result; B·C in trunks.
        groups: the tree, on the host.
        padded_tokens: what the padded forward would compute, B·(P+C).
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    slots: Tensor
    groups: tuple[Group, ...]
    padded_tokens: int

    @property
    def packed_tokens(self) -> int:
        return self.input_ids.shape[1]

    def unpack(self, values: Tensor, rows: int, columns: int) -> Tensor:
        """Per-position `values` (1, N) as (rows, columns), zero where there is no completion token."""
        flat = values.new_zeros(rows * columns + 1).scatter(0, self.slots, values[0])
        return flat[:-1].view(rows, columns)


def pack_rows(input_ids: Tensor, attention_mask: Tensor, completion_columns: int) -> PackedRows:
    """Finds equal prompts, in whatever order the rows are, and packs every distinct prompt once.

    Waits for the device once, to read the tokens.

    Args:
        input_ids: (B, P+C), prompts padded on the left and completions on the right, as TRL's.
        attention_mask: (B, P+C), 1 for tokens. A row whose completion is masked throughout is left out.
        completion_columns: C.
    """
    rows, columns = input_ids.shape
    prompt_columns = columns - completion_columns
    host_ids, host_mask = torch.stack([input_ids, attention_mask.to(input_ids.dtype)]).cpu()
    # A row without any prompt token has nothing to predict its first token from: it keeps one padding token.
    prompt_lengths = host_mask[:, :prompt_columns].sum(1).clamp(min=1).tolist()
    completion_lengths = host_mask[:, prompt_columns:].sum(1).tolist()
    if not any(completion_lengths):
        completion_lengths[0] = 1  # without any token through the model there is no graph to differentiate

    members: dict[bytes, list[int]] = {}
    for row, (prompt, completion) in enumerate(zip(prompt_lengths, completion_lengths, strict=True)):
        if completion:
            key = host_ids[row, prompt_columns - prompt : prompt_columns].numpy().tobytes()
            members.setdefault(key, []).append(row)

    groups: list[Group] = []
    # Of each packed token; its source is where it is in the flattened input.
    sources, positions, slots = [], [], []
    start = 0
    for group_rows in members.values():
        trunk = prompt_lengths[group_rows[0]] - 1
        first = prompt_columns - 1 - trunk  # column of the prompt's first token
        sources.append(torch.arange(trunk) + group_rows[0] * columns + first)
        positions.append(torch.arange(trunk))
        slots.append(torch.full((trunk,), rows * completion_columns))
        for row in group_rows:
            branch = torch.arange(completion_lengths[row])
            sources.append(branch + row * columns + prompt_columns - 1)
            positions.append(branch + trunk)
            slots.append(branch + row * completion_columns)
        groups.append(Group(start, trunk, tuple(completion_lengths[row] for row in group_rows)))
        start = groups[-1].end

    source, position, slot = torch.stack([torch.cat(sources), torch.cat(positions), torch.cat(slots)]).to(
        input_ids.device
    )
    in_branch = slot < rows * completion_columns
    flat_ids, flat_mask = input_ids.flatten(), attention_mask.flatten()
    target = torch.where(in_branch, source + 1, 0)
    labels = torch.where(in_branch & (flat_mask[target] != 0), flat_ids[target], IGNORED)
    return PackedRows(
        input_ids=flat_ids[source][None],
        position_ids=position[None],
        labels=labels[None],
        slots=slot,
        groups=tuple(groups),
        padded_tokens=rows * columns,
    )


def group_order(keys: Sequence[object], generator: torch.Generator | None = None) -> Tensor:
    """A random order of rows in which rows of one group stay together, for use in place of a plain shuffle.

    With one generation batch an optimizer step, the step's gradient does not depend on the order; how much of
    each micro-batch is shared does.

    Args:
        keys: one for each row; equal keys make a group.

    Returns:
        (B,) row indices: groups in random order, the rows of each in random order.
    """
    members: dict[object, list[int]] = {}
    for row, key in enumerate(keys):
        members.setdefault(key, []).append(row)
    groups = [torch.tensor(rows) for rows in members.values()]
    shuffled = (groups[i] for i in torch.randperm(len(groups), generator=generator).tolist())
    parts = [rows[torch.randperm(len(rows), generator=generator)] for rows in shuffled]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.long)
