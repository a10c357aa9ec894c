"""Evaluation of a policy before, during and after its training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlvr.backends.protocol import LoadedPolicy, ModelBackend
from rlvr.config import TrainSettings
from rlvr.environments.base import Environment
from rlvr.rollout.evaluation import Evaluation, ScoredTrajectory, evaluate_policy, evaluation_rows
from rlvr.rollout.tool_calls import ToolCallParser
from rlvr.tracking.adapter_hash import adapter_hash
from rlvr.tracking.trajectories import TrajectoryRecord
from rlvr.trainers.players import fitting_examples, local_player


@dataclass
class Evaluator:
    """Evaluates the policy of a run, greedily, on the same examples each time.

    Args:
        parser: of tool calls; None for that of the chat template.
        keep: takes the trajectories of each evaluation.
        add_row: takes a row of metrics.

    Raises:
        DataError: no held-out prompt fits `max_prompt_length`.
    """

    environment: Environment
    backend: ModelBackend
    policy: LoadedPolicy
    settings: TrainSettings
    parser: ToolCallParser | None
    keep: Callable[[list[TrajectoryRecord]], None]
    add_row: Callable[[Mapping[str, Any]], None]

    def __post_init__(self) -> None:
        self._examples: list[int] | None = None  # None where nothing is evaluated
        if self.settings.eval_samples and self.environment.eval_dataset is not None:
            self._examples = fitting_examples(
                self.environment,
                evaluation_rows(self.environment, self.settings.eval_samples),
                self.policy.tokenizer,
                max_prompt_length=self.settings.max_prompt_length,
                what="held-out examples",
            )

    def run(self, *, step: int) -> Evaluation | None:
        """None where there is nothing held out, or `eval_samples` is 0."""
        if self._examples is None:
            return None
        adapter = adapter_hash(self.policy.model)
        self.backend.for_inference(self.policy)
        try:
            player = local_player(
                self.environment,
                self.policy,
                self.settings,
                temperature=0.0,
                parser=self.parser,
                attempts=len(self._examples),
            )
            found = evaluate_policy(
                self.environment, player, limit=self.settings.eval_samples, only=self._examples, adapter=adapter
            )
        finally:
            self.backend.for_training(self.policy)
        self.keep(records(found.trajectories, step=step))
        by_group = {"evaluation_by_group": found.groups} if found.groups else {}
        self.add_row({"step": step, "evaluation": found.metrics, **by_group})
        return found

    def callback(self, *, every: int, trainer: Any) -> Any:
        """A trainer callback that evaluates every so many steps, and tells the trackers."""
        from transformers import TrainerCallback

        evaluator = self

        class Evaluations(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.global_step % every or state.global_step >= state.max_steps:  # the last comes after training
                    return
                found = evaluator.run(step=state.global_step)
                if found is not None:
                    logs = {f"eval_{name}": value for name, value in found.metrics.items()}
                    # a copy: the handler would note on `control` that the step's own log is done
                    trainer.callback_handler.on_log(args, state, copy.copy(control), logs)

        return Evaluations()


def records(trajectories: Sequence[ScoredTrajectory], *, step: int) -> list[TrajectoryRecord]:
    """Evaluated trajectories as a run keeps them; the group is the number of the example."""
    return [
        TrajectoryRecord(
            step=step,
            phase="eval",
            group=item.example,
            prompt=item.trajectory.prompt,
            completion=item.trajectory.completion,
            rewards=item.rewards,
            reward=item.reward,
            advantage=None,
            stop_reason=str(item.trajectory.stop_reason),
            adapter=item.adapter,
        )
        for item in trajectories
    ]
