"""Attention of packed sequences, one after the other in a row, by the variable-length flash kernel of torch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = range(8, 257, 8)
CAPABILITY = (8, 0)  # Ampere


def takes(query: Tensor) -> bool:
    """Whether the kernel can take these queries (..., D)."""
    fits = query.is_cuda and torch.version.hip is None and query.dtype in DTYPES and query.shape[-1] in HEAD_DIMS
    return fits and _capability(query.device) >= CAPABILITY


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


class Segments(NamedTuple):
    """Which keys belong to which queries, in the order in which the kernel's functions take it."""

    query_starts: Tensor  # (segments + 1,), int32, cumulative lengths, as the next one
    key_starts: Tensor
    longest_query: int  # of any segment, as the next one
    longest_key: int

    @classmethod
    def of(cls, query_lengths: Sequence[int], key_lengths: Sequence[int], device: torch.device) -> Segments:
        return cls(
            _cumulative(query_lengths).to(device),
            _cumulative(key_lengths).to(device),
            max(query_lengths),
            max(key_lengths),
        )


def _cumulative(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def varlen_flash(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, *, scale: float, window: int | None
) -> Tensor:
    """Causal attention of segments, each aligned to the end of its keys; differentiable.

    Args:
        query: (N, H, D). `key`, `value`: (M, H_kv, D).
        window: how many keys, itself included, a token sees; None: all before it.

    Returns:
        (N, H, D).
    """
    return varlen_forward(query, key, value, segments, scale=scale, causal=True, window=window)[0]


def varlen_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    *,
    scale: float,
    causal: bool,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """As `varlen_flash`, causal or not.

    Returns:
        The output (N, H, D), in the memory layout of `query`; and log Σ exp of the scores (H, N), float32. Every query
        needs a key.
    """
    output, logsumexp, *_ = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        *segments,
        0.0,
        causal,
        False,
        scale=scale,
        window_size_left=None if window is None else window - 1,
        window_size_right=None if window is None else 0,
    )
    return output, logsumexp


def varlen_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    segments: Segments,
    *,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value. `output` and `logsumexp` may be those over more keys than these: the
    gradients are then this part's share."""
    unread = torch.empty(2, dtype=torch.uint64, device=query.device)  # the state of a dropout that there is not
    return torch.ops.aten._flash_attention_backward(
        grad,
        query,
        key,
        value,
        output,
        logsumexp,
        *segments,
        0.0,
        causal,
        unread,
        unread,
        scale=scale,
    )


def join(output: Tensor, logsumexp: Tensor, rows: Tensor, more: Tensor, more_logsumexp: Tensor) -> None:
    """Makes attention over some keys that over more of them, in place.

    Args:
        output: (N, H, D), over one key at least. `logsumexp`: (H, N), float32.
        rows: (M,), which of the N have more keys; each once.
        more: (M, H, D), their attention over the other keys. `more_logsumexp`: (H, M), float32.
    """
    if output.is_cuda:
        from rlvr.fused.kernels import join_attention

        join_attention(output, logsumexp, rows, more, more_logsumexp)
        return
    own = logsumexp[:, rows]
    total = torch.logaddexp(own, more_logsumexp)
    first, second = ((part - total).exp().t()[..., None] for part in (own, more_logsumexp))
    output[rows] = (output[rows] * first + more * second).to(output.dtype)
    logsumexp[:, rows] = total
