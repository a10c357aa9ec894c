"""Attention of packed sequences, one after the other in a row, by the variable-length flash kernel of torch."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = range(8, 257, 8)
CAPABILITY = (8, 0)  # Ampere


def takes(query: Tensor) -> bool:
    """Whether the kernel can take these queries (..., D)."""
    fits = query.is_cuda and query.dtype in DTYPES and query.shape[-1] in HEAD_DIMS
    return fits and _capability(query.device) >= CAPABILITY


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def varlen_flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    query_starts: Tensor,
    key_starts: Tensor,
    longest_query: int,
    longest_key: int,
    scale: float,
    window: int | None,
) -> Tensor:
    """Causal attention of segments, each aligned to the end of its keys; differentiable.

    Args:
        query: (N, H, D). `key`, `value`: (M, H_kv, D).
        query_starts, key_starts: (segments + 1,), int32, cumulative lengths.
        longest_query, longest_key: of any segment.
        window: how many keys, itself included, a token sees; None: all before it.

    Returns:
        (N, H, D).
    """
    return torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        query_starts,
        key_starts,
        longest_query,
        longest_key,
        0.0,
        True,
        False,
        scale=scale,
        window_size_left=None if window is None else window - 1,
        window_size_right=None if window is None else 0,
    )[0]
