"""Model backends: load a policy, put an adapter on it, save it. See `protocol.py` for what a backend is."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from rlvr.backends.protocol import LoadedPolicy, LoraSettings, ModelBackend, ModelSettings, check_settings
from rlvr.errors import ConfigError

logger = logging.getLogger(__name__)

DEFAULT_LORA = LoraSettings()


def load_policy(
    model: str,
    *,
    backend: str | ModelBackend | None = None,
    lora: LoraSettings | None = DEFAULT_LORA,
    **model_settings: Any,
) -> LoadedPolicy:
    """Loads a model for training, the same way in a notebook and on the command line.

        policy = rlvr.load_policy("Qwen/Qwen2.5-1.5B-Instruct", backend="unsloth", quantization="4bit")
        model, tokenizer = policy.model, policy.tokenizer

    Args:
        model: model id on the Hub, or a local folder.
        backend: a name from `rlvr backends`, or a backend object; None for RLVR_BACKEND, else "hf".
        lora: the adapter to put on it; None for none. With `full_finetuning=True` there is none.
        model_settings: the other fields of `ModelSettings`.

    Raises:
        PluginError, BackendUnavailableError: as for `load_backend`.
        ConfigError: settings that are impossible; `UnsupportedSettingError`: that this backend cannot honour.
        ModelError: the model's files or its tokenizer cannot be used.
    """
    from rlvr.plugins.manager import load_backend

    settings = _model_settings(model, model_settings)
    if settings.full_finetuning:
        if lora not in (None, DEFAULT_LORA):
            raise ConfigError("full_finetuning=True and lora were both given; give one of them.")
        lora = None
    loader = load_backend(backend)
    check_settings(backend_name(loader, backend), loader.capabilities(), settings, lora)
    policy = loader.load_policy(settings)
    if lora is not None:
        policy = loader.apply_lora(policy, lora)
    for note in policy.notes:
        logger.info(note)
    return policy


def load_saved(backend: ModelBackend, folder: Path, settings: ModelSettings) -> LoadedPolicy:
    """What a run saved, to sample from: an adapter on top of `settings.model`, or a whole model.

    Raises:
        UnsupportedSettingError: this backend cannot honour the settings.
        ModelError: the files cannot be used.
    """
    check_settings(backend_name(backend), backend.capabilities(), settings, None)
    return backend.load_saved(folder, settings)


def backend_name(backend: ModelBackend, asked_for: str | ModelBackend | None = None) -> str:
    """What messages call a backend: the name it was asked for by, else its own, else its class's."""
    return asked_for if isinstance(asked_for, str) else getattr(backend, "name", type(backend).__name__)


def _model_settings(model: str, options: dict[str, Any]) -> ModelSettings:
    known = ModelSettings.__dataclass_fields__
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ConfigError(
            [f"unknown model setting {name!r}; allowed: {', '.join(sorted(known))}." for name in unknown]
        )
    return ModelSettings(model=model, **options)
