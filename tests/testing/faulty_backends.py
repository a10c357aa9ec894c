"""Backends with one fault each, planted for the conformance kit to find. Each is the `hf` backend otherwise."""

from __future__ import annotations

import random
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rlvr.backends.hf.backend import HFBackend
from rlvr.backends.protocol import ArgumentChange
from rlvr.errors import UnsupportedSettingError


class IgnoresDtype(HFBackend):
    def load_policy(self, settings):
        policy = super().load_policy(replace(settings, dtype="float32"))
        return replace(policy, settings=settings)


class ComputesInHalf(HFBackend):
    """float32 weights, bfloat16 arithmetic."""

    def load_policy(self, settings):
        policy = super().load_policy(settings)
        forward = policy.model.forward

        def in_half(*args, **kwargs):
            with torch.autocast("cpu", torch.bfloat16):
                return forward(*args, **kwargs)

        policy.model.forward = in_half
        return policy


class IgnoresAttention(HFBackend):
    def load_policy(self, settings):
        return super().load_policy(replace(settings, attention="sdpa"))


class AcceptsMissingDevices(HFBackend):
    def load_policy(self, settings):
        return super().load_policy(replace(settings, device=None))


class LoadsTheFirstModelAgain(HFBackend):
    first = None

    def load_policy(self, settings):
        self.first = self.first or settings.model
        return super().load_policy(replace(settings, model=self.first))


class CutsTheContextInSilence(HFBackend):
    def load_policy(self, settings):
        return super().load_policy(replace(settings, max_seq_length=min(settings.max_seq_length, 4096)))


class TrustsEveryone(HFBackend):
    def load_policy(self, settings):
        return super().load_policy(replace(settings, trust_remote_code=True))


class ClaimsAnEngine(HFBackend):
    def capabilities(self):
        return replace(super().capabilities(), fast_inference=True)


class RefusesAuto(HFBackend):
    """What users leave at its default."""

    def load_policy(self, settings):
        if settings.fast_inference == "auto":
            raise UnsupportedSettingError("fast_inference='auto' cannot be had. Use 'off'.")
        return super().load_policy(settings)


class CheckpointsAlways(HFBackend):
    def training_arguments(self, policy):
        return (ArgumentChange("gradient_checkpointing", True, "it saves memory"),)


class EngineInName(ClaimsAnEngine):
    """Has an object of that name."""

    def load_policy(self, settings):
        policy = super().load_policy(replace(settings, fast_inference="off"))
        if settings.fast_inference == "on":
            policy.model.vllm_engine = object()
        return replace(policy, settings=settings)


class EngineThatNobodyAsks(EngineInName):
    """It generates; rollouts are sampled without it."""

    def load_policy(self, settings):
        policy = super().load_policy(settings)
        if settings.fast_inference == "on":
            policy.model.vllm_engine = SimpleNamespace(generate=policy.model.generate)
        return policy


class LeavesItsDtypeBehind(HFBackend):
    def load_policy(self, settings):
        policy = super().load_policy(settings)
        torch.set_default_dtype(policy.model.dtype)
        return policy


class StopsToCheckpoint(HFBackend):
    """Once it has inferred; the trainer is told that the model checkpoints."""

    def apply_lora(self, policy, lora):
        policy = super().apply_lora(policy, lora)
        if policy.settings.gradient_checkpointing:
            policy.model.gradient_checkpointing_enable()
        return policy

    def training_arguments(self, policy):
        others = [c for c in super().training_arguments(policy) if not c.name.startswith("gradient_checkpointing")]
        return (*others, ArgumentChange("gradient_checkpointing", False, "it is in the model"))

    def for_inference(self, policy):
        super().for_inference(policy)
        policy.model.gradient_checkpointing_disable()


class LoadsAnotherCopy(HFBackend):
    """Another model than was asked for, and `LoadedPolicy.settings` says which."""

    def load_policy(self, settings):
        if not (Path(settings.model) / "model.safetensors").is_file():
            return super().load_policy(settings)
        copy = Path(shutil.copytree(settings.model, Path(tempfile.mkdtemp()) / "copy"))
        weights = load_file(copy / "model.safetensors")
        save_file({k: 0.8 * w for k, w in weights.items()}, copy / "model.safetensors", metadata={"format": "pt"})
        return super().load_policy(replace(settings, model=str(copy)))


class CheckpointsNothing(HFBackend):
    """Sets the flag of a module that never checkpoints, and tells the trainer that it is done."""

    def training_arguments(self, policy):
        others = [c for c in super().training_arguments(policy) if not c.name.startswith("gradient_checkpointing")]
        return (*others, ArgumentChange("gradient_checkpointing", False, "it is in the model"))

    def for_training(self, policy):
        super().for_training(policy)
        policy.model.get_input_embeddings().gradient_checkpointing = policy.settings.gradient_checkpointing


class ClaimsUnknownExport(HFBackend):
    def capabilities(self):
        return replace(super().capabilities(), export_formats=("adapter", "merged-16bit", "merged-8bit"))


class ClaimsUnknownWords(HFBackend):
    def capabilities(self):
        return replace(super().capabilities(), dtypes=frozenset({"auto", "float32", "fp8"}))


class DrawsFromTheGlobalState(HFBackend):
    def load_policy(self, settings):
        torch.manual_seed(settings.seed)
        return super().load_policy(settings)


class ForgetsOldTokens(HFBackend):
    """Attends to the last 64 tokens."""

    def load_policy(self, settings):
        policy = super().load_policy(settings)
        layers = ["sliding_attention"] * policy.model.config.num_hidden_layers
        window = {"use_sliding_window": True, "sliding_window": 64, "layer_types": layers}
        model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=policy.model.dtype, **window)
        return replace(policy, model=model)


class StretchesPositions(HFBackend):
    """For contexts longer than 512 tokens."""

    def load_policy(self, settings):
        policy = super().load_policy(settings)
        if settings.max_seq_length > 512:
            for name, buffer in policy.model.named_buffers():
                if name.endswith("inv_freq"):
                    buffer.mul_(0.25)
        return policy


class SeedsPython(HFBackend):
    def load_policy(self, settings):
        random.seed(settings.seed)
        return super().load_policy(settings)


class HalvesGradients(HFBackend):
    def apply_lora(self, policy, lora):
        policy = super().apply_lora(policy, lora)
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter.register_hook(lambda gradient: gradient / 2)
        return policy


class OverwritesGradients(HFBackend):
    """Of several micro-batches the last one's are left."""

    def apply_lora(self, policy, lora):
        policy = super().apply_lora(policy, lora)
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter.register_hook(lambda gradient, parameter=parameter: setattr(parameter, "grad", None))
        return policy


class AdapterInHalf(HFBackend):
    def apply_lora(self, policy, lora):
        policy = super().apply_lora(policy, lora)
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(policy.model.dtype)
        return policy


class CountsParametersNotBytes(HFBackend):
    def memory_in_use(self, policy):
        return sum(parameter.numel() for parameter in policy.model.parameters())


class TakesEveryWeightForFloat32(HFBackend):
    def memory_in_use(self, policy):
        return 4 * sum(parameter.numel() for parameter in policy.model.parameters())


class CountsNoAdapter(HFBackend):
    def memory_in_use(self, policy):
        adapter = [weight for name, weight in policy.model.named_parameters() if "lora_" in name]
        return super().memory_in_use(policy) - sum(weight.nbytes for weight in adapter)


class IgnoresRevision(HFBackend):
    def load_policy(self, settings):
        return super().load_policy(replace(settings, revision=None))


class TokenizerIgnoresRevision(HFBackend):
    def load_policy(self, settings):
        default = super().load_policy(replace(settings, revision=None))
        return replace(super().load_policy(settings), tokenizer=default.tokenizer)


class LoadSavedIgnoresRevision(HFBackend):
    def load_saved(self, folder, settings, *, trainable=False):
        return super().load_saved(folder, replace(settings, revision=None), trainable=trainable)


class LosesAGradient(HFBackend):
    """In full fine-tuning, that of the embeddings, which count as trainable."""

    def load_policy(self, settings):
        policy = super().load_policy(settings)
        policy.model.get_input_embeddings().weight.register_hook(torch.zeros_like)
        return policy


class FreezesInFullFinetuning(HFBackend):
    def load_policy(self, settings):
        policy = super().load_policy(settings)
        policy.model.get_input_embeddings().requires_grad_(False)
        return policy


class FreezesForTraining(HFBackend):
    """Full fine-tuning without the embeddings, once training begins."""

    def for_training(self, policy):
        super().for_training(policy)
        policy.model.get_input_embeddings().requires_grad_(False)


class ExportsTheBaseOfFullFinetuning(HFBackend):
    """In every format but its own."""

    def save(self, policy, folder, export_format="adapter"):
        if policy.settings.full_finetuning and export_format != "adapter":
            policy = self.load_policy(policy.settings)
        super().save(policy, folder, export_format)


class SavesTheBaseOfFullFinetuning(HFBackend):
    def save(self, policy, folder, export_format="adapter"):
        if policy.settings.full_finetuning and export_format == "adapter":
            policy = self.load_policy(policy.settings)
        super().save(policy, folder, export_format)


BACKEND_FAULTS = {
    ClaimsUnknownWords: "capabilities",
    ClaimsUnknownExport: "capabilities",
    LoadsTheFirstModelAgain: "setting-model",
    LoadsAnotherCopy: "setting-model",
    IgnoresDtype: "setting-dtype",
    LeavesItsDtypeBehind: "setting-dtype",
    IgnoresAttention: "setting-attention",
    CutsTheContextInSilence: "setting-max-seq-length",
    TrustsEveryone: "setting-trust-remote-code",
    ClaimsAnEngine: "setting-fast-inference",
    RefusesAuto: "setting-fast-inference",
    EngineInName: "setting-fast-inference",
    EngineThatNobodyAsks: "setting-fast-inference",
    CheckpointsAlways: "setting-gradient-checkpointing",
    CheckpointsNothing: "setting-gradient-checkpointing",
    StopsToCheckpoint: "setting-gradient-checkpointing",
    AcceptsMissingDevices: "setting-device",
    DrawsFromTheGlobalState: "setting-seed",
    SeedsPython: "setting-seed",
    ComputesInHalf: "log-probabilities",
    ForgetsOldTokens: "log-probabilities",
    StretchesPositions: "log-probabilities",
    HalvesGradients: "gradients",
    OverwritesGradients: "gradients",
    AdapterInHalf: "gradients",
    CountsParametersNotBytes: "memory-in-use",
    TakesEveryWeightForFloat32: "memory-in-use",
    CountsNoAdapter: "memory-in-use",
}
"""Fault → the check that has to find it."""

FAULTS_ALONE = {
    IgnoresRevision: ("setting-revision", "revision='other' was asked for, and another one's weights"),
    TokenizerIgnoresRevision: ("setting-revision", "another one's tokenizer was loaded"),
    LoadSavedIgnoresRevision: ("setting-revision", "an adapter on revision='other' was loaded back on another one's"),
    LosesAGradient: ("setting-full-finetuning", "training left 1 tensors unchanged"),
    FreezesInFullFinetuning: ("setting-full-finetuning", "once loaded 1 tensors are frozen"),
    ExportsTheBaseOfFullFinetuning: ("setting-full-finetuning", "full_finetuning, merged-16bit: loaded back, it is"),
    SavesTheBaseOfFullFinetuning: ("setting-full-finetuning", "full_finetuning, adapter: loaded back, it is another"),
    FreezesForTraining: ("setting-full-finetuning", "after for_training 1 tensors are frozen"),
}
"""Fault → the check of the group `alone` that has to find it, and a part of what it says."""
