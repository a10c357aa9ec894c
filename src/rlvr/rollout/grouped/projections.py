"""Products of a token step that read the same input, together.

A batch of a few dozen rows is too small for one product to fill a GPU: each waits for its own start. Query, key and
value become one product: on an H100 the three take 16 µs a layer of Qwen2.5-1.5B at 64 rows, the one 7 µs. The weights
are copied for it (6 MB a layer there), anew for every rollout. Gate, up and activation become one kernel, which takes
the weights where they are (`gated_kernel`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlvr.fused.layers import is_gated_mlp
from rlvr.fused.lora import is_plain_linear, is_untouched

HALF = (torch.bfloat16, torch.float16)
NAMES = ("q_proj", "k_proj", "v_proj")


class PackedProjections:
    """Stand-ins for a model's projections; copies at addresses that stay, where they are copies.

    Args:
        model: with its adapters merged. Layers whose projections are not plain linear layers are left alone.
    """

    def __init__(self, model: nn.Module):
        self._layers: list[tuple[nn.Module, list[nn.Linear], _Product, list[_Part]]] = []
        for parent in model.modules():
            if (parts := _projections(parent)) is not None:
                product = _Product(parts)
                self._layers.append((parent, parts, product, [_Part(product, index) for index in range(len(parts))]))
        self._gated = [
            (parent, name, mlp, _gated_projections(mlp))
            for parent in model.modules()
            for name, mlp in parent.named_children()
            if takes_gated(mlp)
        ]

    def load(self) -> None:
        """Copies the weights as they are now."""
        for _, parts, product, _ in self._layers:
            product.load(parts)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it, the model computes with the stand-ins."""
        try:
            for parent, _, _, stand_ins in self._layers:
                parent._modules.update(zip(NAMES, stand_ins, strict=True))
            for parent, name, _, stand_in in self._gated:
                parent._modules[name] = stand_in
            yield
        finally:
            for parent, parts, _, _ in self._layers:
                parent._modules.update(zip(NAMES, parts, strict=True))
            for parent, name, mlp, _ in self._gated:
                parent._modules[name] = mlp


class _Product:
    """The packed weight, and its result between the calls of the first part and of the last."""

    def __init__(self, parts: Sequence[nn.Linear]):
        with torch.no_grad():
            self.weight = torch.cat([part.weight for part in parts])
            self.bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])
        self.sizes = [part.out_features for part in parts]
        self.result: Tensor | None = None

    @torch.no_grad()
    def load(self, parts: Sequence[nn.Linear]) -> None:
        for own, part in zip(self.weight.split(self.sizes), parts, strict=True):
            own.copy_(part.weight)
        if self.bias is not None:
            for own, part in zip(self.bias.split(self.sizes), parts, strict=True):
                own.copy_(part.bias)


class _Part(nn.Module):
    """Stands for one projection. The model calls the parts in their order, all with the same input."""

    def __init__(self, product: _Product, index: int):
        super().__init__()
        self.product = product
        self.start = sum(product.sizes[:index])
        self.stop = self.start + product.sizes[index]
        self.is_first, self.is_last = index == 0, index == len(product.sizes) - 1

    def forward(self, x: Tensor) -> Tensor:
        product = self.product
        if self.is_first:
            product.result = F.linear(x, product.weight, product.bias)
        result = product.result
        if result is None:
            raise RuntimeError("attention asked for keys or values before it asked for queries.")
        if self.is_last:
            product.result = None
        return result[..., self.start : self.stop]


def _gated_projections(mlp: nn.Module) -> nn.Module:
    from rlvr.rollout.grouped.gated_kernel import GatedProjections  # needs Triton

    return GatedProjections(mlp)


def takes_gated(mlp: Any) -> bool:
    """Whether it is a gated MLP of plain projections that the kernel can compute."""
    if not is_gated_mlp(mlp) or not is_untouched(mlp) or not is_untouched(mlp.act_fn):
        return False
    parts = [mlp._modules[name] for name in ("gate_proj", "up_proj")]
    if not all(map(is_plain_linear, parts)) or any(part.bias is not None for part in parts):
        return False
    weights = [part.weight for part in parts]
    return (
        all(w.is_cuda and w.dtype in HALF and w.is_contiguous() for w in weights)
        and weights[0].dtype == weights[1].dtype
    )


def _projections(parent: Any) -> list[nn.Linear] | None:
    parts: list[Any] = [parent._modules.get(name) for name in NAMES]
    if (
        not all(map(is_plain_linear, parts))
        or len({(part.bias is None, part.weight.dtype, part.in_features) for part in parts}) > 1
    ):
        return None
    return parts
