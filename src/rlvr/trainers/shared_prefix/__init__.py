"""The training forward in which each distinct prompt of a micro-batch is computed once.

Its slow twin is the padded forward, `model(input_ids, attention_mask)`; both give the same log-probabilities
and gradients. The model is called as TRL calls it, through its wrappers and its fused head, so that autocast,
DDP, PEFT, gradient checkpointing and TRL's loss work as they do without.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlvr.trainers.shared_prefix.attention import TreeLayout, enable, room_to_keep
from rlvr.trainers.shared_prefix.packing import PackedRows, group_order, pack_rows
from rlvr.trainers.shared_prefix.support import SUPPORTED_MODEL_TYPES, unsupported_reason, unwrap

__all__ = [
    "SUPPORTED_MODEL_TYPES",
    "PackedRows",
    "enable",
    "group_order",
    "pack_rows",
    "shared_prefix_logps",
    "unsupported_reason",
]


def shared_prefix_logps(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    completion_columns: int,
    *,
    compute_entropy: bool = False,
    flash: bool = True,
    keep_attention: bool = False,
) -> tuple[Tensor, Tensor | None, PackedRows]:
    """Per-token log-probabilities of completions, each distinct prompt computed once.

    Equal prompts are found by their tokens, in any order of rows; groups may be unequal, prompts and
    completions of any lengths. The temperature is that of the model's fused head.

    Args:
        model: a causal language model that has TRL's fused head (`trl.trainer.utils.add_fused_lm_head`),
            wrapped or not, for which `unsupported_reason` is None.
        input_ids: (B, P+C), prompts padded on the left, completions on the right.
        attention_mask: (B, P+C), 1 for tokens, without holes.
        completion_columns: C, TRL's `logits_to_keep`.
        compute_entropy: also the entropies; the fused head must have been asked for them.
        flash: on CUDA in half precision, use the variable-length flash kernel; False: SDPA group by group.
        keep_attention: checkpointed blocks, which are computed again in the backward pass, take the kernel's output
            from the first time, if there is room for all of them (`room_to_keep`).

    Returns:
        Log-probabilities (B, C) and entropies (B, C) or None, both float32, in nats, zero where there is no
        token; and the packed rows, which know how many tokens were saved.
    """
    base = unwrap(model)
    enable(base)
    packed = pack_rows(input_ids, attention_mask, completion_columns)
    layout = TreeLayout.of(packed.groups, input_ids.device, use_flash=flash)
    if (
        keep_attention
        and layout.use_flash
        and room_to_keep(base.config, packed.packed_tokens, base.dtype, layout.device)
    ):
        layout = layout.keeping()
    outputs = model(
        input_ids=packed.input_ids,
        position_ids=packed.position_ids,
        # transformers passes a mask of four axes on as it is. This one fits no attention but ours, which
        # ignores it: a model that drops the layout on its way raises, and does not attend across branches in
        # silence.
        attention_mask=torch.ones((1, 1, 0, 0), dtype=torch.bool, device=input_ids.device),
        shift_labels=packed.labels,
        fused_lm_head=True,
        shared_prefix=layout,
    )
    shape = (len(input_ids), completion_columns)
    logps = packed.unpack(outputs.log_probs, *shape)
    return logps, packed.unpack(outputs.entropy, *shape) if compute_entropy else None, packed
