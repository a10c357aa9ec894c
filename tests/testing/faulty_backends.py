"""Backends with one fault each, planted for the conformance kit to find. Each is the `hf` backend otherwise."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from transformers import AutoModelForCausalLM

from rlvr.backends.hf.backend import HFBackend
from rlvr.backends.protocol import ArgumentChange


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


class CheckpointsAlways(HFBackend):
    def training_arguments(self, policy):
        return (ArgumentChange("gradient_checkpointing", True, "it saves memory"),)


class Claims4Bit(HFBackend):
    """Claims 4 bits, and loads 16 in silence."""

    def capabilities(self):
        return replace(super().capabilities(), quantizations=frozenset({"none", "4bit"}))

    def load_policy(self, settings):
        return super().load_policy(replace(settings, quantization="none"))


class EightIsFour(Claims4Bit):
    """Claims 4 and 8 bits, and rounds to 4 for both."""

    def capabilities(self):
        return replace(super().capabilities(), quantizations=frozenset({"none", "4bit", "8bit"}))

    def load_policy(self, settings):
        policy = super().load_policy(settings)
        if settings.quantization != "none":
            for parameter in policy.model.parameters():
                step = parameter.detach().abs().amax(-1, keepdim=True) / 7
                parameter.data = (parameter / step).round() * step
        return policy


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


class CountsQuantizedWeightsAsWhole(Claims4Bit):
    """The same weights in 4 bits, and four times as much as they take."""

    def load_policy(self, settings):
        return replace(super().load_policy(settings), settings=settings)

    def memory_in_use(self, policy):
        return super().memory_in_use(policy) * (4 if policy.settings.quantization == "4bit" else 1)


class ChangesUnknownArguments(HFBackend):
    def training_arguments(self, policy):
        return (ArgumentChange("use_bf16", False, "the policy was loaded in float32"),)


class TrainsTheBase(HFBackend):
    def for_training(self, policy):
        super().for_training(policy)
        policy.model.get_input_embeddings().requires_grad_(True)


class TrainsNothingOfA(HFBackend):
    """LoRA with A frozen: it trains, but not what was stated."""

    def for_training(self, policy):
        super().for_training(policy)
        for name, parameter in policy.model.named_parameters():
            if "lora_A" in name:
                parameter.requires_grad_(False)
                parameter.grad = None


class SamplesFromStaleWeights(HFBackend):
    """Samples from a second model whose weights are synchronised once, and never after an optimizer step."""

    def apply_lora(self, policy, lora):
        policy = super().apply_lora(policy, lora)
        self.sampler, self.synchronised = copy.deepcopy(policy.model).eval(), False
        policy.model.generate = self.sampler.generate
        return policy

    def for_inference(self, policy):
        super().for_inference(policy)
        if not self.synchronised:
            self.sampler.load_state_dict(policy.model.state_dict())
            self.synchronised = True


class SamplesByItself(HFBackend):
    """`generate` with an option of its own, whatever was asked for."""

    option: ClassVar[dict[str, float]]

    def apply_lora(self, policy, lora):
        policy = super().apply_lora(policy, lora)
        generate = policy.model.generate

        def by_itself(*args, generation_config, **kwargs):
            config = copy.deepcopy(generation_config)
            config.update(**self.option)
            return generate(*args, generation_config=config, **kwargs)

        policy.model.generate = by_itself
        return policy


class OtherTemperature(SamplesByItself):
    option: ClassVar = {"temperature": 0.5}


class IgnoresTemperature(SamplesByItself):
    option: ClassVar = {"temperature": 1.0}


class NearlyGreedy(SamplesByItself):
    option: ClassVar = {"top_k": 2}


class MovesTheReference(HFBackend):
    def training_arguments(self, policy):
        return (
            *super().training_arguments(policy),
            ArgumentChange("sync_ref_model", True, "a reference that keeps up"),
            ArgumentChange("ref_model_sync_steps", 1, "at every step"),
            ArgumentChange("ref_model_mixup_alpha", 1.0, "completely"),
        )


class DropsBeta(HFBackend):
    def training_arguments(self, policy):
        return (*super().training_arguments(policy), ArgumentChange("beta", 0.0, "it saves a forward pass"))


class ForgetsTheOptimizer(HFBackend):
    def training_arguments(self, policy):
        return (*super().training_arguments(policy), ArgumentChange("save_only_model", True, "it saves space"))


class IgnoresRevision(HFBackend):
    def load_policy(self, settings):
        return super().load_policy(replace(settings, revision=None))


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


BACKEND_FAULTS = {
    ClaimsUnknownWords: "capabilities",
    ClaimsUnknownExport: "capabilities",
    LoadsTheFirstModelAgain: "setting-model",
    IgnoresDtype: "setting-dtype",
    Claims4Bit: "setting-quantization",
    EightIsFour: "setting-quantization",
    IgnoresAttention: "setting-attention",
    CutsTheContextInSilence: "setting-max-seq-length",
    TrustsEveryone: "setting-trust-remote-code",
    ClaimsAnEngine: "setting-fast-inference",
    CheckpointsAlways: "setting-gradient-checkpointing",
    CheckpointsNothing: "setting-gradient-checkpointing",
    AcceptsMissingDevices: "setting-device",
    DrawsFromTheGlobalState: "setting-seed",
    SeedsPython: "setting-seed",
    ComputesInHalf: "log-probabilities",
    ForgetsOldTokens: "log-probabilities",
    StretchesPositions: "log-probabilities",
    HalvesGradients: "gradients",
    CountsParametersNotBytes: "memory-in-use",
    TakesEveryWeightForFloat32: "memory-in-use",
    CountsNoAdapter: "memory-in-use",
    CountsQuantizedWeightsAsWhole: "memory-in-use",
    ChangesUnknownArguments: "training-arguments",
    TrainsTheBase: "trains-adapter-only",
    TrainsNothingOfA: "trains-adapter-only",
    SamplesFromStaleWeights: "sampler-is-policy",
    OtherTemperature: "sampler-is-policy",
    IgnoresTemperature: "sampler-is-policy",
    NearlyGreedy: "sampler-is-policy",
    MovesTheReference: "reference-is-start",
    DropsBeta: "reference-is-start",
    ForgetsTheOptimizer: "resumes",
}
"""Fault → the check that has to find it."""

FAULTS_ALONE = {
    IgnoresRevision: ("setting-revision", "revision='other' was asked for, and another one's weights"),
    FreezesInFullFinetuning: ("setting-full-finetuning", "once loaded 1 tensors are frozen"),
    FreezesForTraining: ("setting-full-finetuning", "after for_training 1 tensors are frozen"),
}
"""Fault → the check of the group `alone` that has to find it, and a part of what it says."""


@dataclass(frozen=True)
class FaultyPlugin:
    """A fault of an installed plugin, as lines of its module, for the checks that start processes of their own."""

    check: str
    findings: tuple[str, ...]  # parts of what the check has to say
    load: str = ""  # in `rlvr_backend`
    top: str = ""  # at import


PATCHES_ONLY_WHEN_FIRST = """
import sys
if "trl" not in sys.modules:
    import trl
    class PatchedTrainer(trl.GRPOTrainer):
        pass
    trl.GRPOTrainer = PatchedTrainer
else:
    import logging, warnings
"""

FAULTY_PLUGINS = {
    "imports what is heavy": FaultyPlugin("lazy-plugin", ("listing it imports datasets",), top="import datasets"),
    "prints and writes": FaultyPlugin(
        "loads-first", ("Welcome!", "cache.txt"), load="print('Welcome!'); open('cache.txt', 'w').close()"
    ),
    "patches only when first": FaultyPlugin(
        "loads-late",
        (
            "it leaves trl.trainer.grpo_trainer.GRPOTrainer as trl.GRPOTrainer",
            "loaded first, stranger_plugin.rlvr_backend.<locals>.PatchedTrainer",
        ),
        load=f"{PATCHES_ONLY_WHEN_FIRST}    warnings.warn('my cache is old')",  # which is not about the patch
    ),
}
