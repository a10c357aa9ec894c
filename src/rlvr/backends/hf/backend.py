"""The backend `hf`: transformers, PEFT, and bitsandbytes for 4 and 8 bits where it is installed."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import is_flash_attn_2_available

from rlvr.backends.checks import (
    check_lora_target,
    check_model_folder,
    choose_device,
    describe_missing_weights,
    forked_rng,
    load_config,
    load_tokenizer,
    loading_errors,
    lora_settings,
    resolve_dtype,
    weights_in_bytes,
)
from rlvr.backends.four_bits import save_merged_in_4_bits
from rlvr.backends.hf.merge import merged_state_dict, with_weights
from rlvr.backends.process_state import refuse_replaced_trainer
from rlvr.backends.protocol import (
    PROTOCOL_VERSION,
    ArgumentChange,
    Capabilities,
    ExportFormat,
    LoadedPolicy,
    LoraSettings,
    ModelSettings,
    check_settings,
)
from rlvr.errors import AdapterError, ModelError, UnsupportedSettingError

_SIXTEEN_BIT = (torch.bfloat16, torch.float16)


class HFBackend:
    """Loads with `AutoModelForCausalLM`, adapts with PEFT's LoRA."""

    name = "hf"
    protocol_version = PROTOCOL_VERSION

    def capabilities(self) -> Capabilities:
        on_cuda = torch.cuda.is_available()
        has_bitsandbytes = on_cuda and find_spec("bitsandbytes") is not None
        has_flash = on_cuda and is_flash_attn_2_available()
        notes = [
            "an inference engine beside the model (fast_inference) is not part of this backend.",
        ]
        if not has_bitsandbytes:
            notes.append(
                '4bit, 8bit and merged-4bit need a CUDA GPU and bitsandbytes: pip install "rlvr[quantization]".'
            )
        if not has_flash:
            notes.append("flash_attention_2 needs a CUDA GPU and the flash-attn package.")
        return Capabilities(
            quantizations=frozenset({"none", "4bit", "8bit"} if has_bitsandbytes else {"none"}),
            attentions=frozenset({"auto", "sdpa", "eager"} | ({"flash_attention_2"} if has_flash else set())),
            lora_biases=frozenset({"none", "all", "lora_only"}),
            rslora=True,
            dora=True,
            lora_inits=frozenset({"default", "gaussian", "pissa", "olora", "orthogonal"}),
            trust_remote_code=True,
            export_formats=("adapter", "merged-16bit", *(["merged-4bit"] if has_bitsandbytes else [])),
            notes=tuple(notes),
        )

    def load_policy(self, settings: ModelSettings) -> LoadedPolicy:
        """Loads model and tokenizer.

        Raises:
            PatchedProcessError: another backend has replaced TRL's trainer in this process.
            UnsupportedSettingError: a setting cannot be honoured here.
            ModelError: files are missing or broken, or the tokenizer lacks what training needs.
        """
        refuse_replaced_trainer(self.name)
        check_settings(self.name, self.capabilities(), settings, None)
        device = choose_device(settings)
        config = load_config(settings)
        tokenizer, notes = load_tokenizer(settings, config)
        dtype = resolve_dtype(settings, config, device.type)
        if settings.full_finetuning and dtype is torch.float16:
            raise UnsupportedSettingError(
                "full_finetuning in float16: its gradients cannot be unscaled. Use dtype='float32', or bfloat16."
            )
        attention = _attention(settings, config, device, dtype)
        model = _load_model(settings, dtype=dtype, attention=attention, device=device)
        model.config.pad_token_id = tokenizer.pad_token_id
        notes.append(
            f"loaded {settings.model} in {str(dtype).removeprefix('torch.')} on {device} with "
            f"{model.config._attn_implementation} attention"
            + ("." if settings.quantization == "none" else f", weights in {settings.quantization}.")
        )
        return LoadedPolicy(model=model, tokenizer=tokenizer, settings=settings, notes=tuple(notes))

    def apply_lora(self, policy: LoadedPolicy, lora: LoraSettings) -> LoadedPolicy:
        """Wraps the model in a `PeftModel` with one fresh adapter, drawn from `lora.seed`.

        Raises:
            UnsupportedSettingError: PiSSA, OLoRA or DoRA's base cannot be computed from quantized weights.
            AdapterError: the model has an adapter already, or a target module does not exist.
        """
        check_settings(self.name, self.capabilities(), policy.settings, lora)
        if policy.settings.full_finetuning:
            raise UnsupportedSettingError("the policy was loaded for full_finetuning; it takes no LoRA.")
        if policy.settings.quantization != "none" and lora.init in ("pissa", "olora"):
            raise UnsupportedSettingError(
                f"lora init={lora.init!r} changes the base weights, which {policy.settings.quantization} "
                "quantization rounds away. Use init='default', or quantization='none'."
            )
        check_lora_target(policy.model, lora)
        applied = lora.applied()
        with forked_rng(policy.model):
            torch.manual_seed(applied.seed)
            try:
                model: Any = get_peft_model(policy.model, _lora_config(applied))
            except ValueError as error:
                raise AdapterError(f"LoRA cannot be applied: {error}") from error
        return replace(policy, model=model, lora=applied)

    def training_arguments(self, policy: LoadedPolicy) -> tuple[ArgumentChange, ...]:
        dtype = resolve_dtype(policy.settings, policy.model.config, policy.model.device.type)
        same = f"the policy was loaded in {str(dtype).removeprefix('torch.')}"
        changes = [
            ArgumentChange("bf16", dtype is torch.bfloat16, same),
            ArgumentChange("fp16", dtype is torch.float16, same),
            ArgumentChange("gradient_checkpointing", policy.settings.gradient_checkpointing, "as model settings say"),
        ]
        if policy.settings.gradient_checkpointing:
            changes.append(
                ArgumentChange(
                    "gradient_checkpointing_kwargs",
                    {"use_reentrant": False},
                    "reentrant checkpointing loses gradients where a layer's input needs none, as with LoRA",
                )
            )
        return tuple(changes)

    def for_training(self, policy: LoadedPolicy) -> None:
        policy.model.train()

    def for_inference(self, policy: LoadedPolicy) -> None:
        policy.model.eval()

    def save(self, policy: LoadedPolicy, folder: Path, export_format: ExportFormat = "adapter") -> None:
        """Writes the adapter (the whole model, where all weights were trained) or a merged model.

        A merged model is computed in float32 and rounded once, to the policy's 16-bit dtype or bfloat16; in 4 bits it
        is quantized from there.
        The policy is not changed. Where it is quantized, the adapter is merged into the unquantized
        checkpoint.

        Raises:
            UnsupportedSettingError: another format was asked for.
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
        if export_format == "merged-16bit":
            model = self._merged(policy)
        model.save_pretrained(folder)
        policy.tokenizer.save_pretrained(folder)

    def load_saved(self, folder: Path, settings: ModelSettings, *, trainable: bool = False) -> LoadedPolicy:
        """Loads what `save` wrote.

        Args:
            settings: for an adapter, the base model it is put on; for a merged model its `model` is not read.
            trainable: for an adapter, whether training goes on.

        Raises:
            ModelError: `folder` holds neither an adapter nor a model.
        """
        folder = Path(folder)
        if not (folder / "adapter_config.json").is_file():
            check_model_folder(str(folder.absolute()))
            return self.load_policy(replace(settings, model=str(folder.absolute()), revision=None))
        policy = self.load_policy(settings)
        with loading_errors(str(folder)):
            model: Any = PeftModel.from_pretrained(policy.model, str(folder), is_trainable=trainable)
        model.train(trainable)
        return replace(policy, model=model, lora=lora_settings(model.peft_config["default"]))

    def memory_in_use(self, policy: LoadedPolicy) -> int:
        return weights_in_bytes(policy.model)

    def _merged(self, policy: LoadedPolicy) -> PreTrainedModel:
        model: Any = policy.model
        stored = resolve_dtype(policy.settings, model.config, model.device.type)
        dtype = stored if stored in _SIXTEEN_BIT else torch.bfloat16
        if policy.settings.quantization == "none":
            if not isinstance(policy.model, PeftModel):
                return with_weights(model, {name: w.cpu() for name, w in model.state_dict().items()}, dtype)
            return with_weights(model.get_base_model(), merged_state_dict(model), dtype)
        plain = replace(policy.settings, quantization="none", device="cpu", attention="auto")
        base = _load_model(plain, dtype=torch.float32, attention=None, device=torch.device("cpu"))
        if not isinstance(policy.model, PeftModel):
            return with_weights(base, dict(base.state_dict()), dtype)
        adapted: Any = get_peft_model(base, model.peft_config["default"])
        _copy_adapter(model, adapted)
        return with_weights(base, merged_state_dict(adapted), dtype)


def _attention(
    settings: ModelSettings, config: PretrainedConfig, device: torch.device, dtype: torch.dtype
) -> str | None:
    """What to ask transformers for; None lets it choose: SDPA, or eager for models without it."""
    if settings.attention != "auto":
        return settings.attention
    model_class = AutoModelForCausalLM._model_mapping.get(type(config), None)
    flash_fits = (
        device.type == "cuda" and dtype in _SIXTEEN_BIT and getattr(model_class, "_supports_flash_attn", False)
    )
    return "flash_attention_2" if flash_fits and is_flash_attn_2_available() else None


def _load_model(
    settings: ModelSettings, *, dtype: torch.dtype, attention: str | None, device: torch.device
) -> PreTrainedModel:
    """Loads the weights.

    Raises:
        ModelError: they cannot be read, or the checkpoint lacks some.
    """
    arguments: dict[str, Any] = {"dtype": dtype, "device_map": {"": device}}
    if attention is not None:
        arguments["attn_implementation"] = attention
    if settings.quantization != "none":
        arguments["quantization_config"] = _quantization(settings, dtype)
    with loading_errors(settings.model):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            settings.model,
            revision=settings.revision,
            trust_remote_code=settings.trust_remote_code,
            output_loading_info=True,
            **arguments,
        )
    model, info = loaded
    if info["missing_keys"]:
        raise ModelError(
            f"model {settings.model!r} lacks weights that its configuration asks for: "
            f"{describe_missing_weights(sorted(info['missing_keys']))}. Save the whole model, and check "
            "config.json."
        )
    return model


def _quantization(settings: ModelSettings, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if settings.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _lora_config(lora: LoraSettings) -> LoraConfig:
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules),
        bias=lora.bias,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        init_lora_weights=True if lora.init == "default" else lora.init,
    )


def _copy_adapter(source: PeftModel, target: PeftModel) -> None:
    """Copies the adapter's weights, and biases trained with them, to the same adapter on another base."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    set_peft_model_state_dict(target, get_peft_model_state_dict(source))
