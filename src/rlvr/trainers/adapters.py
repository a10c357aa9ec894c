"""What adapters a model carries, whether they can be trained, and what to do with `peft_config`.

TRL wraps, resets or ignores adapters in ways that train nothing, or the wrong thing, without a word. Here
every form is recognised from the model itself, before TRL sees it: a form trains correctly, or is refused
with the fix.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rlvr.errors import AdapterError
from rlvr.trainers.adapter_state import (
    AdapterState,
    describe,
    embeddings,
    inspect_adapters,
    is_adapter_layer,
    kind_and_rank,
)
from rlvr.trainers.peft_differences import config_differences
from rlvr.trainers.reference import refuse_sharded_parameters
from rlvr.trainers.training_check import TrainingCheck

if TYPE_CHECKING:
    from peft import PeftConfig

__all__ = [
    "AdapterState",
    "PreparedPolicy",
    "TrainingCheck",
    "describe",
    "inspect_adapters",
    "prepare_policy",
    "require_fresh_adapter_for_base_reference",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PreparedPolicy:
    """What TRL's trainer is to be given."""

    model: Any
    peft_config: PeftConfig | None
    state: AdapterState | None  # None for a model given by name, or not yet wrapped
    notes: tuple[str, ...] = ()


def prepare_policy(
    model: Any,
    peft_config: PeftConfig | None = None,
    *,
    beta: float = 0.0,
    gradient_checkpointing: bool = True,
    log: Callable[[str], None] = logger.warning,
) -> PreparedPolicy:
    """Decides what TRL's trainer gets, so that the model is wrapped at most once and trains.

    Args:
        model: a model, or its id or folder as a string, which is passed on unseen.
        peft_config: dropped, with one logged line, if the model has adapters already.
        beta: the KL coefficient. If it is not 0, `StartingPolicy` must be able to copy the model.
        gradient_checkpointing: whether the trainer will switch it on, as TRL does by default.
        log: called with the line about a dropped `peft_config`.

    Raises:
        AdapterError: the model would train nothing, or not what was meant; the message names the fix.
    """
    if isinstance(model, str):
        return PreparedPolicy(model=model, peft_config=peft_config, state=None)
    state = inspect_adapters(model)
    if beta != 0:
        refuse_sharded_parameters(model)
    if gradient_checkpointing:
        _refuse_with_gradient_checkpointing([peft_config] if state.kind == "none" else list(state.configs.values()))
    if state.kind == "none" and peft_config is not None:
        return PreparedPolicy(model=model, peft_config=peft_config, state=None)
    _refuse_untrainable(model, state)
    notes = [describe(state)]
    if peft_config is not None:
        notes.append(_dropped_line(model, peft_config, state))
        log(notes[-1])
    if state.trained_in_vain:
        notes.append(
            f"{state.trained_in_vain:,} trainable parameters are in adapters that are not active and will not change"
        )
    if gradient_checkpointing:
        _let_gradients_through(model, state)
    return PreparedPolicy(model=model, peft_config=None, state=state, notes=tuple(notes))


def require_fresh_adapter_for_base_reference(model: nn.Module) -> None:
    """For a trainer whose reference is the base model: refuses a start that differs from the base model.

    Unsloth's trainer on a GPU switches the adapter off for the reference, which is the starting policy only
    if the adapter does nothing yet: LoRA with A or B zero, DoRA magnitudes equal to the norms of the base
    weights, whole-module copies equal to their originals, and nothing trained outside the adapter.

    Raises:
        AdapterError: the adapter is not fresh. A model without adapters passes.
    """
    state = inspect_adapters(model)
    if state.kind == "none":
        return
    fix = "Use beta=0, a fresh adapter (get_peft_model on the merged model), or the hf backend."
    if state.outside:
        raise AdapterError(
            "beta > 0 takes the base model as reference here, and the base itself is trained "
            f"({len(state.outside)} tensors, for example {state.outside[0]}), so that the reference would "
            f"move. {fix}"
        )
    if state.kind == "prompt-learning":
        raise AdapterError(f"beta > 0 takes the base model as reference here, and a prompt is never neutral. {fix}")
    for name, module in model.named_modules():
        if is_adapter_layer(module) and (reason := _why_not_fresh(module)):
            raise AdapterError(
                "beta > 0 takes the base model as reference here, so the starting adapter must be fresh, and "
                f"{name} is not: {reason}. {fix}"
            )


# --- refusals ----------------------------------------------------------------------------------------------


def _refuse_untrainable(model: nn.Module, state: AdapterState) -> None:
    if state.kind == "mixed":
        raise AdapterError(
            "the model is a PeftMixedModel, which TRL's trainers cannot run. Use one PeftModel (several "
            "LoRA adapters can be active on it: model.base_model.set_adapter([...])), or pass the "
            "transformers model inside, model.base_model.model, whose adapters are then trained in place."
        )
    if state.nested:
        raise AdapterError(
            "the model is a PeftModel inside a PeftModel; only the outer one would be saved and loaded. "
            "Merge the inner one first (model = inner.merge_and_unload()), or give the inner one a second "
            "adapter (inner.add_adapter('second', config); inner.set_adapter('second'))."
        )
    if state.merged:
        raise AdapterError(
            f"adapter {_names(state.merged)} is merged into the base weights in place, so that training it "
            "would change nothing. Call model.unmerge_adapter() (on a transformers model: unmerge() on each "
            "adapter layer), or model = model.merge_and_unload() and pass a peft_config for a new adapter."
        )
    if state.trainable == state.trained_in_vain:
        raise AdapterError(f"nothing in the model is trainable: {_why_nothing_trains(state)}")
    if state.head_adapted:
        raise AdapterError(
            "the output head (lm_head) carries an adapter. Training computes log-probabilities from "
            "lm_head.weight directly, so that the adapter would be used for sampling and never trained. "
            "Remove 'lm_head' from target_modules (for trainable_token_indices with tied embeddings: train "
            "the whole head instead), or train a whole copy with modules_to_save=['lm_head']."
        )


def _refuse_with_gradient_checkpointing(configs: Sequence[Any]) -> None:
    """Prefix tuning hands its prefix over as a cache, which transformers drops in checkpointed layers."""
    for config in configs:
        if getattr(config, "peft_type", None) in ("PREFIX_TUNING", "CARTRIDGE"):
            raise AdapterError(
                f"{config.peft_type.value} cannot be trained with gradient checkpointing, which drops the "
                "cache that holds the prefix. Set gradient_checkpointing=False in the training arguments, "
                "or use LoRA."
            )


def _why_nothing_trains(state: AdapterState) -> str:
    if state.kind == "none":
        return (
            f"all {state.total:,} parameters are frozen and there is no adapter (after merge_and_unload() "
            "none is left). Pass a peft_config for LoRA, or call model.requires_grad_(True) for full "
            "fine-tuning."
        )
    if state.disabled:
        enable = "model.enable_adapters()" if state.kind == "transformers" else "model.enable_adapter_layers()"
        return f"adapter {_names(state.adapters)} is disabled. Call {enable}."
    if state.trainable:
        return (
            f"the trainable parameters are in adapters that are not active; active: {_names(state.active)} "
            f"of {_names(state.adapters)}. Activate the adapter to train with model.set_adapter(name)."
        )
    fix = {
        "peft": "Load it with PeftModel.from_pretrained(..., is_trainable=True)",
        "transformers": "Load it with model.load_adapter(..., is_trainable=True)",
    }.get(state.kind, "Set requires_grad on its parameters")
    how = "was loaded for inference" if _for_inference(state) else "is frozen"
    names = _names(state.active or state.adapters)
    return f"adapter {names} {how}. {fix}, or call model.set_adapter(name) on it."


def _for_inference(state: AdapterState) -> bool:
    return any(getattr(state.configs.get(name), "inference_mode", False) for name in state.active)


def _dropped_line(model: nn.Module, peft_config: PeftConfig, state: AdapterState) -> str:
    name = state.active[0] if state.active else state.adapters[0]
    applied = state.configs.get(name)
    line = f"peft_config dropped: the model already has adapter {name!r}{kind_and_rank(applied)}"
    if applied is None:
        return f"{line}, whose configuration is not known."
    differences = config_differences(peft_config, applied, model)
    if not differences:
        return f"{line}, with the same settings."
    return f"{line}; it differs in {'; '.join(differences)}."


def _let_gradients_through(model: Any, state: AdapterState) -> None:
    """Keeps gradient checkpointing with `use_reentrant=True` from cutting the gradients.

    It gives none to a block whose inputs need none. TRL cures that for a PeftModel and transformers for its
    own adapters; a model with frozen embeddings may be neither.
    """
    layer = embeddings(model, "input")
    frozen = layer is not None and not any(p.requires_grad for p in layer.parameters())
    if state.kind in ("none", "injected") and frozen and not getattr(model, "_require_grads_hooks", None):
        model.enable_input_require_grads()


# --- freshness ---------------------------------------------------------------------------------------------


def _why_not_fresh(layer: Any) -> str | None:
    if type(layer).__name__ == "ModulesToSaveWrapper":
        for name in layer.active_adapters:
            copy, original = layer.modules_to_save[name], layer.original_module
            pairs = zip(copy.parameters(), original.parameters(), strict=True)
            if not all(torch.equal(new, old) for new, old in pairs):
                return f"the copy in modules_to_save of adapter {name!r} differs from the original"
        return None
    if not hasattr(layer, "lora_B"):
        return f"{type(layer).__name__} is not LoRA, so it cannot be told"
    for name in layer.active_adapters:
        factors = [[layer.lora_A, layer.lora_B], [layer.lora_embedding_A, layer.lora_embedding_B]]
        for a, b in factors:  # PEFT starts linear layers with B = 0, embeddings with A = 0
            if name in a and _any_nonzero(a[name]) and _any_nonzero(b[name]):
                return f"adapter {name!r} adds something to the weights: neither A nor B is zero"
        magnitudes = getattr(layer, "lora_magnitude_vector", {})
        if name in magnitudes:
            weight = layer.get_base_weight()
            norms = torch.linalg.vector_norm(weight.float(), dim=1)
            if not torch.allclose(magnitudes[name].weight.float().flatten(), norms, rtol=1e-2):
                return f"adapter {name!r} has DoRA magnitudes that differ from the norms of the weights"
    return None


def _any_nonzero(item: Any) -> bool:
    tensors = [item] if isinstance(item, torch.Tensor) else item.parameters()
    return any(bool(tensor.any()) for tensor in tensors)


def _names(names: tuple[str, ...]) -> str:
    return ", ".join(repr(name) for name in names) or "(unnamed)"
