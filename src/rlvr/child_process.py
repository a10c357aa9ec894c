"""A Python process that does one task for this one: what it is given, and the error that stopped it.

The task lies in a file that only its owner can read, since command lines are open to every user of a machine, and a
task may hold keys and passwords.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlvr import errors
from rlvr.errors import ConfigError, RlvrError

# Unsloth exports it when it makes a trainer; the child's backend would train in that precision, whatever is asked.
_LEFT_BEHIND = ("ACCELERATE_MIXED_PRECISION",)


def as_text(task: Mapping[str, Any]) -> str:
    """The task as JSON.

    Raises:
        ConfigError: something in it cannot be sent.
    """
    try:
        return json.dumps(task)
    except TypeError as error:
        raise ConfigError(f"settings are sent as JSON to another process, and one cannot be sent: {error}.") from error


@contextmanager
def task_folder(text: str) -> Iterator[Path]:
    """A folder for the process, readable for its owner only and gone afterwards, with the task in it."""
    with tempfile.TemporaryDirectory(prefix="rlvr-") as folder:
        Path(folder, "task.json").write_text(text, encoding="utf-8")
        yield Path(folder)


def read_task(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "task.json").read_text(encoding="utf-8"))


def environment() -> dict[str, str]:
    """The variables of this process, and what it can import, modules beside a script too."""
    kept = {name: value for name, value in os.environ.items() if name not in _LEFT_BEHIND}
    return {**kept, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def keep_error(folder: Path, error: RlvrError) -> None:
    """For the process that waits. A stranger's subclass is kept as the nearest class of ours."""
    ours = next(cls for cls in type(error).__mro__ if cls.__module__ == errors.__name__)
    message = error.problems if isinstance(error, ConfigError) else str(error)
    (folder / "error.json").write_text(json.dumps({"type": ours.__name__, "message": message}), encoding="utf-8")


def kept_error(folder: Path) -> RlvrError | None:
    path = folder / "error.json"
    if not path.exists():
        return None
    kept = json.loads(path.read_text(encoding="utf-8"))
    return getattr(errors, kept["type"])(kept["message"])
