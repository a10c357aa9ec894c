"""Where the keys and values live: one copy of a prompt for its whole group, and one suffix for each sequence."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from transformers import PretrainedConfig


def head_dim(config: PretrainedConfig) -> int:
    """Of attention, for a model's configuration."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


@dataclass(frozen=True, kw_only=True)
class CacheShape:
    """How much a cache holds. `groups`, `slots` and the token counts are capacities, not what is in use."""

    groups: int
    prompt_tokens: int  # of the longest prompt
    slots: int  # sequences, and one more for the rows that only fill a batch
    suffix_tokens: int
    layers: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(
        cls, config: PretrainedConfig, *, groups: int, prompt_tokens: int, slots: int, suffix_tokens: int
    ) -> CacheShape:
        """The shape for a model's configuration; token counts are rounded up to multiples of 64."""
        heads = config.num_attention_heads
        return cls(
            groups=groups,
            prompt_tokens=round_up(prompt_tokens, 64),
            slots=slots,
            suffix_tokens=round_up(suffix_tokens, 64),
            layers=config.num_hidden_layers,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=head_dim(config),
        )

    @property
    def tokens(self) -> int:
        return self.groups * self.prompt_tokens + self.slots * self.suffix_tokens

    def bytes(self, dtype: torch.dtype) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * self.tokens * dtype.itemsize

    def joined(self, other: CacheShape) -> CacheShape:
        """The smallest that both fit in."""
        return CacheShape(**{f.name: max(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)})


def round_up(value: int, multiple: int) -> int:
    return max(multiple, math.ceil(value / multiple) * multiple)


class Cache:
    """Keys and values of every layer.

    Sequence b of group g attends to `prompt_keys[layer][g, :, :prompt_length]` and then to
    `suffix_keys[layer][slot, :, :length]`. Zeros at first: what is masked is multiplied by 0, so it must be finite.

    Attributes:
        prompt_keys, prompt_values: [layers, groups, key/value heads, prompt tokens, head dim].
        suffix_keys, suffix_values: [layers, slots, key/value heads, suffix tokens, head dim].
    """

    def __init__(self, shape: CacheShape, *, dtype: torch.dtype, device: torch.device):
        self.shape = shape

        def zeros(rows: int, tokens: int) -> torch.Tensor:
            return torch.zeros(
                (shape.layers, rows, shape.kv_heads, tokens, shape.head_dim), dtype=dtype, device=device
            )

        self.prompt_keys = zeros(shape.groups, shape.prompt_tokens)
        self.prompt_values = zeros(shape.groups, shape.prompt_tokens)
        self.suffix_keys = zeros(shape.slots, shape.suffix_tokens)
        self.suffix_values = zeros(shape.slots, shape.suffix_tokens)
