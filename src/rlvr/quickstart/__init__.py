"""The quickstart: a model made on the spot, and a run that makes it better, in a few minutes on a CPU.

    rlvr train                                # this, from the command line

A tiny transformer is taught addition by a teacher who knows how to carry and forgets to, six times in ten (see
`warm_start.py`). So it can carry and usually does not: held-out exact match lies between 0.2 and 0.6. Reinforcement
learning then finds the habit that is rewarded, as it does with the skills that a real model brings from pretraining.
Nothing is downloaded.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlvr.errors import ModelError

ENV_OPTIONS: dict[str, Any] = {"levels": "2", "train_size": 5000, "eval_size": 400}
"""Two-digit additions. One problem in five is held out, and neither the teacher nor the run shows it to the model."""

SETTINGS: dict[str, Any] = {
    "num_generations": 8,
    "prompts_per_step": 16,
    "batch_size": 128,
    "max_steps": 80,
    "max_tokens": 6,
    "max_prompt_length": 32,
    "learning_rate": 3e-3,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_alpha_multiplier": 1.0,  # the same adapter on every backend
    "dtype": "float32",
    "gradient_checkpointing": False,
    "eval_samples": 400,
}


def settings(folder: str | Path | None = None, *, seed: int = 0) -> dict[str, Any]:
    """The settings of the run, in the names of `rlvr.config.TrainSettings`. Builds nothing.

    Args:
        folder: where the warm-started model is, or will be; by default `outputs/quickstart/warm-start-SEED`.
        seed: of the model, the problems and the run.
    """
    return {
        "env": "arithmetic",
        "env_options": {**ENV_OPTIONS, "seed": seed},
        "model": str(folder or Path("outputs") / "quickstart" / f"warm-start-{seed}"),
        **SETTINGS,
        "seed": seed,
    }


def prepare(
    folder: str | Path | None = None, *, seed: int = 0, report: Callable[[str], None] = print
) -> dict[str, Any]:
    """Builds the warm-started model, unless `folder` holds it already, and gives the settings of the run.

    Args:
        folder: as in `settings`.
        seed: as in `settings`.
        report: takes the lines that say how far the warm start is.

    Raises:
        ModelError: the model could not be built.
    """
    values = settings(folder, seed=seed)
    build_apart("arithmetic", values["model"], seed=seed, report=report)
    return values


def build_apart(task: str, folder: str, *, seed: int, report: Callable[[str], None]) -> None:
    """Builds a task's warm-started model in a process of its own.

    This one has not imported transformers yet, so that any backend can still be imported first.

    Raises:
        ModelError: the model could not be built.
    """
    command = [sys.executable, "-m", "rlvr.quickstart", folder, "--task", task, "--seed", str(seed)]
    lines: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip())
            report(lines[-1])
    if process.returncode:
        raise ModelError(
            f"the quickstart's model could not be built in {folder!r}: {lines[-1] if lines else 'no output'}"
        )
