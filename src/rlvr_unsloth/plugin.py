"""The entry point of the backend `unsloth`. Light: Unsloth is imported when the backend is asked for."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from rlvr import hookimpl
from rlvr_unsloth.process import INSTALL

if TYPE_CHECKING:
    from rlvr import ModelBackend


@hookimpl
def rlvr_backend_availability() -> str | None:
    missing = [name for name in ("unsloth", "unsloth_zoo") if find_spec(name) is None]
    return f"{' and '.join(missing)} not installed. Install with: {INSTALL}" if missing else None


@hookimpl
def rlvr_backend() -> ModelBackend:
    from rlvr_unsloth.backend import UnslothBackend

    return UnslothBackend()
