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
Kept = dict[object, tuple[Tensor, Tensor]]  # by layer: output (N, H, D) and log-sum-exp (H, N)


@dataclass(frozen=True, kw_only=True)
class Shared:
    """The second call.

    Attributes:
        segments: the branches of each group that has a trunk, over this trunk.
        trunks, branches: where they are in the packed row, group by group.
        branch_rows: all positions in `branches`, (M,).
    """

    segments: flash.Segments
    trunks: tuple[Span, ...]
    branches: tuple[Span, ...]
    branch_rows: Tensor


@dataclass(frozen=True)
class Split:
    """The two calls of a packed row; without the second where no group has a trunk."""

    own: flash.Segments
    shared: Shared | None

    @classmethod
    def of(cls, groups: Sequence[Group], device: torch.device) -> Split:
        lengths = [length for group in groups for length in (group.trunk, *group.branches) if length]
        own = flash.Segments.of(lengths, lengths, device)
        sharing = [group for group in groups if group.trunk]
        if not sharing:
            return cls(own, None)
        trunks = tuple((group.start, group.start + group.trunk) for group in sharing)
        branches = tuple((group.start + group.trunk, group.end) for group in sharing)
        shared = Shared(
            segments=flash.Segments.of(_lengths(branches), _lengths(trunks), device),
            trunks=trunks,
            branches=branches,
            branch_rows=torch.cat([torch.arange(*span) for span in branches]).to(device),
        )
        return cls(own, shared)


def split_flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    split: Split,
    *,
    scale: float,
    kept: Kept | None = None,
    layer: object = None,
) -> Tensor:
    """
    Args:
        query: (N, H, D), rotated. `key`, `value`: (N, H_kv, D).
        kept: where the first computation of a layer is kept for the second, which takes it from there.

    Returns:
        (N, H, D). Each part of it, and of a gradient, is rounded, and then their sum.
    """
    return _SplitFlash.apply(query, key, value, split, scale, kept, layer)


def _attend(query: Tensor, key: Tensor, value: Tensor, split: Split, scale: float) -> tuple[Tensor, Tensor]:
    output, logsumexp = flash.varlen_forward(query, key, value, split.own, scale=scale, causal=True)
    if split.shared is not None:
        shared = split.shared
        part, part_logsumexp = flash.varlen_forward(
            _rows(query, shared.branches),
            _rows(key, shared.trunks),
            _rows(value, shared.trunks),
            shared.segments,
            scale=scale,
            causal=False,
        )
        flash.join(output, logsumexp, shared.branch_rows, part, part_logsumexp)
    return output, logsumexp


class _SplitFlash(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        split: Split,
        scale: float,
        kept: Kept | None,
        layer: object,
    ) -> Tensor:
        found = None if kept is None else kept.pop(layer, None)
        output, logsumexp = found or _attend(query, key, value, split, scale)
        if kept is not None and found is None:
            kept[layer] = output.detach(), logsumexp
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
            shared = split.shared
            parts = flash.varlen_backward(
                _rows(grad, shared.branches),
                _rows(query, shared.branches),
                _rows(key, shared.trunks),
                _rows(value, shared.trunks),
                _rows(output, shared.branches),
                logsumexp.index_select(1, shared.branch_rows),
                shared.segments,
                scale=scale,
                causal=False,
            )
            of_query_key_value = shared.branches, shared.trunks, shared.trunks
            for whole, part, spans in zip(grads, parts, of_query_key_value, strict=True):
                torch._foreach_add_([whole[slice(*span)] for span in spans], list(part.split(_lengths(spans))))
        return *grads, None, None, None, None


def _rows(tensor: Tensor, spans: Sequence[Span]) -> Tensor:
    return torch.cat([tensor[slice(*span)] for span in spans])


def _lengths(spans: Sequence[Span]) -> list[int]:
    return [end - start for start, end in spans]
