"""Backends that put on another LoRA than was asked for, planted for the conformance kit: `hf` otherwise."""

from __future__ import annotations

from dataclasses import replace

import torch
from peft import LoraConfig, get_peft_model

from rlvr.backends.hf.backend import HFBackend
from rlvr.backends.protocol import LoraSettings


class ClaimsDora(HFBackend):
    def apply_lora(self, policy, lora):
        return replace(super().apply_lora(policy, replace(lora, dora=False)), lora=lora)


class DropsDoraWhichItDoesNotClaim(HFBackend):
    def capabilities(self):
        return replace(super().capabilities(), dora=False)

    def apply_lora(self, policy, lora):
        return super().apply_lora(policy, replace(lora, dora=False))


class WrapsTwice(HFBackend):
    def apply_lora(self, policy, lora):
        policy = super().apply_lora(policy, lora)
        again = LoraConfig(r=lora.r, target_modules="all-linear", task_type="CAUSAL_LM")
        return replace(policy, model=get_peft_model(policy.model, again))


class WrapsAgainWhenAsked(HFBackend):
    def apply_lora(self, policy, lora):
        if getattr(policy.model, "peft_config", None):
            return policy
        return super().apply_lora(policy, lora)


class DropsAlpha(HFBackend):
    def apply_lora(self, policy, lora):
        return replace(super().apply_lora(policy, replace(lora, alpha=lora.r)), lora=lora.applied())


class DropsRsLora(HFBackend):
    def apply_lora(self, policy, lora):
        return super().apply_lora(policy, replace(lora, rslora=False))


class DropsDropout(HFBackend):
    def apply_lora(self, policy, lora):
        return super().apply_lora(policy, replace(lora, dropout=0.0))


class IgnoresRank(HFBackend):
    def apply_lora(self, policy, lora):
        return super().apply_lora(policy, replace(lora, r=4))


class IgnoresTargets(HFBackend):
    def apply_lora(self, policy, lora):
        return super().apply_lora(policy, replace(lora, target_modules="all-linear"))


class IgnoresFullNames(HFBackend):
    """Adapts all layers with the same last name."""

    def apply_lora(self, policy, lora):
        targets = lora.target_modules
        if not isinstance(targets, str):
            targets = tuple({name.rpartition(".")[2] for name in targets})
        return super().apply_lora(policy, replace(lora, target_modules=targets))


class TakesARegexForAll(HFBackend):
    def apply_lora(self, policy, lora):
        targets = "all-linear" if isinstance(lora.target_modules, str) else lora.target_modules
        return super().apply_lora(policy, replace(lora, target_modules=targets))


class IgnoresBias(HFBackend):
    def apply_lora(self, policy, lora):
        return super().apply_lora(policy, replace(lora, bias="none"))


class IgnoresInit(HFBackend):
    def apply_lora(self, policy, lora):
        return super().apply_lora(policy, replace(lora, init="default"))


class IgnoresLoraSeed(HFBackend):
    def apply_lora(self, policy, lora):
        return super().apply_lora(policy, replace(lora, seed=0))


class DropsLess(HFBackend):
    """5% where 50% were asked for."""

    def apply_lora(self, policy, lora):
        return replace(super().apply_lora(policy, replace(lora, dropout=lora.dropout / 10)), lora=lora.applied())


class DropsInOneLayer(HFBackend):
    def apply_lora(self, policy, lora):
        policy = super().apply_lora(policy, lora)
        layers = [module for module in policy.model.modules() if hasattr(module, "lora_dropout")]
        for layer in layers[1:]:
            layer.lora_dropout["default"] = torch.nn.Identity()
        return policy


class SwapsInits(HFBackend):
    def apply_lora(self, policy, lora):
        swapped = {"gaussian": "orthogonal", "orthogonal": "gaussian"}.get(lora.init, lora.init)
        return replace(super().apply_lora(policy, replace(lora, init=swapped)), lora=lora.applied())


class StatesRankAndAlphaOnly(HFBackend):
    """`LoadedPolicy.lora` has defaults for all else."""

    def apply_lora(self, policy, lora):
        policy = super().apply_lora(policy, lora)
        return replace(policy, lora=LoraSettings(r=policy.lora.r, alpha=policy.lora.alpha, alpha_multiplier=1))


LORA_FAULTS = {
    ClaimsDora: "lora-dora",
    DropsDoraWhichItDoesNotClaim: "lora-dora",
    WrapsTwice: "adapter-applied-once",
    WrapsAgainWhenAsked: "adapter-applied-once",
    DropsAlpha: "lora-alpha",
    DropsRsLora: "lora-rslora",
    DropsDropout: "lora-dropout",
    IgnoresRank: "lora-r",
    IgnoresTargets: "lora-target-modules",
    IgnoresFullNames: "lora-target-modules",
    TakesARegexForAll: "lora-target-modules",
    IgnoresBias: "lora-bias",
    IgnoresInit: "lora-init",
    IgnoresLoraSeed: "lora-seed",
    DropsLess: "lora-dropout",
    DropsInOneLayer: "lora-dropout",
    SwapsInits: "lora-init",
    StatesRankAndAlphaOnly: "lora-bias",
}
"""Fault → the check that has to find it."""
