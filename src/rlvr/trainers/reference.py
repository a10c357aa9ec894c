"""The reference model of the KL term: the policy as it was given, adapter included, without a second model.

Training changes trainable parameters and nothing else, so a copy of those beside the live model is the
starting model exactly, whatever its form: LoRA of any name, several adapters, `modules_to_save`, an unfrozen
base, all weights. Copies of parameters are kept once, however many modules share them (tied weights);
`modules_to_save` holds trainable copies of its own, which are copied like any other parameter. Buffers that a
forward pass in training mode changes (batch norm's statistics; no causal language model of transformers has
any) are not restored.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from rlvr.errors import AdapterError

if TYPE_CHECKING:
    from transformers import TrainerCallback


class StartingPolicy:
    """A frozen copy of a model's trainable parameters, which can stand in for the live ones.

    Make it when the model is on its device and in its final dtype, before the first optimizer step. It takes
    as much memory as the trainable parameters do: little for LoRA, a second set of weights for full
    fine-tuning (as a reference model would).

    Raises:
        AdapterError: the parameters are sharded over processes (DeepSpeed ZeRO-3, FSDP): none can copy them.
    """

    def __init__(self, model: nn.Module):
        refuse_sharded_parameters(model)
        self._model = model
        self._copies: dict[nn.Parameter, torch.Tensor] = {
            parameter: parameter.detach().clone() for parameter in model.parameters() if parameter.requires_grad
        }

    @contextmanager
    def applied(self) -> Iterator[nn.Module]:
        """The model with its starting parameters, dropout off, for as long as the block lasts.

        Tensors are exchanged, not copied: afterwards every parameter has the storage that it had before, bit
        for bit, also when the block raises. Run forward passes in it, and no backward pass.

        Raises:
            AdapterError: a parameter has become trainable since the copy was made, or was replaced by
            another.
        """
        self._check_still_complete()
        live = {parameter: parameter.data for parameter in self._copies}
        try:
            for parameter, copy in self._copies.items():
                parameter.data = self._like_live(parameter, copy)
            torch.clear_autocast_cache()  # an enclosing autocast would reuse its casts of the live parameters
            with dropout_off(self._model):
                yield self._model
        finally:
            for parameter, tensor in live.items():
                parameter.data = tensor
            torch.clear_autocast_cache()

    @torch.no_grad()
    def move_towards_policy(self, alpha: float) -> None:
        """reference ← alpha · policy + (1 − alpha) · reference: TRL's `sync_ref_model` (arXiv:2404.09656)."""
        for parameter, copy in self._copies.items():
            copy.copy_(copy.to(parameter.device).mul_(1 - alpha).add_(parameter.data, alpha=alpha))

    def sync_callback(self) -> TrainerCallback:
        """A callback that does what TRL's `SyncRefModelCallback` does, with the same training arguments."""
        from transformers import TrainerCallback

        starting_policy = self

        class SyncStartingPolicy(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step % args.ref_model_sync_steps == 0:
                    starting_policy.move_towards_policy(args.ref_model_mixup_alpha)

        return SyncStartingPolicy()

    def _like_live(self, parameter: nn.Parameter, copy: torch.Tensor) -> torch.Tensor:
        """The copy on the parameter's device, in its dtype; converted once where the model was moved."""
        if copy.device != parameter.device or copy.dtype != parameter.dtype:
            copy = self._copies[parameter] = copy.to(parameter.device, parameter.dtype)
        return copy

    def _check_still_complete(self) -> None:
        late = [
            name
            for name, parameter in self._model.named_parameters()
            if parameter.requires_grad and parameter not in self._copies
        ]
        if late:
            raise AdapterError(
                f"{len(late)} parameters became trainable, or were replaced, after the trainer was made (for "
                f"example {late[0]}), so the reference model for beta > 0 is no longer known. Activate "
                "adapters and unfreeze layers before the trainer is made, and use no FSDP with beta > 0."
            )


@contextmanager
def dropout_off(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode; afterwards each is in the mode that it had, also when the block raises."""
    in_training = [module for module in model.modules() if module.training]
    try:
        for module in in_training:  # the flag, not eval(): some hand-written layers merge weights in eval()
            module.training = False
        yield
    finally:
        for module in in_training:
            module.training = True


def refuse_sharded_parameters(model: nn.Module) -> None:
    """Raises AdapterError if a trainable parameter is spread over processes; it is needed whole."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (hasattr(parameter, "ds_id") or hasattr(parameter, "device_mesh")):
            raise AdapterError(
                f"beta > 0 with sharded parameters ({name} is spread over processes by DeepSpeed ZeRO-3 or "
                "FSDP): the starting policy cannot be kept as reference model. Use beta=0, or data "
                "parallelism or ZeRO stage 1 or 2."
            )
