"""Attention over a prompt that a group shares and a suffix of each sequence's own.

The model's attention modules call `grouped_attention` through transformers' attention interface. It hands over to the
`Plan` of the current forward pass, of which there are three: `Prefill` (the shared prompts), `Extend` (several tokens
more for some sequences: a tool's result) and `Decode` (one token more for every sequence of the batch).

Rows are sequences; B rows, H query heads, K key/value heads, R = H / K, D head dim, P prompt tokens, S suffix tokens.
Token i of a suffix has position prompt length + i.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rlvr.fused import flash
from rlvr.rollout.grouped.cache import Cache

ATTENTION_NAME = "rlvr_grouped"  # no mask function is registered under it, so transformers builds no mask


class Plan(Protocol):
    """What one forward pass does in its attention layers."""

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None
    ) -> Tensor:
        """Stores the new keys and values and attends.

        Args:
            query: [rows, H, new tokens, D]. `key` and `value`: [rows, K, new tokens, D].
            window: a query sees the keys less than this many positions back; None: all before it.

        Returns:
            [rows, new tokens, H, D].
        """
        ...


@torch.compiler.disable
def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    rollout_plan: Plan | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The function under `ATTENTION_NAME`. `rollout_plan` comes through the model's forward as a keyword."""
    if rollout_plan is None:
        raise RuntimeError(
            f"attention {ATTENTION_NAME!r} was called outside a rollout of the grouped engine; it is set for the "
            "length of a rollout only, so the model was used while one was open."
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = rollout_plan.attend(module.layer_idx, query, key, value, scaling, sliding_window)  # type: ignore[arg-type]
    return output, None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, grouped_attention)


@dataclass(frozen=True)
class Prefill:
    """Whole prompts packed into one row: each attends to itself.

    Attributes:
        spans: (group, first token, end), one after the other.
        starts: (spans + 1,), int32, the first tokens and the end.
    """

    cache: Cache
    spans: Sequence[tuple[int, int, int]]
    starts: Tensor

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None
    ) -> Tensor:
        for group, start, end in self.spans:
            self.cache.prompt_keys[layer, group, :, : end - start] = key[0, :, start:end]
            self.cache.prompt_values[layer, group, :, : end - start] = value[0, :, start:end]
        if flash.takes(query):
            return self._flash(query, key, value, scaling, window)
        output = torch.empty_like(query.transpose(1, 2))
        for _, start, end in self.spans:
            q, k, v = query[:, :, start:end], key[:, :, start:end], value[:, :, start:end]
            if window is None or end - start <= window:
                attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
            else:
                position = torch.arange(end - start, device=q.device)
                mask = visible(position[:, None], position, window)
                repeats = q.shape[1] // k.shape[1]  # with a mask, GQA inside SDPA would write out all scores
                k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
                attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
            output[:, start:end] = attended.transpose(1, 2)
        return output

    def _flash(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None) -> Tensor:
        """All prompts in one call. SDPA would also plan anew for every length of prompt that it has not met."""
        longest = max(end - start for _, start, end in self.spans)
        segments = flash.Segments(self.starts, self.starts, longest, longest)
        query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        output = flash.varlen_flash(query, key, value, segments, scale=scaling, window=window)
        return output[None]


@dataclass(frozen=True)
class Extend:
    """Several new tokens for some sequences, in padded rows of L tokens.

    Attributes:
        slots, groups, prompt_lengths, lengths: [rows]. `lengths` counts the suffix tokens stored before.
        token_rows, token_columns: [new tokens], where in [rows, L] the tokens are that are no padding.
        total: the most suffix tokens that a row holds afterwards.
    """

    cache: Cache
    slots: Tensor
    groups: Tensor
    prompt_lengths: Tensor
    lengths: Tensor
    token_rows: Tensor
    token_columns: Tensor
    total: int

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None
    ) -> Tensor:
        cache, (rows, heads, new, dim) = self.cache, query.shape
        slot = self.slots[self.token_rows]
        index = self.lengths[self.token_rows] + self.token_columns
        for suffix, fresh in ((cache.suffix_keys, key), (cache.suffix_values, value)):
            suffix[layer][slot, :, index] = fresh.transpose(1, 2)[self.token_rows, self.token_columns]

        def gathered(prompt: Tensor, suffix: Tensor) -> Tensor:
            return torch.cat([prompt[layer][self.groups], suffix[layer][self.slots, :, : self.total]], dim=2)

        keys = gathered(cache.prompt_keys, cache.suffix_keys)
        values = gathered(cache.prompt_values, cache.suffix_values)
        kv_heads, repeats = key.shape[1], heads // key.shape[1]
        mask = self._mask(new, window, query.device)
        # the R query heads of a key/value head become R times as many queries, so that no key is repeated
        attended = F.scaled_dot_product_attention(
            query.reshape(rows, kv_heads, repeats * new, dim),
            keys,
            values,
            attn_mask=mask[:, None].repeat(1, 1, repeats, 1),
            scale=scaling,
        )
        return attended.reshape(rows, heads, new, dim).transpose(1, 2)

    def _mask(self, new: int, window: int | None, device: torch.device) -> Tensor:
        """[rows, L, P + total]; true where a query sees a key."""
        prompt = torch.arange(self.cache.shape.prompt_tokens, device=device)
        suffix = torch.arange(self.total, device=device) + self.prompt_lengths[:, None]
        new_positions = self.prompt_lengths[:, None] + self.lengths[:, None] + torch.arange(new, device=device)
        in_prompt = (prompt < self.prompt_lengths[:, None])[:, None]
        on_prompt = in_prompt & visible(new_positions[..., None], prompt, window)
        on_suffix = visible(new_positions[..., None], suffix[:, None], window)
        return torch.cat([on_prompt, on_suffix], dim=-1)


@dataclass(frozen=True)
class Decode:
    """One new token for every row of a batch. Rows of a group are neighbours. Plain torch, run eagerly.

    Attributes:
        slots, prompt_lengths, lengths: [rows], on the device. `lengths` counts the suffix tokens stored before.
        spans: (group, its prompt's length, first row, end row).
        total: no row holds more suffix tokens than this, the new one included.
    """

    cache: Cache
    slots: Tensor
    prompt_lengths: Tensor
    lengths: Tensor
    spans: Sequence[tuple[int, int, int, int]]
    total: int

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None
    ) -> Tensor:
        cache = self.cache
        cache.suffix_keys[layer][self.slots, :, self.lengths] = key[:, :, 0]
        cache.suffix_values[layer][self.slots, :, self.lengths] = value[:, :, 0]
        output = [
            self._attend_group(layer, query[start:end, :, 0], group, length, slice(start, end), scaling, window)
            for group, length, start, end in self.spans
        ]
        return torch.cat(output)[:, None]

    def _attend_group(
        self,
        layer: int,
        query: Tensor,
        group: int,
        prompt_length: int,
        rows: slice,
        scaling: float,
        window: int | None,
    ) -> Tensor:
        """`query` [M, H, D], all of one group → [M, H, D]: one softmax over the scores of both parts."""
        cache, (members, heads, dim) = self.cache, query.shape
        prompt_keys = cache.prompt_keys[layer, group, :, :prompt_length]
        prompt_values = cache.prompt_values[layer, group, :, :prompt_length]
        suffix_keys = cache.suffix_keys[layer][self.slots[rows], :, : self.total]
        suffix_values = cache.suffix_values[layer][self.slots[rows], :, : self.total]
        kv_heads = suffix_keys.shape[1]
        repeats = heads // kv_heads

        own = query.reshape(members, kv_heads, repeats, dim)
        shared = own.transpose(0, 1).reshape(kv_heads, members * repeats, dim)  # so that the prompt is read once
        prompt_scores = (shared @ prompt_keys.mT).view(kv_heads, members, repeats, prompt_length).transpose(0, 1)
        scores = torch.cat([prompt_scores, own @ suffix_keys.mT], dim=-1).float() * scaling
        scores.masked_fill_(~self._mask(rows, prompt_length, window)[:, None, None], -torch.inf)
        weights = scores.softmax(dim=-1).to(query.dtype)
        on_prompt, on_suffix = weights.split([prompt_length, self.total], dim=-1)
        on_prompt = on_prompt.transpose(0, 1).reshape(kv_heads, members * repeats, prompt_length)
        from_prompt = (on_prompt @ prompt_values).view(kv_heads, members, repeats, dim).transpose(0, 1)
        return (from_prompt + on_suffix @ suffix_values).reshape(members, heads, dim)

    def _mask(self, rows: slice, prompt_length: int, window: int | None) -> Tensor:
        """[M, prompt length + total]; true where the new token sees a key."""
        key_positions = torch.arange(prompt_length + self.total, device=self.slots.device)
        new_positions = self.prompt_lengths[rows] + self.lengths[rows]
        return visible(new_positions[:, None], key_positions, window)


def visible(query_positions: Tensor, key_positions: Tensor, window: int | None) -> Tensor:
    """Causal, and within the sliding window where there is one."""
    seen = key_positions <= query_positions
    return seen if window is None else seen & (key_positions > query_positions - window)
