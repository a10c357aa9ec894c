"""Triton kernels of `layers` and `flash`, which have their slow twins. Everything is computed in float32 and stored in
the dtype of the output."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

GELU_SLOPE, GELU_CUBIC = 1.5957691216057308, 0.044715  # 2·sqrt(2/π): gelu_tanh(g) = g·sigmoid(slope·(g + cubic·g³))


def _warps(block: int) -> int:
    return min(max(block // 512, 1), 8)


@triton.jit
def _rms_norm(x, weight, y, inverse, width, eps, SHIFT: tl.constexpr, ROUND: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, 0) / width + eps)
    value = value * scale
    if ROUND:
        value = value.to(x.dtype.element_ty).to(tl.float32)
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32) + SHIFT
    tl.store(y + row * width + column, (value * factor).to(y.dtype.element_ty), mask=inside)
    tl.store(inverse + row, scale)


@triton.jit
def _rms_norm_backward(grad, x, weight, inverse, grad_x, width, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    scale = tl.load(inverse + row)
    normed = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32) * scale
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32) + SHIFT
    inner = tl.load(grad + row * width + column, mask=inside, other=0.0).to(tl.float32) * factor
    result = scale * (inner - normed * (tl.sum(inner * normed, 0) / width))
    tl.store(grad_x + row * width + column, result.to(grad_x.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, shift: float, rounds: bool, dtype: torch.dtype) -> Any:
    """Of contiguous rows (n, width): the output, and 1/rms of each row in float32."""
    rows, width = x.shape
    y, inverse = torch.empty_like(x, dtype=dtype), torch.empty(rows, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    _rms_norm[(rows,)](
        x, weight, y, inverse, width, eps, SHIFT=shift, ROUND=rounds, BLOCK=block, num_warps=_warps(block)
    )
    return y, inverse


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, *, shift: float) -> Tensor:
    grad_x = torch.empty_like(x)
    block = triton.next_power_of_2(x.shape[1])
    _rms_norm_backward[(len(x),)](
        grad, x, weight, inverse, grad_x, x.shape[1], SHIFT=shift, BLOCK=block, num_warps=_warps(block)
    )
    return grad_x


@triton.jit
def _gate(gate, GELU: tl.constexpr, SLOPE: tl.constexpr, CUBIC: tl.constexpr):
    """(sigmoid, derivative of its argument): both activations are gate·sigmoid(argument)."""
    if GELU:
        argument = SLOPE * (gate + CUBIC * gate * gate * gate)
        slope = SLOPE * (1.0 + 3.0 * CUBIC * gate * gate)
    else:
        argument = gate
        slope = gate * 0.0 + 1.0
    return tl.sigmoid(argument), slope


@triton.jit
def _gated(
    gate, up, y, width, gate_stride, up_stride,
    GELU: tl.constexpr, SLOPE: tl.constexpr, CUBIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    g = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid, _ = _gate(g, GELU, SLOPE, CUBIC)
    activated = (g * sigmoid).to(gate.dtype.element_ty).to(tl.float32)
    tl.store(y + row * width + column, (activated * u).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _gated_backward(
    grad, gate, up, grad_gate, grad_up, width, gate_stride, up_stride,
    GELU: tl.constexpr, SLOPE: tl.constexpr, CUBIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    g = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(grad + row * width + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid, slope = _gate(g, GELU, SLOPE, CUBIC)
    by_gate = d * u * sigmoid * (1.0 + g * (1.0 - sigmoid) * slope)
    tl.store(grad_gate + row * width + column, by_gate.to(grad_gate.dtype.element_ty), mask=inside)
    tl.store(grad_up + row * width + column, (d * g * sigmoid).to(grad_up.dtype.element_ty), mask=inside)


def _gated_grid(rows: int, width: int) -> tuple[int, int]:
    return rows, triton.cdiv(width, 1024)


def gated(gate: Tensor, up: Tensor, *, gelu: bool) -> Tensor:
    """act(gate)·up of rows (n, width), each row contiguous."""
    rows, width = gate.shape
    y = torch.empty(rows, width, dtype=torch.promote_types(gate.dtype, up.dtype), device=gate.device)
    _gated[_gated_grid(rows, width)](
        gate, up, y, width, gate.stride(0), up.stride(0),
        GELU=gelu, SLOPE=GELU_SLOPE, CUBIC=GELU_CUBIC, BLOCK=1024,
    )  # fmt: skip
    return y


def gated_backward(
    grad: Tensor, gate: Tensor, up: Tensor, *, gelu: bool, in_place: bool = False
) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up; `in_place`: over these, which are contiguous."""
    rows, width = gate.shape
    grad_gate, grad_up = (
        t if in_place else torch.empty(rows, width, dtype=t.dtype, device=t.device) for t in (gate, up)
    )
    _gated_backward[_gated_grid(rows, width)](
        grad, gate, up, grad_gate, grad_up, width, gate.stride(0), up.stride(0),
        GELU=gelu, SLOPE=GELU_SLOPE, CUBIC=GELU_CUBIC, BLOCK=1024,
    )  # fmt: skip
    return grad_gate, grad_up


@triton.jit
def _rotate(
    x, y, first_cos, second_cos, first_sin, second_sin, token, batch, position,
    batch_stride, head_stride, position_stride, heads, half, column,
    BACKWARD: tl.constexpr, BLOCK_HEADS: tl.constexpr,
):  # fmt: skip
    head = tl.arange(0, BLOCK_HEADS)[:, None].to(tl.int64)
    inside = (head < heads) & (column[None, :] < half)
    source = x + batch * batch_stride + position * position_stride + head * head_stride + column[None, :]
    target = y + (token * heads + head) * (2 * half) + column[None, :]
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
    if BACKWARD:  # the transposed rotation
        new_first = first * first_cos + second * second_sin
        new_second = second * second_cos - first * first_sin
    else:
        new_first = first * first_cos - second * first_sin
        new_second = second * second_cos + first * second_sin
    tl.store(target, new_first.to(y.dtype.element_ty), mask=inside)
    tl.store(target + half, new_second.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _rotary(
    q, k, new_q, new_k, cos, sin, positions, half, heads, kv_heads,
    q_batch, q_head, q_position, k_batch, k_head, k_position, cos_batch, cos_position,
    BACKWARD: tl.constexpr, BLOCK: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_KV_HEADS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    batch, position = token // positions, token % positions
    column = tl.arange(0, BLOCK)
    inside = column < half
    at = batch * cos_batch + position * cos_position + column
    c1 = tl.load(cos + at, mask=inside, other=0.0).to(tl.float32)[None, :]
    c2 = tl.load(cos + at + half, mask=inside, other=0.0).to(tl.float32)[None, :]
    s1 = tl.load(sin + at, mask=inside, other=0.0).to(tl.float32)[None, :]
    s2 = tl.load(sin + at + half, mask=inside, other=0.0).to(tl.float32)[None, :]
    _rotate(
        q, new_q, c1, c2, s1, s2, token, batch, position, q_batch, q_head, q_position, heads, half, column,
        BACKWARD, BLOCK_HEADS,
    )  # fmt: skip
    _rotate(
        k, new_k, c1, c2, s1, s2, token, batch, position, k_batch, k_head, k_position, kv_heads, half, column,
        BACKWARD, BLOCK_KV_HEADS,
    )  # fmt: skip


def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, dtypes: tuple[torch.dtype, torch.dtype], *, backward: bool
) -> tuple[Tensor, Tensor]:
    """Of q (B, H, N, D) and k (B, H_kv, N, D) by cos and sin (B or 1, N, D); the last axis of each contiguous."""
    batch, heads, positions, width = q.shape
    results = [
        torch.empty(batch, positions, x.shape[1], width, dtype=dtype, device=x.device).transpose(1, 2)
        for x, dtype in zip((q, k), dtypes, strict=True)
    ]
    _rotary[(batch * positions,)](
        q, k, *results, cos, sin, positions, width // 2, heads, k.shape[1],
        *q.stride()[:3], *k.stride()[:3], cos.stride(0) if len(cos) > 1 else 0, cos.stride(1),
        BACKWARD=backward, BLOCK=triton.next_power_of_2(width // 2),
        BLOCK_HEADS=triton.next_power_of_2(heads), BLOCK_KV_HEADS=triton.next_power_of_2(k.shape[1]),
    )  # fmt: skip
    return results[0], results[1]


@triton.jit
def _join_attention(
    output, logsumexp, rows, more, more_logsumexp, total, added, heads, width,
    row_stride, head_stride, more_row_stride, more_head_stride, HEADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + index)
    head = tl.arange(0, HEADS).to(tl.int64)
    column = tl.arange(0, WIDTH)
    is_head = head < heads
    inside = is_head[:, None] & (column < width)[None, :]
    own = tl.load(logsumexp + head * total + row, mask=is_head, other=0.0)
    other = tl.load(more_logsumexp + head * added + index, mask=is_head, other=0.0)
    top = tl.maximum(own, other)
    joint = top + tl.log(tl.exp(own - top) + tl.exp(other - top))
    place = output + row * row_stride + head[:, None] * head_stride + column[None, :]
    more_place = more + index * more_row_stride + head[:, None] * more_head_stride + column[None, :]
    first = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(more_place, mask=inside, other=0.0).to(tl.float32)
    value = first * tl.exp(own - joint)[:, None] + second * tl.exp(other - joint)[:, None]
    tl.store(place, value.to(output.dtype.element_ty), mask=inside)
    tl.store(logsumexp + head * total + row, joint, mask=is_head)


def join_attention(output: Tensor, logsumexp: Tensor, rows: Tensor, more: Tensor, more_logsumexp: Tensor) -> None:
    """As `flash.join`. The last axis of `output` and `more` and all of the sums have to be contiguous."""
    total, heads, width = output.shape
    _join_attention[(len(rows),)](
        output, logsumexp, rows, more, more_logsumexp, total, len(rows), heads, width,
        *output.stride()[:2], *more.stride()[:2],
        HEADS=triton.next_power_of_2(heads), WIDTH=triton.next_power_of_2(width), num_warps=4,
    )  # fmt: skip
