"""The backend `unsloth`: FastLanguageModel on a GPU, and Unsloth's CPU backend on a machine without one.

Unsloth is imported before transformers, TRL and PEFT, which it patches; the imports below keep that order.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from rlvr_unsloth.process import import_unsloth

unsloth = import_unsloth()

import numpy  # noqa: E402
import torch  # noqa: E402
from huggingface_hub import is_offline_mode, snapshot_download  # noqa: E402

from rlvr.backends.checks import (  # noqa: E402
    check_lora_target,
    check_model_folder,
    check_tokenizer,
    linear_names,
    load_config,
    load_tokenizer,
    loading_errors,
    lora_settings,
    resolve_dtype,
    weights_in_bytes,
)
from rlvr.backends.four_bits import save_merged_in_4_bits  # noqa: E402
from rlvr.backends.protocol import (  # noqa: E402
    PROTOCOL_VERSION,
    ArgumentChange,
    Capabilities,
    ExportFormat,
    LoadedPolicy,
    LoraSettings,
    ModelSettings,
    check_settings,
)
from rlvr.errors import AdapterError, ModelError, UnsupportedSettingError  # noqa: E402
from rlvr_unsloth.sixteen_bits import round_to_16_bits  # noqa: E402

ALPHA_MULTIPLIER = 2  # Unsloth recommends an alpha of twice the rank
MAX_LORA_RANK = 64  # vLLM reserves room for adapters of this rank when the model is loaded

_NO_BASE = ["*.gguf", "*.onnx", "*.h5", "*.msgpack", "*.pth"]  # forms of a model that are not loaded
_NO_GGUF = "gguf is not part of this backend: convert a merged-16bit model."


class UnslothBackend:
    """Loads with `FastLanguageModel.from_pretrained`, adapts with its `get_peft_model`."""

    name = "unsloth"
    protocol_version = PROTOCOL_VERSION

    def capabilities(self) -> Capabilities:
        return _cpu_capabilities() if on_cpu() else _gpu_capabilities()

    def load_policy(self, settings: ModelSettings) -> LoadedPolicy:
        """Loads model and tokenizer: the model that is named, never one of Unsloth's mirrors.

        Raises:
            UnsupportedSettingError: a setting cannot be honoured here.
            ModelError: files are missing or broken, or the tokenizer lacks what training needs.
        """
        self._check(settings, None)
        config = load_config(settings)
        checked, notes = load_tokenizer(settings, config)
        dtype = resolve_dtype(settings, config, "cpu" if on_cpu() else "cuda")
        fast_inference = self._fast_inference(settings)
        model, tokenizer = _from_pretrained(settings, settings.model, dtype, fast_inference)
        if tokenizer.pad_token in (None, tokenizer.eos_token):
            tokenizer.pad_token = checked.pad_token
            model.config.pad_token_id = tokenizer.pad_token_id
        check_tokenizer(tokenizer, settings.model)
        loaded = _dtype(model)
        if loaded != dtype:
            if settings.dtype != "auto":
                raise UnsupportedSettingError(
                    f"Unsloth loaded {settings.model!r} in {_name(loaded)} where dtype={settings.dtype!r} "
                    f"was asked for; use dtype='auto' or {_name(loaded)!r}."
                )
            notes.append(f"Unsloth chose {_name(loaded)} for this model.")
        notes.append(f"loaded {settings.model} in {_name(loaded)} on {model.device}, Unsloth {unsloth.__version__}.")
        if loaded is torch.float32 and not on_cpu() and unsloth.is_bfloat16_supported():
            notes.append("Unsloth's trainer computes with float32 weights in bfloat16 (autocast).")
        notes += _inference_notes(settings, fast_inference)
        return LoadedPolicy(model=model, tokenizer=tokenizer, settings=settings, notes=tuple(notes))

    def apply_lora(self, policy: LoadedPolicy, lora: LoraSettings) -> LoadedPolicy:
        """One fresh adapter. Alpha is doubled, as Unsloth recommends, but for `lora.alpha_multiplier`.

        Raises:
            UnsupportedSettingError: beside vLLM: a bias, DoRA, or a rank above 64.
            AdapterError: the model has an adapter already, or a target module does not exist.
        """
        self._check(policy.settings, lora)
        if policy.settings.full_finetuning:
            raise UnsupportedSettingError("the policy was loaded for full_finetuning; it takes no LoRA.")
        if has_vllm(policy):
            _check_lora_for_vllm(lora)
        check_lora_target(policy.model, lora)
        applied = lora.applied(ALPHA_MULTIPLIER)
        if applied.target_modules == "all-linear":
            applied = replace(applied, target_modules=tuple(linear_names(policy.model)))
        targets = applied.target_modules
        with _output_to_stderr(), _random_state_kept():
            try:
                adapted: Any = unsloth.FastLanguageModel.get_peft_model(
                    policy.model,
                    r=applied.r,
                    target_modules=targets if isinstance(targets, str) else list(targets),
                    lora_alpha=applied.alpha,
                    lora_dropout=applied.dropout,
                    bias=applied.bias,
                    use_gradient_checkpointing=_checkpointing(policy.settings),
                    random_state=applied.seed,
                    use_rslora=applied.rslora,
                    use_dora=applied.dora,
                    init_lora_weights=True if applied.init == "default" else applied.init,
                )
            except (TypeError, ValueError, NotImplementedError) as error:
                raise AdapterError(f"Unsloth cannot apply this LoRA: {error}") from error
        if not getattr(adapted, "peft_config", None):
            raise AdapterError(
                "Unsloth put no adapter on the model: an earlier load for full_finetuning has switched LoRA "
                "off in this process. Restart the process."
            )
        notes = []
        if applied.alpha != lora.alpha:
            notes.append(
                f"lora alpha {lora.alpha} became {applied.alpha}: Unsloth recommends to double it; "
                "alpha_multiplier=1 turns that off."
            )
        return replace(policy, model=adapted, lora=applied).with_notes(*notes)

    def training_arguments(self, policy: LoadedPolicy) -> tuple[ArgumentChange, ...]:
        dtype = _dtype(policy.model)
        same = f"the policy was loaded in {_name(dtype)}"
        changes = [
            ArgumentChange("bf16", dtype is torch.bfloat16, same),
            ArgumentChange("fp16", dtype is torch.float16, same),
            ArgumentChange("gradient_checkpointing", False, "Unsloth's own is in the model; TRL's would replace it"),
        ]
        if has_vllm(policy):
            shared = "the policy was loaded beside vLLM, which shares its weights"
            changes += [
                ArgumentChange("use_vllm", True, shared),
                ArgumentChange("vllm_mode", "colocate", shared),
            ]
        return tuple(changes)

    def for_training(self, policy: LoadedPolicy) -> None:
        unsloth.FastLanguageModel.for_training(
            policy.model, use_gradient_checkpointing=_checkpointing(policy.settings)
        )

    def for_inference(self, policy: LoadedPolicy) -> None:
        unsloth.FastLanguageModel.for_inference(policy.model)

    def save(self, policy: LoadedPolicy, folder: Path, export_format: ExportFormat = "adapter") -> None:
        """Writes the adapter (the whole model, where all weights were trained) or a merged model, in 16 or 4 bits.

        Raises:
            UnsupportedSettingError: another format was asked for, or Unsloth cannot merge this model here.
        """
        formats = self.capabilities().export_formats
        if export_format not in formats:
            raise UnsupportedSettingError(
                f"backend {self.name!r} cannot export {export_format!r}; allowed: {', '.join(formats)}."
            )
        if export_format == "merged-4bit":
            save_merged_in_4_bits(self, policy, folder)
            return
        model: Any = policy.model
        with _output_to_stderr():
            if export_format == "adapter":
                model.save_pretrained(folder)
                policy.tokenizer.save_pretrained(folder)
                return
            try:
                model.save_pretrained_merged(str(folder), tokenizer=policy.tokenizer, save_method="merged_16bit")
            except NotImplementedError as error:
                raise UnsupportedSettingError(f"Unsloth cannot export {export_format!r} here: {error}") from error
        stored = _dtype(model)
        round_to_16_bits(Path(folder), stored if stored in (torch.bfloat16, torch.float16) else torch.bfloat16)

    def load_saved(self, folder: Path, settings: ModelSettings, *, trainable: bool = False) -> LoadedPolicy:
        """Loads what `save` wrote: an adapter onto `settings.model`, or a merged model."""
        folder = Path(folder).absolute()
        if not (folder / "adapter_config.json").is_file():
            check_model_folder(str(folder))
            return self.load_policy(replace(settings, model=str(folder), revision=None))
        self._check(settings, None)
        config = load_config(settings)
        checked, notes = load_tokenizer(settings, config)
        dtype = resolve_dtype(settings, config, "cpu" if on_cpu() else "cuda")
        with _adapter_on(folder, settings) as staged:
            model, tokenizer = _from_pretrained(settings, str(staged), dtype, self._fast_inference(settings))
        if not getattr(model, "peft_config", None):
            raise ModelError(f"Unsloth loaded no adapter from {str(folder)!r}; save it again.")
        if tokenizer.pad_token in (None, tokenizer.eos_token):
            tokenizer.pad_token = checked.pad_token
        peft_config: Any = model.peft_config["default"]
        peft_config.base_model_name_or_path, peft_config.revision = settings.model, settings.revision
        lora = lora_settings(peft_config)
        policy = LoadedPolicy(model=model, tokenizer=tokenizer, settings=settings, lora=lora, notes=tuple(notes))
        if trainable:
            self.for_training(policy)
        else:
            model.requires_grad_(False)
            self.for_inference(policy)
        return policy

    def memory_in_use(self, policy: LoadedPolicy) -> int:
        return weights_in_bytes(policy.model)

    def _check(self, settings: ModelSettings, lora: LoraSettings | None) -> None:
        check_settings(self.name, self.capabilities(), settings, lora)
        if settings.device is not None and torch.device(settings.device).type != ("cpu" if on_cpu() else "cuda"):
            here = "has no GPU that Unsloth can use" if on_cpu() else "has a GPU, which Unsloth always takes"
            raise UnsupportedSettingError(
                f"device={settings.device!r}: this process {here}. Leave device out"
                + ("." if on_cpu() else ", or set UNSLOTH_FORCE_CPU=1 before the process starts.")
            )
        if settings.fast_inference == "on":
            problem = _vllm_conflict(settings)
            if problem:
                raise UnsupportedSettingError(f"fast_inference='on' {problem} Use fast_inference='off'.")

    def _fast_inference(self, settings: ModelSettings) -> bool:
        if settings.fast_inference != "auto":
            return settings.fast_inference == "on"
        return self.capabilities().fast_inference and _vllm_conflict(settings) is None


def on_cpu() -> bool:
    """Whether Unsloth has taken its CPU path in this process, which patches no trainer and has no kernels."""
    return bool(unsloth.DEVICE_TYPE == "cpu")


def has_vllm(policy: LoadedPolicy) -> bool:
    return hasattr(policy.model, "vllm_engine")


def _cpu_capabilities() -> Capabilities:
    return Capabilities(
        dtypes=frozenset({"auto", "float32", "bfloat16"}),
        lora_biases=frozenset({"none", "all", "lora_only"}),
        rslora=True,
        dora=True,
        lora_inits=frozenset({"default", "gaussian", "pissa", "olora", "orthogonal"}),
        trust_remote_code=True,
        notes=(
            "Unsloth found no GPU: 4bit, 8bit, merged-4bit and fast_inference need one.",
            "Unsloth on a CPU replaces float16 by another dtype; use bfloat16 or float32.",
            _NO_GGUF,
        ),
    )


def _gpu_capabilities() -> Capabilities:
    has_bitsandbytes = find_spec("bitsandbytes") is not None
    has_vllm_package = find_spec("vllm") is not None and torch.cuda.get_device_capability()[0] >= 7
    has_bfloat16 = unsloth.is_bfloat16_supported()
    notes = ["Unsloth chooses the attention implementation itself.", _NO_GGUF]
    if not has_bitsandbytes:
        notes.append('4bit, 8bit and merged-4bit need bitsandbytes: pip install "rlvr[quantization]".')
    if not has_vllm_package:
        notes.append('fast_inference needs vLLM and a GPU of compute capability 7: pip install "rlvr[vllm]".')
    return Capabilities(
        dtypes=frozenset({"auto", "float32", "float16", *(["bfloat16"] if has_bfloat16 else [])}),
        quantizations=frozenset({"none", "4bit", "8bit"} if has_bitsandbytes else {"none"}),
        attentions=frozenset({"auto"}),
        fast_inference=has_vllm_package,
        lora_biases=frozenset({"none", "all", "lora_only"}),
        rslora=True,
        dora=True,
        lora_inits=frozenset({"default", "gaussian", "pissa", "olora", "orthogonal"}),
        trust_remote_code=True,
        export_formats=("adapter", "merged-16bit", *(["merged-4bit"] if has_bitsandbytes else [])),
        notes=tuple(notes),
    )


def _vllm_conflict(settings: ModelSettings) -> str | None:
    """Why a model with these settings cannot be loaded beside vLLM, as the end of a sentence."""
    if settings.full_finetuning:
        return "cannot be had with full_finetuning: Unsloth shares frozen base weights with vLLM."
    if settings.revision is not None:
        return f"cannot be had with revision={settings.revision!r}: vLLM loads the default branch."
    if settings.trust_remote_code:
        return "cannot be had with trust_remote_code: Unsloth refuses the two together."
    if settings.quantization == "8bit":
        return "cannot be had with 8bit weights: Unsloth refuses the two together."
    return None


def _check_lora_for_vllm(lora: LoraSettings) -> None:
    problems = []
    if lora.bias != "none":
        problems.append(f"vLLM cannot serve an adapter with bias={lora.bias!r}; use fast_inference='off'.")
    if lora.dora:
        problems.append("vLLM cannot serve a DoRA adapter; use fast_inference='off'.")
    if lora.r > MAX_LORA_RANK:
        problems.append(f"lora r is {lora.r}; beside vLLM it is {MAX_LORA_RANK} at most, or use fast_inference='off'.")
    if problems:
        raise UnsupportedSettingError(problems)


def _from_pretrained(
    settings: ModelSettings, model_name: str, dtype: torch.dtype, fast_inference: bool
) -> tuple[Any, Any]:
    """`FastLanguageModel.from_pretrained` with nothing left to Unsloth's defaults.

    Raises:
        ModelError: Unsloth cannot load it.
    """
    arguments: dict[str, Any] = {
        "max_seq_length": settings.max_seq_length,
        "dtype": dtype,
        "load_in_4bit": settings.quantization == "4bit",
        "load_in_8bit": settings.quantization == "8bit",
        "load_in_16bit": False,
        "full_finetuning": settings.full_finetuning,
        "trust_remote_code": settings.trust_remote_code,
        "use_gradient_checkpointing": _checkpointing(settings),
        "revision": settings.revision if model_name == settings.model else None,
        "use_exact_model_name": True,
        "fast_inference": fast_inference,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "random_state": settings.seed,
        "max_lora_rank": MAX_LORA_RANK,
        "float8_kv_cache": False,
        "unsloth_tiled_mlp": False,
    }
    if on_cpu():
        if settings.attention != "auto":
            arguments["attn_implementation"] = settings.attention
    else:
        arguments |= {
            "float32_mixed_precision": False,
            "disable_log_stats": True,
            "qat_scheme": None,
            "load_in_fp8": False,
            "text_only": False,
        }
        if settings.device is not None:
            arguments["device_map"] = {"": settings.device}
    with _output_to_stderr(), _random_state_kept(), loading_errors(settings.model), _runtime_errors(settings.model):
        return unsloth.FastLanguageModel.from_pretrained(model_name=model_name, **arguments)


@contextlib.contextmanager
def _random_state_kept() -> Iterator[None]:
    """On a GPU, loading and `get_peft_model` seed the generators of Python, NumPy and torch."""
    python, numpy_state = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(numpy_state)


@contextlib.contextmanager
def _runtime_errors(model: str) -> Iterator[None]:
    """Turns what Unsloth raises for models that it cannot load into a `ModelError`."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        raise ModelError(f"Unsloth cannot load {model!r}: {error}") from error


@contextlib.contextmanager
def _adapter_on(folder: Path, settings: ModelSettings) -> Iterator[Path]:
    """An adapter folder that names the base of `settings`, which is where Unsloth looks."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    base = {"base_model_name_or_path": _base_of_adapter(settings), "revision": None}
    if base.items() <= config.items():
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="rlvr-adapter-") as temporary:
        staged = Path(temporary)
        for file in folder.iterdir():
            if file.is_file():
                shutil.copy2(file, staged / file.name)
        (staged / "adapter_config.json").write_text(json.dumps(config | base), encoding="utf-8")
        yield staged


def _base_of_adapter(settings: ModelSettings) -> str:
    """The model, or the folder of its revision: on a GPU, Unsloth loads the default branch under every adapter."""
    if settings.revision is None or Path(settings.model).is_dir():
        return settings.model
    with loading_errors(settings.model):
        return snapshot_download(
            settings.model,
            revision=settings.revision,
            ignore_patterns=_NO_BASE,
            local_files_only=is_offline_mode(),  # of a commit it would ask for a list of files all the same
        )


def _inference_notes(settings: ModelSettings, fast_inference: bool) -> list[str]:
    if fast_inference:
        return [f"sampling with vLLM, which may take {settings.gpu_memory_utilization:.0%} of the GPU's memory."]
    if settings.fast_inference == "auto" and not on_cpu():
        reason = _vllm_conflict(settings) or 'is not installed for this GPU: pip install "rlvr[vllm]".'
        return [f"sampling without vLLM, which {reason}"]
    return []


def _checkpointing(settings: ModelSettings) -> Literal["unsloth", False]:
    return "unsloth" if settings.gradient_checkpointing else False


def _dtype(model: Any) -> torch.dtype:
    """The dtype of the weights that quantization leaves alone."""
    return model.get_input_embeddings().weight.dtype


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _output_to_stderr() -> contextlib.redirect_stdout[Any]:
    """Unsloth prints banners; they do not belong in the output of commands that write JSON."""
    return contextlib.redirect_stdout(sys.stderr)
