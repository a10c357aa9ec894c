"""From a scored batch to the records that the sinks take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlvr.tracking.trajectories import TrajectoryRecord, TrajectorySink

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ScoredBatch:
    """What `_calculate_rewards` saw and found, for this process's B rows; rewards for those of all processes.

    `rewards_per_function`: (B of all processes, number of reward functions), NaN where not applicable.
    """

    prompts: Sequence[Any]
    completions: Sequence[Any]
    stop_reasons: Sequence[str | None]
    rewards_per_function: torch.Tensor


class TrajectoryRecorder:
    """Numbers the groups of a run and hands each batch's records to the sinks, on the main process."""

    def __init__(self, sinks: Sequence[TrajectorySink]):
        self.sinks = list(sinks)
        self._groups = 0

    def record(
        self,
        batch: ScoredBatch,
        advantages: torch.Tensor,
        *,
        step: int,
        phase: str,
        group_size: int,
        reward_names: Sequence[str],
        reward_weights: Sequence[float],
        is_main_process: bool,
        adapter: str | None,
    ) -> None:
        """
        Args:
            advantages: (B,), of this process's rows.
            step: optimizer steps that the policy has seen.
            adapter: the hash of the policy that sampled the batch, where it is known.
        """
        if not self.sinks:
            return
        from accelerate.utils import gather_object

        rows = gather_object(
            list(zip(batch.prompts, batch.completions, batch.stop_reasons, advantages.tolist(), strict=True))
        )
        first_group = self._groups
        self._groups += -(-len(rows) // group_size)
        if not is_main_process:
            return
        records = []
        for index, (row, values) in enumerate(zip(rows, batch.rewards_per_function.tolist(), strict=True)):
            prompt, completion, stop_reason, advantage = row
            rewards = [None if value != value else value for value in values]  # NaN is not equal to itself
            weighted = [w * r for w, r in zip(reward_weights, rewards, strict=True) if r is not None]
            records.append(
                TrajectoryRecord(
                    step=step,
                    phase=phase,
                    group=first_group + index // group_size,
                    prompt=prompt,
                    completion=completion,
                    rewards=dict(zip(reward_names, rewards, strict=True)),
                    reward=sum(weighted) if weighted else None,
                    advantage=advantage,
                    stop_reason=stop_reason,
                    adapter=adapter,
                )
            )
        for sink in self.sinks:
            sink(records)
