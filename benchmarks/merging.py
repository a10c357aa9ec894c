"""How much of a young adapter bfloat16 weights keep when it is merged into them for a rollout.

    python benchmarks/merging.py

A transformer of four layers with bfloat16 weights of the size that large models have (standard deviation 0.02), LoRA
rank 16 on all linear layers, lora_B as Adam makes it in so many steps all in one direction. Log-probabilities are
computed in float32, with W + s·BA rounded to the nearest bfloat16 number, as is usual, and as the grouped engine
rounds it, against those without rounding. Prints a Markdown table: the mean effect of the adapter in nats, for both
the share of it that is kept (regression on the effect) and the mean error, and what bfloat16 arithmetic by itself is
off by.
"""

from __future__ import annotations

import copy

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from rlvr.rollout.grouped.weights import merged_weight
from rlvr.testing.tiny import tiny_model

STEPS = ((1e-6, 1), (1e-6, 10), (1e-6, 100), (1e-5, 1), (1e-5, 10), (1e-5, 100))  # learning rate, steps


def main() -> None:
    torch.manual_seed(0)
    base = tiny_model(hidden_size=512, layers=4, heads=8, kv_heads=4, intermediate_size=1_536).to(torch.bfloat16)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, lora)
    ids = torch.randint(3, 259, (8, 32))
    without = logprobs(copy.deepcopy(model).float(), ids)
    signs = [torch.randn(p.shape).sign() for p in lora_bs(model)]

    print("| learning rate × steps | effect | nearest: kept | error | ours: kept | error | bfloat16 arithmetic |")
    print("|---|---|---|---|---|---|---|")
    for rate, steps in STEPS:
        for parameter, sign in zip(lora_bs(model), signs, strict=True):
            parameter.data = rate * steps * sign
        exact = copy.deepcopy(model).float()
        effect = logprobs(exact, ids) - without
        cells = [f"{rate:g} × {steps}", f"{effect.abs().mean():.1e}"]
        for rounded in (to_nearest, merged_weight):
            kept = logprobs(merged(model, rounded), ids) - without
            share = (kept * effect).sum() / (effect * effect).sum()
            cells += [f"{share:.2f}", f"{(kept - effect).abs().mean():.1e}"]
        arithmetic = logprobs(model, ids) - logprobs(exact, ids)
        print("| " + " | ".join([*cells, f"{arithmetic.abs().mean():.1e}"]) + " |")


def lora_bs(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if "lora_B" in name]


@torch.no_grad()
def logprobs(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids).logits.float().log_softmax(-1)


def to_nearest(layer) -> Tensor:
    exact = copy.deepcopy(layer).float()
    return merged_weight(exact).to(layer.base_layer.weight.dtype)


def merged(model: nn.Module, rounded) -> nn.Module:
    """The base model in float32 with the merged weights that `rounded` makes of its layers."""
    result = copy.deepcopy(model).float()
    layers = zip(model.modules(), result.modules(), strict=True)
    for layer, of_result in [pair for pair in layers if hasattr(pair[0], "lora_A")]:
        of_result.base_layer.weight.data = rounded(layer).float()
    for parameter in lora_bs(result):
        parameter.data.zero_()
    return result


if __name__ == "__main__":
    main()
