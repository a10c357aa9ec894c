"""The oracle: the same checkpoint in float32 by transformers alone, with LoRA added to the weights by hand.

No PEFT and nothing of the backend takes part, but for the values of the adapter's factors.

    W' = W + s · B · A      with s as `LoadedPolicy.lora` states it (alpha / r, or alpha / sqrt(r) for rsLoRA)
    dL/dA = s · Bᵀ · dL/dW'     dL/dB = s · dL/dW' · Aᵀ
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from rlvr.backends.protocol import LoadedPolicy, LoraSettings
from rlvr.testing.conformance.context import factors, lora_layers


@dataclass
class Reference:
    """`model`: float32 on the CPU, adapter included. `adapters`: name of a layer → (A, B)."""

    model: Any
    adapters: dict[str, tuple[torch.Tensor, torch.Tensor]]
    scale: float

    @classmethod
    def of(cls, policy: LoadedPolicy, weights_dtype: torch.dtype) -> Reference:
        """
        Args:
            weights_dtype: the policy's; the checkpoint is rounded to it first, so that only the arithmetic differs.
        """
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(
            policy.settings.model, dtype=torch.float32, attn_implementation="eager"
        )
        model.eval()
        adapters = {name: factors(layer) for name, layer in lora_layers(policy.model).items()}
        scale = stated_scale(policy.lora) if policy.lora else 0.0
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.to(weights_dtype))
            for name, (a, b) in adapters.items():
                model.get_submodule(name).weight += scale * b @ a
        return cls(model, adapters, scale)

    @torch.no_grad()
    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids.cpu()).logits

    def loss_and_gradients(self, ids: torch.Tensor) -> tuple[float, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
        """Mean negative log-probability of the tokens after the first, in nats, and its gradients by A and by B."""
        ids = ids.cpu()
        log_probabilities = self.model(ids).logits[:, :-1].log_softmax(-1)
        loss = -log_probabilities.gather(-1, ids[:, 1:, None]).mean()
        loss.backward()
        gradients = {}
        for name, (a, b) in self.adapters.items():
            by_weight = self.model.get_submodule(name).weight.grad
            gradients[name] = (self.scale * b.T @ by_weight, self.scale * by_weight @ a.T)
        return loss.item(), gradients


def stated_scale(lora: LoraSettings) -> float:
    return lora.alpha / (lora.r**0.5 if lora.rslora else lora.r)
