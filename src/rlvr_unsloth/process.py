"""Imports Unsloth the way it has to be: first, with its environment variables set, nothing on stdout."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterable
from importlib import import_module
from itertools import takewhile
from pathlib import Path
from typing import Any

from rlvr.errors import BackendUnavailableError, PatchedProcessError

logger = logging.getLogger(__name__)

PATCHED_BY_UNSLOTH = ("trl", "transformers", "peft")  # it has to be imported before these
STRICT_VARIABLE = "RLVR_STRICT_IMPORTS"
CACHE_VARIABLE = "RLVR_CACHE"
COMPILED_VARIABLE = "UNSLOTH_COMPILE_LOCATION"  # Unsloth reads it when it is imported
INSTALL = 'pip install "rlvr[unsloth]"'


def import_unsloth() -> Any:
    """Imports Unsloth, or returns it if this process has it.

    Raises:
        PatchedProcessError: RLVR_STRICT_IMPORTS=1, on a GPU, and what Unsloth patches was imported before it, whoever
            imported Unsloth.
        BackendUnavailableError: Unsloth raised while it was imported.
    """
    early = imported_before_unsloth(sys.modules)
    if early and _has_gpu():
        _tell_late_import(early)
    if "unsloth" not in sys.modules:
        set_environment()
    elif COMPILED_VARIABLE not in os.environ and _has_gpu():
        logger.warning(
            "Unsloth was imported before rlvr could choose a folder for its compiled code, which goes to the working "
            f'directory. Begin with rlvr.load_backend("unsloth"), or set {COMPILED_VARIABLE} before the import.'
        )
    try:
        with contextlib.redirect_stdout(sys.stderr):  # its banner would get into output meant for programs
            unsloth = import_module("unsloth")
    except Exception as error:
        raise BackendUnavailableError(
            f"unsloth cannot be imported: {type(error).__name__}: {error}. Install the versions that it "
            f"needs with: {INSTALL}"
        ) from error
    if unsloth.DEVICE_TYPE == "mlx":
        raise BackendUnavailableError("Unsloth has no GRPO on Apple's MLX. Use the backend 'hf' on this machine.")
    return unsloth


def imported_before_unsloth(modules: Iterable[str]) -> list[str]:
    """Those of what Unsloth patches that came before it, or have come where it has not.

    Args:
        modules: `sys.modules`, in the order in which imports ended. Unsloth's own ends after those that it makes, and
            its first submodule before them: that is its place.
    """
    earlier = set(takewhile(lambda name: not name.startswith("unsloth."), list(modules)))
    return [name for name in PATCHED_BY_UNSLOTH if name in earlier]


def set_environment() -> None:
    """Keeps Unsloth from running package managers, counting users, and writing to the working directory.

    What the user has set stays.
    """
    os.environ.setdefault("UNSLOTH_AUTO_INSTALL", "0")
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    if COMPILED_VARIABLE not in os.environ:
        folder = cache_folder() / "unsloth_compiled"
        folder.mkdir(parents=True, exist_ok=True)
        os.environ[COMPILED_VARIABLE] = str(folder)


def cache_folder() -> Path:
    """RLVR_CACHE, else `rlvr` in the platform's folder for caches."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser().absolute()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA")
        return (Path(base) if base else Path.home() / "AppData" / "Local") / "rlvr" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "rlvr"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "rlvr"


def _tell_late_import(early: list[str]) -> None:
    message = (
        f"{', '.join(early)} were imported before Unsloth, which then cannot patch all of them: training is "
        "slower and needs more memory. Restart the process (in a notebook, the kernel) and begin with "
        'rlvr.load_backend("unsloth"), in the first cell, above every import of trl, transformers and peft.'
    )
    if os.environ.get(STRICT_VARIABLE, "0") not in ("", "0"):
        raise PatchedProcessError(f"{message} ({STRICT_VARIABLE} is set.)")
    logger.warning(f"{message} {STRICT_VARIABLE}=1 makes this an error.")
    warnings.filterwarnings("ignore", message=r"\s*(WARNING: )?Unsloth should be imported before")  # said once


def _has_gpu() -> bool:
    """Whether Unsloth will take its GPU path. On a CPU it has no patch that could come too late."""
    import torch

    if os.environ.get("UNSLOTH_FORCE_CPU", "0") == "1":
        return False
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator is not None and accelerator.type in ("cuda", "xpu")
