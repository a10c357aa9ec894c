"""Backends that are right, and other than `hf` in one thing, which the conformance kit must not hold against them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch

from rlvr.backends.hf.backend import HFBackend
from rlvr.backends.protocol import ArgumentChange
from rlvr.errors import ModelError


class BFloat16Only(HFBackend):
    """Without float32: "auto" is bfloat16."""

    def capabilities(self):
        return replace(super().capabilities(), dtypes=frozenset({"auto", "bfloat16"}))

    def load_policy(self, settings):
        dtype = "bfloat16" if settings.dtype == "auto" else settings.dtype
        return super().load_policy(replace(settings, dtype=dtype))


class PlainSGD(HFBackend):
    """An optimizer without moments, and with small steps."""

    def training_arguments(self, policy):
        return (*super().training_arguments(policy), ArgumentChange("optim", "sgd", "it takes no memory"))


class PlainSGDInHalf(PlainSGD, BFloat16Only):
    """Its steps are smaller than rounding, unless they are made larger."""


class RefusesOwnCode(HFBackend):
    """A model that comes with code, unless it may run."""

    def load_policy(self, settings):
        config = Path(settings.model) / "config.json"
        if config.exists() and "auto_map" in json.loads(config.read_text()) and not settings.trust_remote_code:
            raise ModelError(f"model {settings.model!r} comes with code of its own. Set trust_remote_code.")
        return super().load_policy(settings)


class ReadsFilesOfItsOwn(HFBackend):
    """A folder with the model in a folder within it, where transformers does not look."""

    def load_policy(self, settings):
        inner = Path(settings.model) / "inner"
        found = super().load_policy(replace(settings, model=str(inner)) if inner.is_dir() else settings)
        return replace(found, settings=settings)


_BELOW = (-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911)
_ABOVE = (0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.723, 1.0)
_NF4 = torch.tensor((*_BELOW, 0.0, *_ABOVE))
"""QLoRA's, arXiv:2305.14314."""


class RoundsToFewBits(HFBackend):
    """Stands in for bitsandbytes: linear layers are rounded to 4 bits (NF4, in blocks of 64) or to 8 (by rows)."""

    def capabilities(self):
        formats = ("adapter", "merged-16bit", "merged-4bit")
        return replace(
            super().capabilities(), quantizations=frozenset({"none", "4bit", "8bit"}), export_formats=formats
        )

    def load_policy(self, settings):
        policy = super().load_policy(replace(settings, quantization="none"))
        round_weight = {"4bit": _to_4_bits, "8bit": _to_8_bits}.get(settings.quantization)
        for name, layer in policy.model.named_modules():
            if round_weight and isinstance(layer, torch.nn.Linear) and name != "lm_head":
                layer.weight.data = round_weight(layer.weight.data.float()).to(layer.weight.dtype)
        return replace(policy, settings=settings)


def _to_4_bits(weight):
    blocks = weight.reshape(-1, 64)
    scale = blocks.abs().amax(-1, keepdim=True)
    return (_NF4[((blocks / scale)[..., None] - _NF4).abs().argmin(-1)] * scale).reshape(weight.shape)


def _to_8_bits(weight):
    step = weight.abs().amax(-1, keepdim=True) / 127
    return (weight / step).round() * step
