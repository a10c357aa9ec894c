"""A run that anyone can repeat on a CPU: an environment, settings, and a model that is made on the spot."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlvr.errors import ModelError


@dataclass(frozen=True, kw_only=True)
class Demonstration:
    """
    Args:
        task: the environment, and what `python -m rlvr.quickstart --task` builds a model for.
        env_options: of the environment.
        options: of the run, in the names of `rlvr.config.TrainSettings`.
        models: the folder that models are made in by default, as `warm-start-SEED`.
    """

    task: str
    env_options: Mapping[str, Any]
    options: Mapping[str, Any]
    models: Path

    def settings(self, folder: str | Path | None = None, *, seed: int = 0) -> dict[str, Any]:
        """The settings of the run, in the names of `rlvr.config.TrainSettings`. Builds nothing.

        Args:
            folder: where the warm-started model is, or will be; by default `warm-start-SEED` in `models`.
            seed: of the model, the examples and the run.
        """
        return {
            "env": self.task,
            "env_options": {**self.env_options, "seed": seed},
            "model": str(folder or self.models / f"warm-start-{seed}"),
            **self.options,
            "seed": seed,
        }

    def prepare(
        self, folder: str | Path | None = None, *, seed: int = 0, report: Callable[[str], None] = print
    ) -> dict[str, Any]:
        """Builds the warm-started model, unless `folder` holds it already, and gives the settings of the run.

        It is built in a process of its own: this one has not imported transformers yet, so that any backend can still
        be imported first.

        Args:
            folder: as in `settings`.
            seed: as in `settings`.
            report: takes the lines that say how far the warm start is.

        Raises:
            ModelError: the model could not be built.
        """
        values = self.settings(folder, seed=seed)
        command = [sys.executable, "-m", "rlvr.quickstart", values["model"], "--task", self.task, "--seed", str(seed)]
        lines: list[str] = []
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line.rstrip())
                report(lines[-1])
        if process.returncode:
            last = lines[-1] if lines else "no output"
            raise ModelError(f"the quickstart's model could not be built in {values['model']!r}: {last}")
        return values
