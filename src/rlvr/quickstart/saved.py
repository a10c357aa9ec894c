"""A model that is made once: a folder that `from_pretrained` reads, and a record of what it was made from."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlvr.errors import ModelError

RECORD = "quickstart.json"  # beside the weights: what the model was made from
WEIGHTS = "model.safetensors"


def make_once(
    folder: str | Path,
    made_from: dict[str, Any],
    *,
    make: Callable[[], tuple[Any, Any, Any]],
    report: Callable[[str], None],
) -> Path:
    """Saves what `make` gives, unless the folder holds the model that was made from just that.

    Args:
        made_from: what the model depends on, as JSON can hold it.
        make: gives the model, its tokenizer and its scores, a dataclass.

    Raises:
        ModelError: the folder holds something else.
    """
    folder = Path(folder)
    made_from = json.loads(json.dumps(made_from))
    if _holds(folder, made_from):
        report(f"warm start: using the model in {folder}")
        return folder
    if folder.exists() and not (folder / RECORD).is_file() and any(folder.iterdir()):
        raise ModelError(f"the folder {str(folder)!r} holds something else; give one that is empty or new.")
    model, tokenizer, scores = make()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        made = Path(temporary) / "model"  # moved into place whole: an interrupted build leaves nothing behind
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        record = {**made_from, "sha256": _digest(made / WEIGHTS), "validation": asdict(scores)}
        (made / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        made.rename(folder)
    return folder


def _holds(folder: Path, made_from: dict[str, Any]) -> bool:
    """Whether the model in `folder` is whole, and made from just that."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return made_from.items() <= record.items() and record["sha256"] == _digest(folder / WEIGHTS)
    except (OSError, ValueError, KeyError, AttributeError):
        return False


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
