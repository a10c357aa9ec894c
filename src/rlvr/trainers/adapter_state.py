"""Which adapters a model carries, read from the marks that PEFT, transformers and Unsloth leave."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

if TYPE_CHECKING:
    from peft import PeftConfig

AdapterKind = Literal["none", "peft", "mixed", "transformers", "injected", "prompt-learning"]
"""peft: a PeftModel; mixed: a PeftMixedModel; transformers: `model.add_adapter` or `load_adapter`; injected:
adapter layers and none of these (`peft.inject_adapter_in_model`); prompt-learning: prompt, prefix,
p-tuning."""


@dataclass(frozen=True, kw_only=True)
class AdapterState:
    """The adapters of a model as they stand. Numbers count parameters, shared ones once."""

    kind: AdapterKind
    unsloth: bool  # loaded or wrapped by Unsloth
    adapters: tuple[str, ...]  # every adapter's name
    active: tuple[str, ...]  # those that the forward pass uses
    configs: Mapping[str, PeftConfig]
    merged: tuple[str, ...]  # adapters added into the base weights, in place
    disabled: bool  # at least one layer's adapters are switched off
    nested: bool  # a PeftModel inside another
    trainable: int
    total: int
    trained_in_vain: int  # of `trainable`: in adapters that are merged, disabled or not active
    outside: tuple[str, ...]  # names of trainable parameters that belong to no adapter
    head_adapted: bool  # the output head computes more than weight · x + bias
    embeddings_adapted: bool


def inspect_adapters(model: nn.Module) -> AdapterState:
    """Reads which adapters `model` carries. Changes nothing."""
    layers: list[Any] = [module for module in model.modules() if is_adapter_layer(module)]
    adapter_parameters = [entry for layer in layers for entry in _adapter_parameters(layer)]
    prompt = _prompt_parameters(model)
    inside = {parameter for _, parameter, _ in adapter_parameters} | prompt
    trainable = {p for p in model.parameters() if p.requires_grad}
    effective = {p for _, p, in_use in adapter_parameters if in_use} | prompt | (trainable - inside)
    configs = _configs(model) if layers or prompt else {}
    active = tuple(dict.fromkeys(name for layer in layers for name in layer.active_adapters))
    if prompt:
        active = (str(model.active_adapter),)
    names = dict.fromkeys([*configs, *(name for name, _, _ in adapter_parameters)])
    return AdapterState(
        kind=_kind(model, bool(layers), bool(prompt)),
        unsloth=_is_unsloth(model),
        adapters=tuple(names),
        active=active,
        configs=configs,
        merged=tuple(dict.fromkeys(name for layer in layers for name in layer.merged_adapters)),
        disabled=any(layer.disable_adapters for layer in layers),
        nested=sum(_is_peft_model(module) for module in model.modules()) > 1,
        trainable=sum(p.numel() for p in trainable),
        total=sum(p.numel() for p in model.parameters()),
        trained_in_vain=sum(p.numel() for p in trainable - effective),
        outside=tuple(n for n, p in model.named_parameters() if p.requires_grad and p not in inside),
        head_adapted=_is_adapted(embeddings(model, "output"), whole_copies=False),
        embeddings_adapted=_is_adapted(embeddings(model, "input"), whole_copies=True),
    )


def describe(state: AdapterState) -> str:
    """One line for the log and the run folder."""
    share = f"{state.trainable:,} of {state.total:,} parameters trainable"
    share += f" ({state.trainable / state.total:.2%})" if state.total else ""
    where = " through Unsloth" if state.unsloth else ""
    if state.kind == "none":
        return f"no adapter{where}; {share}"
    kinds = ", ".join(
        f"{name!r}{kind_and_rank(state.configs.get(name))}{'' if name in state.active else ', not active'}"
        for name in state.adapters
    )
    flags = [f"merged: {', '.join(state.merged)}"] if state.merged else []
    flags += ["disabled"] if state.disabled else []
    flags += ["nested"] if state.nested else []
    flags += [f"{len(state.outside)} trainable tensors outside adapters"] if state.outside else []
    return "; ".join([f"{state.kind} adapters{where}: {kinds}", *flags, share])


def _peft_classes() -> tuple[type, type, tuple[type, ...]]:
    from peft import PeftMixedModel, PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return PeftModel, PeftMixedModel, (BaseTunerLayer, AuxiliaryTrainingWrapper)


def _is_peft_model(module: Any) -> bool:
    return isinstance(module, _peft_classes()[:2])


def is_adapter_layer(module: Any) -> bool:
    """Whether PEFT put this layer around another: LoRA and its kin, `modules_to_save`, trainable tokens."""
    return isinstance(module, _peft_classes()[2])


def _kind(model: nn.Module, has_layers: bool, has_prompt: bool) -> AdapterKind:
    peft_model, mixed_model, _ = _peft_classes()
    if isinstance(model, mixed_model):
        return "mixed"
    if has_prompt:
        return "prompt-learning"
    if isinstance(model, peft_model):
        return "peft"
    if not has_layers:
        return "none"
    return "transformers" if getattr(model, "_hf_peft_config_loaded", False) else "injected"


def _is_unsloth(model: nn.Module) -> bool:
    """Unsloth attaches these to what it loads, on a GPU and on a CPU; a PeftModel passes them through."""
    methods = all(callable(getattr(model, name, None)) for name in ("for_training", "for_inference"))
    return methods and hasattr(model, "_saved_temp_tokenizer")


def _configs(model: nn.Module) -> dict[str, PeftConfig]:
    configs = getattr(model, "peft_config", None)
    return dict(configs) if isinstance(configs, Mapping) else {}


def _adapter_parameters(layer: Any) -> Iterator[tuple[str, nn.Parameter, bool]]:
    """Yields (adapter name, parameter, whether the forward pass uses it) of one adapter layer.

    PEFT keeps them as `<kind>.<adapter name>[...]` beside the wrapped layer, for example
    `lora_A.default.weight`.
    """
    wrapped = {p for name in ("base_layer", "original_module") for p in _parameters(getattr(layer, name, None))}
    in_use = not layer.disable_adapters and not layer.merged_adapters
    for path, parameter in layer.named_parameters():
        parts = path.split(".")
        if parameter not in wrapped and parts[0] not in ("base_layer", "original_module") and len(parts) > 1:
            # trainable tokens: their layer is a child of the wrapper: token_adapter.<kind>.<name>
            name = parts[2] if parts[0] == "token_adapter" and len(parts) > 2 else parts[1]
            yield name, parameter, in_use and name in layer.active_adapters


def _parameters(module: Any) -> set[nn.Parameter]:
    return set(module.parameters()) if isinstance(module, nn.Module) else set()


def _prompt_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Of prompt, prefix and p-tuning: a PeftModel that holds virtual tokens instead of adapter layers."""
    if _is_peft_model(model) and any(config.is_prompt_learning for config in _configs(model).values()):
        return _parameters(getattr(model, "prompt_encoder", None))
    return set()


def embeddings(model: nn.Module, side: Literal["input", "output"]) -> nn.Module | None:
    """The layer that `get_input_embeddings` or `get_output_embeddings` gives, None if there is none."""
    get = getattr(model, f"get_{side}_embeddings", None)
    try:
        found = get() if callable(get) else None
    except (NotImplementedError, AttributeError):  # a hand-written model without such a thing
        return None
    return found if isinstance(found, nn.Module) else None


def _is_adapted(module: nn.Module | None, *, whole_copies: bool) -> bool:
    """Whether anything but `weight` and `bias` takes part in this layer (a weight may be parametrized).

    Args:
        whole_copies: count `modules_to_save`, a trained copy of the whole layer, too.
    """
    if module is None:
        return False
    if type(module).__name__ == "ModulesToSaveWrapper":
        return whole_copies
    if is_adapter_layer(module):
        return True
    own = ("weight", "bias", "parametrizations")
    return any(p.requires_grad and n.split(".")[0] not in own for n, p in module.named_parameters())


def kind_and_rank(config: Any) -> str:
    """' (LORA, r=16, alpha=32)', or nothing where the configuration is not known."""
    if config is None:
        return ""
    kind = getattr(config.peft_type, "value", config.peft_type)
    rank = f", r={config.r}" if hasattr(config, "r") else ""
    alpha = f", alpha={config.lora_alpha}" if hasattr(config, "lora_alpha") else ""
    return f" ({kind}{rank}{alpha})"
