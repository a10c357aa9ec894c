"""Which weights sampled what: the policy's hash at every optimizer step, and in every checkpoint."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlvr.tracking.adapter_hash import adapter_hash, hash_unless_spread, trained_tensors
from rlvr.tracking.lineage import base_record, read_record, write_record

if TYPE_CHECKING:
    import torch
    from transformers import TrainerCallback

    from rlvr.backends.protocol import LoadedPolicy

logger = logging.getLogger(__name__)


class PolicyHashes:
    """Hashes the policy at most once for each optimizer step of a training."""

    def __init__(self, model: torch.nn.Module):
        self._model: Any = model
        self._step: int | None = None
        self._hash: str | None = None
        self._found: tuple[Any, dict[str, torch.Tensor]] | None = None

    def at(self, step: int) -> str | None:
        """The policy's hash, None where it has none (`adapter_hash`). `step` counts the optimizer steps so far."""
        if step != self._step:
            self._hash = hash_unless_spread(self._tensors())
            if self._hash is None and self._step is None:
                logger.warning(
                    "trajectories and checkpoints carry no hash of the weights: they are spread over processes."
                )
            self._step = step
        return self._hash

    def _tensors(self) -> dict[str, torch.Tensor]:
        """`trained_tensors`. PEFT takes 11 ms to name those of 28 layers: it is asked again only when the parameters
        are other ones, or where it computes what it names."""
        from peft import PeftModel

        parameters = [(name, id(p), p.requires_grad) for name, p in self._model.named_parameters()]
        key = parameters, list(self._model.active_adapters) if isinstance(self._model, PeftModel) else None
        if self._found is not None and self._found[0] == key:
            return self._found[1]
        tensors, known = trained_tensors(self._model), {address for _, address, _ in parameters}
        self._found = (key, tensors) if all(id(tensor) in known for tensor in tensors.values()) else None
        return tensors

    def callback(self) -> TrainerCallback:
        """Writes `lineage.json` into each checkpoint once it is saved, and forgets the hash when training begins."""
        from transformers import TrainerCallback

        hashes = self

        class Checkpoints(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                hashes._step = None  # steps are counted from 0 again, and the weights may be others

            def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.is_world_process_zero:
                    folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
                    write_record(folder, adapter=adapter_hash(hashes._model), step=state.global_step)

        return Checkpoints()


def origin(policy: LoadedPolicy, checkpoint: Path | None) -> dict[str, Any]:
    """Where a run's weights come from: the base model, and the start or the checkpoint that it goes on from."""
    settings = policy.settings
    base = base_record(settings.model, settings.revision)
    if checkpoint is None:
        return {"base": base, "adapter": adapter_hash(policy.model)}
    step, record = int(checkpoint.name.rpartition("-")[2]), read_record(checkpoint) or {}
    return {
        "base": base,
        "resumed_from": {"checkpoint": checkpoint.name, "step": step, "adapter": record.get("adapter")},
    }
