"""How `EnhancedGRPOTrainer` makes completions: the engine, environments, the canary."""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rlvr.errors import ConfigError, SamplerDriftError
from rlvr.types import StopReason, Trajectory

if TYPE_CHECKING:
    import numpy as np

    _Base: Any  # trl.GRPOTrainer, found when an instance is made

    from rlvr.environments.base import Environment
    from rlvr.rollout.engine import RolloutEngine
    from rlvr.rollout.tool_calls import ToolCallParser
    from rlvr.trainers.engines import RolloutEngineName
    from rlvr.types import Example
else:
    _Base = object

logger = logging.getLogger(__name__)


class RolloutMixin(_Base):
    """The part of the trainer that samples. `super()` is TRL's trainer."""

    env: Environment | None
    engine: RolloutEngine
    rollout_func: Any  # TRL's
    _batch_examples: list[Example]

    def _set_up_rollouts(
        self,
        rollout_engine: RolloutEngineName,
        canary_every: int,
        tool_call_parser: str | ToolCallParser | None,
    ) -> None:
        from rlvr.trainers.engines import choose_engine

        choice = choose_engine(self, rollout_engine)
        self.engine = choice.engine
        if self.use_vllm and not self._on_unsloth_trainer:
            from rlvr.trainers.vllm_weights import merge_apart

            merge_apart(self.vllm_generation)
        if canary_every < 0:
            raise ConfigError(
                f"canary_every is {canary_every}; allowed: a number of steps, or 0 for checks after 0, 10, 100, "
                "... steps and at the last rollout."
            )
        self._canary_every, self._canary_due = canary_every, 0
        if choice.fallback:
            logger.warning("rollouts use plain generate, not the grouped engine: %s.", choice.fallback)
        takes_text = self._tokenizer is self.processing_class  # a processor has a chat template of its own
        if self.env is not None:
            from rlvr.rollout.chat import ChatRenderer
            from rlvr.rollout.tool_calls import parser_for

            self._renderer = ChatRenderer(
                self._tokenizer,
                tools=self.env.tools,
                chat_template=None if takes_text else getattr(self.processing_class, "chat_template", None),
                chat_template_kwargs=self.chat_template_kwargs,
                content_parts=not takes_text,
            )
            self._parser = parser_for(self._renderer, tool_call_parser)
        elif self.rollout_func is not None and takes_text:
            self.rollout_func = self._watched(self.rollout_func)

    def sample_with_trl(
        self, full_ids: list[list[int]], max_new_tokens: list[int]
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """One batch through TRL's own sampling (transformers, continuous batching or vLLM, as `args` say)."""
        config = getattr(self, "generation_config", None)  # absent with vLLM, which has its own limit
        if config is None:
            return super()._generate_single_turn(full_ids, None, {}, 1)
        limit, config.max_new_tokens = config.max_new_tokens, max(max_new_tokens)
        try:
            return super()._generate_single_turn(full_ids, None, {}, 1)
        finally:
            config.max_new_tokens = limit

    def _generate_single_turn(self, prompt_ids: Any, images: Any, *args: Any, **kwargs: Any) -> Any:
        """What TRL samples by itself, without an environment: through the grouped engine where that is the choice."""
        from rlvr.rollout.engine import sample_all
        from rlvr.rollout.grouped import GroupedEngine

        if images is not None:
            self._leave_unchecked("prompts have images")
            return super()._generate_single_turn(prompt_ids, images, *args, **kwargs)
        logprobs: list[Any] | None
        if isinstance(self.engine, GroupedEngine):
            turns = sample_all(self.engine, prompt_ids, max_completion_tokens=self.max_completion_length)
            ids, logprobs = [turn.token_ids for turn in turns], None
            recorded = [turn.logprobs for turn in turns]
        else:
            ids, logprobs = super()._generate_single_turn(prompt_ids, images, *args, **kwargs)
            recorded = [None] * len(ids) if logprobs is None else logprobs
        self._check_sampler(prompt_ids, ids, [[1] * len(row) for row in ids], recorded)
        return ids, logprobs

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        """As TRL's, each distinct prompt once: those of a group are equal."""
        if self.environment_factories is not None:  # then a row's tools are its environment's
            return super()._tokenize_prompts(prompts)
        keys = [repr(prompt) for prompt in prompts]
        distinct = dict(zip(keys, prompts, strict=True))
        ids, images, fields = super()._tokenize_prompts(list(distinct.values()))
        if images is not None:  # they come in one row for all prompts
            return super()._tokenize_prompts(prompts)
        groups = {key: group for group, key in enumerate(distinct)}
        group_of = [groups[key] for key in keys]
        by_row = {name: [values[group] for group in group_of] for name, values in fields.items()}
        return [list(ids[group]) for group in group_of], None, by_row

    def _generate(self, prompts: list[Any]) -> Any:
        start = time.perf_counter()
        prompt_ids, *others = super()._generate(prompts)
        self._metrics["train" if self.model.training else "eval"]["rollout_time"].append(time.perf_counter() - start)
        if not self._on_unsloth_trainer and all(type(ids) is list for ids in prompt_ids):
            prompt_ids = _arrays(prompt_ids)
        return prompt_ids, *others

    def _check_sampler(
        self,
        prompt_ids: list[list[int]],
        completion_ids: list[list[int]],
        sampled_mask: list[list[int]],
        logprobs: list[list[float] | None],
        *,
        sampler: str | None = None,
    ) -> None:
        """The canary: after 0, 10, 100, ... optimizer steps and at the last rollout, or every `canary_every`."""
        if not self._canary_is_due() or not any(map(any, sampled_mask)):
            return
        from rlvr.trainers.canary import check_sampler, check_samples
        from rlvr.trainers.reference import dropout_off

        own = self._options_of_the_model() if sampler is None else []
        truncated = bool(self.top_p < 1 or self.top_k != 0 or self.min_p or own)
        recorded = [values for values in logprobs if values is not None]
        if self.use_vllm and (truncated or self.repetition_penalty != 1):
            recorded = []  # vLLM gives log-probabilities of the distribution that it draws from: not comparable
        if not recorded and self.args.generation_kwargs:
            self._leave_unchecked("generation_kwargs change what is sampled")
            return
        continuous = getattr(self.args, "use_transformers_continuous_batching", False)
        if self.repetition_penalty != 1 and (sampler or continuous):
            self._leave_unchecked(f"{sampler or 'continuous batching'} may sample without the repetition_penalty")
            return
        if not recorded and not {*own} <= {"top_k", "min_p"}:
            self._leave_unchecked(f"the model's generation config changes what is sampled ({', '.join(own)})")
            return
        step = self.state.global_step
        self._canary_due = self._next_look(step)
        samples = (prompt_ids, completion_ids, sampled_mask)
        with dropout_off(self.accelerator.unwrap_model(self.model)):  # engines sample without dropout
            if len(recorded) == len(prompt_ids):
                drift = check_sampler(self, *samples, recorded)
            else:
                drift = check_samples(self, *samples, truncated=truncated, sampler=sampler)
        if drift is not None:
            self._metrics["train"]["sampler_drift"].append(drift.mean_difference)
            return
        logger.warning(
            "whether sampling follows the policy was not checked at step %d: all that was looked at has the padding "
            "token %r among its tokens, which Unsloth's trainer takes for padding wherever it is, in training too.",
            *(step, self._tokenizer.pad_token),
        )

    def _canary_is_due(self) -> bool:
        return self.model.training and self.state.global_step >= self._canary_due

    def _next_look(self, step: int) -> int:
        """The step at which the canary looks after that at `step`."""
        if self._canary_every:
            return step + self._canary_every
        usual, last_rollout = 10 ** len(str(step)), self.state.max_steps - self.num_iterations
        return min(usual, last_rollout) if step < last_rollout else usual

    def _options_of_the_model(self) -> list[str]:
        """What transformers' generate, where it samples, takes from the model's own generation config."""
        from rlvr.trainers.engines import generate_options

        given = getattr(self, "generation_config", None)  # absent with vLLM
        own = self.accelerator.unwrap_model(self.model).generation_config
        return [] if given is None else generate_options(own, given=given)

    def _leave_unchecked(self, reason: str) -> None:
        if self._canary_due < sys.maxsize:
            logger.warning("whether sampling follows the policy is not checked: %s.", reason)
        self._canary_due = sys.maxsize

    def _watched(self, rollout_func: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
        """A user's own function, which may sample as it likes: what the canary finds is a warning. With a processor it
        is left alone, since its prompts may have images, which it does not give."""

        def watched(prompts: list[Any], trainer: Any) -> dict[str, Any]:
            output = rollout_func(prompts, trainer)
            if not self._canary_is_due():
                return output
            prompt_ids, completion_ids = ([[int(i) for i in ids] for ids in output[name]] for name in _TOKENS)
            masks = [[1] * len(ids) for ids in completion_ids]
            if output.get("env_mask") is not None:
                masks = [[int(i) for i in mask] for mask in output["env_mask"]]
            try:
                self._check_sampler(
                    prompt_ids, completion_ids, masks, [None] * len(masks), sampler="the given rollout_func"
                )
            except SamplerDriftError as error:
                logger.warning("%s", error)
            return output

        return watched

    def _play_environment(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """TRL's `rollout_func`: plays the batch's examples to their ends."""
        from rlvr.rollout.episodes import play

        assert self.env is not None
        rollouts = play(
            self.env,
            self._batch_examples,
            engine=self.engine,
            renderer=self._renderer,
            max_completion_tokens=self.max_completion_length,
            parser=self._parser,
        )
        self._log_rollouts([rollout.trajectory for rollout in rollouts])
        prompt_ids = [rollout.prompt_ids for rollout in rollouts]
        completion_ids = [rollout.completion_ids for rollout in rollouts]
        masks = [rollout.sampled_mask for rollout in rollouts]
        logprobs = [rollout.logprobs for rollout in rollouts]
        self._check_sampler(prompt_ids, completion_ids, masks, logprobs)
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": completion_ids,
            "logprobs": logprobs if self.use_vllm and None not in logprobs else None,
            "env_mask": masks,
            "trajectory": [rollout.trajectory for rollout in rollouts],
        }

    def _log_rollouts(self, trajectories: list[Trajectory]) -> None:
        """Shares of stop reasons, turns and tool calls over all processes, as metrics of this batch."""
        import torch

        reasons = Counter(trajectory.stop_reason for trajectory in trajectories)
        counts = [
            *(reasons[reason] for reason in StopReason),
            sum(len(t.turns) for t in trajectories),
            sum(len(t.tool_calls) for t in trajectories),
            sum(t.failed_calls for t in trajectories),
            len(trajectories),
        ]
        local = torch.tensor([counts], dtype=torch.float32, device=self.accelerator.device)
        *by_reason, turns, calls, failures, total = self.accelerator.gather(local).sum(dim=0).tolist()
        metrics = self._metrics["train" if self.model.training else "eval"]
        for reason, count in zip(StopReason, by_reason, strict=True):
            metrics[f"stop_reason/{reason}"].append(count / total)
        metrics["turns"].append(turns / total)
        assert self.env is not None
        if self.env.tools:
            metrics["tools/call_frequency"].append(calls / total)
            metrics["tools/failure_frequency"].append(failures / calls if calls else 0.0)


_TOKENS = ("prompt_ids", "completion_ids")  # of what a rollout_func gives


def _arrays(prompt_ids: list[list[int]]) -> list[np.ndarray]:
    """TRL makes a tensor of each row's ids: of an array in no time, of a list number by number (15 ms for 64 rows of
    2,048). Equal rows share one."""
    import numpy as np

    from rlvr.rollout.grouped.session import distinct

    prompts, group_of = distinct(prompt_ids)
    arrays = [np.array(ids, dtype=np.int64) for ids in prompts]
    return [arrays[group] for group in group_of]
