"""What TRL gives vLLM of a policy with adapters: the weights with their adapters in, and the policy left as it is.

TRL merges every adapter into the policy's own weights, reads them, and subtracts it again, at each step. In half
precision that rounds: the frozen weights drift, a little at every step, and the adapter that is saved belongs to
weights that nobody has. The canary cannot see it, since vLLM drifts along. Here W + s·BA is computed apart, layer by
layer, as for the grouped engine; other kinds of adapters are merged as TRL does, and the weights then put back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from rlvr.errors import AdapterError
from rlvr.rollout.grouped.weights import mergeable, merged_weight


def merge_apart(generation: Any) -> None:
    """From now on the policy's weights are the same after they were given to vLLM as before.

    Weights under adapters that are not plain LoRA are there twice meanwhile. A sharded model stays with TRL, which
    gathers it to merge.

    Args:
        generation: TRL's `VLLMGeneration`.
    """
    if generation._dist.is_fsdp or generation._dist.is_zero3:
        return
    own = generation._iter_named_params

    def iter_named_params() -> Iterator[tuple[str, Tensor]]:
        model = generation.model
        if not isinstance(model, PeftModel):
            yield from own()
            return
        layers: list[Any] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        waiting = {layer.base_layer.weight.data_ptr(): layer for layer in layers if mergeable(layer)}
        with _left_to_us(model), _merged([layer for layer in layers if not mergeable(layer)]):
            for name, value in own():
                layer = waiting.pop(value.data_ptr(), None)
                yield name, value if layer is None else merged_weight(layer)
        if waiting:
            raise AdapterError(f"vLLM did not get the adapters of {len(waiting)} layers; use rollout_engine='auto'.")

    generation._iter_named_params = iter_named_params


@contextlib.contextmanager
def _left_to_us(model: PeftModel) -> Iterator[None]:
    """What TRL calls before and after it reads the weights does nothing."""
    model.__dict__.update(merge_adapter=lambda: None, unmerge_adapter=lambda: None)
    try:
        yield
    finally:
        del model.__dict__["merge_adapter"], model.__dict__["unmerge_adapter"]


@contextlib.contextmanager
def _merged(layers: list[Any]) -> Iterator[None]:
    """Layers whose adapters PEFT merges and takes out again; their weights are then put back, bit for bit."""
    bases = [layer.get_base_layer() for layer in layers]
    kept = [(base, name, p, p.detach().clone()) for base in bases for name, p in base.named_parameters(recurse=False)]
    try:
        for layer in layers:
            layer.merge()
        yield
    finally:
        for layer in layers:
            if layer.merged:
                layer.unmerge()
        for base, name, parameter, value in kept:  # of a quantized layer PEFT makes a new parameter
            base._parameters[name] = parameter
            with torch.no_grad():
                parameter.copy_(value)
