"""The two plugin seams. A plugin module implements one of them; its entry point's name is its public name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from rlvr.backends.protocol import ModelBackend
    from rlvr.environments.base import Environment

PROJECT = "rlvr"
BACKENDS = "rlvr.backends"  # entry-point groups
ENVIRONMENTS = "rlvr.environments"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class BackendHooks:
    """What a module in the entry-point group `rlvr.backends` implements."""

    @hookspec(firstresult=True)
    def rlvr_backend(self) -> ModelBackend:  # type: ignore[empty-body]
        """Makes the backend. Called when it is asked for: heavy imports belong in here."""

    @hookspec(firstresult=True)
    def rlvr_backend_availability(self) -> str | None:
        """Optional and cheap: None if the backend can be used here, else the reason and the fix in a sentence."""


class EnvironmentHooks:
    """What a module in the entry-point group `rlvr.environments` implements."""

    @hookspec(firstresult=True)
    def rlvr_environment(self) -> Environment:  # type: ignore[empty-body]
        """Makes the environment. An implementation takes its options as parameters with defaults and type hints:
        they are its options on the command line too."""

    @hookspec(firstresult=True)
    def rlvr_environment_availability(self) -> str | None:
        """Optional and cheap: None if the environment can be used here, else the reason and the fix in a sentence."""
