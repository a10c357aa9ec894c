"""What a model backend is: the protocol, and the settings that go in and out of it.

A backend loads a policy, applies LoRA, says which training arguments it must change, saves and loads. It does not
sample and does not train: rollouts and the trainer work on the `LoadedPolicy` that it returns. There is no base
class to inherit; any object with these methods is a backend (`docs/write-a-backend.md`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from rlvr.errors import ConfigError, UnsupportedSettingError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROTOCOL_VERSION = 1
"""Raised when a method is added or changes meaning. A backend states the version it was written for."""

OLDEST_PROTOCOL_VERSION = 1
"""Backends written for versions from this one to `PROTOCOL_VERSION` are accepted, others are refused."""

DType = Literal["auto", "float32", "bfloat16", "float16"]
Quantization = Literal["none", "4bit", "8bit"]
Attention = Literal["auto", "sdpa", "flash_attention_2", "eager"]
FastInference = Literal["auto", "on", "off"]
LoraBias = Literal["none", "all", "lora_only"]
LoraInit = Literal["default", "gaussian", "pissa", "olora", "orthogonal"]
ExportFormat = Literal["adapter", "merged-16bit", "merged-4bit", "gguf"]

CHOICES: dict[str, tuple[str, ...]] = {
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "quantization": ("none", "4bit", "8bit"),
    "attention": ("auto", "sdpa", "flash_attention_2", "eager"),
    "fast_inference": ("auto", "on", "off"),
    "bias": ("none", "all", "lora_only"),
    "init": ("default", "gaussian", "pissa", "olora", "orthogonal"),
}


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """How to load the policy. Defaults are for one GPU and LoRA; on a CPU they work too.

    Raises:
        ConfigError: a value is not among those allowed, or two contradict each other; all problems at once.
    """

    model: str  # model id on the Hub, or a local folder
    revision: str | None = None
    max_seq_length: int = 4096  # prompt and completion together, tokens
    dtype: DType = "auto"  # auto: the checkpoint's, bfloat16 where that is float32 and the device has it
    quantization: Quantization = "none"
    attention: Attention = "auto"  # auto: flash attention where installed, else SDPA
    trust_remote_code: bool = False
    full_finetuning: bool = False
    gradient_checkpointing: bool = True
    gpu_memory_utilization: float = 0.9  # share of GPU memory that an inference engine may take
    fast_inference: FastInference = "auto"
    device: str | None = None  # None: the accelerator if there is one, else the CPU
    seed: int = 0

    def __post_init__(self) -> None:
        problems = _choice_problems(self, ("dtype", "quantization", "attention", "fast_inference"))
        if not self.model:
            problems.append("model is empty; give a model id or a folder, for example Qwen/Qwen2.5-7B-Instruct.")
        if self.max_seq_length < 1:
            problems.append(f"max_seq_length is {self.max_seq_length}; it must be at least 1 token.")
        if not 0 < self.gpu_memory_utilization <= 1:
            problems.append(
                f"gpu_memory_utilization is {self.gpu_memory_utilization}; it is a share, above 0 and at most 1."
            )
        if self.full_finetuning and self.quantization != "none":
            problems.append(
                f"full_finetuning with quantization={self.quantization!r}: quantized weights cannot be trained. "
                "Use LoRA, or quantization='none'."
            )
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """LoRA (Hu et al. 2021, arXiv:2106.09685), in PEFT's terms. `LoadedPolicy.lora` is None for full fine-tuning.

    Raises:
        ConfigError: a value is not among those allowed; all problems at once.
    """

    r: int = 16
    alpha: int = 16
    alpha_multiplier: float | None = None  # None: the backend's own, 1 or, for Unsloth, 2
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"  # every linear layer but the output head
    bias: LoraBias = "none"
    rslora: bool = False  # scale by alpha / sqrt(r), arXiv:2312.03732
    dora: bool = False  # arXiv:2402.09353
    init: LoraInit = "default"
    seed: int = 0

    def __post_init__(self) -> None:
        problems = _choice_problems(self, ("bias", "init"))
        if self.r < 1:
            problems.append(f"lora r is {self.r}; the rank must be at least 1. For full fine-tuning pass no LoRA.")
        if self.alpha <= 0:
            problems.append(f"lora alpha is {self.alpha}; it must be above 0.")
        if self.alpha_multiplier is not None and not self._is_whole(self.alpha_multiplier):
            problems.append(
                f"lora alpha_multiplier is {self.alpha_multiplier}; alpha={self.alpha} times it must be a whole "
                "number above 0."
            )
        if not 0 <= self.dropout < 1:
            problems.append(f"lora dropout is {self.dropout}; it must be at least 0 and below 1.")
        if not self.target_modules:
            problems.append("lora target_modules is empty; name modules, or use 'all-linear'.")
        if problems:
            raise ConfigError(problems)

    def applied(self, default_multiplier: int = 1) -> LoraSettings:
        """These settings with alpha multiplied: what goes to PEFT, and what `LoadedPolicy.lora` says."""
        multiplier = default_multiplier if self.alpha_multiplier is None else self.alpha_multiplier
        return replace(self, alpha=round(self.alpha * multiplier), alpha_multiplier=1)

    def _is_whole(self, multiplier: float) -> bool:
        product = self.alpha * multiplier
        return isfinite(product) and product > 0 and product == round(product)


def _choice_problems(settings: object, names: Sequence[str]) -> list[str]:
    return [
        f"{name} is {getattr(settings, name)!r}; allowed: {', '.join(CHOICES[name])}."
        for name in names
        if getattr(settings, name) not in CHOICES[name]
    ]


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a backend can honour on this machine. Whatever is not listed is refused, never ignored."""

    dtypes: frozenset[str] = frozenset({"auto", "float32", "bfloat16", "float16"})
    quantizations: frozenset[str] = frozenset({"none"})
    attentions: frozenset[str] = frozenset({"auto", "sdpa", "eager"})
    full_finetuning: bool = True
    fast_inference: bool = False  # an inference engine beside the model, such as vLLM
    lora_dropout: bool = True
    lora_biases: frozenset[str] = frozenset({"none"})
    rslora: bool = False
    dora: bool = False
    lora_inits: frozenset[str] = frozenset({"default"})
    trust_remote_code: bool = False
    export_formats: tuple[str, ...] = ("adapter", "merged-16bit")
    notes: tuple[str, ...] = ()  # one sentence each: why something is missing here, and how to get it


@dataclass(frozen=True)
class ArgumentChange:
    """A training argument that the backend has to change, and why. Logged and kept in the run folder."""

    name: str
    value: Any
    reason: str


@dataclass(frozen=True, kw_only=True)
class LoadedPolicy:
    """A policy ready to be trained or sampled from, whichever backend loaded it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    settings: ModelSettings
    lora: LoraSettings | None = None  # as applied, not as asked for; None: no adapter
    notes: tuple[str, ...] = field(default=())  # what the backend decided or changed, a sentence each

    def with_notes(self, *notes: str) -> LoadedPolicy:
        return replace(self, notes=(*self.notes, *notes))


@runtime_checkable
class ModelBackend(Protocol):
    """Loads policies. Heavy imports belong in the methods, or in the module that the plugin's hook imports."""

    protocol_version: int

    def capabilities(self) -> Capabilities:
        """What it can honour on this machine."""
        ...

    def load_policy(self, settings: ModelSettings) -> LoadedPolicy:
        """Loads model and tokenizer. No adapter is applied yet.

        Raises:
            ModelError: files are missing or broken, or the tokenizer lacks what training needs.
        """
        ...

    def apply_lora(self, policy: LoadedPolicy, lora: LoraSettings) -> LoadedPolicy:
        """Puts one fresh adapter, in float32, on `policy.model`. `lora` of the result says what was applied."""
        ...

    def training_arguments(self, policy: LoadedPolicy) -> tuple[ArgumentChange, ...]:
        """The `GRPOConfig` arguments that must differ from the user's for this backend."""
        ...

    def for_training(self, policy: LoadedPolicy) -> None:
        """Switches the model to training."""
        ...

    def for_inference(self, policy: LoadedPolicy) -> None:
        """Switches the model to sampling: evaluation mode and whatever makes the backend's sampling fast.

        Evaluation and export call it; training does not, where rollouts and steps take turns. What samples with
        weights of its own has to follow the policy by itself.
        """
        ...

    def save(self, policy: LoadedPolicy, folder: Path, export_format: ExportFormat = "adapter") -> None:
        """Writes model and tokenizer to `folder` in one of `capabilities().export_formats`."""
        ...

    def load_saved(self, folder: Path, settings: ModelSettings, *, trainable: bool = False) -> LoadedPolicy:
        """Loads what `save` wrote: an adapter on top of `settings.model`, or a merged model (then
        `settings.model` is not read)."""
        ...

    def memory_in_use(self, policy: LoadedPolicy) -> int:
        """Bytes that the policy's weights take on their device."""
        ...


def check_settings(
    backend_name: str,
    capabilities: Capabilities,
    settings: ModelSettings,
    lora: LoraSettings | None,
) -> None:
    """Refuses what the backend cannot honour.

    Raises:
        UnsupportedSettingError: names every such setting, what is allowed, and the backend's own note on it.
    """
    problems = []

    def add(problem: str, word: str) -> None:
        notes = [note for note in capabilities.notes if re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", note)]
        problems.append(" ".join([problem, *notes]))

    def require(setting: str, value: object, allowed: frozenset[str]) -> None:
        if value not in allowed:
            add(
                f"backend {backend_name!r} cannot honour {setting}={value!r} here; "
                f"allowed: {', '.join(sorted(allowed))}.",
                str(value),
            )

    def refuse(setting: str, asked: bool) -> None:
        if asked:
            add(f"backend {backend_name!r} cannot honour {setting} here.", setting.partition("=")[0])

    require("dtype", settings.dtype, capabilities.dtypes)
    require("quantization", settings.quantization, capabilities.quantizations)
    require("attention", settings.attention, capabilities.attentions)
    refuse("full_finetuning", settings.full_finetuning and not capabilities.full_finetuning)
    refuse("fast_inference='on'", settings.fast_inference == "on" and not capabilities.fast_inference)
    refuse("trust_remote_code", settings.trust_remote_code and not capabilities.trust_remote_code)
    if lora is not None:
        require("lora bias", lora.bias, capabilities.lora_biases)
        require("lora init", lora.init, capabilities.lora_inits)
        refuse(f"lora dropout={lora.dropout}", lora.dropout > 0 and not capabilities.lora_dropout)
        refuse("rslora", lora.rslora and not capabilities.rslora)
        refuse("dora", lora.dora and not capabilities.dora)
    if problems:
        raise UnsupportedSettingError(problems)
