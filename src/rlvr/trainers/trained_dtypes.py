"""What is trained stays in the dtype that it was given in, and one that rounds small updates away is said.

bfloat16 keeps 8 bits of a number: an update below some 1/256 of its weight leaves the weight as it was, and at the
learning rates of GRPO most are. Adapters are small, so PEFT keeps them in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

Given = list[tuple[nn.Parameter, torch.Tensor]]


def trained_as_given(model: Any) -> Given:
    """The trainable parameters and what is in them; none for a model given by name."""
    parameters = model.parameters() if isinstance(model, nn.Module) else ()
    return [(parameter, parameter.data) for parameter in parameters if parameter.requires_grad]


def keep_dtypes(model: nn.Module, given: Given, *, wrapped: bool) -> None:
    """Undoes what TRL's constructor does on quantized weights: it casts all that is trained to bfloat16.

    TRL leaves DoRA's magnitudes alone, which would be "silently frozen"; A is hardly better off, and float16 training
    refuses bfloat16 gradients. Unsloth's trainer does not cast either.

    Args:
        given: what `trained_as_given` found before.
        wrapped: TRL has put the adapter on, for which PEFT had chosen float32.
    """
    for parameter, data in given:
        if parameter.dtype != data.dtype:
            parameter.data = data.to(parameter.device)
    if wrapped and (getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)):
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dtype == torch.bfloat16:
                parameter.data = parameter.data.float()


def rounding_notice(model: nn.Module) -> str | None:
    """One line if trainable parameters are in half precision; None if none are."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    coarse = [parameter for parameter in trained if parameter.dtype in (torch.bfloat16, torch.float16)]
    if not coarse:
        return None
    count, whole = (sum(parameter.numel() for parameter in some) for some in (coarse, trained))
    dtypes = ", ".join(sorted({str(parameter.dtype).removeprefix("torch.") for parameter in coarse}))
    return (
        f"{count:,} of {whole:,} trainable parameters are in {dtypes}, where updates that are small beside their "
        "weight are rounded away, which at low learning rates most are. Train them in float32: adapters as PEFT makes "
        "them (autocast_adapter_dtype=True), all weights with dtype='float32'."
    )
