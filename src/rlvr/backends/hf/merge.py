"""A policy's weights with its adapter merged in, made without touching the policy."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper

from rlvr.errors import AdapterError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def merged_state_dict(model: PeftModel) -> dict[str, torch.Tensor]:
    """The base model's state dict with the active adapter merged in, on the CPU.

    Wrapped layers are merged one at a time on a float32 copy: the policy stays as it is to the last bit,
    and memory is needed for one layer and the result. They come out in float32, all else in its own dtype.

    Raises:
        AdapterError: the adapter trains whole modules (PEFT's `modules_to_save`) beside LoRA.
    """
    base = model.get_base_model()
    modules = dict(base.named_modules())
    whole = [name for name, module in modules.items() if isinstance(module, AuxiliaryTrainingWrapper)]
    if whole:
        raise AdapterError(
            f"modules trained beside LoRA cannot be merged here: {', '.join(whole)}. Save the adapter instead."
        )
    wrapped: dict[str, Any] = {name: m for name, m in modules.items() if isinstance(m, BaseTunerLayer)}
    merged = {name: tensor.cpu() for name, tensor in base.state_dict().items() if not _inside(name, wrapped)}
    for name, layer in wrapped.items():
        if not _inside(name, wrapped):
            weights = _merged_layer(layer).state_dict()
            merged.update({f"{name}.{key}": tensor for key, tensor in weights.items()})
    return merged


def _merged_layer(layer: Any) -> torch.nn.Module:
    """A layer in float32 without its wrappers: experts have one around another for each of their parameters."""
    alone = copy.deepcopy(layer).cpu().float()
    for wrapper in (module for module in alone.modules() if isinstance(module, BaseTunerLayer)):
        wrapper.merge(safe_merge=True)
    return alone.get_base_layer()


def _inside(name: str, layers: dict[str, Any]) -> bool:
    """Whether a parameter or a module is part of a wrapped layer."""
    parts = name.split(".")
    return any(".".join(parts[:i]) in layers for i in range(1, len(parts)))


def with_weights(model: PreTrainedModel, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> PreTrainedModel:
    """A model of the same class and configuration that holds these weights, floating ones cast to `dtype`.

    It is there to be saved: buffers that a checkpoint does not hold have no data.
    """
    config = copy.deepcopy(model.config)
    config.dtype = dtype
    with torch.device("meta"):
        result = type(model)(config)
    cast = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    result.load_state_dict(cast, assign=True)
    result.tie_weights()
    result.generation_config = copy.deepcopy(model.generation_config)
    return result
