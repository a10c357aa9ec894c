"""Attention over packed rows: a trunk attends to itself, a branch to its trunk and itself, all causally.

`enable` puts the function in front of the one that transformers has by the model's own name ("sdpa"). A forward that
carries a `TreeLayout` (the keyword argument `shared_prefix`) is computed here; every other forward, of whatever model,
goes on to the function that was there, so ours can stay. It has to: with gradient checkpointing, layers are computed
again in the backward pass, after the forward has returned. The configuration keeps its name, by which transformers
loads flash kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rlvr.fused import flash
from rlvr.rollout.grouped.cache import head_dim
from rlvr.rollout.grouped.weights import free_on_gpu
from rlvr.trainers.shared_prefix.packing import Group
from rlvr.trainers.shared_prefix.split_flash import Kept, Split, split_flash

SHARE = 4  # what is kept may take this part of the free memory: rollouts, gradients and optimizer want theirs


@dataclass(frozen=True)
class TreeLayout:
    """What attention needs to know of a packed row, computed once for all layers, and only what is needed.

    Attributes:
        use_flash: the variable-length flash kernel (CUDA, half precision) rather than SDPA by group.
        kept: what the kernel gave in each layer, for when a checkpointed block is computed again; None: not kept.
    """

    groups: tuple[Group, ...]
    device: torch.device
    use_flash: bool
    kept: Kept | None = None

    @classmethod
    def of(cls, groups: tuple[Group, ...], device: torch.device, *, use_flash: bool = True) -> TreeLayout:
        return cls(groups, device, use_flash and device.type == "cuda")

    def keeping(self) -> TreeLayout:
        """For one forward and its backward pass: a layout that keeps what the kernel gives."""
        return replace(self, kept={})

    @property
    def longest(self) -> int:
        """Tokens of the longest trunk with a branch of its own."""
        return max(group.trunk + max(group.branches) for group in self.groups)

    @cached_property
    def split(self) -> Split:
        return Split.of(self.groups, self.device)

    @cached_property
    def segments(self) -> tuple[flash.Segments, Tensor]:
        """The tree as segments that are causal and aligned to the end of their keys: a trunk's queries see the trunk,
        a branch's queries see its trunk and then itself. And the packed position of every key, (M,), segment by
        segment; trunks repeat."""
        query_lengths, key_lengths, keys = [], [], []
        for group in self.groups:
            trunk = torch.arange(group.start, group.start + group.trunk)
            query_lengths.append(group.trunk)
            key_lengths.append(group.trunk)
            keys.append(trunk)
            start = group.start + group.trunk
            for length in group.branches:
                query_lengths.append(length)
                key_lengths.append(group.trunk + length)
                keys += [trunk, torch.arange(start, start + length)]
                start += length
        return flash.Segments.of(query_lengths, key_lengths, self.device), torch.cat(keys).to(self.device)

    @cached_property
    def padded(self) -> list[tuple[Tensor | None, Tensor | None]]:
        """For each group the packed positions of its branches (branches, longest branch), the last one repeated at
        the end of shorter branches, and where its branch tokens are in them, flattened; None where all are equally
        long."""
        pairs = [_branch_index(group) for group in self.groups]
        return [(None, None) if pair is None else (pair[0].to(self.device), pair[1].to(self.device)) for pair in pairs]


def room_to_keep(config: Any, tokens: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether what the kernel gives for so many tokens in all layers takes at most a quarter of the free memory.

    Args:
        config: of the transformers model.
    """
    of_head = head_dim(config) * dtype.itemsize + 4  # and a sum in float32
    needed = tokens * config.num_hidden_layers * config.num_attention_heads * of_head
    return needed * SHARE <= free_on_gpu(device)


def _branch_index(group: Group) -> tuple[Tensor, Tensor] | None:
    lengths = torch.tensor(group.branches)
    if (lengths == lengths[0]).all():
        return None
    starts = group.start + group.trunk + lengths.cumsum(0) - lengths
    columns = torch.arange(int(lengths.max()))
    index = starts[:, None] + torch.minimum(columns[None], lengths[:, None] - 1)
    return index, (columns[None] < lengths[:, None]).flatten().nonzero()[:, 0]


def enable(model: Any) -> None:
    """Puts this attention in front of the model's own. Idempotent.

    Args:
        model: the transformers model itself, without wrappers.
    """
    name = model.config._attn_implementation
    own = ALL_ATTENTION_FUNCTIONS[name]
    if not isinstance(own, _InFront):
        ALL_ATTENTION_FUNCTIONS[name] = _InFront(own)


class _InFront:
    """An attention function of transformers that computes packed rows here, and everything else as `own` does."""

    def __init__(self, own: Callable[..., Any]):
        self.own = own

    def __call__(
        self,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        shared_prefix: TreeLayout | None = None,
        **kwargs: Any,
    ) -> Any:
        if shared_prefix is None:
            return self.own(module, query, key, value, attention_mask, **kwargs)
        attend = tree_attention(
            query,
            key,
            value,
            shared_prefix,
            layer=module,
            scale=kwargs["scaling"],
            sliding_window=kwargs.get("sliding_window"),
        )
        return attend, None


def tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TreeLayout,
    *,
    layer: object = None,
    scale: float,
    sliding_window: int | None = None,
) -> Tensor:
    """Attention of a packed row.

    Args:
        layer: whose attention it is, for `layout.kept`.
        query: (1, H, N, D), rotated.
        key, value: (1, H_kv, N, D).
        sliding_window: how many keys, itself included, a token sees; None: all before it.

    Returns:
        (1, N, H, D).
    """
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    window = None if sliding_window is None or sliding_window >= layout.longest else sliding_window
    if layout.use_flash and flash.takes(query):
        query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        if window is None:
            return split_flash(query, key, value, layout.split, scale=scale, kept=layout.kept, layer=layer)[None]
        return _repeated_flash(query, key, value, *layout.segments, scale=scale, window=window)[None]
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    parts = []
    for group, (index, select) in zip(layout.groups, layout.padded, strict=True):
        parts += _group(query, key, value, group, index, select, scale=scale, window=window)
    return torch.cat(parts, 2).transpose(1, 2)


class _Spread(torch.autograd.Function):
    """Rows of x by index, with repeats. A gradient, the sum over a trunk's branches, is rounded once, not at every
    addition."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = len(x)
        return x.index_select(0, index)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        total = torch.zeros(ctx.rows, *grad.shape[1:], dtype=torch.float32, device=grad.device)
        return total.index_add_(0, index, grad.float()).to(grad.dtype), None


def _repeated_flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: flash.Segments,
    key_index: Tensor,
    *,
    scale: float,
    window: int,
) -> Tensor:
    """All segments in one call, trunks repeated before each branch: a window reaches back from each branch's end."""
    key, value = _Spread.apply(key, key_index), _Spread.apply(value, key_index)
    return flash.varlen_flash(query, key, value, segments, scale=scale, window=window)


def _group(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    group: Group,
    index: Tensor | None,
    select: Tensor | None,
    *,
    scale: float,
    window: int | None,
) -> list[Tensor]:
    """One group by SDPA: (1, H, n, D) for its trunk (none if it is empty) and for its branches."""
    trunk = slice(group.start, group.start + group.trunk)
    branches = slice(trunk.stop, group.end)
    heads, count = query.shape[1], len(group.branches)

    def by_branch(tensor: Tensor) -> Tensor:  # (branches, H, longest, D)
        if index is not None:
            return tensor[0][:, index].transpose(0, 1)
        return tensor[0, :, branches].unflatten(1, (count, -1)).transpose(0, 1)

    parts = []
    if group.trunk:
        mask = _causal(group.trunk, group.trunk, window, query.device)
        parts.append(
            scaled_dot_product_attention(
                query[:, :, trunk],
                key[:, :, trunk],
                value[:, :, trunk],
                attn_mask=mask,
                is_causal=mask is None,
                scale=scale,
            )
        )
    branch_query = by_branch(query)
    longest = branch_query.shape[2]
    mask = _causal(longest, group.trunk + longest, window, query.device)
    output = scaled_dot_product_attention(
        branch_query,
        torch.cat([key[:, :, trunk].expand(count, -1, -1, -1), by_branch(key)], 2),
        torch.cat([value[:, :, trunk].expand(count, -1, -1, -1), by_branch(value)], 2),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
    )
    output = output.transpose(0, 1).reshape(heads, count * longest, -1)
    parts.append((output if select is None else output[:, select])[None])
    return parts


def _causal(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor | None:
    """(queries, keys), True where a query may look; the last sees all keys. None: square causality."""
    if queries == keys and window is None:
        return None
    position = torch.arange(keys, device=device)
    distance = position[keys - queries :, None] - position[None]
    mask = distance >= 0
    return mask if window is None else mask & (distance < window)
