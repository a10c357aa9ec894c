"""The entry point of the backend `hf`. Light: transformers is imported when the backend is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlvr.plugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from rlvr.backends.protocol import ModelBackend


@hookimpl
def rlvr_backend() -> ModelBackend:
    from rlvr.backends.hf.backend import HFBackend

    return HFBackend()
