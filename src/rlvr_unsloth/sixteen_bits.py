"""Unsloth merges into the base's own files, in their types: of a float32 checkpoint the merged model is in float32."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

_WIDE = ("F32", "F64")  # as safetensors names them


def round_to_16_bits(folder: Path, dtype: torch.dtype) -> None:
    """Rewrites a merged model whose matrices are wider than 16 bits, with every floating-point tensor in `dtype`. One
    that has 16-bit matrices stays as it is, with the few tensors that its model wants in float32."""
    shards = sorted(folder.glob("*.safetensors"))
    if not any(map(_has_wide_matrices, shards)):
        return
    total = 0
    for shard in shards:
        tensors = load_file(shard)
        rounded = {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()
        }
        save_file(rounded, shard, metadata={"format": "pt"})
        total += sum(tensor.nbytes for tensor in rounded.values())
    _edit(folder / "config.json", lambda config: config.update(_named(config, dtype)))
    _edit(folder / "model.safetensors.index.json", lambda index: index["metadata"].update(total_size=total))


def _has_wide_matrices(path: Path) -> bool:
    with safe_open(path, framework="pt") as file:
        slices = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118 (it is no dictionary)
    return any(part.get_dtype() in _WIDE and len(part.get_shape()) > 1 for part in slices)


def _named(config: dict[str, Any], dtype: torch.dtype) -> dict[str, str]:
    """The dtype, under the name that a configuration has it."""
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    return {key: str(dtype).removeprefix("torch.")}


def _edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    if path.is_file():
        content = json.loads(path.read_text(encoding="utf-8"))
        change(content)
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
