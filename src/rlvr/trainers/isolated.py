"""Trains in a child process, for a process that another backend has patched: `rlvr.train(..., isolate=True)`.

The child gets the settings as JSON. What it writes appears here line by line, and what stops it is raised here as the
same error. The trained policy stays in the run folder.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

from rlvr.child_process import as_text, environment, keep_error, kept_error, read_task, task_folder
from rlvr.config import TrainSettings, processes
from rlvr.errors import ConfigError, RlvrError, TrainingProcessError
from rlvr.tracking.run_folder import RunFolder
from rlvr.trainers.run import Run, train_with


def train_isolated(settings: TrainSettings, **given: Any) -> Run:
    """Trains as resolved settings say, in a process of its own. The policy of the run is None: it is in the folder.

    Args:
        given: what `rlvr.train` was given as objects, by the names of its parameters. There may be none.

    Raises:
        ConfigError: something cannot be sent to another process; all problems at once.
        RlvrError: what kept the run from starting or stopped it, of the same class as without isolation.
        TrainingProcessError: the process crashed or was killed.
    """
    problems = [f"isolate=True trains in another process, which cannot get {name}: {_FIX[name]}." for name in given]
    if processes() > 1:
        problems.append("isolate=True is for one training process; leave it out under torchrun and accelerate.")
    try:
        text = as_text({"settings": settings.as_dict(), "log_level": _log_level()})
    except ConfigError as refused:
        problems += refused.problems
    if problems:
        raise ConfigError(problems)
    with task_folder(text) as folder:
        last_lines, code = _run_child(folder)
        if error := kept_error(folder):
            raise error
    if code != 0:
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        raise TrainingProcessError(f"the training process {how}. Its last lines:\n{''.join(last_lines)}")
    assert settings.output_dir is not None
    run = RunFolder(Path(settings.output_dir))
    return Run(run.path, run.summary(), policy=None)


_FIX = {
    "env": "give the environment by name, with env_options",
    "model": "give the model's id or folder",
    "backend": "give the backend's name",
    "callbacks": "leave them out, or read metrics.jsonl of the run folder",
}


def _run_child(folder: Path) -> tuple[list[str], int]:
    """Runs it to its end, its output passed on; the last lines and the exit code (minus the signal if killed)."""
    variables = {**environment(), "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-m", "rlvr.trainers.isolated", str(folder)]
    lines: list[str] = []
    with subprocess.Popen(
        command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8"
    ) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", file=sys.stderr, flush=True)
                lines = [*lines[-19:], line]
        except BaseException:  # above all an interrupted cell: the child is not left behind
            process.terminate()
            raise
    return lines, process.returncode


def _log_level() -> int:
    return logging.getLogger("rlvr").getEffectiveLevel()


def _child(folder: Path) -> int:
    task = read_task(folder)
    logging.basicConfig(format="%(levelname)s:%(name)s:%(message)s")
    for name in ("rlvr", "rlvr_unsloth"):
        logging.getLogger(name).setLevel(task["log_level"])
    try:
        train_with(TrainSettings(**task["settings"]))
    except RlvrError as error:
        keep_error(folder, error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(_child(Path(sys.argv[1])))
