"""The model as a rollout runs it: adapters merged, evaluation mode, our attention; afterwards all as it was."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from rlvr.fused.lora import is_untouched
from rlvr.rollout.grouped.attention import ATTENTION_NAME

PEFT_LAYERS = (BaseTunerLayer, AuxiliaryTrainingWrapper)  # adapters of any kind; modules to save, trainable tokens


def causal_lm(model: Any) -> Any:
    """The transformers model inside whatever wraps it: DistributedDataParallel, torch.compile, PEFT."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "get_base_model") and hasattr(model, "peft_config"):
            model = model.get_base_model()
        else:
            return model


@contextmanager
def rollout_mode(model: Any, *, merge: bool = True) -> Iterator[None]:
    """Within it, `model` (from `causal_lm`) is in evaluation mode, attends through us and has its LoRA merged.

    Outside it, and when anything raises, every weight is bit for bit what it was: W + s·BA in W's own dtype is
    rounded, so W is not recomputed by subtraction but kept.
    """
    with ExitStack() as undo:
        modules = list(model.modules())  # walked once: an adapted model of 28 layers has more than 2,000
        training = [module for module in modules if module.training]
        undo.callback(_set_training, training, True)
        _set_training(training, False)

        config, attention = model.config, model.config._attn_implementation
        undo.callback(setattr, config, "_attn_implementation", attention)
        config._attn_implementation = ATTENTION_NAME

        if merge:
            undo.enter_context(merged_lora(modules))
        undo.enter_context(torch.no_grad())
        undo.enter_context(torch.autocast(next(model.parameters()).device.type, enabled=False))
        yield


@contextmanager
def merged_lora(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Merges every LoRA layer that can be into its base weight, in place, and takes the wrapper out of the model.

    In place, so that captured CUDA graphs, which know weights by address, go on working from one rollout to the next.
    Layers that cannot be merged exactly (`mergeable`), or that somebody has put a hook or another forward on, stay
    wrapped and apply their adapter in every forward.

    Args:
        modules: all of the model's, itself the first.
    """
    merged: list[_Merged] = []
    try:
        with torch.no_grad():
            _merge(modules, merged)
        yield
    finally:
        try:
            _put_back(merged)
        except BaseException:  # Ctrl-C: all of it once more
            _put_back(merged)
            raise


class _Merged(NamedTuple):
    """A layer whose adapter is in its base weight."""

    siblings: dict[str, Any]  # the children of its parent, itself among them
    name: str
    layer: Any
    original: Tensor


def _merge(modules: Sequence[nn.Module], merged: list[_Merged]) -> None:
    """Lists each layer before it changes it."""
    tied = _shared_parameters(modules)
    room = _room(modules)  # asked once: the driver takes its time to answer
    for parent in modules:
        children: dict[str, Any] = parent._modules  # written directly: setattr of a module is slow
        for name, layer in list(children.items()):
            if not mergeable(layer) or _is_touched(layer) or layer.base_layer.weight in tied:
                continue
            weight = layer.base_layer.weight
            room -= weight.nbytes
            original = weight.detach().clone() if room > 0 else weight.detach().to("cpu")
            merged.append(_Merged(children, name, layer, original))
            weight.copy_(merged_weight(layer))
            children[name] = layer.base_layer


def _put_back(merged: Sequence[_Merged]) -> None:
    for siblings, name, layer, original in merged:
        layer.base_layer.weight.data.copy_(original)
        siblings[name] = layer


def mergeable(layer: Any) -> bool:
    """A plain LoRA on a plain `nn.Linear`: no DoRA or other variant, no quantized base, no bias of its own."""
    return (
        type(layer) is LoraLinear
        and type(layer.base_layer) is nn.Linear
        and layer.base_layer.weight.is_floating_point()
        and not layer.fan_in_fan_out
        and not layer.merged_adapters
        and not any(layer.lora_variant.get(name) for name in layer.active_adapters)
        and not any(layer.lora_bias.get(name) for name in layer.active_adapters)
    )


def _is_touched(layer: Any) -> bool:
    """Whether there is a hook, or a forward that is not its class's own, on what merging computes otherwise."""
    parts = (layer.lora_dropout, layer.lora_A, layer.lora_B)
    in_use = [part[name] for name in layer.active_adapters for part in parts if name in part]
    return not all(map(is_untouched, (layer, layer.base_layer, *in_use)))


def merged_weight(layer: Any) -> Tensor:
    """W + Σ s·BA over the active adapters, computed in float32, in W's dtype and in memory of its own.

    W itself if disabled.
    """
    weight = layer.base_layer.weight
    adapters = [] if layer.disable_adapters else [name for name in layer.active_adapters if name in layer.lora_A]
    total = weight.detach().to(torch.float32, copy=True)
    for name in adapters:
        up, down = layer.lora_B[name].weight.float(), layer.lora_A[name].weight.float()
        total.addmm_(up.detach(), down.detach(), alpha=layer.scaling[name])
    return _dithered(total, weight.dtype)


def _dithered(total: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 `total` in `dtype`, rounded up or down so that the mean stays; overwrites `total`.

    A young adapter moves most bfloat16 weights by less than half of what lies between two of them: rounded to the
    nearest, all of these would stay, and the policy be sampled without it. Here as many move as it takes. What random
    numbers decide, added to the bits that are cut off, is the same at each call: equal weights are merged equally.
    """
    cut = round(math.log2(torch.finfo(dtype).eps / torch.finfo(torch.float32).eps))  # bits: 16 for bfloat16
    if cut > 0:
        generator = torch.Generator(total.device).manual_seed(0)
        noise = torch.empty_like(total, dtype=torch.int32).random_(1 << cut, generator=generator)
        total.view(torch.int32).add_(noise).bitwise_and_(-1 << cut)
    return total.to(dtype)


def fingerprint(model: nn.Module) -> tuple[Any, ...]:
    """What a captured graph depends on beside the values of the weights: their addresses, and how each layer of PEFT
    that is not merged for the rollout uses its adapters."""
    modules = list(model.modules())
    adapters = [_adapters_in_use(layer) for layer in modules if isinstance(layer, PEFT_LAYERS)]
    return tuple(parameter.data_ptr() for parameter in _parameters(modules)), tuple(adapters)


def _adapters_in_use(layer: Any) -> tuple[Any, ...]:
    scaling = vars(layer).get("scaling", {})  # not every kind has one
    return tuple(layer.active_adapters), layer.disable_adapters, tuple(layer.merged_adapters), tuple(scaling.items())


def _set_training(modules: Sequence[nn.Module], training: bool) -> None:
    for module in modules:
        vars(module)["training"] = training  # what setting the attribute does, without the ceremony of a module


def _parameters(modules: Sequence[nn.Module]) -> Iterator[nn.Parameter]:
    """As each module has them: those that several share come as often."""
    return (p for module in modules for p in module._parameters.values() if p is not None)


def _room(modules: Sequence[nn.Module]) -> float:
    """Bytes of originals that can stay on the device; others go to the host's memory.

    For the rollout are left 4 GiB, and an eighth of the weights, of which copies of the projections take about half.
    """
    weights = set(_parameters(modules))
    device = next(iter(weights)).device
    if device.type != "cuda":
        return float("inf")
    return free_on_gpu(device) - 4 * 2**30 - sum(weight.nbytes for weight in weights) // 8


def free_on_gpu(device: torch.device) -> int:
    """Bytes that this process can still get: what the driver has, and what torch has reserved and does not use."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _shared_parameters(modules: Sequence[nn.Module]) -> set[nn.Parameter]:
    """Parameters that stand in more than one module, such as tied embeddings."""
    return {parameter for parameter, count in Counter(_parameters(modules)).items() if count > 1}
