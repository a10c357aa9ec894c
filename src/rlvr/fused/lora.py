"""LoRA linear layers in fewer, smaller kernels: y = x Wᵀ + b + s (x Aᵀ) Bᵀ as one differentiable function.

PEFT keeps adapters in float32 and computes them apart: the input is copied to float32 and back for every
layer, and the adapter's output, as large as the layer's, is scaled, added and rounded in kernels of its own.
Here the low-rank product is accumulated into the layer's output by the matrix product itself, and layers that
share an input share what is kept of it for the backward pass. Same mathematics; under autocast also the same
precision, since autocast runs PEFT's products in half precision too.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn


def _lora_product(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """x (n, in), W (out, in), b (out,) or None, A (r, in), B (out, r); W and b are frozen."""
    promised, hidden, low_rank_b = _LoraInput.apply(x, weight, a, b, scaling)
    return _LoraOutput.apply(promised, x, hidden, weight, bias, low_rank_b, scaling)


class _LoraInput(torch.autograd.Function):
    """The narrow product, and the backward pass of both.

    It saves all that the backward pass needs before the output is computed. Non-reentrant checkpointing stops to
    compute again once everything is saved: so a block's last layer, `down_proj` where no norm follows it, does not
    compute its output twice.

    Returns:
        What `_LoraOutput` takes: a tensor of the output's shape that holds nothing, for the gradient to come back
        through; x Aᵀ (n, r); and B in x's dtype.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scaling: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        low_rank_a, low_rank_b = a.to(x.dtype), b.to(x.dtype)
        hidden = x @ low_rank_a.t()
        promised = x.new_empty(()).expand(len(x), len(weight))
        ctx.save_for_backward(x, weight, low_rank_a, low_rank_b, hidden)
        ctx.scaling, ctx.adapter_dtype = scaling, a.dtype
        ctx.mark_non_differentiable(hidden, low_rank_b)
        ctx.set_materialize_grads(False)  # theirs would be zeros, made for nothing
        return promised, hidden, low_rank_b

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, a, b, hidden = ctx.saved_tensors
        grad_hidden = _scaled_product(grad, b, ctx.scaling)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_hidden @ a).addmm_(grad, weight)
        grad_a = (grad_hidden.t() @ x).to(ctx.adapter_dtype)
        grad_b = _scaled_product(grad.t(), hidden, ctx.scaling).to(ctx.adapter_dtype)
        return grad_x, None, grad_a, grad_b, None


class _LoraOutput(torch.autograd.Function):
    """The output; its gradient goes to `promised`."""

    @staticmethod
    def forward(
        ctx: Any,
        promised: Tensor,
        x: Tensor,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        low_rank_b: Tensor,
        scaling: float,
    ) -> Tensor:
        # The narrow product first: the wide one, which has the time for it, then adds up.
        if bias is None:
            output = _scaled_product(hidden, low_rank_b.t(), scaling)
        else:
            output = torch.addmm(bias, hidden, low_rank_b.t(), alpha=scaling)
        return output.addmm_(x, weight.t())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None, None, None, None, None, None


def _scaled_product(one: Tensor, other: Tensor, scale: float) -> Tensor:
    """scale · (one @ other), in one kernel."""
    result = one.new_empty(one.shape[0], other.shape[1])
    return result.addmm_(one, other, beta=0, alpha=scale)


def fuse_lora(model: nn.Module) -> int:
    """Computes the model's plain LoRA layers in this way from now on. Idempotent; `unfuse_lora` takes it
    back.

    A layer decides at every call: where dropout, DoRA, a merged, disabled or second adapter, a trained base
    weight or unlike dtypes are in the way, PEFT's own forward runs.

    Returns:
        How many layers there are.
    """
    layers = [module for module in model.modules() if type(module) is LoraLinear]
    for layer in layers:
        if "forward" not in layer.__dict__:
            layer.__dict__["forward"] = _Forward(layer)
    return len(layers)


def unfuse_lora(model: nn.Module) -> None:
    """Gives PEFT's layers their own forward back."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), _Forward):
            del module.forward


class _Forward:
    """The forward of one layer. An object, so that in a copy of the model it belongs to the copied layer."""

    def __init__(self, layer: LoraLinear):
        self.layer: Any = layer

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer = self.layer
        adapter = None if args or kwargs else _only_adapter(layer)
        if adapter is None:
            return LoraLinear.forward(layer, x, *args, **kwargs)
        base, a, b = layer.base_layer, layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        elif x.dtype == base.weight.dtype == a.dtype == b.dtype:
            dtype = x.dtype
        else:
            return LoraLinear.forward(layer, x)
        bias = None if base.bias is None else base.bias.to(dtype)
        flat = x.reshape(-1, x.shape[-1]).to(dtype)
        output = _lora_product(flat, base.weight.to(dtype), bias, a, b, layer.scaling[adapter])
        return output.view(*x.shape[:-1], output.shape[-1])


def _only_adapter(layer: LoraLinear) -> str | None:
    """The name of the one active adapter, if the layer is now nothing but W, b, A and B."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1 or layer.disable_adapters or layer.merged or active[0] in layer.lora_variant:
        return None
    base, dropout, b = layer.base_layer, layer.lora_dropout[active[0]], layer.lora_B[active[0]]
    frozen = not base.weight.requires_grad and (base.bias is None or not base.bias.requires_grad)
    drops = layer.training and getattr(dropout, "p", 0.0) > 0
    plain = type(base) is nn.Linear and not base._forward_hooks and not base._forward_pre_hooks
    return active[0] if plain and frozen and not drops and b.bias is None else None
