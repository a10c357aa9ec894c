"""LoRA linear layers in fewer, smaller kernels: y = x Wᵀ + b + s (x Aᵀ) Bᵀ as one differentiable function.

PEFT keeps adapters in float32 and computes them apart: the input is copied to float32 and back for every layer, and
the adapter's output, as large as the layer's, is scaled, added and rounded in kernels of its own. Here the low-rank
product is accumulated into the layer's output by the matrix product itself, and layers that share an input share what
is read of it: queries, keys and values are computed together, and gate and up. Same mathematics; under autocast also
the same precision, since autocast runs PEFT's products in half precision too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers of one module that it calls in this order, with the same input."""


class _Layer(NamedTuple):
    """One of the linear layers that share an input."""

    weight: Tensor  # (out, in), frozen, as the next one; in its own dtype: a cast copy is not kept for backward
    bias: Tensor | None  # (out,)
    a: Tensor  # (r, in)
    b: Tensor  # (out, r)
    scaling: float


class Together(NamedTuple):
    """Linear layers that share an input, and their adapters as the products take them."""

    layers: Sequence[_Layer]
    all_a: Tensor  # A of all layers, one below the other (Σr, in)
    every_b: Sequence[Tensor]  # each B (out, r), in the dtype of `all_a`

    @classmethod
    @torch.no_grad()  # the products compute the gradients of A and B themselves
    def of(cls, layers: Sequence[_Layer], dtype: torch.dtype) -> Together:
        all_a = layers[0].a if len(layers) == 1 else torch.cat([layer.a for layer in layers])
        return cls(layers, all_a.to(dtype), [layer.b.to(dtype) for layer in layers])

    def hidden(self, x: Tensor) -> Tensor:
        """x Aᵀ (n, Σr), the layers side by side."""
        return x @ self.all_a.t()


def _lora_products(x: Tensor, together: Together) -> tuple[Tensor, ...]:
    """x (n, in), in the dtype of the adapters, → (n, out) for each layer."""
    with torch.no_grad():
        hidden = together.hidden(x)
    adapters = [tensor for layer in together.layers for tensor in (layer.a, layer.b)]
    if len(together.layers) > 1:  # never the last of a block
        return _Lora.apply(x, hidden, together, *adapters)
    promised = _LoraInput.apply(x, hidden, together, *adapters)
    return _LoraOutput.apply((x, hidden, together), *promised)


class _LoraInput(torch.autograd.Function):
    """The backward pass of layers that share an input.

    It saves all that the backward pass needs before the outputs are computed. Non-reentrant checkpointing stops to
    compute again once everything is saved: so a block's last layer, `down_proj` where no norm follows it, does not
    compute its output twice. Weights are kept without being saved: checkpointing looks at what is saved piece by
    piece, which takes the host longer than a kernel takes the GPU.

    Args:
        hidden: x Aᵀ (n, Σr), the layers side by side.
        adapters: A, B, A, B, ... as they are trained.

    Returns:
        What `_LoraOutput` takes: for each layer a tensor of its output's shape that holds nothing, for the gradient
        to come back through.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, hidden: Tensor, together: Together, *adapters: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, hidden)
        ctx.together = together
        return tuple(x.new_empty(()).expand(len(x), len(layer.weight)) for layer in together.layers)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden = ctx.saved_tensors
        grad_x, of_adapters = lora_gradients(x, hidden, ctx.together, grads, needs_x=ctx.needs_input_grad[0])
        return grad_x, None, None, *of_adapters


class _LoraOutput(torch.autograd.Function):
    """The outputs; their gradients go to `promised`."""

    @staticmethod
    def forward(ctx: Any, inputs: tuple[Tensor, Tensor, Together], *promised: Tensor) -> tuple[Tensor, ...]:
        return lora_outputs(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *grads


class _Lora(_LoraInput):
    """Both in one, for layers that checkpointing computes again anyhow."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, hidden: Tensor, together: Together, *adapters: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, hidden)
        ctx.together = together
        return lora_outputs(x, hidden, together)


def lora_outputs(x: Tensor, hidden: Tensor, together: Together) -> tuple[Tensor, ...]:
    """x Wᵀ + b + s · hidden Bᵀ of each layer, (n, out). `hidden`: of `together.hidden(x)`."""
    layers = together.layers
    outputs = []
    for part, b, layer in zip(hidden.split(_ranks(layers), 1), together.every_b, layers, strict=True):
        # The narrow product first: the wide one, which has the time for it, then adds up.
        if layer.bias is None:
            output = _scaled_product(part, b.t(), layer.scaling)
        else:
            output = torch.addmm(layer.bias, part, b.t(), alpha=layer.scaling)
        outputs.append(output.addmm_(x, layer.weight.to(x.dtype).t()))
    return tuple(outputs)


def lora_gradients(
    x: Tensor,
    hidden: Tensor,
    together: Together,
    grads: Sequence[Tensor],
    *,
    needs_x: bool = True,
    in_place: bool = False,
) -> tuple[Any, list[Tensor]]:
    """Of x (None unless `needs_x`), and of A, B, A, B, ... in the dtypes that they are trained in.

    Args:
        grads: of the layers' outputs, each (n, out).
        in_place: the gradient of x takes the memory of x.
    """
    layers, all_a, every_b = together
    ranks = _ranks(layers)
    grad_hidden = torch.empty_like(hidden)
    for part, grad, b, layer in zip(grad_hidden.split(ranks, 1), grads, every_b, layers, strict=True):
        part.addmm_(grad, b, beta=0, alpha=layer.scaling)
    grad_a = (grad_hidden.t() @ x).to(layers[0].a.dtype).split(ranks)
    grad_b = [
        _scaled_product(grad.t(), part, layer.scaling).to(layer.b.dtype)
        for grad, part, layer in zip(grads, hidden.split(ranks, 1), layers, strict=True)
    ]
    grad_x = None
    if needs_x:
        grad_x = torch.mm(grad_hidden, all_a, out=x if in_place else None)
        for grad, layer in zip(grads, layers, strict=True):
            grad_x.addmm_(grad, layer.weight.to(grad.dtype))
    return grad_x, [grad for pair in zip(grad_a, grad_b, strict=True) for grad in pair]


def _ranks(layers: Sequence[_Layer]) -> list[int]:
    return [len(layer.a) for layer in layers]


def _scaled_product(one: Tensor, other: Tensor, scale: float) -> Tensor:
    """scale · (one @ other), in one kernel."""
    result = one.new_empty(one.shape[0], other.shape[1])
    return result.addmm_(one, other, beta=0, alpha=scale)


def fuse_lora(model: nn.Module) -> int:
    """Computes the model's plain LoRA layers in this way from now on. Idempotent; `unfuse_lora` takes it back.

    A layer decides at every call, unless told to `hold`: where dropout, DoRA, a merged, disabled or second adapter, a
    trained base weight or unlike dtypes are in the way, PEFT's own forward runs.

    Returns:
        How many layers there are.
    """
    layers = [module for module in model.modules() if type(module) is LoraLinear]
    for layer in layers:
        if "forward" not in layer.__dict__:
            layer.__dict__["forward"] = _Forward(layer)
    for parent in model.modules():
        for names in SAME_INPUT:
            forwards = [_forward_of(parent._modules.get(name)) for name in names]
            first = forwards[0]
            if first is not None:
                width = first.layer.in_features  # of cross-attention's keys and values it may be another
                first.others = [other for other in forwards[1:] if other and other.layer.in_features == width]
    return len(layers)


def unfuse_lora(model: nn.Module) -> None:
    """Gives PEFT's layers their own forward back."""
    for module in model.modules():
        if _forward_of(module) is not None:
            del module.forward


def _forward_of(module: nn.Module | None) -> _Forward | None:
    forward = None if module is None else module.__dict__.get("forward")
    return forward if isinstance(forward, _Forward) else None


def computed_together(module: Any, x: Tensor) -> Together | None:
    """What a layer, and those it is computed together with, are now for inputs like x. None: PEFT computes one, or
    somebody has put hooks on it, or a forward."""
    forward = _forward_of(module)
    if forward is None:
        return None
    ours = all(_forward_of(part.layer) is part and not _has_hooks(part.layer) for part in (forward, *forward.others))
    return forward.together(x) if ours else None


class _Forward:
    """The forward of one layer. An object, so that in a copy of the model it belongs to the copied layer.

    Attributes:
        others: of the layers that are called next with the same input, and are computed together with this one.
        ready: an input, whether gradients were asked for, and this layer's output, if it was computed with another.
        found: what was found to be computed together, by dtype; None: it is found again at every call.
    """

    def __init__(self, layer: LoraLinear):
        self.layer: Any = layer
        self.others: list[_Forward] = []
        self.ready: tuple[Tensor, bool, Tensor] | None = None
        self.found: dict[tuple[torch.dtype, bool], Together | None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "ready": None, "found": None}  # a copy holds nothing: nobody would let it go

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        ready, self.ready = self.ready, None
        if args or kwargs:
            return LoraLinear.forward(self.layer, x, *args, **kwargs)
        if ready is not None and ready[0] is x and ready[1] == torch.is_grad_enabled():
            return ready[2]
        together = self.together(x)
        if together is None:
            return LoraLinear.forward(self.layer, x)
        rows = x.reshape(-1, x.shape[-1]).to(together.all_a.dtype)
        outputs = [output.view(*x.shape[:-1], output.shape[-1]) for output in _lora_products(rows, together)]
        for other, output in zip(self.others, outputs[1:], strict=False):  # this layer alone: nothing for the others
            other.ready = (x, torch.is_grad_enabled(), output)
        return outputs[0]

    def together(self, x: Tensor) -> Together | None:
        autocast = torch.is_autocast_enabled(x.device.type)
        key = (torch.get_autocast_dtype(x.device.type) if autocast else x.dtype), autocast
        found = {} if self.found is None else self.found
        if key not in found:
            every = [self.layer, *(other.layer for other in self.others)]
            found[key] = _together(every, *key) or _together([self.layer], *key)
        return found[key]


def hold(forwards: Iterable[Any]) -> None:
    """Until `let_go`, these layers' forwards decide once what they compute, and cast the adapters once: for a forward
    and its backward pass, between which no weight changes. From the start again if they held something."""
    for forward in forwards:
        if isinstance(forward, _Forward):
            forward.found = {}


def let_go(forwards: Iterable[Any]) -> None:
    for forward in forwards:
        if isinstance(forward, _Forward):
            forward.found = None


def _together(lora_layers: Sequence[Any], dtype: torch.dtype, autocast: bool) -> Together | None:
    """The layers, to be computed in `dtype`; None if one is now more than W, b, A and B, or of another dtype."""
    layers = []
    for lora_layer in lora_layers:
        name = _only_adapter(lora_layer)
        if name is None:
            return None
        base, a, b = lora_layer.base_layer, lora_layer.lora_A[name].weight, lora_layer.lora_B[name].weight
        if not autocast and not dtype == base.weight.dtype == a.dtype == b.dtype:
            return None
        bias = None if base.bias is None else base.bias.to(dtype)
        layers.append(_Layer(base.weight, bias, a, b, lora_layer.scaling[name]))
    return Together.of(layers, dtype)


def _only_adapter(layer: LoraLinear) -> str | None:
    """The name of the one active adapter, if the layer is now nothing but W, b, A and B."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1 or layer.disable_adapters or layer.merged or active[0] in layer.lora_variant:
        return None
    base, dropout = layer.base_layer, layer.lora_dropout[active[0]]
    a, b = layer.lora_A[active[0]], layer.lora_B[active[0]]
    if not all(map(is_plain_linear, (base, a, b))) or b.bias is not None:
        return None
    frozen = not base.weight.requires_grad and (base.bias is None or not base.bias.requires_grad)
    drops = layer.training and getattr(dropout, "p", 0.0) > 0
    return active[0] if frozen and not drops else None


def is_plain_linear(module: Any) -> bool:
    """Whether it computes x Wᵀ + b, and nobody changed that from outside."""
    return type(module) is nn.Linear and is_untouched(module)


def is_untouched(module: nn.Module) -> bool:
    """Nobody has put hooks on it, or a forward of its own."""
    return not (_has_hooks(module) or "forward" in module.__dict__)


def _has_hooks(module: nn.Module) -> bool:
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(hooks)
