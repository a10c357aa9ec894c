"""Evaluation of a policy on an environment: before, during and after training, and by `rlvr evaluate`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlvr.backends.protocol import LoadedPolicy, ModelBackend
from rlvr.config import EVALUATION_SETTINGS, LOADING, TrainSettings, closest, settings_from
from rlvr.environments.base import Environment
from rlvr.environments.tools import check_tools
from rlvr.errors import ConfigError, ModelError
from rlvr.rollout.engine import RolloutEngine, SamplingSettings
from rlvr.rollout.evaluation import Evaluation, ScoredTrajectory, evaluate_policy
from rlvr.rollout.tool_calls import ToolCallParser, asked_parser
from rlvr.tracking.trajectories import TrajectoryRecord


def evaluate(
    env: str | Environment,
    model: str | Path | LoadedPolicy,
    backend: str | ModelBackend | None = None,
    *,
    adapter: str | Path | None = None,
    samples: int = 1,
    limit: int | None = None,
    temperature: float | None = None,
    batch_size: int = 64,
    env_options: Mapping[str, Any] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> Evaluation:
    """Plays an environment's held-out examples with a policy.

        rlvr.evaluate("arithmetic", "Qwen/Qwen2.5-0.5B-Instruct", samples=4).metrics["pass@4"]

    Args:
        env: a name from `rlvr environments`, or an `Environment`.
        model: a model id, a folder, or a loaded policy.
        backend: a name from `rlvr backends`, or a backend; None for RLVR_BACKEND, else "hf".
        adapter: folder of a saved adapter, or of a run that has one.
        samples: N, attempts at each example.
        limit: examples, from the first; None for all.
        temperature: None for 0 (greedy) with one attempt, 1.0 with several.
        batch_size: rollouts that are played at the same time.
        env_options: the environment's own options, where `env` is a name.
        on_progress: called with (attempts played, all).
        settings: those in `EVALUATION_SETTINGS`, in the names and with the defaults of `TrainSettings`.

    Raises:
        RlvrError: something cannot be used, found before the model is loaded where that can be known.
    """
    from rlvr.plugins.manager import load_backend, load_environment

    chosen, temperature = _checked(model, settings, samples, limit, temperature, batch_size)
    folder = _adapter_folder(adapter) if adapter is not None else None
    backend = load_backend(backend if backend is not None else chosen.backend)
    environment = load_environment(env, **(env_options or {}))
    check_tools(environment.tools)
    parser = asked_parser(chosen.tool_call_parser, has_tools=bool(environment.tools))
    policy = model if isinstance(model, LoadedPolicy) else _load(chosen, backend, folder)
    backend.for_inference(policy)
    return evaluate_policy(
        environment,
        sampling_engine(
            policy,
            _sampling(chosen, temperature),
            asked=chosen.rollout_engine,
            batch_size=batch_size,
            seed=chosen.seed,
        ),
        _renderer(environment, policy),
        max_completion_tokens=chosen.max_tokens,
        samples=samples,
        limit=limit,
        batch_size=batch_size,
        parser=parser,
        on_progress=on_progress,
    )


def sampling_engine(
    policy: LoadedPolicy, sampling: SamplingSettings, *, asked: str = "auto", batch_size: int = 64, seed: int = 0
) -> RolloutEngine:
    """What samples outside training: the grouped engine where it can run the model, else `generate`.

    Raises:
        UnsupportedSettingError: "grouped" was asked for, and cannot run the model.
    """
    from rlvr.rollout.generate import GenerateEngine, end_token_ids, model_generate
    from rlvr.rollout.grouped import GroupedEngine

    ends = end_token_ids(policy.model, policy.tokenizer)
    if asked == "grouped" or (asked != "generate" and GroupedEngine.unsupported(policy.model, sampling) is None):
        return GroupedEngine(
            policy.model, sampling=sampling, eos_token_ids=sorted(ends), seed=seed, max_rows=batch_size
        )
    generate = model_generate(policy.model, policy.tokenizer, sampling, batch_size=batch_size, seed=seed)
    return GenerateEngine(generate, end_token_ids=ends)


@dataclass
class Evaluator:
    """Evaluates the policy of a run, greedily, on the same examples each time.

    Args:
        parser: of tool calls; None for that of the chat template.
        keep: takes the trajectories of each evaluation.
        add_row: takes a row of metrics.
    """

    environment: Environment
    backend: ModelBackend
    policy: LoadedPolicy
    settings: TrainSettings
    parser: ToolCallParser | None
    keep: Callable[[list[TrajectoryRecord]], None]
    add_row: Callable[[Mapping[str, Any]], None]

    def run(self, *, step: int) -> Evaluation | None:
        """None where there is nothing held out, or `eval_samples` is 0."""
        if self.settings.eval_samples == 0 or self.environment.eval_dataset is None:
            return None
        self.backend.for_inference(self.policy)
        try:
            found = evaluate_policy(
                self.environment,
                sampling_engine(
                    self.policy,
                    _sampling(self.settings, temperature=0.0),
                    asked=self.settings.rollout_engine,
                    seed=self.settings.seed,
                ),
                _renderer(self.environment, self.policy),
                max_completion_tokens=self.settings.max_tokens,
                limit=self.settings.eval_samples,
                parser=self.parser,
            )
        finally:
            self.backend.for_training(self.policy)
        self.keep(records(found.trajectories, step=step))
        self.add_row({"step": step, "evaluation": found.metrics})
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
        )
        for item in trajectories
    ]


def _checked(
    model: Any,
    settings: Mapping[str, Any],
    samples: int,
    limit: int | None,
    temperature: float | None,
    batch_size: int,
) -> tuple[TrainSettings, float]:
    """The settings and the temperature; all problems at once."""
    problems = [
        f"{name} is {value}; it must be at least 1."
        for name, value in (("samples", samples), ("limit", limit), ("batch_size", batch_size))
        if value is not None and value < 1
    ]
    problems += [
        f"evaluate has no option {name!r}.{closest(name, EVALUATION_SETTINGS)}"
        for name in settings
        if name not in EVALUATION_SETTINGS
    ]
    if temperature is None:
        temperature = 0.0 if samples == 1 else 1.0
    if temperature < 0:
        problems.append(f"temperature is {temperature}; it must be at least 0, where 0 is greedy.")
    elif temperature == 0 and samples > 1:
        problems.append(f"samples is {samples} with temperature 0: all attempts would be equal. Raise --temperature.")
    if settings.get("rollout_engine") == "vllm":
        problems.append("rollout_engine is 'vllm', which trains only; allowed here: auto, generate, grouped.")
    known = {name: value for name, value in settings.items() if name in EVALUATION_SETTINGS}
    named = model.settings.model if isinstance(model, LoadedPolicy) else model
    try:
        chosen = settings_from(known, {"model": named}, required=("model",))
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from None
    if isinstance(model, LoadedPolicy):
        problems += loaded_policy_problems(model, chosen, settings)
    if problems:
        raise ConfigError(problems)
    return chosen, temperature


def loaded_policy_problems(policy: LoadedPolicy, settings: TrainSettings, given: Iterable[str]) -> list[str]:
    """What a policy that is loaded already cannot honour of the settings; `given` are those not left to defaults."""
    problems = [
        f"{name} was given for a policy that is loaded already; give it to rlvr.load_policy instead."
        for name in given
        if name in LOADING
    ]
    length, room = settings.max_prompt_length + settings.max_tokens, policy.settings.max_seq_length
    if length > room:
        problems.append(
            f"max_prompt_length {settings.max_prompt_length} + max_tokens {settings.max_tokens} = {length} tokens, "
            f"and the policy was loaded for {room}. Lower one, or load it with max_seq_length={length}."
        )
    return problems


def _adapter_folder(adapter: str | Path) -> Path:
    """The folder with the adapter's files: the one given, or `adapter` in a run's folder."""
    for folder in (Path(adapter), Path(adapter) / "adapter"):
        if (folder / "adapter_config.json").is_file():
            return folder
    raise ModelError(
        f"there is no adapter in {str(adapter)!r}: it has no adapter_config.json. Give a folder that a run saved, for "
        "example outputs/my-run/adapter."
    )


def _load(settings: TrainSettings, backend: ModelBackend, adapter: Path | None) -> LoadedPolicy:
    from rlvr.backends import load_policy

    model_settings = settings.model_settings()
    if adapter is not None:
        return backend.load_saved(adapter, model_settings)
    return load_policy(backend=backend, lora=None, **asdict(model_settings))


def _sampling(settings: TrainSettings, temperature: float) -> SamplingSettings:
    return SamplingSettings(
        temperature=temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        min_p=settings.min_p,
        repetition_penalty=settings.repetition_penalty,
    )


def _renderer(environment: Environment, policy: LoadedPolicy) -> Any:
    from rlvr.rollout.chat import ChatRenderer

    return ChatRenderer(policy.tokenizer, tools=environment.tools)
