"""How a given PEFT configuration differs from the one that a model was wrapped with."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from enum import Enum
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from peft import PeftConfig

# Bookkeeping that PEFT fills in, which changes nothing about the adapter.
_IGNORED = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_version",
    "revision",
    "runtime_config",
    "task_type",
}


def config_differences(given: PeftConfig, applied: PeftConfig, model: nn.Module) -> list[str]:
    """Says field by field how `given` differs from `applied`: 'r (8 given, 16 applied)'.

    Sequences are compared as sets. `target_modules` is compared by the layers that it selects in `model`, so
    that 'all-linear', a regular expression and a list which mean the same layers are the same.
    """
    differences = []
    new, old = given.to_dict(), applied.to_dict()
    for field in dict.fromkeys([*new, *old]):
        if field in _IGNORED:
            continue
        if field == "target_modules" and _targets(given, model) == _targets(applied, model):
            continue
        left, right = _comparable(new.get(field)), _comparable(old.get(field))
        if left != right:
            differences.append(f"{field} ({_shown(left)} given, {_shown(right)} applied)")
    return differences


def _comparable(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, list | tuple | set | frozenset):
        return frozenset(_hashable(item) for item in value)
    return value or None if isinstance(value, dict) else value


def _hashable(item: Any) -> Any:
    return tuple(item) if isinstance(item, list) else item


def _shown(value: Any) -> str:
    return "{" + ", ".join(sorted(map(str, value))) + "}" if isinstance(value, frozenset) else repr(value)


def _targets(config: Any, model: Any) -> frozenset[str] | None:
    """The names of the layers that `config.target_modules` selects; None where it cannot be told."""
    from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    targets = getattr(config, "target_modules", None)
    names = [name for name, module in _layers(model) if isinstance(module, nn.Linear | nn.Embedding | BaseTunerLayer)]
    if isinstance(targets, str) and targets.lower() == "all-linear":
        embeddings = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
        return frozenset(n for n, m in _layers(model) if n in set(names) and id(m) not in embeddings)
    if targets is None:
        kind = str(getattr(getattr(model, "config", None), "model_type", None))
        targets = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(kind)
        if targets is None:
            return None
    if not isinstance(targets, str):
        targets = set(targets)
    probe = copy.copy(config)
    probe.target_modules = targets
    return frozenset(name for name in names if check_target_module_exists(probe, name))


def _layers(model: Any) -> Iterable[tuple[str, nn.Module]]:
    """(name, module) as before wrapping: without PEFT's prefix and what is inside an adapter layer."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    inside: list[str] = []
    for name, module in inner.named_modules():
        if any(name.startswith(prefix) for prefix in inside):
            continue
        if isinstance(module, BaseTunerLayer):
            inside.append(f"{name}.")
        yield name, module
