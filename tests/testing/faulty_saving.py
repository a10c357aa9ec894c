"""Backends that lose something in saving or loading, planted for the conformance kit: `hf` otherwise."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from faulty_tokenizers import OTHER_TEMPLATE, SavesOtherEnd, SavesOtherTemplate
from right_backends import RoundsToFewBits
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from rlvr.backends.hf.backend import HFBackend
from rlvr.backends.hf.merge import merged_state_dict, with_weights


class Claims4BitExport(HFBackend):
    def capabilities(self):
        return replace(super().capabilities(), export_formats=("adapter", "merged-16bit", "merged-4bit"))

    def save(self, policy, folder, export_format="adapter"):
        if export_format == "merged-4bit":
            raise NotImplementedError("soon")
        super().save(policy, folder, export_format)


class Exports4BitsOfTheBase(RoundsToFewBits):
    def save(self, policy, folder, export_format="adapter"):
        if export_format == "merged-4bit":
            policy = self.load_policy(policy.settings)
        super().save(policy, folder, export_format)


class ExportsWhatItDoesNotClaim(HFBackend):
    def save(self, policy, folder, export_format="adapter"):
        super().save(policy, folder, "adapter")


class SavesAFreshAdapter(HFBackend):
    def save(self, policy, folder, export_format="adapter"):
        fresh = super().load_policy(policy.settings)
        super().save(self.apply_lora(fresh, policy.lora), folder, export_format)


class ExportsTheBase(HFBackend):
    def save(self, policy, folder, export_format="adapter"):
        if export_format == "adapter":
            super().save(policy, folder)
        else:
            super().save(super().load_policy(policy.settings), folder, export_format)


class ExportsTheBaseOfHalves(HFBackend):
    """Where the policy is in bfloat16, as it is by default on a GPU."""

    def save(self, policy, folder, export_format="adapter"):
        if policy.model.dtype is torch.bfloat16 and export_format != "adapter":
            policy = super().load_policy(policy.settings)
        super().save(policy, folder, export_format)


class LoadSavedIgnoresDtype(HFBackend):
    def load_saved(self, folder, settings, *, trainable=False):
        return super().load_saved(folder, replace(settings, dtype="float32"), trainable=trainable)


class MergesInPlace(HFBackend):
    """The export is right, and the policy is no longer what it was."""

    def save(self, policy, folder, export_format="adapter"):
        super().save(policy, folder, export_format)
        if export_format == "merged-16bit":
            with torch.no_grad():
                for parameter in policy.model.parameters():
                    parameter.copy_(parameter.bfloat16())


class LoadsFrozen(HFBackend):
    def load_saved(self, folder, settings, *, trainable=False):
        return super().load_saved(folder, settings)


def drop_from_adapter(folder, word):
    """Takes the tensors with this word in their names out of a saved adapter, if `folder` holds one."""
    path = Path(folder) / "adapter_model.safetensors"
    if path.exists():
        save_file({k: v for k, v in load_file(path).items() if word not in k}, path, metadata={"format": "pt"})


class SavesNoDoraMagnitude(HFBackend):
    def save(self, policy, folder, export_format="adapter"):
        super().save(policy, folder, export_format)
        drop_from_adapter(folder, "magnitude")


class SavesNoBias(HFBackend):
    def save(self, policy, folder, export_format="adapter"):
        super().save(policy, folder, export_format)
        drop_from_adapter(folder, "bias")


def forget_rslora(policy):
    for module in policy.model.modules():
        if hasattr(module, "lora_A") and hasattr(module, "scaling"):
            module.scaling["default"] = policy.lora.alpha / policy.lora.r


class LoadSavedDropsRsLora(HFBackend):
    def load_saved(self, folder, settings, *, trainable=False):
        policy = super().load_saved(folder, settings, trainable=trainable)
        if policy.lora:
            forget_rslora(policy)
        return policy


class MergeLosesRsLora(HFBackend):
    def _merged(self, policy):
        policy = replace(policy, model=copy.deepcopy(policy.model))
        forget_rslora(policy)
        return super()._merged(policy)


class MergeLosesBias(HFBackend):
    """The merged model has the biases of the checkpoint."""

    def _merged(self, policy):
        merged, base = super()._merged(policy), super().load_policy(policy.settings).model.state_dict()
        with torch.no_grad():
            for name, parameter in merged.named_parameters():
                if name.endswith(".bias"):
                    parameter.copy_(base[name])
        return merged


class MergeLosesDora(HFBackend):
    """Merges as if it were plain LoRA."""

    def _merged(self, policy):
        policy = replace(policy, model=copy.deepcopy(policy.model))
        for module in policy.model.modules():
            if hasattr(module, "lora_A"):
                module.lora_variant.clear()
        return super()._merged(policy)


class MergesTo32Bits(HFBackend):
    def _merged(self, policy):
        return with_weights(policy.model.get_base_model(), merged_state_dict(policy.model), torch.float32)


class MergesToTheCheckpointsType(HFBackend):
    """Of a float32 checkpoint the merged model is in float32."""

    def _merged(self, policy):
        merged = merged_state_dict(policy.model)
        return with_weights(policy.model.get_base_model(), merged, policy.model.dtype)


def rewrite_config(folder, **values):
    """Writes these into a saved adapter's configuration, if `folder` holds one."""
    path = Path(folder) / "adapter_config.json"
    if path.exists():
        path.write_text(json.dumps(json.loads(path.read_text()) | values))


class SavesOtherBase(HFBackend):
    """The adapter names another model, which `load_saved` does not read."""

    def save(self, policy, folder, export_format="adapter"):
        super().save(policy, folder, export_format)
        rewrite_config(folder, base_model_name_or_path="org/other")


class SavesOtherAlpha(HFBackend):
    """Only its own `load_saved` knows what it was."""

    def save(self, policy, folder, export_format="adapter"):
        super().save(policy, folder, export_format)
        rewrite_config(folder, lora_alpha=1)
        self.alpha = policy.lora.alpha

    def load_saved(self, folder, settings, *, trainable=False):
        with tempfile.TemporaryDirectory() as own:
            shutil.copytree(folder, own, dirs_exist_ok=True)
            rewrite_config(own, lora_alpha=self.alpha)
            return super().load_saved(own, settings, trainable=trainable)


class LoadsFreshForTraining(HFBackend):
    def load_saved(self, folder, settings, *, trainable=False):
        policy = super().load_saved(folder, settings, trainable=trainable)
        for name, parameter in policy.model.named_parameters():
            if trainable and "lora_B" in name:
                parameter.data.zero_()
        return policy


class LoadsWithoutSayingLora(HFBackend):
    def load_saved(self, folder, settings, *, trainable=False):
        return replace(super().load_saved(folder, settings, trainable=trainable), lora=None)


class ReplacesTemplate(HFBackend):
    def load_policy(self, settings):
        policy = super().load_policy(settings)
        policy.tokenizer.chat_template = OTHER_TEMPLATE
        return policy


class OtherTokenizer(HFBackend):
    """The ids of two pairs of letters are swapped."""

    def load_policy(self, settings):
        policy = super().load_policy(settings)
        with tempfile.TemporaryDirectory() as folder:
            policy.tokenizer.save_pretrained(folder)
            path = Path(folder) / "tokenizer.json"
            content = json.loads(path.read_text())
            vocabulary = content["model"]["vocab"]
            vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
            vocabulary["t"], vocabulary["o"] = vocabulary["o"], vocabulary["t"]
            path.write_text(json.dumps(content))
            return replace(policy, tokenizer=AutoTokenizer.from_pretrained(folder, padding_side="left"))


class SavesNoTokenizer(HFBackend):
    def save(self, policy, folder, export_format="adapter"):
        super().save(policy, folder, export_format)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (Path(folder) / name).unlink()


SAVING_FAULTS = {
    ReplacesTemplate: "tokenizer",
    OtherTokenizer: "tokenizer",
    SavesNoTokenizer: "export-adapter",
    SavesOtherTemplate: "export-merged-16bit",
    SavesOtherEnd: "export-adapter",
    SavesAFreshAdapter: "export-adapter",
    LoadsFrozen: "export-adapter",
    LoadsFreshForTraining: "export-adapter",
    LoadsWithoutSayingLora: "export-adapter",
    SavesOtherBase: "export-adapter",
    SavesOtherAlpha: "export-adapter",
    SavesNoDoraMagnitude: "export-adapter",
    SavesNoBias: "export-adapter",
    LoadSavedDropsRsLora: "export-adapter",
    LoadSavedIgnoresDtype: "export-adapter",
    ExportsTheBase: "export-merged-16bit",
    ExportsTheBaseOfHalves: "export-merged-16bit",
    MergesTo32Bits: "export-merged-16bit",
    MergesToTheCheckpointsType: "export-merged-16bit",
    MergesInPlace: "export-merged-16bit",
    MergeLosesRsLora: "export-merged-16bit",
    MergeLosesBias: "export-merged-16bit",
    MergeLosesDora: "export-merged-16bit",
    Claims4BitExport: "export-merged-4bit",
    Exports4BitsOfTheBase: "export-merged-4bit",
    ExportsWhatItDoesNotClaim: "export-gguf",
}
"""Fault → the check that has to find it."""
