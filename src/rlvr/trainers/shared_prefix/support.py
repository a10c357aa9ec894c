"""Which models the shared-prefix forward computes correctly; one line for each that it does not."""

from __future__ import annotations

from typing import Any

from rlvr.rollout.grouped.support import configuration_problem

SUPPORTED_MODEL_TYPES = frozenset(
    {"qwen2", "qwen3", "llama", "mistral", "gemma3_text", "phi3"}
    | {"cohere2", "gemma", "glm4", "granite", "olmo2", "olmo3", "smollm3", "starcoder2"}
)
"""Architectures (`config.model_type`) whose parity with the padded forward is tested."""

ROPE_BY_LENGTH = ("dynamic", "longrope")  # frequencies depend on the longest sequence of the batch


def unwrap(model: Any) -> Any:
    """The transformers model inside DDP, PEFT and `torch.compile` wrappers."""
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "module") and not hasattr(model, "config"):
            model = model.module
        else:
            return model


def unsupported_reason(model: Any) -> str | None:
    """Why prompts cannot be shared in this model's training forward, wrapped or not; None if they can."""
    return _wrapper_reason(model) or _adapter_reason(model) or _base_reason(unwrap(model))


def _wrapper_reason(model: Any) -> str | None:
    from transformers.integrations import is_deepspeed_zero3_enabled

    if is_deepspeed_zero3_enabled():
        return "DeepSpeed ZeRO-3 shards the model; sharing prompts is not tested with it"
    names = {kind.__name__ for module in model.modules() for kind in type(module).__mro__}
    if names & {"FullyShardedDataParallel", "FSDPModule"}:
        return "FSDP shards the model; sharing prompts is not tested with it"
    if "DataParallel" in names:
        return "torch.nn.DataParallel splits rows, which a packed micro-batch has not; use one process a GPU"
    if len(set((getattr(unwrap(model), "hf_device_map", None) or {}).values())) > 1:
        return "the model is spread over several devices"
    return None


def _adapter_reason(model: Any) -> str | None:
    configs = getattr(model, "peft_config", None) or getattr(unwrap(model), "peft_config", None) or {}
    for name, config in configs.items():
        if getattr(config, "is_prompt_learning", False) or getattr(config, "is_adaption_prompt", False):
            return f"adapter {name!r} ({config.peft_type.value}) puts tokens of its own before the prompt"
        if getattr(config, "alora_invocation_tokens", None):
            return f"adapter {name!r} is an activated LoRA, which depends on each row's own tokens"
    return None


def _base_reason(model: Any) -> str | None:
    config = model.config
    kind = config.model_type
    for module in model.modules():
        forward = module.__dict__.get("forward", type(module).forward)
        if str(getattr(forward, "__module__", "")).startswith("unsloth"):
            return f"Unsloth has replaced the forward of {type(module).__name__}"
    if kind not in SUPPORTED_MODEL_TYPES or not type(model).__module__.startswith("transformers.models."):
        return (
            f"architecture {kind!r} ({type(model).__name__}) has no parity test; "
            f"supported: {', '.join(sorted(SUPPORTED_MODEL_TYPES))}"
        )
    attention = config._attn_implementation or "eager"
    if attention == "eager":
        return "attention is 'eager'; load the model with 'sdpa' or flash attention"
    if getattr(config, "attention_dropout", 0.0):
        return f"attention_dropout is {config.attention_dropout}; the packed attention has none"
    if getattr(config, "attn_logit_softcapping", None):
        return f"attn_logit_softcapping is {config.attn_logit_softcapping}; the packed attention has none"
    if getattr(config, "use_bidirectional_attention", False):
        return "attention is bidirectional"
    return _rope_reason(config) or configuration_problem(model)


def _rope_reason(config: Any) -> str | None:
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if parameters.get("rope_type") in ROPE_BY_LENGTH:
            return f"rope type {parameters['rope_type']!r} changes with the longest sequence of a batch"
    return None
