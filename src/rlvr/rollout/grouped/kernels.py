"""Decode attention in two Triton kernels: a group's prompt is read once, whatever rows are in the batch.

The first kernel computes attention over pieces of keys: a *tile* of rows of one group over a piece of their prompt, or
one row over a piece of its suffix. The second merges the pieces of each row and head by their log-sum-exp (as in
flash decoding). Rows name their slot and group, so a batch can lose and gain rows without moving any key.

The slow twin is `attention.Decode`; names of axes as there.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlvr.rollout.grouped.cache import Cache

TILE = 64  # rows × query heads of a key/value head that share one reading of a piece of the prompt
PIECE = 64  # suffix tokens of one piece
PROGRAMS = 264  # how many programs the prompts are cut into: two for each multiprocessor of a large GPU
LOG2_E = 1.4426950408889634


@triton.jit
def _accumulate(q, k, v, sees, scale, best, total, output, PRECISION: tl.constexpr):
    """One block of keys more, by the online softmax in base 2. A row that has seen no key yet has best = -inf."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    scores = tl.where(sees, scores, -float("inf"))
    higher = tl.maximum(best, tl.max(scores, 1))
    finite = tl.where(higher == -float("inf"), 0.0, higher)
    weights = tl.exp2(scores - finite[:, None])
    shrink = tl.exp2(best - finite)
    total = total * shrink + tl.sum(weights, 1)
    output = output * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
    return higher, total, output


@triton.jit
def _store_piece(pieces, piece_lse, where, mask, best, total, output, offs_d, DIM: tl.constexpr):
    seen = total > 0
    divisor = tl.where(seen, total, 1.0)
    tl.store(piece_lse + where, tl.where(seen, best + tl.log2(divisor), -float("inf")), mask=mask)
    target = pieces + where[:, None] * DIM + offs_d[None, :]
    tl.store(target, output / divisor[:, None], mask=mask[:, None] & (offs_d < DIM)[None, :])


@triton.jit
def _prompt_piece(
    tile, piece, kv_head, query, prompt_keys, prompt_values, prompt_lengths, lengths, tile_groups, tile_rows,
    pieces, piece_lse, scale, q_row, q_head, prompt_tokens, prompt_piece, all_pieces,
    KV_HEADS: tl.constexpr, REPEATS: tl.constexpr, DIM: tl.constexpr, WINDOW: tl.constexpr,
    TILE_MEMBERS: tl.constexpr, TILE_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr, DIM_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The query heads of one key/value head, of all rows of a tile, over one piece of their group's prompt."""
    offs_d = tl.arange(0, DIM_BLOCK)
    in_dim = offs_d < DIM
    offs_m = tl.arange(0, TILE_BLOCK)
    member = offs_m // REPEATS
    row = tl.load(tile_rows + tile * TILE_MEMBERS + member, mask=member < TILE_MEMBERS, other=-1).to(tl.int32)
    present = row >= 0
    length = tl.load(lengths + row, mask=present, other=0).to(tl.int32)
    prompt_length = tl.max(tl.load(prompt_lengths + row, mask=present, other=0).to(tl.int32), 0)
    start = piece * prompt_piece
    stop = tl.minimum(start + prompt_piece, prompt_length)
    if start < stop:
        group = tl.load(tile_groups + tile).to(tl.int64)
        head = kv_head * REPEATS + offs_m % REPEATS
        q_mask = present[:, None] & in_dim[None, :]
        q = tl.load(query + row[:, None] * q_row + head[:, None] * q_head + offs_d[None, :], mask=q_mask, other=0.0)
        best = tl.full([TILE_BLOCK], -float("inf"), tl.float32)
        total = tl.zeros([TILE_BLOCK], tl.float32)
        output = tl.zeros([TILE_BLOCK, DIM_BLOCK], tl.float32)
        base = (group * KV_HEADS + kv_head) * prompt_tokens * DIM
        for block in range(start, stop, KEY_BLOCK):
            offs_n = block + tl.arange(0, KEY_BLOCK)
            inside = offs_n < stop
            where = base + offs_n[:, None] * DIM + offs_d[None, :]
            kv_mask = inside[:, None] & in_dim[None, :]
            k = tl.load(prompt_keys + where, mask=kv_mask, other=0.0)
            v = tl.load(prompt_values + where, mask=kv_mask, other=0.0)
            sees = present[:, None] & inside[None, :]
            if WINDOW > 0:
                sees = sees & ((prompt_length + length)[:, None] - offs_n[None, :] < WINDOW)
            best, total, output = _accumulate(q, k, v, sees, scale, best, total, output, PRECISION)
        target = (row * (KV_HEADS * REPEATS) + head) * all_pieces + piece
        _store_piece(pieces, piece_lse, target, present, best, total, output, offs_d, DIM)


@triton.jit
def _suffix_piece(
    row, piece, kv_head, query, key, value, suffix_keys, suffix_values, slots, lengths,
    pieces, piece_lse, scale, q_row, q_head, k_row, k_head, v_row, v_head, suffix_tokens, prompt_pieces, all_pieces,
    KV_HEADS: tl.constexpr, REPEATS: tl.constexpr, DIM: tl.constexpr, WINDOW: tl.constexpr,
    ROW_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr, DIM_BLOCK: tl.constexpr, SUFFIX_PIECE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The query heads of one key/value head of one row over one piece of its suffix. Stores the new key and value."""
    newest = tl.load(lengths + row).to(tl.int32)
    start = piece * SUFFIX_PIECE
    stop = tl.minimum(start + SUFFIX_PIECE, newest + 1)
    if start < stop:
        offs_d = tl.arange(0, DIM_BLOCK)
        in_dim = offs_d < DIM
        slot = tl.load(slots + row).to(tl.int64)
        base = (slot * KV_HEADS + kv_head) * suffix_tokens * DIM
        new_key = tl.load(key + row * k_row + kv_head * k_head + offs_d, mask=in_dim, other=0.0)
        new_value = tl.load(value + row * v_row + kv_head * v_head + offs_d, mask=in_dim, other=0.0)
        if stop == newest + 1:  # the one program that has the new token stores it, and no other reads it
            tl.store(suffix_keys + base + newest * DIM + offs_d, new_key, mask=in_dim)
            tl.store(suffix_values + base + newest * DIM + offs_d, new_value, mask=in_dim)
        offs_r = tl.arange(0, ROW_BLOCK)
        head = kv_head * REPEATS + offs_r
        present = offs_r < REPEATS
        q_mask = present[:, None] & in_dim[None, :]
        q = tl.load(query + row * q_row + head[:, None] * q_head + offs_d[None, :], mask=q_mask, other=0.0)
        best = tl.full([ROW_BLOCK], -float("inf"), tl.float32)
        total = tl.zeros([ROW_BLOCK], tl.float32)
        output = tl.zeros([ROW_BLOCK, DIM_BLOCK], tl.float32)
        for block in range(start, stop, KEY_BLOCK):
            offs_n = block + tl.arange(0, KEY_BLOCK)
            where = base + offs_n[:, None] * DIM + offs_d[None, :]
            kv_mask = (offs_n < newest)[:, None] & in_dim[None, :]
            is_new = (offs_n == newest)[:, None]
            k = tl.where(is_new, new_key[None, :], tl.load(suffix_keys + where, mask=kv_mask, other=0.0))
            v = tl.where(is_new, new_value[None, :], tl.load(suffix_values + where, mask=kv_mask, other=0.0))
            sees = present[:, None] & (offs_n < stop)[None, :]
            if WINDOW > 0:
                sees = sees & (newest - offs_n < WINDOW)[None, :]
            best, total, output = _accumulate(q, k, v, sees, scale, best, total, output, PRECISION)
        target = (row * (KV_HEADS * REPEATS) + head) * all_pieces + prompt_pieces + piece
        _store_piece(pieces, piece_lse, target, present, best, total, output, offs_d, DIM)


@triton.jit(do_not_specialize=["prompt_programs", "prompt_pieces", "suffix_pieces"])
def _pieces_kernel(
    query, key, value, prompt_keys, prompt_values, suffix_keys, suffix_values,
    slots, prompt_lengths, lengths, tile_groups, tile_rows, pieces, piece_lse,
    scale, q_row, q_head, k_row, k_head, v_row, v_head, prompt_tokens, suffix_tokens,
    prompt_programs, prompt_pieces, prompt_piece, suffix_pieces,
    KV_HEADS: tl.constexpr, REPEATS: tl.constexpr, DIM: tl.constexpr, WINDOW: tl.constexpr,
    TILE_MEMBERS: tl.constexpr, TILE_BLOCK: tl.constexpr, ROW_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr,
    DIM_BLOCK: tl.constexpr, SUFFIX_PIECE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles × pieces of a prompt + rows × pieces of a suffix, key/value heads)."""
    program = tl.program_id(0)
    kv_head = tl.program_id(1)
    all_pieces = prompt_pieces + suffix_pieces
    if program < prompt_programs:
        _prompt_piece(
            program // prompt_pieces, program % prompt_pieces, kv_head,
            query, prompt_keys, prompt_values, prompt_lengths, lengths, tile_groups, tile_rows,
            pieces, piece_lse, scale, q_row, q_head, prompt_tokens, prompt_piece, all_pieces,
            KV_HEADS, REPEATS, DIM, WINDOW, TILE_MEMBERS, TILE_BLOCK, KEY_BLOCK, DIM_BLOCK, PRECISION,
        )  # fmt: skip
    else:
        own = program - prompt_programs
        _suffix_piece(
            own // suffix_pieces, own % suffix_pieces, kv_head,
            query, key, value, suffix_keys, suffix_values, slots, lengths, pieces, piece_lse,
            scale, q_row, q_head, k_row, k_head, v_row, v_head, suffix_tokens, prompt_pieces, all_pieces,
            KV_HEADS, REPEATS, DIM, WINDOW, ROW_BLOCK, KEY_BLOCK, DIM_BLOCK, SUFFIX_PIECE, PRECISION,
        )  # fmt: skip


@triton.jit(do_not_specialize=["prompt_pieces", "suffix_pieces"])
def _merge_kernel(
    pieces, piece_lse, prompt_lengths, lengths, output, prompt_pieces, prompt_piece, suffix_pieces,
    HEADS: tl.constexpr, DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, SUFFIX_PIECE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: (rows, heads). Only the pieces that the first kernel wrote are read."""
    row = tl.program_id(0)
    at = row * HEADS + tl.program_id(1)
    offs_d = tl.arange(0, DIM_BLOCK)
    in_dim = offs_d < DIM
    in_prompt = tl.cdiv(tl.load(prompt_lengths + row).to(tl.int32), prompt_piece)
    in_suffix = tl.cdiv(tl.load(lengths + row).to(tl.int32) + 1, SUFFIX_PIECE)
    all_pieces = prompt_pieces + suffix_pieces
    best = tl.full([], -float("inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    merged = tl.zeros([DIM_BLOCK], tl.float32)
    for block in range(0, all_pieces, BLOCK):
        piece = block + tl.arange(0, BLOCK)
        written = (piece < in_prompt) | ((piece >= prompt_pieces) & (piece < prompt_pieces + in_suffix))
        lse = tl.load(piece_lse + at * all_pieces + piece, mask=written, other=-float("inf"))
        where = (at * all_pieces + piece)[:, None] * DIM + offs_d[None, :]
        part = tl.load(pieces + where, mask=written[:, None] & in_dim[None, :], other=0.0)
        higher = tl.maximum(best, tl.max(lse, 0))
        finite = tl.where(higher == -float("inf"), 0.0, higher)
        weights = tl.exp2(lse - finite)
        shrink = tl.exp2(best - finite)
        total = total * shrink + tl.sum(weights, 0)
        merged = merged * shrink + tl.sum(weights[:, None] * part, 0)
        best = higher
    tl.store(output + at * DIM + offs_d, (merged / total).to(output.dtype.element_ty), mask=in_dim)


@dataclass(frozen=True)
class KernelDecode:
    """`attention.Decode` by kernels. Every tensor keeps its address, so it can be captured in a CUDA graph.

    Attributes:
        slots, prompt_lengths, lengths: [B].
        tile_groups: [tiles]. `tile_rows`: [tiles, members], rows of the batch, -1 where there is none.
        suffix_pieces: no row holds more than this many times `PIECE` suffix tokens, the new one included.
    """

    cache: Cache
    slots: Tensor
    prompt_lengths: Tensor
    lengths: Tensor
    tile_groups: Tensor
    tile_rows: Tensor
    suffix_pieces: int

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None
    ) -> Tensor:
        cache, (rows, heads, _, dim) = self.cache, query.shape
        query, key, value = (tensor[:, :, 0] for tensor in (query, key, value))
        if query.stride(-1) != 1 or key.stride(-1) != 1 or value.stride(-1) != 1:
            query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        kv_heads, tiles = key.shape[1], self.tile_groups.shape[0]
        prompt_pieces, prompt_piece = cut(cache.shape.prompt_tokens, tiles * kv_heads)
        shape = (rows, heads, prompt_pieces + self.suffix_pieces)
        pieces = torch.empty((*shape, dim), dtype=torch.float32, device=query.device)
        piece_lse = torch.empty(shape, dtype=torch.float32, device=query.device)
        output = torch.empty((rows, 1, heads, dim), dtype=query.dtype, device=query.device)
        exact = query.dtype == torch.float32
        dim_block = max(16, triton.next_power_of_2(dim))
        repeats = heads // kv_heads
        _pieces_kernel[(tiles * prompt_pieces + rows * self.suffix_pieces, kv_heads)](
            query, key, value,
            cache.prompt_keys[layer], cache.prompt_values[layer], cache.suffix_keys[layer], cache.suffix_values[layer],
            self.slots, self.prompt_lengths, self.lengths, self.tile_groups, self.tile_rows, pieces, piece_lse,
            scaling * LOG2_E, *query.stride()[:2], *key.stride()[:2], *value.stride()[:2],
            cache.shape.prompt_tokens, cache.shape.suffix_tokens,
            tiles * prompt_pieces, prompt_pieces, prompt_piece, self.suffix_pieces,
            KV_HEADS=kv_heads, REPEATS=repeats, DIM=dim, WINDOW=window or 0,
            TILE_MEMBERS=self.tile_rows.shape[1], TILE_BLOCK=tile_block(repeats),
            ROW_BLOCK=max(16, triton.next_power_of_2(repeats)),
            KEY_BLOCK=32, DIM_BLOCK=dim_block, SUFFIX_PIECE=PIECE,
            PRECISION="ieee" if exact else "tf32", num_warps=4, num_stages=2,
        )  # fmt: skip
        _merge_kernel[(rows, heads)](
            pieces, piece_lse, self.prompt_lengths, self.lengths, output,
            prompt_pieces, prompt_piece, self.suffix_pieces,
            HEADS=heads, DIM=dim, DIM_BLOCK=dim_block, SUFFIX_PIECE=PIECE, BLOCK=32, num_warps=4,
        )  # fmt: skip
        return output


def cut(prompt_tokens: int, tiles: int) -> tuple[int, int]:
    """Into how many pieces of how many tokens (a multiple of 64) to cut prompts, to keep a whole GPU busy."""
    pieces = max(1, min(PROGRAMS // tiles, prompt_tokens // 64))
    piece = -(-prompt_tokens // (pieces * 64)) * 64
    return -(-prompt_tokens // piece), piece


def tile_block(repeats: int) -> int:
    return max(TILE, triton.next_power_of_2(repeats))


def tile_members(repeats: int) -> int:
    """How many rows of a group fit a tile."""
    return tile_block(repeats) // repeats


def tiles_of(groups: Sequence[int], members: int) -> list[tuple[int, list[int]]]:
    """Cuts a batch into tiles: (group, rows). `groups[i]` is row i's; rows of a group are neighbours."""
    tiles: list[tuple[int, list[int]]] = []
    for row, group in enumerate(groups):
        if not tiles or tiles[-1][0] != group or len(tiles[-1][1]) == members:
            tiles.append((group, []))
        tiles[-1][1].append(row)
    return tiles
