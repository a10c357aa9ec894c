"""The hash of a policy's trained weights: one for the live policy, for its files, and for what is loaded from them.

    sums   Σᵢ bitsᵢ · rᵢ mod 2⁶⁴ over every 65,536 elements of a tensor, and over the fewer that are left, if none 0,
           with bitsᵢ an element's bits as a signed integer (two of them for 8 bytes) and r fixed pseudo-random odd
           numbers (SplitMix64, doi:10.1145/2660193.2660195)
    hash   SHA-256 over name, dtype, shape and sums of every tensor, in the order of their names

Floats of fewer than 32 bits count as the float32 numbers that they are: TRL makes adapters on quantized weights
bfloat16, and PEFT loads them into float32. The sums are made where the tensors are, so that the weights never leave
the GPU. By accident two different tensors have the same sums with a probability below 2⁻³². An adversary could find
such a pair: files are therefore compared by the SHA-256 of their bytes (`lineage.py`).
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ROW = 65_536  # elements that share a sum
_MASK = (1 << 64) - 1


def adapter_hash(model: torch.nn.Module) -> str | None:
    """64 hexadecimal digits; None where DeepSpeed ZeRO-3 or FSDP have spread the parameters over processes.

    Of a `PeftModel` it covers what PEFT saves of its active adapters, and parameters trained beside them; of any other
    model all parameters. Dropout, `requires_grad` and an adapter's name take no part.
    """
    return hash_unless_spread(trained_tensors(model))


def hash_unless_spread(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """As `hash_of`; None where the parameters are spread over processes."""
    if any(hasattr(tensor, "ds_id") or hasattr(tensor, "device_mesh") for tensor in tensors.values()):
        return None
    return hash_of(tensors)


def hash_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """The hash of named tensors, on whatever devices they are."""
    import torch

    batches = _batches(tensors)
    with torch.no_grad():
        found = _on_host([row_sums([tensors[name] for name in names]) for names in batches])
    sums: dict[str, Any] = {}
    for names, values in zip(batches, found, strict=True):
        sums.update(zip(names, values.numpy().astype("<i8").reshape(len(names), -1), strict=True))
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {_dtype(tensors[name])} {tuple(tensors[name].shape)}\n".encode())
        digest.update(sums[name].tobytes())
    return digest.hexdigest()


def trained_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What `adapter_hash` covers, under the names that PEFT saves it by."""
    from peft import PeftModel, get_peft_model_state_dict

    if not isinstance(model, PeftModel):
        return dict(model.named_parameters())
    parameters = dict(model.named_parameters(remove_duplicate=False))
    active = model.active_adapters
    tensors = {}
    for adapter in active:
        # Given the parameters, PEFT does not build a state dict, which would pack quantized weights at every call.
        found = get_peft_model_state_dict(
            model, state_dict=parameters, adapter_name=adapter, save_embedding_layers=False
        )
        prefix = f"{adapter}:" if len(active) > 1 else ""  # PEFT loads a single adapter under any name
        tensors.update({prefix + name: tensor for name, tensor in found.items()})
    covered = {id(tensor) for tensor in tensors.values()}
    beside = {name: p for name, p in parameters.items() if p.requires_grad and id(p) not in covered}
    return tensors | beside


def row_sums(tensors: list[torch.Tensor]) -> torch.Tensor:
    """The sums of tensors alike in shape, dtype and device: int64, a row for each tensor."""
    import torch

    elements = (tensors[0] if len(tensors) == 1 else torch.stack(tensors)).reshape(len(tensors), -1)
    if elements.element_size() == 8:
        elements = elements.view(torch.int32)
    factors, count = _factors(str(elements.device)), elements.shape[1]
    whole, rest = elements.split([count - count % ROW, count % ROW], dim=1)
    sums = [(_bits(rest) * factors[: count % ROW]).sum(dim=1, keepdim=True)]
    if count >= ROW:
        parts = whole.unflatten(1, (-1, ROW)).split(_at_once(elements.device) // ROW, dim=1)
        sums = [*((_bits(part) * factors).sum(dim=2) for part in parts), *sums]
    return torch.cat(sums, dim=1)


def _batches(tensors: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """Names of tensors alike, as many as are summed at once: an adapter has hundreds of tensors, of few shapes."""
    alike: dict[tuple, list[str]] = {}
    for name, tensor in tensors.items():
        alike.setdefault((tensor.device, tensor.dtype, tensor.shape), []).append(name)
    batches = []
    for (device, _, shape), names in alike.items():
        size = max(1, _at_once(device) // max(1, shape.numel()))
        batches += [names[start : start + size] for start in range(0, len(names), size)]
    return batches


def _at_once(device: torch.device) -> int:
    """Elements summed at once: products that stay in a CPU's cache; elsewhere 32 MB of them, in few kernels."""
    return ROW if device.type == "cpu" else 64 * ROW


def _bits(elements: torch.Tensor) -> torch.Tensor:
    import torch

    if elements.is_floating_point():
        return elements.float().view(torch.int32)
    return elements.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[elements.element_size()])


def _dtype(tensor: torch.Tensor) -> str:
    narrow = tensor.is_floating_point() and tensor.element_size() < 4
    return "float32" if narrow else str(tensor.dtype).removeprefix("torch.")


@functools.cache
def _factors(device: str) -> torch.Tensor:
    """r₀ … r₆₅₅₃₅: SplitMix64 from 0, made odd. int64 wraps around as the sums do."""
    import torch

    def signed(value: int) -> int:
        return value - (1 << 64) if value >> 63 else value

    def shifted(z: torch.Tensor, bits: int) -> torch.Tensor:
        return (z >> bits) & (_MASK >> bits)  # the shift of signed integers copies the sign

    z = torch.arange(1, ROW + 1, dtype=torch.int64, device=device) * signed(0x9E3779B97F4A7C15)
    z = (z ^ shifted(z, 30)) * signed(0xBF58476D1CE4E5B9)
    z = (z ^ shifted(z, 27)) * signed(0x94D049BB133111EB)
    return (z ^ shifted(z, 31)) | 1


def _on_host(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors on the CPU, with one transfer a device."""
    import torch

    tensors = list(tensors)
    result: dict[int, torch.Tensor] = {}
    for device in {tensor.device for tensor in tensors}:
        places = [index for index, tensor in enumerate(tensors) if tensor.device == device]
        together = torch.cat([tensors[index].flatten() for index in places]).cpu()
        parts = together.split([tensors[index].numel() for index in places])
        result.update(zip(places, parts, strict=True))
    return [result[index] for index in range(len(tensors))]
