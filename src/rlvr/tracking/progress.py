"""What a run tells while it trains: a progress bar, and rows of metrics. Trainer callbacks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

Row = Mapping[str, Any]


class MetricsRows(TrainerCallback):
    """Hands every row that the trainer logs, with its step, to `write`."""

    def __init__(self, write: Callable[[Row], None]):
        self._write = write

    def on_log(self, args: Any, state: Any, control: Any, logs: Row | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs:
            self._write({"step": state.global_step, **logs})


class ProgressDisplay(TrainerCallback):
    """Reward, completion length, seconds a step and time left.

    A bar on a terminal and in a notebook. Elsewhere (a log file, CI) a line now and then: about twenty over a run.
    """

    LINES = 20

    def __init__(self, console: Console | None = None):
        self._console = console or Console(stderr=True, markup=False)
        self._bar: Progress | None = None
        self._latest = ""
        self._began = self._step_began = 0.0
        self._first_step = 0
        self._step_seconds = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = self._step_began = time.monotonic()
        self._first_step = state.global_step
        if not state.is_world_process_zero or not (self._console.is_terminal or self._console.is_jupyter):
            return
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.description}"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task = self._bar.add_task("", total=state.max_steps, completed=state.global_step)
        self._bar.start()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step_began = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step_seconds = time.monotonic() - self._step_began
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Row | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        if "reward" not in logs or not state.is_world_process_zero:
            return
        self._latest = describe(logs, self._step_seconds)
        if self._bar is not None:
            self._bar.update(self._task, description=self._latest)
        elif state.global_step % max(1, state.max_steps // self.LINES) == 0 or state.global_step == state.max_steps:
            done = state.global_step - self._first_step
            left = (time.monotonic() - self._began) / max(1, done) * (state.max_steps - state.global_step)
            self._console.print(
                f"step {state.global_step}/{state.max_steps} · {self._latest} · {duration(left)} left",
                soft_wrap=True,
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Ends the bar, also where training stopped with an error."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def describe(logs: Row, step_seconds: float) -> str:
    """`reward 0.412 · 37 tokens · 1.3 s a step`."""
    parts = [f"reward {float(logs['reward']):.3f}"]
    if "completions/mean_length" in logs:
        parts.append(f"{float(logs['completions/mean_length']):.0f} tokens")
    return " · ".join([*parts, f"{step_seconds:.1f} s a step"])


def duration(seconds: float) -> str:
    """`0:42`, `3:07`, `1:02:03`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
