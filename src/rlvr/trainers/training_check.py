"""Whether training trains: the first optimizer step that should change the policy has changed something."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rlvr.errors import FrozenTrainingError

if TYPE_CHECKING:
    from transformers import TrainerCallback

_INTEGER_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes an element


class TrainingCheck:
    """Compares the trainable parameters before and after the first step whose advantages are not all zero.

    Call `note_advantages` with each micro-batch before its backward pass, `before_step` and `after_step`
    around each optimizer step (`callback()` does both). A step proves nothing, and the next one is looked at
    instead, when its learning rate is exactly 0 (warmup), when its gradients are not finite (a float16 loss
    scaler skips it), or when parameters in half precision did not move while the learning rate was still
    warming up. Once the check has passed it costs nothing.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._before: dict[str, int] | None = None
        self._step_counts = False
        self.done = False

    def note_advantages(self, advantages: torch.Tensor, completion_mask: torch.Tensor | None = None) -> None:
        """Takes the fingerprint of the parameters at the first advantage that is not zero.

        Args:
            advantages: of shape (B,) or (B, C).
            completion_mask: (B, C), 1 for the tokens that the loss counts. A completion without any is
            ignored.
        """
        if self.done or self._before is not None:
            return
        counts = advantages != 0
        if completion_mask is not None:
            counted = completion_mask.bool()
            counts = counts & (counted.any(dim=1) if advantages.dim() == 1 else counted)
        if counts.any():
            self._before = _fingerprints(self._model)
            self.done = not self._before  # all sharded away: nothing to compare on this process

    def before_step(self, optimizer: Any = None) -> None:
        """Looks at gradients and learning rate, right before the optimizer step.

        Raises:
            FrozenTrainingError: every gradient is exactly zero.
        """
        self._step_counts = False
        if self.done or self._before is None or _learning_rate(optimizer) == 0:
            return
        gradients = [p.grad for p in self._model.parameters() if p.requires_grad and p.grad is not None]
        if gradients:  # DeepSpeed and FSDP keep theirs elsewhere
            largest = _largest_magnitude(gradients)
            if largest == 0:
                raise FrozenTrainingError(self._message("every gradient is exactly zero"))
            if not math.isfinite(largest):
                return
        self._step_counts = True

    def after_step(self, optimizer: Any = None) -> None:
        """Compares, right after the optimizer step.

        Raises:
            FrozenTrainingError: no trainable parameter has changed in a single bit.
        """
        if self.done or self._before is None or not self._step_counts:
            return
        skipped = bool(getattr(optimizer, "step_was_skipped", False))
        if _fingerprints(self._model) != self._before:
            self.done = True
            self._before = None
        elif not skipped and not (_warming_up(optimizer) and self._half_precision()):
            raise FrozenTrainingError(self._message("not one bit of the trainable parameters changed"))

    def callback(self) -> TrainerCallback:
        """A `TrainerCallback` that calls `before_step` and `after_step`."""
        from transformers import TrainerCallback

        check = self

        class TrainingCheckCallback(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, **kwargs):
                check.before_step(kwargs.get("optimizer"))

            def on_optimizer_step(self, args, state, control, **kwargs):
                check.after_step(kwargs.get("optimizer"))

        return TrainingCheckCallback()

    def _half_precision(self) -> bool:
        return any(p.requires_grad and p.dtype.itemsize < 4 for p in self._model.parameters())

    def _message(self, finding: str) -> str:
        trainable = [(name, p) for name, p in self._model.named_parameters() if p.requires_grad]
        causes = [
            "the trainable parameters do not take part in the forward pass (an adapter that is merged, "
            "disabled, not active, or on the output head)",
            "the optimizer was made from other parameters (a model that was wrapped or reloaded after the trainer)",
            "gradient checkpointing with use_reentrant=True cut the gradients; use use_reentrant=False",
        ]
        if any(p.dtype.itemsize < 4 for _, p in trainable):
            causes.append("the learning rate is too small for half precision, so that every update is rounded away")
        listed = "".join(f"\n  - {cause}" for cause in causes)
        example = f", for example {trainable[0][0]}" if trainable else ""
        return (
            f"an optimizer step with non-zero advantages trained nothing: {finding} "
            f"({len(trainable)} trainable tensors{example}). Likely causes:{listed}"
        )


@torch.no_grad()
def _fingerprints(model: nn.Module) -> dict[str, int]:
    """A checksum of each trainable tensor: its bits as integers, summed modulo 2⁶⁴; exact, without a copy."""
    sums = {}
    for name, parameter in model.named_parameters():
        tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter.detach()
        if parameter.requires_grad and tensor.numel():
            sums[name] = tensor.view(_INTEGER_OF_SIZE[tensor.dtype.itemsize]).sum(dtype=torch.int64)
    return {name: int(value) for name, value in zip(sums, _on_host(sums.values()), strict=True)}


@torch.no_grad()
def _largest_magnitude(tensors: Iterable[torch.Tensor]) -> float:
    """Of all elements of all tensors; nan if any is nan."""
    norms = _on_host(torch.linalg.vector_norm(t, ord=math.inf).float() for t in tensors if t.numel())
    return float(torch.stack(norms).max()) if norms else 0.0


def _on_host(scalars: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """The scalars on the CPU, with one transfer a device instead of one a scalar."""
    scalars = list(scalars)
    result: list[torch.Tensor] = [torch.empty(0)] * len(scalars)
    for device in {scalar.device for scalar in scalars}:
        places = [i for i, scalar in enumerate(scalars) if scalar.device == device]
        for i, value in zip(places, torch.stack([scalars[i] for i in places]).cpu(), strict=True):
            result[i] = value
    return result


def _learning_rate(optimizer: Any) -> float | None:
    """The largest of the groups' learning rates, None if unknown."""
    groups = getattr(optimizer, "param_groups", None)
    return max(float(group.get("lr") or 0) for group in groups) if groups else None


def _warming_up(optimizer: Any) -> bool:
    groups = getattr(optimizer, "param_groups", None) or ()
    return any(float(group.get("lr") or 0) < float(group.get("initial_lr", 0)) for group in groups)
