"""GGUF files, as llama.cpp reads them, as policies.

The weights are dequantized when they are loaded and stay frozen under a LoRA adapter, which is so trained against
the weights that will be served, rounding errors included.
"""

from dataclasses import replace
from pathlib import Path

from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

from rlvr import LoadedPolicy, load_backend
from rlvr.backends.checks import (
    check_length,
    check_tokenizer,
    choose_device,
    describe_missing_weights,
    loading_errors,
    lora_settings,
    resolve_dtype,
)
from rlvr.backends.process_state import refuse_replaced_trainer
from rlvr.backends.protocol import check_settings
from rlvr.errors import ModelError


def find_gguf(model):
    """The folder or Hub repository, and the file in it, that `--model` means; None for an ordinary checkpoint."""
    if Path(model).is_dir():
        files = sorted(file.name for file in Path(model).glob("*.gguf"))
        if not files and (Path(model) / "config.json").is_file():
            return None
        if len(files) != 1:
            raise ModelError(f"folder {model!r} holds {len(files)} GGUF files: {files}. Name one: {model}/FILE.gguf.")
        return model, files[0]
    folder, _, file = model.rpartition("/")
    if not file.endswith(".gguf"):
        raise ModelError(f"model {model!r} is no GGUF file. Give FOLDER/FILE.gguf, a folder, or ORG/NAME/FILE.gguf.")
    return folder or ".", file


class GGUFBackend:
    name = "gguf"
    protocol_version = 1

    def __init__(self):
        # What it loads is an ordinary transformers model: from there on, `hf` does what is to be done.
        hf = self._hf = load_backend("hf")
        self.apply_lora, self.training_arguments = hf.apply_lora, hf.training_arguments
        self.for_training, self.for_inference = hf.for_training, hf.for_inference
        self.save, self.memory_in_use = hf.save, hf.memory_in_use

    def capabilities(self):
        return replace(
            self._hf.capabilities(),
            quantizations=frozenset({"none"}),
            trust_remote_code=False,
            notes=("GGUF weights are dequantized to dtype; transformers' own classes run them.",),
        )

    def load_policy(self, settings):
        refuse_replaced_trainer(self.name)
        check_settings(self.name, self.capabilities(), settings, None)
        found = find_gguf(settings.model)
        if found is None:
            return self._hf.load_policy(settings)
        folder, file = found
        source = {"gguf_file": file, "revision": settings.revision}
        device = choose_device(settings)
        with loading_errors(settings.model):
            config = AutoConfig.from_pretrained(folder, **source)
            check_length(settings, config)
            dtype = resolve_dtype(settings, config, device.type)
            attention = None if settings.attention == "auto" else settings.attention
            tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", **source)
            model, info = AutoModelForCausalLM.from_pretrained(
                folder,
                quantization_config=GgufConfig(dequantize=True),
                dtype=dtype,
                attn_implementation=attention,
                output_loading_info=True,
                **source,
            )
        if info["missing_keys"]:
            missing = describe_missing_weights(sorted(info["missing_keys"]))
            raise ModelError(f"{settings.model!r} lacks weights: {missing}. Convert the model again.")
        for name in ("eos_token", "pad_token"):  # transformers 5.17 takes the architecture's, not the file's
            if getattr(config, f"{name}_id") is not None:
                setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(getattr(config, f"{name}_id")))
        notes = check_tokenizer(tokenizer, settings.model, config)
        model.config.pad_token_id = tokenizer.pad_token_id
        notes.append(f"dequantized {file} to {str(dtype).removeprefix('torch.')} on {device}.")
        return LoadedPolicy(model=model.to(device), tokenizer=tokenizer, settings=settings, notes=tuple(notes))

    def load_saved(self, folder, settings, *, trainable=False):
        if not (Path(folder) / "adapter_config.json").is_file():
            return self._hf.load_saved(folder, settings)  # a merged model is no GGUF file
        policy = self.load_policy(settings)
        with loading_errors(str(folder)):
            model = PeftModel.from_pretrained(policy.model, str(folder), is_trainable=trainable)
        model.train(trainable)
        return replace(policy, model=model, lora=lora_settings(model.peft_config["default"]))
