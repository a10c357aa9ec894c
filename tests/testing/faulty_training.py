"""Backends whose training goes wrong, planted for the conformance kit: `hf` otherwise."""

from __future__ import annotations

import copy
from typing import ClassVar

import torch

from rlvr.backends.hf.backend import HFBackend
from rlvr.backends.protocol import ArgumentChange


class ChangesUnknownArguments(HFBackend):
    def training_arguments(self, policy):
        return (ArgumentChange("use_bf16", False, "the policy was loaded in float32"),)


class TrainsTheBase(HFBackend):
    def for_training(self, policy):
        super().for_training(policy)
        policy.model.get_input_embeddings().requires_grad_(True)


class TrainsInHalf(HFBackend):
    """Adapters are in float32 until training begins."""

    def for_training(self, policy):
        super().for_training(policy)
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()


class TrainsNothingOfA(HFBackend):
    """LoRA with A frozen: it trains, but not what was stated."""

    def for_training(self, policy):
        super().for_training(policy)
        for name, parameter in policy.model.named_parameters():
            if "lora_A" in name:
                parameter.requires_grad_(False)
                parameter.grad = None


class FreezesAPart(HFBackend):
    """Of the adapter, once training begins."""

    part: ClassVar[str]

    def for_training(self, policy):
        super().for_training(policy)
        for name, parameter in policy.model.named_parameters():
            if self.part in name:
                parameter.requires_grad_(False)


class FreezesMagnitudes(FreezesAPart):
    part = "magnitude"


class FreezesBiases(FreezesAPart):
    part = ".bias"


class KeepsTheBaseInBuffers(HFBackend):
    """And training changes one."""

    def load_policy(self, settings):
        policy = super().load_policy(settings)
        policy.model.register_buffer("qweight", torch.zeros(8))
        return policy

    def apply_lora(self, policy, lora):
        policy = super().apply_lora(policy, lora)
        base = policy.model.get_base_model()

        def change(weight):
            base.qweight.add_(1)

        first = next(weight for weight in policy.model.parameters() if weight.requires_grad)
        first.register_post_accumulate_grad_hook(change)
        return policy


class LosesATensorOfTheBase(HFBackend):
    """A norm that does nothing, once training begins."""

    def for_training(self, policy):
        super().for_training(policy)
        policy.model.get_base_model().model.norm = torch.nn.Identity()


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


class SynchronisesForInferenceOnly(HFBackend):
    """Samples from a second model that follows the policy in `for_inference`, which a trainer never calls."""

    def apply_lora(self, policy, lora):
        policy = super().apply_lora(policy, lora)
        self.sampler = copy.deepcopy(policy.model).eval()
        policy.model.generate = self.sampler.generate
        return policy

    def for_inference(self, policy):
        super().for_inference(policy)
        self.sampler.load_state_dict(policy.model.state_dict())


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


class ForgetsWhereItIs(HFBackend):
    """With a cache it knows 128 positions, and takes the last one for all beyond."""

    def load_policy(self, settings):
        policy = super().load_policy(settings)

        def clamp(module, args, kwargs):
            if kwargs["inputs_embeds" if kwargs.get("input_ids") is None else "input_ids"].shape[1] == 1:
                kwargs["position_ids"] = kwargs["position_ids"].clamp(max=127)
            return args, kwargs

        policy.model.model.register_forward_pre_hook(clamp, with_kwargs=True)
        return policy


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


class BeginsTheDataAnew(HFBackend):
    """After a checkpoint."""

    def training_arguments(self, policy):
        return (*super().training_arguments(policy), ArgumentChange("ignore_data_skip", True, "it saves time"))


TRAINING_FAULTS = {
    ChangesUnknownArguments: "training-arguments",
    TrainsTheBase: "trains-adapter-only",
    TrainsInHalf: "trains-adapter-only",
    FreezesMagnitudes: "trains-adapter-only",
    FreezesBiases: "trains-adapter-only",
    KeepsTheBaseInBuffers: "trains-adapter-only",
    LosesATensorOfTheBase: "trains-adapter-only",
    TrainsNothingOfA: "trains-adapter-only",
    SamplesFromStaleWeights: "sampler-is-policy",
    SynchronisesForInferenceOnly: "sampler-is-policy",
    OtherTemperature: "sampler-is-policy",
    IgnoresTemperature: "sampler-is-policy",
    ForgetsWhereItIs: "sampler-is-policy",
    NearlyGreedy: "sampler-is-policy",
    MovesTheReference: "reference-is-start",
    DropsBeta: "reference-is-start",
    ForgetsTheOptimizer: "resumes",
    BeginsTheDataAnew: "resumes",
}
"""Fault → the check that has to find it."""
