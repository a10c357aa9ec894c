"""Attention of a packed row in two calls of the flash kernel, each over keys as they lie.

    own      every trunk and every branch, causally over itself
    shared   all branches of a group, as one segment, over the whole trunk

A branch's output is the mean of its two parts, weighted by their sums of exponentials; with the joint output and sum
put in, the kernel's backward pass gives each part's share of the gradients. A trunk is read once for its group. The
other way, trunks repeated before each branch in one call, writes them G times, gathers their gradients G times, and
gives the kernel segments of few queries and many keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlvr.fused import flash
from rlvr.trainers.shared_prefix.packing import Group

Span = tuple[int, int]  # first row, and the one after the last


@dataclass(frozen=True, kw_only=True)
class Split:
    """The two calls of a packed row.

    Attributes:
        own: trunks and branches.
        shared: branches over trunks, of the groups that have a trunk; None if none has.
        trunks, branches: where they are in the packed row, for each of these groups.
        branch_rows: the positions in `branches`, (M,).
    """

    own: flash.Segments
    shared: flash.Segments | None
    trunks: tuple[Span, ...]
    branches: tuple[Span, ...]
    branch_rows: Tensor

    @classmethod
    def of(cls, groups: Sequence[Group], device: torch.device) -> Split:
        lengths = [length for group in groups for length in (group.trunk, *group.branches) if length]
        sharing = [group for group in groups if group.trunk]
        trunks = tuple((group.start, group.start + group.trunk) for group in sharing)
        branches = tuple((group.start + group.trunk, group.end) for group in sharing)
        return cls(
            own=flash.Segments.of(lengths, lengths, device),
            shared=flash.Segments.of(_lengths(branches), _lengths(trunks), device) if sharing else None,
            trunks=trunks,
            branches=branches,
            branch_rows=torch.cat([torch.arange(*span) for span in branches] or [torch.empty(0, dtype=torch.long)]).to(
                device
            ),
        )


def split_flash(query: Tensor, key: Tensor, value: Tensor, split: Split, *, scale: float) -> Tensor:
    """
    Args:
        query: (N, H, D), rotated. `key`, `value`: (N, H_kv, D).

    Returns:
        (N, H, D).
    """
    return _SplitFlash.apply(query, key, value, split, scale)


class _SplitFlash(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, split: Split, scale: float) -> Tensor:
        output, logsumexp = flash.varlen_forward(query, key, value, split.own, scale=scale, causal=True)
        if split.shared is not None:
            shared_query = _rows(query, split.branches)
            shared_key, shared_value = _rows(key, split.trunks), _rows(value, split.trunks)
            part = flash.varlen_forward(
                shared_query, shared_key, shared_value, split.shared, scale=scale, causal=False
            )
            flash.join(output, logsumexp, split.branch_rows, *part)
        ctx.save_for_backward(query, key, value, output, logsumexp)
        ctx.split, ctx.scale = split, scale
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, logsumexp = ctx.saved_tensors
        split, scale = ctx.split, ctx.scale
        grads = flash.varlen_backward(grad, query, key, value, output, logsumexp, split.own, scale=scale, causal=True)
        if split.shared is not None:
            grad, query, output = (_rows(tensor, split.branches) for tensor in (grad, query, output))
            key, value = _rows(key, split.trunks), _rows(value, split.trunks)
            logsumexp = logsumexp[:, split.branch_rows]
            parts = flash.varlen_backward(
                grad, query, key, value, output, logsumexp, split.shared, scale=scale, causal=False
            )
            for whole, spans, part in zip(grads, (split.branches, split.trunks, split.trunks), parts, strict=True):
                torch._foreach_add_([whole[slice(*span)] for span in spans], list(part.split(_lengths(spans))))
        return *grads, None, None


def _rows(tensor: Tensor, spans: Sequence[Span]) -> Tensor:
    return torch.cat([tensor[slice(*span)] for span in spans])


def _lengths(spans: Sequence[Span]) -> list[int]:
    return [end - start for start, end in spans]
