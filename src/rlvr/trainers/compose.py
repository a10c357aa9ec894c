"""Which class a trainer is built on: found when an instance is made, not when a module is imported.

Unsloth replaces `trl.GRPOTrainer` on a GPU by a class that does not inherit from TRL's. A trainer class that had
inherited at import would miss the replacement, or its original, depending on the order of imports.
"""

from __future__ import annotations

import functools
from typing import Any

from rlvr.errors import PatchedProcessError, UnsupportedSettingError


def composed(cls: Any, base: Any) -> Any:
    """`cls` on top of `base`, under the name of `cls`; `cls` itself where it has that base already."""
    return cls if issubclass(cls, base) else _joined(cls, base)


@functools.cache
def _joined(cls: Any, base: Any) -> Any:
    return type(cls.__name__, (cls, base), {"__module__": cls.__module__, "__doc__": cls.__doc__})


def trl_trainer_class(model: Any) -> type:
    """The `trl.GRPOTrainer` of this moment.

    Raises:
        PatchedProcessError: Unsloth has replaced it, and `model` is not Unsloth's: its trainer needs methods that
            only its own models have, and would drop `peft_config` in silence.
    """
    import trl

    base = trl.GRPOTrainer
    if is_unsloth_class(base) and not is_unsloth_model(model):
        raise PatchedProcessError(
            "unsloth was imported in this process and has replaced trl.GRPOTrainer by its own class, which trains "
            "Unsloth's models only. Load the model with FastLanguageModel (backend 'unsloth'), or restart the process "
            "and do not import unsloth, or train in a process of its own: rlvr.train(..., isolate=True)."
        )
    return base


def is_unsloth_class(trainer_class: type) -> bool:
    """Whether a trainer class is one that Unsloth generated."""
    return any(base.__name__.startswith(("Unsloth", "_Unsloth")) for base in trainer_class.__mro__)


_OF_A_VLLM_TO_START = {
    "vllm_mode": "colocate",
    "vllm_server_base_url": None,
    "vllm_model_impl": "vllm",
    "vllm_max_model_length": None,
    "vllm_tensor_parallel_size": 1,
}
"""TRL's arguments of the vLLM that a trainer would start or ask, and their defaults."""


def refuse_what_unsloth_ignores(args: Any, peft_config: Any, *, model: Any) -> None:
    """What Unsloth's generated trainer passes over with a warning, or with none.

    Args:
        peft_config: what TRL's trainer is to put on the model; None if nothing.
        model: with `vllm_engine` where it was loaded beside vLLM.

    Raises:
        UnsupportedSettingError: there is something of it.
    """
    if getattr(args, "use_adaptive_entropy", False):
        raise UnsupportedSettingError(
            "use_adaptive_entropy is True, and Unsloth's trainer ignores it, its entropy_coef included. Use a fixed "
            "entropy_coef, or the backend 'hf'."
        )
    if peft_config is not None:
        raise UnsupportedSettingError(
            "peft_config is given for a model without adapters, and Unsloth's trainer ignores it: every weight would "
            "train. Put the adapter on first, with FastLanguageModel.get_peft_model or "
            "rlvr.load_policy(..., backend='unsloth', lora=...), and leave peft_config out."
        )
    if hasattr(model, "vllm_engine"):
        values = {name: getattr(args, name, usual) for name, usual in _OF_A_VLLM_TO_START.items()}
        given = [f"{name}={value!r}" for name, value in values.items() if value != _OF_A_VLLM_TO_START[name]]
        if given:
            raise UnsupportedSettingError(
                f"{', '.join(given)}: the model was loaded beside a vLLM of its own (fast_inference), which Unsloth's "
                "trainer samples with whatever these say. Leave them out, or load with fast_inference='off'."
            )


def is_unsloth_model(model: Any) -> bool:
    """Unsloth marks its models, wrapped in adapters or not, with these two methods."""
    return callable(getattr(model, "for_training", None)) and callable(getattr(model, "for_inference", None))
