"""What an export has to say of itself beside giving the right log-probabilities: its base, dtype and tokenizer.

A clause for each problem, as `Parity.problems` has them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlvr.backends.checks import matrix_dtypes
from rlvr.exporting.texts import FIXED

if TYPE_CHECKING:
    from rlvr.backends.protocol import ExportFormat, ModelSettings

_SIXTEEN_BIT = ("BF16", "F16")  # as safetensors names them
_CHAT = (
    {"role": "user", "content": "What is 17 + 25?"},
    {"role": "assistant", "content": "42"},
    {"role": "user", "content": "And 42 + 1?"},
)


def file_problems(folder: Path, export_format: ExportFormat, settings: ModelSettings) -> list[str]:
    """
    Args:
        settings: with the base model and its revision as the run was trained on them.
    """
    if export_format == "adapter":
        return _base_problems(folder, settings)
    return _dtype_problems(folder) if export_format == "merged-16bit" else []


def tokenizer_problems(trained: Any, exported: Any, export_format: ExportFormat) -> list[str]:
    """What the export's tokenizer does otherwise than the trained policy's.

    Of a GGUF file only the tokens are compared: its readers take chat template and EOS from it in their own ways.
    """
    found = []
    if any(_ids(trained, text) != _ids(exported, text) for text in FIXED):
        found.append("its tokenizer reads the same texts as other tokens")
    if export_format == "gguf":
        return found
    if trained.eos_token_id != exported.eos_token_id:
        found.append(
            f"its tokenizer ends a turn with {exported.eos_token!r}, and the trained policy's with "
            f"{trained.eos_token!r}"
        )
    if trained.chat_template != exported.chat_template or _rendered(trained) != _rendered(exported):
        found.append("its chat template is another than the trained policy's")
    return found


def _base_problems(folder: Path, settings: ModelSettings) -> list[str]:
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    base, revision = str(config.get("base_model_name_or_path")), config.get("revision")
    found = []
    if _resolved(base) != _resolved(settings.model):
        found.append(f"its adapter_config.json names the base {base!r}, and the run was trained on {settings.model!r}")
    if revision != settings.revision:
        found.append(
            f"its adapter_config.json names the revision {revision!r} of its base, and the run was trained on "
            f"{settings.revision!r}"
        )
    return found


def _resolved(model: str) -> Path:
    """A folder however it is written; names of the Hub stay as different as they are."""
    return Path(model).expanduser().resolve()


def _dtype_problems(folder: Path) -> list[str]:
    others = {dtype for dtype in wide_matrices(folder).values() if dtype.startswith("F")}
    return [f"it holds weights in {', '.join(sorted(others))}, not in 16 bits"] if others else []


def wide_matrices(folder: Path) -> dict[str, str]:
    """Those of `matrix_dtypes` that are not 16-bit floating point."""
    return {name: dtype for name, dtype in matrix_dtypes(folder).items() if dtype not in _SIXTEEN_BIT}


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, verbose=False)["input_ids"])


def _rendered(tokenizer: Any) -> str:
    return tokenizer.apply_chat_template([*_CHAT], tokenize=False, add_generation_prompt=True)
