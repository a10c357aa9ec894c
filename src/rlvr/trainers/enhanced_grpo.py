"""`EnhancedGRPOTrainer`: TRL's GRPO trainer, with environments, PEFT detection and checks that nothing is silent."""

from __future__ import annotations

import copy
import gc
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlvr.environments.base import Environment
from rlvr.errors import ConfigError, RlvrError
from rlvr.rewards.rubric import WeightedReward
from rlvr.tracking.trajectories import TrajectorySink
from rlvr.trainers.compose import composed, refuse_what_unsloth_ignores, trl_trainer_class
from rlvr.trainers.log_probabilities import LogProbabilityMixin
from rlvr.trainers.rollouts import RolloutMixin

if TYPE_CHECKING:
    import torch

    _Base: Any  # trl.GRPOTrainer, found when an instance is made
    from rlvr.rollout.tool_calls import ToolCallParser
    from rlvr.trainers.engines import RolloutEngineName
    from rlvr.trainers.log_probabilities import SharedPrefix
else:
    _Base = object

logger = logging.getLogger(__name__)


class EnhancedGRPOTrainer(RolloutMixin, LogProbabilityMixin, _Base):
    """A drop-in superset of the installed `trl.GRPOTrainer`: every argument of TRL's works as it does there.

        trainer = EnhancedGRPOTrainer(model=model, processing_class=tokenizer, env=env, args=training_args)
        trainer.train()

    What it adds:
        - `env`: prompts, tools, turns and rewards come from an `Environment`;
        - a model that has adapters already is recognised and never wrapped twice, and one that would train nothing,
          or the wrong thing, is refused when the trainer is made;
        - with `beta > 0` the reference model is the model as given, adapter included;
        - rewards are checked, and the first step that should have changed parameters is checked too;
        - trajectories go whole to W&B and to `trajectory_sinks`.

    Its base class is chosen when an instance is made (see `compose.py`); subclassing and `isinstance` work as usual.

    Args:
        env: the environment. `train_dataset` and `eval_dataset` default to its own; `reward_funcs` are added to its
            rubric, and take `trajectory` and the columns of its rows as keywords. Not together with `tools`,
            `rollout_func` or `environment_factory`.
        rollout_engine: what samples. `auto` takes the fastest that supports the model and the sampling options.
        tool_call_parser: how the tool calls of `env` are read: hermes, llama3_json, mistral, `my_module:my_parser`, or
            an object with `parse(text) -> (text, calls)`; by default found from the chat template.
        shared_prefix: whether the training forward computes each distinct prompt of a micro-batch once.
        canary_every: optimizer steps between checks that the sampler follows the policy (see `canary.py` for what they
            can see); 0 for the rollouts after 0, 10, 100, ... steps and the last. An engine that does not is an error;
            a `rollout_func`, which may sample as it likes, a warning.
        trajectory_sinks: called with the records of every generation batch, on the main process.

    Raises:
        AdapterError: the model's PEFT state cannot train correctly.
        ConfigError: arguments that contradict each other.
        PatchedProcessError: Unsloth has replaced TRL's trainer in this process, and the model is not Unsloth's.
    """

    def __new__(cls, model: Any = None, *args: Any, **kwargs: Any) -> EnhancedGRPOTrainer:
        return object.__new__(composed(cls, trl_trainer_class(model)))

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: Any = None,
        optimizers: Any = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        tools: Any = None,
        rollout_func: Any = None,
        environment_factory: Any = None,
        *,
        env: Environment | None = None,
        rollout_engine: RolloutEngineName = "auto",
        tool_call_parser: str | ToolCallParser | None = None,
        shared_prefix: SharedPrefix = "auto",
        canary_every: int = 0,
        trajectory_sinks: Sequence[TrajectorySink] = (),
    ):
        import trl

        from rlvr.trainers.adapters import prepare_policy, require_fresh_adapter_for_base_reference
        from rlvr.trainers.checked_rewards import batch_reward, checked
        from rlvr.trainers.env_dataset import ExampleStore
        from rlvr.trainers.plain_head import provide_plain_head
        from rlvr.trainers.trained_dtypes import keep_dtypes, rounding_notice, trained_as_given
        from rlvr.trainers.trl_seams import require_seams

        require_seams(trl.GRPOTrainer)
        provide_plain_head()
        args = copy.copy(args) if args is not None else trl.GRPOConfig(output_dir="outputs/grpo")
        prepared = prepare_policy(
            model,
            peft_config,
            beta=args.beta,
            gradient_checkpointing=args.gradient_checkpointing,
            log=logger.warning,
        )
        if self._on_unsloth_trainer:
            refuse_what_unsloth_ignores(args, prepared.peft_config, model=model)

        functions = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs] if reward_funcs else []
        functions = [checked(function) for function in functions]
        self.env = env
        if env is None and tool_call_parser is not None:
            raise ConfigError(
                f"tool_call_parser is {tool_call_parser!r}, and there is no env: it reads the tool calls of an "
                "environment of rlvr. Leave it out, or give env."
            )
        if env is not None:
            _refuse_with_env(tools=tools, rollout_func=rollout_func, environment_factory=environment_factory)
            self._examples = ExampleStore(env)
            self._rewards_take_columns = bool(functions)  # those of the rubric read the trajectory's example
            train_dataset = self._examples.prompts(env.train_dataset if train_dataset is None else train_dataset)
            if eval_dataset is None and args.eval_strategy != "no":
                eval_dataset = env.eval_dataset
            eval_dataset = None if eval_dataset is None else self._examples.prompts(eval_dataset)
            args.shuffle_dataset = args.shuffle_dataset and not env.keeps_order
            args.reward_weights = _reward_weights(env.rubric.rewards, len(functions), args.reward_weights)
            functions = [*(batch_reward(reward) for reward in env.rubric.rewards), *functions]
            reward_processing_classes = _pad_front(reward_processing_classes, len(env.rubric.rewards))
            rollout_func = self._play_environment

        beta, syncs, own_reference = args.beta, args.sync_ref_model, self._takes_own_reference(args)
        if own_reference:  # ours is set below, and TRL is to build none
            args.beta, args.sync_ref_model = 0.0, False
        elif args.beta != 0.0 and self._on_unsloth_trainer:
            require_fresh_adapter_for_base_reference(model)
        given = trained_as_given(prepared.model)
        super().__init__(
            model=prepared.model,
            reward_funcs=functions or None,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            reward_processing_classes=reward_processing_classes,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=prepared.peft_config,
            tools=tools,
            rollout_func=rollout_func,
            environment_factory=environment_factory,
        )
        if not self.is_fsdp_enabled:  # which wants one dtype for all it shards together
            keep_dtypes(self.model, given, wrapped=prepared.peft_config is not None)
        if not self.is_deepspeed_enabled and (notice := rounding_notice(self.model)):  # it keeps copies in float32
            logger.warning(notice)
        if own_reference:
            self._set_own_reference(beta, syncs)
        else:
            self._make_reference_as_given()
        self._set_up_tracking(trajectory_sinks)
        self._set_up_shared_prefix(shared_prefix)
        self._set_up_rollouts(rollout_engine, canary_every, tool_call_parser)

    # ------------------------------------------------------------------ scoring and records

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if self.env is not None:
            self._batch_examples = [self._examples.example(row) for row in inputs]
            inputs = [{"prompt": row["prompt"]} for row in inputs]  # TRL adds the trajectory: see rollouts.py
            if self._rewards_take_columns:
                inputs = self._examples.with_columns(inputs, self._batch_examples)
        output = super()._generate_and_score_completions(inputs)
        training = self.model.training
        recorded = bool(self._recorder.sinks) and self.accelerator.is_main_process
        self._recorder.record(
            self._scored,
            output["advantages"],
            step=self.state.global_step,
            phase="train" if training else "eval",
            group_size=self.num_generations if training else self.num_generations_eval,
            reward_names=self.reward_func_names,
            reward_weights=self.reward_weights.tolist(),
            is_main_process=self.accelerator.is_main_process,
            adapter=self._hashes.at(self.state.global_step) if recorded else None,
        )
        return output

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if self.model.training:
            self._training_check.note_advantages(inputs["advantages"], inputs["completion_mask"])
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any
    ) -> torch.Tensor:
        from rlvr.trainers.recording import ScoredBatch

        if self.env is not None:  # TRL decodes all tokens as one message; the trajectory knows the turns
            completions = [row["trajectory"].completion for row in inputs]
        start = time.perf_counter()
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._metrics["train" if self.model.training else "eval"]["scoring_time"].append(time.perf_counter() - start)
        stop_reasons = [str(row["trajectory"].stop_reason) if "trajectory" in row else None for row in inputs]
        self._scored = ScoredBatch(prompts, completions, stop_reasons, rewards)
        return rewards

    # ------------------------------------------------------------------ tracking

    def _set_up_tracking(self, sinks: Sequence[TrajectorySink]) -> None:
        from rlvr.trainers.policy_hashes import PolicyHashes
        from rlvr.trainers.recording import TrajectoryRecorder
        from rlvr.trainers.training_check import TrainingCheck

        policy = self.accelerator.unwrap_model(self.model)
        self._training_check = TrainingCheck(policy)
        self._hashes = PolicyHashes(policy)
        self.add_callback(self._training_check.callback())
        self.add_callback(self._hashes.callback())
        self._recorder = TrajectoryRecorder(sinks)
        if "wandb" in (self.args.report_to or ()):
            from rlvr.tracking.wandb import WandbTrajectories

            self._recorder.sinks.append(WandbTrajectories(self.reward_func_names))

    # ------------------------------------------------------------------ training

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `trl.GRPOTrainer.train`; when an error of rlvr stops the run, a checkpoint is saved first."""
        try:
            with _heap_set_aside():
                return super().train(*args, **kwargs)
        except RlvrError:
            if self.optimizer is not None:
                self._save_checkpoint(self.model, trial=None)
                self.callback_handler.on_save(self.args, self.state, self.control)
                folder = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
                if (folder / "trainer_state.json").is_file():
                    logger.error("the run stops; its state is saved in %s", folder)
                else:  # another process writes it, and may not have come here
                    logger.error("the run stops; its state is not saved: %s has no trainer_state.json", folder)
            raise


@contextmanager
def _heap_set_aside() -> Iterator[None]:
    """Leaves the objects that exist now out of garbage collections. With torch, transformers and TRL imported they are
    half a million, and looking through them takes a quarter of a second and more, every few steps."""
    if gc.get_freeze_count():  # somebody did so already
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _refuse_with_env(**arguments: Any) -> None:
    given = [name for name, value in arguments.items() if value]
    if given:
        raise ConfigError(
            f"env was given together with {', '.join(given)}; an environment brings its own tools and rollouts. "
            "Leave one of them out."
        )


def _reward_weights(rewards: Sequence[WeightedReward], added: int, given: Sequence[float] | None) -> list[float]:
    """The rubric's weights, then one for each reward function that was added beside it."""
    if given is not None and len(given) != added:
        raise ConfigError(
            f"args.reward_weights has {len(given)} values, and {added} reward_funcs were given beside the "
            "environment; its rubric has its own weights, so give one value for each of reward_funcs."
        )
    return [reward.weight for reward in rewards] + list(given if given is not None else [1.0] * added)


def _pad_front(processing_classes: Any, count: int) -> Any:
    """TRL wants one processing class for each reward function; a rubric's need none."""
    if processing_classes is None:
        return None
    given = processing_classes if isinstance(processing_classes, list) else [processing_classes]
    return [None] * count + given
