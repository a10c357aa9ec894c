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
    """The trainable parameters of a quantized model and what is in them; of any other TRL leaves them alone."""
    parameters = model.parameters() if _quantized(model) else ()
    return [(parameter, parameter.data) for parameter in parameters if parameter.requires_grad]


def keep_dtypes(model: nn.Module, given: Given, *, wrapped: bool) -> None:
    """Undoes what TRL's constructor does on quantized weights: it casts all that is trained to bfloat16.

    DoRA's magnitudes it leaves alone, since they would freeze in silence; A is hardly better off, and training in
    float16 refuses bfloat16 gradients. Unsloth's trainer does not cast either.

    Args:
        given: what `trained_as_given` found before.
        wrapped: TRL has put the adapter on, for which PEFT had chosen float32.
    """
    for parameter, data in given:
        if parameter.dtype != data.dtype:
            parameter.data = data.to(parameter.device)
    if wrapped and _quantized(model):
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dtype == torch.bfloat16:
                parameter.data = parameter.data.float()


def _quantized(model: Any) -> bool:
    """As TRL decides it."""
    return any(getattr(model, name, False) for name in ("is_loaded_in_4bit", "is_loaded_in_8bit"))


def rounding_notice(model: nn.Module) -> str | None:
    """One line if trainable parameters are in half precision; None if none are."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    coarse = [parameter for parameter in trained if parameter.dtype in (torch.bfloat16, torch.float16)]
    if not coarse:
        return None
    count, whole = (sum(parameter.numel() for parameter in some) for some in (coarse, trained))
    dtypes = ", ".join(sorted({str(parameter.dtype).removeprefix("torch.") for parameter in coarse}))
    adapters = "keep adapters as PEFT makes them (autocast_adapter_dtype=True)"
    fix = adapters if hasattr(model, "peft_config") else "load the model with dtype='float32' (--dtype float32)"
    return (
        f"{count:,} of {whole:,} trainable parameters are in {dtypes}, which rounds small updates away: at low "
        f"learning rates, most of them. To train in float32, {fix}."
    )
