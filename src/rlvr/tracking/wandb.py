"""Trajectories as a W&B table that grows over the run."""

from __future__ import annotations

from typing import Any

from rlvr.tracking.trajectories import TrajectoryRecord


class WandbTrajectories:
    """A sink that appends every record to the table `trajectories` of the current W&B run.

    The table is incremental: each call uploads its new rows only, and no row is overwritten. Records that come before
    the run has started (an evaluation before training) wait for it.
    """

    FIXED_COLUMNS = (
        *("step", "phase", "group", "prompt", "completion", "reward", "advantage", "stop_reason", "adapter"),
    )

    def __init__(self, reward_names: list[str]):
        self._reward_names = list(reward_names)
        self._waiting: list[TrajectoryRecord] = []
        self._table: Any = None
        self._run: Any = None

    def __call__(self, records: list[TrajectoryRecord]) -> None:
        import wandb

        self._waiting.extend(records)
        if wandb.run is None or not self._waiting:
            return
        if self._table is None or self._run is not wandb.run:
            columns: list[str | int] = [*self.FIXED_COLUMNS, *(f"rewards/{name}" for name in self._reward_names)]
            self._table = wandb.Table(columns=columns, log_mode="INCREMENTAL", allow_mixed_types=True)
            self._run = wandb.run
        for record in self._waiting:
            self._table.add_data(*self._row(record))
        self._waiting.clear()
        self._run.log({"trajectories": self._table}, commit=False)  # joins the step that the metrics commit

    def _row(self, record: TrajectoryRecord) -> list[object]:
        return [
            record.step,
            record.phase,
            record.group,
            record.prompt_text,
            record.completion_text,
            record.reward,
            record.advantage,
            record.stop_reason,
            record.adapter,
            *(record.rewards.get(name) for name in self._reward_names),
        ]
