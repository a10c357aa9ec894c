"""The oracle: the same checkpoint in float32 by transformers alone, with LoRA added to the weights by hand.

No PEFT and nothing of the backend takes part, but for the values of the adapter's factors. It computes in a process of
its own, since a backend may have patched transformers in this one.

    W' = W + s · B · A      with s as `LoadedPolicy.lora` states it (alpha / r, or alpha / sqrt(r) for rsLoRA)
    dL/dA = s · Bᵀ · dL/dW'     dL/dB = s · dL/dW' · Aᵀ
"""

from __future__ import annotations

import functools
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from rlvr.backends.protocol import LoadedPolicy, LoraSettings
from rlvr.testing.conformance.context import factors, lora_layers

Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Reference:
    """What the checkpoint `model` should compute. `adapters`: name of a layer → (A, B)."""

    model: str
    weights_dtype: torch.dtype
    adapters: Pairs
    scale: float

    @classmethod
    def of(cls, policy: LoadedPolicy, weights_dtype: torch.dtype) -> Reference:
        """
        Args:
            weights_dtype: the policy's; the checkpoint is rounded to it first, so that only the arithmetic differs.
        """
        adapters = {name: factors(layer) for name, layer in lora_layers(policy.model).items()}
        return cls(policy.settings.model, weights_dtype, adapters, stated_scale(policy.lora) if policy.lora else 0.0)

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """(B, T, V), on the CPU."""
        return _clean_process().submit(_logits, self, ids.cpu()).result()

    def loss_and_gradients(self, ids: torch.Tensor) -> tuple[float, Pairs]:
        """Mean negative log-probability of the tokens after the first, in nats, and its gradients by A and by B."""
        return _clean_process().submit(_loss_and_gradients, self, ids.cpu()).result()


@functools.cache
def _clean_process() -> ProcessPoolExecutor:
    """One for all references of this process. Spawned, not forked: it imports transformers for itself."""
    return ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn"))


@torch.no_grad()
def _logits(reference: Reference, ids: torch.Tensor) -> torch.Tensor:
    return _adapted(reference)(ids).logits


def _loss_and_gradients(reference: Reference, ids: torch.Tensor) -> tuple[float, Pairs]:
    model = _adapted(reference)
    log_probabilities = model(ids).logits[:, :-1].log_softmax(-1)
    loss = -log_probabilities.gather(-1, ids[:, 1:, None]).mean()
    loss.backward()
    gradients = {}
    for name, (a, b) in reference.adapters.items():
        by_weight = model.get_submodule(name).weight.grad
        gradients[name] = (reference.scale * b.T @ by_weight, reference.scale * by_weight @ a.T)
    return loss.item(), gradients


def _adapted(reference: Reference) -> Any:
    """The model in float32 on the CPU, adapter included."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        reference.model, dtype=torch.float32, attn_implementation="eager"
    )
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(reference.weights_dtype))
        for name, (a, b) in reference.adapters.items():
            model.get_submodule(name).weight += reference.scale * b @ a
    return model


def stated_scale(lora: LoraSettings) -> float:
    return lora.alpha / (lora.r**0.5 if lora.rslora else lora.r)
