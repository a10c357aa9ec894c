"""RMS norm, rotary embedding and gated activation of a decoder as one kernel each, forward and backward.

transformers computes each of them in five to ten elementwise kernels, which read and write the activations as often;
with the matrix products of a long packed row they take about a third of an update's time. Here each is one autograd
function, in Triton on CUDA and in plain torch elsewhere. Sums are taken in float32 and values rounded where the
model's own code rounds them, save that rotation rounds once instead of three times.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlvr.fused import lora
from rlvr.fused.mlp import Gated, checkpointed_mlp


class NormStyle(NamedTuple):
    """y = (shift + weight)·x/rms. `rounds`: x/rms is rounded to x's dtype first, and y has the dtype that the product
    then has; otherwise y is rounded once, to x's dtype."""

    shift: float
    rounds: bool


LLAMA, OLMO, GEMMA = NormStyle(0.0, True), NormStyle(0.0, False), NormStyle(1.0, False)
NORMS = {
    **{
        f"{name}RMSNorm": LLAMA
        for name in ("Llama", "Qwen2", "Qwen3", "Mistral", "Phi3", "Glm4", "Granite", "SmolLM3")
    },
    **{f"{name}RMSNorm": OLMO for name in ("Olmo2", "Olmo3")},
    **{f"{name}RMSNorm": GEMMA for name in ("Gemma", "Gemma3")},
}
"""By class name: all whose formula was compared. A class not named here or below keeps its own forward."""
GATED = frozenset(
    f"{name}MLP"
    for name in ("Llama", "Qwen2", "Qwen3", "Mistral", "Granite", "SmolLM3", "Olmo2", "Olmo3", "Gemma", "Gemma3")
)
PAIRED = frozenset({"Phi3MLP", "Glm4MLP"})  # gate and up in one product
NORMS_AFTER_MLP = frozenset({"post_feedforward_layernorm", "post_mlp_layernorm"})
ROTARY = frozenset(
    f"{name}Attention"
    for name in ("Llama", "Qwen2", "Qwen3", "Mistral", "Granite", "SmolLM3", "Starcoder2", "Gemma", "Gemma3", "Phi3")
)


class _RmsNorm(torch.autograd.Function):
    """x (n, width), weight (width,)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, style: NormStyle) -> Tensor:
        dtype = torch.promote_types(x.dtype, weight.dtype) if style.rounds else x.dtype
        if x.is_cuda:
            from rlvr.fused.kernels import rms_norm

            y, inverse = rms_norm(x, weight, eps, shift=style.shift, rounds=style.rounds, dtype=dtype)
        else:
            inverse = torch.rsqrt(x.float().pow(2).mean(-1) + eps)
            normed = x.float() * inverse[:, None]
            y = (normed.to(x.dtype) * weight if style.rounds else normed * (weight.float() + style.shift)).to(dtype)
        ctx.save_for_backward(x, inverse)
        ctx.weight, ctx.shift = weight, style.shift  # kept, not saved: see `lora._LoraInput`
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, inverse), weight = ctx.saved_tensors, ctx.weight
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0] and x.is_cuda:
            from rlvr.fused.kernels import rms_norm_backward

            grad_x = rms_norm_backward(grad.contiguous(), x, weight, inverse, shift=ctx.shift)
        elif ctx.needs_input_grad[0]:
            normed = x.float() * inverse[:, None]
            inner = grad.float() * (weight.float() + ctx.shift)
            grad_x = (inverse[:, None] * (inner - normed * (inner * normed).mean(-1, keepdim=True))).to(x.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = (grad.float() * (x.float() * inverse[:, None])).sum(0).to(weight.dtype)
        return grad_x, grad_weight, None, None


class _Rotary(torch.autograd.Function):
    """x·cos + rotate_half(x)·sin of q (B, H, N, D) and k (B, H_kv, N, D); cos and sin (B or 1, N, D)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.cos, ctx.sin = cos, sin  # the same for all layers, so kept, not saved
        ctx.dtypes = q.dtype, k.dtype
        dtypes = torch.promote_types(q.dtype, cos.dtype), torch.promote_types(k.dtype, cos.dtype)
        return _rotated(q, k, cos, sin, dtypes, backward=False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
        return *_rotated(grad_q, grad_k, ctx.cos, ctx.sin, ctx.dtypes, backward=True), None, None


def _rotated(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, dtypes: tuple[torch.dtype, torch.dtype], *, backward: bool
) -> tuple[Tensor, Tensor]:
    if q.is_cuda:
        from rlvr.fused.kernels import rotary

        q, k, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, cos, sin))
        return rotary(q, k, cos, sin, dtypes, backward=backward)
    cos, sin = cos[:, None], sin[:, None]

    def rotated(x: Tensor) -> Tensor:
        if backward:  # the transposed rotation
            first, second = (x * sin).chunk(2, -1)
            return x * cos + torch.cat([second, -first], -1)
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    return rotated(q).to(dtypes[0]), rotated(k).to(dtypes[1])


class _Forward:
    """The fused forward of one layer. An object, so that in a copy of the model it belongs to the copied layer."""

    def __init__(self, layer: nn.Module):
        self.layer: Any = layer


class _NormForward(_Forward):
    def __call__(self, x: Tensor) -> Tensor:
        layer = self.layer
        eps = layer.eps if hasattr(layer, "eps") else layer.variance_epsilon
        rows = x.reshape(-1, x.shape[-1])
        return _RmsNorm.apply(rows.contiguous(), layer.weight, eps, NORMS[type(layer).__name__]).view(x.shape)


class _GatedForward(_Forward):
    """
    Attributes:
        ends_block: whether nothing that keeps its input follows in its block.
        checkpointed: whether its block is computed again in the backward pass, up to it.
    """

    ends_block = checkpointed = False

    def __call__(self, x: Tensor) -> Tensor:
        layer = self.layer
        if self.checkpointed and torch.is_grad_enabled():
            gate_up, down = lora.computed_together(layer.gate_proj, x), lora.computed_together(layer.down_proj, x)
            if gate_up is not None and len(gate_up.layers) == 2 and down is not None:
                rows = x.reshape(-1, x.shape[-1]).to(gate_up.all_a.dtype)
                output = checkpointed_mlp(rows, gate_up, down, is_tanh_gelu(layer.act_fn))
                return output.view(*x.shape[:-1], output.shape[-1])
        return layer.down_proj(_gated(layer.gate_proj(x), layer.up_proj(x), layer.act_fn))


class _PairedForward(_Forward):
    def __call__(self, x: Tensor) -> Tensor:
        layer = self.layer
        gate, up = layer.gate_up_proj(x).chunk(2, -1)
        return layer.down_proj(_gated(gate, up, layer.activation_fn))


class _RotaryForward(_Forward):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _with_fused_rotary(type(self.layer).forward)(self.layer, *args, **kwargs)


def _gated(gate: Tensor, up: Tensor, activation: nn.Module) -> Tensor:
    is_gelu = is_tanh_gelu(activation)
    rows = (x.reshape(-1, x.shape[-1]) for x in (gate, up))
    return Gated.apply(*rows, is_gelu).view(gate.shape)


@cache
def _with_fused_rotary(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The attention's own forward, but that the function it calls by the name of `apply_rotary_pos_emb` is ours."""
    own = forward.__globals__["apply_rotary_pos_emb"]

    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or cos.ndim != 3 or cos.shape[-1] != q.shape[-1]:
            return own(q, k, cos, sin, *args, **kwargs)
        return _Rotary.apply(q, k, cos, sin)

    names = {**forward.__globals__, "apply_rotary_pos_emb": apply_rotary_pos_emb}
    copied = types.FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    copied.__kwdefaults__ = forward.__kwdefaults__
    return copied


def fuse_layers(model: nn.Module) -> int:
    """Computes the model's norms, rotations and gated activations in this way from now on. Idempotent;
    `unfuse_layers` takes it back. Layers that are unknown, or patched by somebody, stay as they are.

    Returns:
        How many layers are fused.
    """
    for module in model.modules():
        kind = _forward_class(module)
        if kind is not None and "forward" not in module.__dict__:
            module.__dict__["forward"] = kind(module)
    for block in model.modules():
        mlp = block._modules.get("mlp")
        forward = None if mlp is None else mlp.__dict__.get("forward")
        if isinstance(forward, _GatedForward):
            forward.ends_block = not NORMS_AFTER_MLP & block._modules.keys()
    return sum(isinstance(module.__dict__.get("forward"), _Forward) for module in model.modules())


def unfuse_layers(model: nn.Module) -> None:
    """Gives the layers their own forward back."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), _Forward):
            del module.__dict__["forward"]


class FusedForwards:
    """The fused forwards of a model, LoRA layers included, found once: putting them in and out costs nothing."""

    def __init__(self, model: nn.Module):
        own = {module for module in model.modules() if "forward" in module.__dict__}
        fuse_layers(model)
        lora.fuse_lora(model)
        self._forwards = [
            (module, module.__dict__["forward"])
            for module in model.modules()
            if "forward" in module.__dict__ and module not in own
        ]
        unfuse_layers(model)
        lora.unfuse_lora(model)

    def put_in(self, *, checkpointed: bool = False, hold: bool = False) -> None:
        """
        Args:
            checkpointed: whether blocks are computed again in the backward pass.
            hold: LoRA layers hold what they find (`lora.hold`): no weight changes before these are taken out or put
                in anew.
        """
        if hold:
            lora.hold(forward for _, forward in self._forwards)
        for module, forward in self._forwards:
            if isinstance(forward, _GatedForward):
                forward.checkpointed = checkpointed and forward.ends_block
            module.__dict__.setdefault("forward", forward)

    def take_out(self) -> None:
        lora.let_go(forward for _, forward in self._forwards)
        for module, forward in self._forwards:
            if module.__dict__.get("forward") is forward:
                del module.__dict__["forward"]


def is_tanh_gelu(activation: Any) -> bool:
    return type(activation).__name__ == "GELUTanh"


def is_gated_mlp(module: nn.Module) -> bool:
    """Whether it computes down_proj(act_fn(gate_proj(x)) · up_proj(x)), by silu or tanh's gelu."""
    return _forward_class(module) is _GatedForward


def _forward_class(module: Any) -> type[_Forward] | None:
    kind, name = type(module), type(module).__name__
    if not kind.__module__.startswith("transformers.models.") or kind.forward.__module__ != kind.__module__:
        return None
    if name in NORMS:
        return _NormForward
    activation = getattr(module, "act_fn" if name in GATED else "activation_fn", None)
    is_silu = isinstance(activation, nn.SiLU) or type(activation).__name__ == "SiLUActivation"
    if name in GATED | PAIRED and (is_silu or is_tanh_gelu(activation)):
        return _GatedForward if name in GATED else _PairedForward
    if name in ROTARY and "apply_rotary_pos_emb" in kind.forward.__code__.co_names:
        return _RotaryForward
    return None
