"""What TRL gives vLLM of a policy with adapters: the weights with their adapters in, and the policy left as it is.

TRL merges every adapter into the policy's own weights, reads them, and subtracts it again, at each step. In half
precision that rounds: the frozen weights drift, a little at every step, and the adapter that is saved belongs to
weights that nobody has. The canary cannot see it, since vLLM drifts along. Here W + s·BA is computed apart, in
float32, layer by layer; other kinds of adapters are merged as TRL does, and the weights then put back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from rlvr.rollout.grouped.weights import mergeable, merged_weight


def merge_apart(generation: Any) -> None:
    """From now on the policy's weights are the same after they were given to vLLM as before.

    Args:
        generation: TRL's `VLLMGeneration`, of a model that is not sharded.
    """
    own = generation._iter_named_params

    def iter_named_params() -> Iterator[tuple[str, Tensor]]:
        model = generation.model
        if not isinstance(model, PeftModel):
            yield from own()
            return
        layers: list[Any] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        if not all(map(mergeable, layers)):
            with _put_back(layers):
                yield from own()
            return
        by_address = {layer.base_layer.weight.data_ptr(): layer for layer in layers}
        with _left_unmerged(model):
            for name, value in own():
                layer = by_address.get(value.data_ptr())
                yield name, value if layer is None else merged_weight(layer).to(value.dtype)

    generation._iter_named_params = iter_named_params


@contextlib.contextmanager
def _left_unmerged(model: PeftModel) -> Iterator[None]:
    """What TRL calls before and after it reads the weights does nothing."""
    model.__dict__.update(merge_adapter=lambda: None, unmerge_adapter=lambda: None)
    try:
        yield
    finally:
        del model.__dict__["merge_adapter"], model.__dict__["unmerge_adapter"]


@contextlib.contextmanager
def _put_back(layers: list[Any]) -> Iterator[None]:
    """Afterwards the weights under the adapters are what they were, bit for bit. Merging changes or replaces them."""
    kept: list[tuple[nn.Module, str, nn.Parameter, Tensor]] = []
    for layer in layers:
        base = layer.get_base_layer()
        kept += [(base, name, p, p.detach().clone()) for name, p in base.named_parameters(recurse=False)]
    try:
        yield
    finally:
        for base, name, parameter, value in kept:
            base._parameters[name] = parameter
            with torch.no_grad():
                parameter.copy_(value)
