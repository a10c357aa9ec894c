"""Unsloth merges into the base's own files, in their types: of a float32 checkpoint the merged model is in float32."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from rlvr.backends.checks import matrix_dtypes

_WIDE = ("F32", "F64")  # as safetensors names them


def round_to_16_bits(folder: Path, dtype: torch.dtype) -> None:
    """Rewrites a merged model that has matrices wider than 16 bits, with those in `dtype`; where all are, vectors too.
    Beside 16-bit matrices the vectors stay, since some models want them in float32."""
    floats = [dtype for dtype in matrix_dtypes(folder).values() if dtype.startswith(("F", "BF"))]
    wide = [dtype in _WIDE for dtype in floats]
    if not any(wide):
        return
    total, least = 0, 1 if all(wide) else 2  # dimensions of what is rounded
    for shard in sorted(folder.glob("*.safetensors")):
        tensors = load_file(shard)
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and tensor.dim() >= least:
                tensors[name] = tensor.to(dtype)
        save_file(tensors, shard, metadata={"format": "pt"})
        total += sum(tensor.nbytes for tensor in tensors.values())
    _edit(folder / "config.json", lambda config: config.update(_named(config, dtype)))
    _edit(folder / "model.safetensors.index.json", lambda index: index["metadata"].update(total_size=total))


def _named(config: dict[str, Any], dtype: torch.dtype) -> dict[str, str]:
    """The dtype, under the name that a configuration has it."""
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    return {key: str(dtype).removeprefix("torch.")}


def _edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    if path.is_file():
        content = json.loads(path.read_text(encoding="utf-8"))
        change(content)
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
