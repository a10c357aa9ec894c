"""Which models the grouped engine takes. One line each says why it does not."""

from __future__ import annotations

from itertools import takewhile
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from rlvr.rollout.engine import SamplingSettings
from rlvr.rollout.grouped.weights import causal_lm

ARCHITECTURES = frozenset({"qwen2", "qwen3", "llama", "mistral", "gemma3_text", "phi3"})
"""Model types whose tokens equal `generate`'s in the tests."""


def unsupported(model: Any, sampling: SamplingSettings) -> str | None:
    """Why the engine cannot take this model, in one line; None if it can.

    Every option of `SamplingSettings` is supported.
    """
    del sampling
    if (problem := _peft_problem(model)) is not None:
        return problem
    inner = causal_lm(model)
    checks = (
        *(_wrapper_problem, _patch_problem, _architecture_problem, _position_problem),
        *(configuration_problem, _placement_problem, _dtype_problem, _quantization_problem),
    )
    return next((problem for check in checks if (problem := check(inner)) is not None), None) or _hook_problem(model)


def configuration_problem(model: Any) -> str | None:
    """Layers that read another configuration than the model's: what is set or checked there is not what they do.

    PEFT's `layer_replication` copies layers with their configurations.

    Args:
        model: the transformers model itself, without wrappers.
    """
    for name, module in model.named_modules():
        own = getattr(module, "config", model.config) if hasattr(module, "layer_idx") else model.config
        if own is not model.config:
            return f"{name} has a configuration of its own, which is not model.config (copied or replicated layers)"
    return None


def _peft_problem(model: Any) -> str | None:
    """What a PeftModel's own forward does, which the transformers model inside does not."""
    configs = getattr(model, "peft_config", None)
    for config in configs.values() if isinstance(configs, dict) else ():
        kind = getattr(config.peft_type, "value", config.peft_type)
        if config.is_prompt_learning:
            return f"{kind} puts virtual tokens in front of the prompt"
        if getattr(config, "alora_invocation_tokens", None) or kind in ("XLORA", "POLY"):
            return f"{kind} adapters that depend on the input"
    return None


def _wrapper_problem(model: Any) -> str | None:
    name = type(model).__name__
    if name in ("DeepSpeedEngine", "FullyShardedDataParallel") or name.startswith("FSDP"):
        return f"the weights are sharded by {name}"
    for parameter in model.parameters():
        if hasattr(parameter, "ds_id") or type(parameter.data).__name__ == "DTensor":
            return "the weights are sharded (DeepSpeed ZeRO-3, FSDP or tensor parallelism)"
    return None


def _patch_problem(model: Any) -> str | None:
    for module in model.modules():
        forward = getattr(module.forward, "__wrapped__", module.forward)
        if "unsloth" in (getattr(forward, "__module__", "") or "") or "unsloth" in type(module).__module__:
            return "the model is patched by Unsloth, which has its own attention and generation"
    if not type(model).__module__.startswith("transformers."):
        return f"{type(model).__name__} is no class of transformers, so its attention is unknown"
    return None


def _architecture_problem(model: Any) -> str | None:
    config = model.config
    layer_types = set(getattr(config, "layer_types", None) or ())
    if hasattr(config, "vision_config") or hasattr(config, "audio_config"):
        return f"{config.model_type} reads images or sound"
    if layer_types - {"full_attention", "sliding_attention"}:
        return f"{config.model_type} has layers of type {', '.join(sorted(layer_types))}"
    if any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        return f"{config.model_type} is a mixture of experts"
    if config.model_type not in ARCHITECTURES or not type(model).__name__.endswith("ForCausalLM"):
        return (
            f"{type(model).__name__} ({config.model_type}) is not among the architectures whose parity is tested: "
            + ", ".join(sorted(ARCHITECTURES))
        )
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return f"{config.model_type} caps its attention scores (attn_logit_softcapping)"
    if getattr(config, "use_bidirectional_attention", None):
        return f"{config.model_type} attends in both directions"
    if getattr(config, "output_attentions", False) or getattr(config, "output_hidden_states", False):
        return "the configuration asks for attentions or hidden states of every forward"
    return None


def _position_problem(model: Any) -> str | None:
    parameters = getattr(model.config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    for rope in nested or [parameters]:
        if rope.get("rope_type") in ("dynamic", "longrope"):
            return f"rotary embedding of type {rope['rope_type']!r} changes with the longest sequence of a batch"
    return None


def _placement_problem(model: Any) -> str | None:
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1 or next(iter(devices)).type not in ("cpu", "cuda"):
        return f"the weights are on {', '.join(sorted(map(str, devices)))}; one CPU or one CUDA device is needed"
    if next(iter(devices)).type == "cuda" and torch.version.hip is not None:
        return "it is not tested on ROCm"
    return None


def _dtype_problem(model: Any) -> str | None:
    """A rollout runs without autocast, which would bring weights of several dtypes together.

    Adapters do that by themselves, and so does a head that TRL keeps in float32 (`cast_lm_head_to_fp32`), by a forward
    of its own. Quantized weights are not looked at.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    holders = [getattr(layer, name) for layer in layers for name in layer.adapter_layer_names]
    adapters = {part for holder in holders if isinstance(holder, nn.Module) for part in holder.modules()}
    weights = [
        module._parameters.get("weight")
        for module in model.modules()
        if module not in adapters and "forward" not in vars(module)
    ]
    dtypes = {w.dtype for w in weights if w is not None and w.is_floating_point() and w.dtype.itemsize > 1}
    if len(dtypes) > 1:
        return f"the weights are of several dtypes: {', '.join(sorted(str(d).removeprefix('torch.') for d in dtypes))}"
    return None


def _quantization_problem(model: Any) -> str | None:
    """Of bitsandbytes the 4-bit layers are tested; those in 8 bits ask the host which columns to compute apart."""
    method = getattr(model, "quantization_method", None)
    if method is None or getattr(model, "is_loaded_in_4bit", False):
        return None
    if getattr(model, "is_loaded_in_8bit", False):
        return "8-bit weights synchronise with the host in every layer, so that no CUDA graph can hold them"
    return f"weights quantized by {getattr(method, 'value', method)} are not tested"


def _hook_problem(model: Any) -> str | None:
    """The engine calls the decoder and the head, and so no hook of the model around them."""
    inner = causal_lm(model)
    for module in (*takewhile(lambda module: module is not inner, model.modules()), inner):
        if module._forward_hooks or module._forward_pre_hooks:
            return f"a forward hook is registered on {type(module).__name__}, which the engine would not call"
    return None
