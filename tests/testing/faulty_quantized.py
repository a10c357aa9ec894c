"""Backends that claim 4 bits and go wrong there, planted for the conformance kit: `hf` otherwise."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import ClassVar

from right_backends import RoundsToFewBits

from rlvr.backends.hf.backend import HFBackend


class Claims4Bit(HFBackend):
    """Claims 4 bits, and loads 16 in silence."""

    def capabilities(self):
        return replace(super().capabilities(), quantizations=frozenset({"none", "4bit"}))

    def load_policy(self, settings):
        return super().load_policy(replace(settings, quantization="none"))


class LoadsWholeWhatItDoesNotClaim(HFBackend):
    """4 and 8 bits."""

    def load_policy(self, settings):
        return replace(super().load_policy(replace(settings, quantization="none")), settings=settings)


class LoadsAdaptersOnWhatItDoesNotClaim(HFBackend):
    """On unquantized weights, whatever was asked for."""

    def load_saved(self, folder, settings, *, trainable=False):
        return super().load_saved(folder, replace(settings, quantization="none"), trainable=trainable)


class EightIsFour(Claims4Bit):
    """Claims 4 and 8 bits, and rounds to 4 for both."""

    def capabilities(self):
        return replace(super().capabilities(), quantizations=frozenset({"none", "4bit", "8bit"}))

    def load_policy(self, settings):
        policy = super().load_policy(settings)
        if settings.quantization != "none":
            for parameter in policy.model.parameters():
                step = parameter.detach().abs().amax(-1, keepdim=True) / 7
                parameter.data = ((parameter / step).round() * step).nan_to_num()  # of 0 / 0
        return policy


class NotANumberIn4Bits(RoundsToFewBits):
    def load_policy(self, settings):
        policy = super().load_policy(settings)
        if settings.quantization == "4bit":
            policy.model.get_output_embeddings().weight.data[0] = float("nan")
        return policy


class CountsQuantizedWeightsAsWhole(Claims4Bit):
    """The same weights in 4 bits, and four times as much as they take."""

    def load_policy(self, settings):
        return replace(super().load_policy(settings), settings=settings)

    def memory_in_use(self, policy):
        return super().memory_in_use(policy) * (4 if policy.settings.quantization == "4bit" else 1)


class FreezesOn4Bits(RoundsToFewBits):
    def apply_lora(self, policy, lora):
        policy = super().apply_lora(policy, lora)
        if policy.settings.quantization == "4bit":
            policy.model.requires_grad_(False)
        return policy


class TrainsTheBaseOn4Bits(RoundsToFewBits):
    def for_training(self, policy):
        super().for_training(policy)
        if policy.settings.quantization == "4bit":
            policy.model.get_input_embeddings().requires_grad_(True)


class DropsAlphaOnFewBits(RoundsToFewBits):
    def apply_lora(self, policy, lora):
        dropped = replace(lora, alpha=lora.r) if policy.settings.quantization != "none" else lora
        return replace(super().apply_lora(policy, dropped), lora=lora.applied())


class SamplesFromStaleWeightsOnFewBits(RoundsToFewBits):
    """Samples from a copy that never gets new weights."""

    def apply_lora(self, policy, lora):
        policy = super().apply_lora(policy, lora)
        if policy.settings.quantization != "none":
            policy.model.generate = copy.deepcopy(policy.model).eval().generate
        return policy


class ScalesGradientsOnFewBits(RoundsToFewBits):
    """Those of the adapter."""

    factor: ClassVar[float]

    def apply_lora(self, policy, lora):
        policy = super().apply_lora(policy, lora)
        if policy.settings.quantization != "none":
            for parameter in policy.model.parameters():
                if parameter.requires_grad:
                    parameter.register_hook(lambda gradient: self.factor * gradient)
        return policy


class NegatesGradientsOnFewBits(ScalesGradientsOnFewBits):
    factor = -1.0


class HalvesGradientsOnFewBits(ScalesGradientsOnFewBits):
    factor = 0.5


class SavesNoAdapterOf4Bits(RoundsToFewBits):
    def save(self, policy, folder, export_format="adapter"):
        if policy.settings.quantization == "4bit" and export_format == "adapter":
            raise RuntimeError("quantized weights have no state")
        super().save(policy, folder, export_format)


class LoadsAdaptersOf4BitsOnTheWhole(RoundsToFewBits):
    """On unquantized weights."""

    def load_saved(self, folder, settings, *, trainable=False):
        return super().load_saved(folder, replace(settings, quantization="none"), trainable=trainable)


class ExportsTheBaseOf4Bits(RoundsToFewBits):
    def save(self, policy, folder, export_format="adapter"):
        if policy.settings.quantization == "4bit" and export_format != "adapter":
            policy = super().load_policy(policy.settings)
        super().save(policy, folder, export_format)


QUANTIZED_FAULTS = {
    Claims4Bit: "setting-quantization",
    LoadsWholeWhatItDoesNotClaim: "setting-quantization",
    LoadsAdaptersOnWhatItDoesNotClaim: "export-adapter",
    EightIsFour: "setting-quantization",
    CountsQuantizedWeightsAsWhole: "memory-in-use",
    NotANumberIn4Bits: "setting-quantization",
    FreezesOn4Bits: "trains-adapter-only",
    TrainsTheBaseOn4Bits: "trains-adapter-only",
    DropsAlphaOnFewBits: "lora-alpha",
    SamplesFromStaleWeightsOnFewBits: "sampler-is-policy",
    NegatesGradientsOnFewBits: "gradients",
    HalvesGradientsOnFewBits: "gradients",
    SavesNoAdapterOf4Bits: "export-adapter",
    LoadsAdaptersOf4BitsOnTheWhole: "export-adapter",
    ExportsTheBaseOf4Bits: "export-merged-16bit",
}
"""Fault → the check that has to find it."""
