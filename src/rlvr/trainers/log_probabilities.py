"""How `EnhancedGRPOTrainer` gets log-probabilities: the reference model, and the shared-prefix forward."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from rlvr.errors import ConfigError, UnsupportedSettingError
from rlvr.trainers.compose import is_unsloth_class
from rlvr.trainers.sharding import sharding_problem

if TYPE_CHECKING:
    import torch

    _Base: Any  # trl.GRPOTrainer, found when an instance is made

    from rlvr.fused.layers import FusedForwards
else:
    _Base = object

logger = logging.getLogger(__name__)

SharedPrefix = Literal["auto", "on", "off"]


class LogProbabilityMixin(_Base):
    """The part of the trainer that runs the training forward. `super()` is TRL's trainer."""

    _buffered_inputs: Any
    vllm_importance_sampling_correction: bool
    _checkpointable: list[Any] | None = None  # modules in which gradient checkpointing is switched on and off
    _only_scores = False  # within a batch of an evaluation without a loss

    def _takes_own_reference(self, args: Any) -> bool:
        """Whether the reference is a snapshot of the trainable parameters, rather than what TRL would build.

        Unsloth's generated trainer computes the reference inside its own kernels and keeps doing so.
        """
        return args.beta != 0.0 and not self._on_unsloth_trainer

    @property
    def _on_unsloth_trainer(self) -> bool:
        return is_unsloth_class(type(self))

    def _set_own_reference(self, beta: float, syncs: bool) -> None:
        from rlvr.trainers.reference import StartingPolicy

        self.beta, self.args.beta, self.args.sync_ref_model = beta, beta, syncs
        self.ref_model = StartingPolicy(self.accelerator.unwrap_model(self.model))
        if syncs:
            self.add_callback(self.ref_model.sync_callback())

    def _make_reference_as_given(self) -> None:
        """Unsloth's trainer reads the reference of a model without adapters from its checkpoint again; the model as it
        was given may have other weights."""
        if self.ref_model is not None:
            weights = self.accelerator.unwrap_model(self.model).state_dict()
            self.accelerator.unwrap_model(self.ref_model).load_state_dict(weights)

    def _set_up_shared_prefix(self, asked: SharedPrefix) -> None:
        """
        Raises:
            ConfigError: `asked` is not one of auto, on and off.
            UnsupportedSettingError: "on", and the model or an option does not allow it.
        """
        import torch

        from rlvr.trainers.shared_prefix import unsupported_reason

        if asked not in ("auto", "on", "off"):
            raise ConfigError(f"shared_prefix is {asked!r}; allowed: auto, on, off.")
        self.shares_prefix = False
        self._fused: FusedForwards | None = None
        self._steps = False  # within a training step
        self.tokens_computed = self.tokens_padded = 0
        if asked == "off":
            return
        problem = sharding_problem(self) or unsupported_reason(self.model)
        if problem is None and self.aux_loss_enabled:
            problem = "the auxiliary loss of a mixture of experts needs every token of every row"
        if problem is None and self._on_unsloth_trainer:
            problem = "Unsloth's trainer computes log-probabilities in its own order of columns"
        if problem is None:
            self.shares_prefix = True
            if any(isinstance(module, torch.nn.Dropout) and module.p for module in self.model.modules()):
                logger.info("completions of a prompt train with the same dropout of it, which they share.")
            if self.model.device.type == "cuda" and find_spec("triton") is not None:
                self._fuse()
        elif asked == "on":
            raise UnsupportedSettingError(f"shared_prefix='on' cannot be honoured: {problem}. Use 'auto' or 'off'.")
        else:
            logger.warning("every completion computes its prompt again in training: %s.", problem)

    def _fuse(self) -> None:
        """On CUDA, where it was measured to pay, the training forward runs with fused layers."""
        from rlvr.fused.layers import FusedForwards

        self._fused = FusedForwards(self.model)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """As TRL's. Layers that the forward fused stay so for the backward pass, where checkpointing computes them
        again, and no longer: rollouts, saving and PEFT find the model as it was given."""
        self._steps = True
        try:
            return super().training_step(*args, **kwargs)
        finally:
            self._steps = False
            if self._fused is not None:
                self._fused.take_out()

    @property
    def token_ratio_saved(self) -> float:
        """Share of the padded forward's tokens that the shared-prefix forward did not compute; 0 without it."""
        return 1 - self.tokens_computed / self.tokens_padded if self.tokens_padded else 0.0

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        *args: Any,  # Unsloth's trainer has one more
        **kwargs: Any,
    ) -> Any:
        """As TRL's: (log-probabilities (B, C), entropies (B, C) or None, auxiliary loss or None), in nats. None of
        them where no loss is going to ask."""
        from rlvr.trainers.reference import StartingPolicy

        if self._only_scores:
            return None, None, None

        arguments = (input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy)
        if isinstance(model, StartingPolicy):
            with model.applied():
                return self._get_per_token_logps_and_entropies(self.model, *arguments, *args, **kwargs)
        more = [value for value in (*args, *kwargs.values()) if value is not None and value is not False]
        if more or not self.shares_prefix:
            return super()._get_per_token_logps_and_entropies(model, *arguments, *args, **kwargs)
        return *self._shared_prefix_logps(model, *arguments), None

    def _shared_prefix_logps(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None,
        compute_entropy: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        import torch

        from rlvr.trainers.shared_prefix import shared_prefix_logps

        chunk = batch_size or len(input_ids)
        logps, entropies = [], []
        checkpointed = self._steps and self.args.gradient_checkpointing
        if self._fused is not None:
            # anew for every forward; its backward pass has the same weights
            self._fused.put_in(checkpointed=checkpointed, hold=self._steps)
        for rows in (slice(start, start + chunk) for start in range(0, len(input_ids), chunk)):
            with self.accelerator.autocast():
                of_chunk, entropies_of_chunk, packed = shared_prefix_logps(
                    model,
                    input_ids[rows],
                    attention_mask[rows],
                    logits_to_keep,
                    compute_entropy=compute_entropy,
                    keep_attention=checkpointed and torch.is_grad_enabled(),
                )
            logps.append(of_chunk)
            entropies.append(entropies_of_chunk)
            self.tokens_computed += packed.input_ids.numel()
            self.tokens_padded += packed.padded_tokens
        if self._fused is not None and not torch.is_grad_enabled():
            self._fused.take_out()
        return torch.cat(logps), torch.cat(entropies) if compute_entropy else None  # type: ignore[arg-type]

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        """As TRL's, which meanwhile takes gradient checkpointing out of the model, and puts it back, by walks over all
        modules (15 ms for 28 adapted layers). It finds it taken out already."""
        if self._on_unsloth_trainer:
            return super()._generate_and_score_completions(inputs)
        if self._checkpointable is None:
            flag = "gradient_checkpointing"
            self._checkpointable = [m for m in self.model.modules() if flag in vars(m) or hasattr(type(m), flag)]
        checkpointed = [module for module in self._checkpointable if module.gradient_checkpointing]
        try:
            for module in checkpointed:
                module.gradient_checkpointing = False
            return super()._generate_and_score_completions(inputs)
        finally:
            for module in checkpointed:
                module.gradient_checkpointing = True

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """Evaluation samples and scores. Its loss, and the forwards of the old policy and of the reference for it, are
        computed only where a loss selects the checkpoint or sets the learning rate."""
        if str(self.args.metric_for_best_model).endswith("loss"):
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        correction = self.vllm_importance_sampling_correction  # compares the old policy with vLLM
        self._only_scores, self.vllm_importance_sampling_correction = True, False
        try:
            self._prepare_inputs(inputs)
        finally:
            self._only_scores, self.vllm_importance_sampling_correction = False, correction
        return None, None, None

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """As TRL's, but that groups stay together inside a micro-batch where prompts are shared.

        TRL shuffles single rows. Where a generation batch makes one optimizer step, its gradient is the same sum.
        """
        if not self.shares_prefix or not self.model.training:
            return super()._prepare_inputs(generation_batch)
        micro_batches = self.args.steps_per_generation
        if self._step % (micro_batches * self.num_iterations) == 0 or self._buffered_inputs is None:
            batch = self._generate_and_score_completions(generation_batch)
            self._buffered_inputs = _split(_in_groups(batch), micro_batches)
        return self._buffered_inputs[self._step % micro_batches]


def _in_groups(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch's rows in a random order that keeps those of one prompt together."""
    from rlvr.trainers.shared_prefix import group_order

    order = group_order([row.tobytes() for row in batch["prompt_ids"].cpu().numpy()])

    def ordered(value: Any) -> Any:
        if isinstance(value, list):
            return [value[row] for row in order.tolist()]
        return value[order.to(value.device)] if value is not None and value.ndim else value

    return {key: ordered(value) for key, value in batch.items()}


def _split(batch: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """`count` equal parts of its rows; values without rows go to every part."""
    size = len(batch["prompt_ids"]) // count

    def part(value: Any, index: int) -> Any:
        has_rows = isinstance(value, list) or (value is not None and value.ndim > 0)
        return value[index * size : (index + 1) * size] if has_rows else value

    return [{key: part(value, index) for key, value in batch.items()} for index in range(count)]
