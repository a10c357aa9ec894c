"""What has happened to this process: whether TRL's trainer was replaced.

Standard library only, and nothing is imported to find out.
"""

from __future__ import annotations

import sys

from rlvr.errors import PatchedProcessError

_TRAINER_MODULE = "trl.trainer.grpo_trainer"


def replaced_trainer() -> str | None:
    """The full name of the class that stands where `trl.GRPOTrainer` should; None while TRL's own does.

    TRL loads lazily: as long as its trainer's module was not imported, nobody can have replaced the class.
    """
    if _TRAINER_MODULE not in sys.modules:
        return None
    for place in ("trl", "trl.trainer", _TRAINER_MODULE):
        trainer = vars(sys.modules[place]).get("GRPOTrainer")  # vars: a lazy module would import on getattr
        if trainer is not None and (trainer.__module__, trainer.__qualname__) != (
            _TRAINER_MODULE,
            "GRPOTrainer",
        ):
            return f"{trainer.__module__}.{trainer.__qualname__}"
    return None


def refuse_replaced_trainer(backend_name: str) -> None:
    """For backends whose models train on TRL's own trainer.

    Raises:
        PatchedProcessError: another backend has replaced it in this process.
    """
    trainer = replaced_trainer()
    if trainer:
        raise PatchedProcessError(
            f"backend {backend_name!r} trains on TRL's own GRPOTrainer, and this process has {trainer} in "
            "its place: another backend has patched it. Restart the Python process (in a notebook, the "
            f"kernel) and ask for {backend_name!r} first, or train in a process of its own: "
            f"rlvr.train(..., backend={backend_name!r}, isolate=True)."
        )
