"""One record for each trajectory of a run, and what takes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rlvr.types import Message, conversation_text


@dataclass(frozen=True, kw_only=True)
class TrajectoryRecord:
    """What a run keeps of a trajectory.

    `step` counts the optimizer steps that the policy had seen. `group` numbers the groups of a process over the run;
    trajectories that share a prompt share it. `reward` is the weighted sum, None where no reward function applied.
    `adapter` is the hash of the weights that sampled it (`adapter_hash.py`), None where it is not known.
    """

    step: int
    phase: str  # "train" or "eval"
    group: int
    prompt: Sequence[Message] | str
    completion: Sequence[Message] | str
    rewards: Mapping[str, float | None]
    reward: float | None
    advantage: float | None
    stop_reason: str | None
    adapter: str | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def prompt_text(self) -> str:
        return self.prompt if isinstance(self.prompt, str) else conversation_text(list(self.prompt))

    @property
    def completion_text(self) -> str:
        return self.completion if isinstance(self.completion, str) else conversation_text(list(self.completion))


TrajectorySink = Callable[[list[TrajectoryRecord]], None]
"""Takes the records of one generation batch, on the main process."""
