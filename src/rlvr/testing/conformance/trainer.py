"""A trainer for the checks: `EnhancedGRPOTrainer` on a small environment, with the backend's changes of arguments."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlvr.testing.conformance.context import Context, plain_name

if TYPE_CHECKING:
    import torch

    from rlvr.backends.protocol import LoadedPolicy

STEPS = 2

LEARNING_RATES = (0.05, 3.0)
"""In turn, where a step has to move the policy: plain SGD, with clipped gradients, needs the second."""


def trainer_for(
    context: Context,
    policy: LoadedPolicy,
    *,
    folder: Path | None = None,
    reward: Callable[[Any], float] | None = None,
    callbacks: Sequence[Any] = (),
    rollout_engine: Any = "auto",
    **overrides: Any,
) -> Any:
    """A trainer on a small environment whose rewards, by default `checksum`, differ inside every group."""
    import trl
    from transformers import PrinterCallback

    from rlvr.trainers import EnhancedGRPOTrainer

    context.backend.for_training(policy)
    on_cpu = policy.model.device.type == "cpu"
    values = {
        "output_dir": str(folder or context.folder()),
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "num_generations": 4,
        "max_completion_length": 8,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "optim": "adamw_torch",
        "beta": 0.0,
        "temperature": 1.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": False,
        "fp16": False,
        "use_cpu": on_cpu,
        "gradient_checkpointing": False,
        "seed": 0,
        **overrides,
        **context.changes(policy),
    }
    trainer = EnhancedGRPOTrainer(
        model=policy.model,
        processing_class=policy.tokenizer,
        env=_environment(reward or checksum),
        args=trl.GRPOConfig(**values),
        callbacks=list(callbacks),
        rollout_engine=rollout_engine,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def checksum(trajectory: Any) -> float:
    """A reward that is not the same for two different completions."""
    return zlib.crc32(trajectory.text.encode()) % 8 / 7


def _environment(reward: Callable[[Any], float]) -> Any:
    from rlvr import Environment, Rubric

    rows = [{"question": f"Say something about the number {number}."} for number in range(16)]
    return Environment(name="conformance", train_dataset=rows, rubric=Rubric(reward))


def trained(policy: LoadedPolicy) -> dict[str, torch.Tensor]:
    return copied({name: p for name, p in policy.model.named_parameters() if p.requires_grad})


def held(policy: LoadedPolicy) -> dict[str, torch.Tensor]:
    """What a checkpoint would hold: parameters and persistent buffers, by the name they have without an adapter."""
    saved = policy.model.state_dict().keys()
    buffers = {name: buffer for name, buffer in policy.model.named_buffers() if name in saved}
    return {plain_name(name): tensor for name, tensor in (*policy.model.named_parameters(), *buffers.items())}


def copied(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def changed(policy: LoadedPolicy, before: Mapping[str, torch.Tensor]) -> set[str]:
    """Names, as `held` has them, of the tensors that are no longer there or no longer what they were."""
    import torch

    now = held(policy)
    return {name for name, tensor in before.items() if name not in now or not torch.equal(tensor, now[name])}
