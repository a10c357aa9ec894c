"""One training run, from settings to a trained policy. `rlvr train` and `rlvr.train` are this."""

from __future__ import annotations

import itertools
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rlvr.backends.protocol import LoadedPolicy, ModelBackend
from rlvr.config import TrainSettings, merge, processes, read_config, settings_from
from rlvr.environments.base import Environment
from rlvr.environments.tools import check_tools
from rlvr.errors import ConfigError, DataError
from rlvr.exporting.card import write_own_card
from rlvr.exporting.writers import write_base_revision
from rlvr.plugins.manager import BACKEND_VARIABLE, DEFAULT_BACKEND
from rlvr.rollout.tool_calls import asked_parser
from rlvr.secrets import NOT_KEPT, options_not_kept
from rlvr.tracking.adapter_hash import adapter_hash
from rlvr.tracking.hub import check_push, push
from rlvr.tracking.lineage import check_base_commit, exact_revision, recorded_base, write_record
from rlvr.tracking.run_folder import RunFolder, find_checkpoint
from rlvr.trainers.arguments import grpo_config, training_arguments
from rlvr.trainers.colocated import check_vllm_can_start, variables_kept
from rlvr.trainers.evaluator import Evaluator
from rlvr.trainers.players import backend_name, fitting_examples, loaded_policy_problems
from rlvr.trainers.policy_hashes import origin
from rlvr.trainers.resuming import check_resumed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A finished run. `folder` holds everything; see `rlvr.tracking.run_folder`.

    `policy` is None after `isolate=True`: `load_backend(...).load_saved(run.folder / "adapter", ...)` loads it.
    """

    folder: Path
    summary: dict[str, Any]
    policy: LoadedPolicy | None

    def metrics(self) -> Iterator[dict[str, Any]]:
        """A row for each logged step."""
        return RunFolder(self.folder).metrics()

    def trajectories(self) -> Iterator[dict[str, Any]]:
        """A row for each trajectory, evaluation included."""
        return RunFolder(self.folder).trajectories()


def train(
    env: str | Environment | None = None,
    model: str | Path | LoadedPolicy | None = None,
    backend: str | ModelBackend | None = None,
    *,
    env_options: Mapping[str, Any] | None = None,
    config: str | Path | None = None,
    callbacks: Sequence[Any] = (),
    isolate: bool = False,
    **settings: Any,
) -> Run:
    """Trains a policy on an environment.

        run = rlvr.train("arithmetic", "Qwen/Qwen2.5-0.5B-Instruct", max_steps=100, env_options={"levels": "2"})
        print(run.summary["eval_before"], run.summary["eval_after"])

    Args:
        env: a name from `rlvr environments`, or an `Environment`.
        model: a model id, a folder, or a policy that was loaded before. The latter is trained as it is: no adapter
            is put on it.
        backend: a name from `rlvr backends`, or a backend; None for RLVR_BACKEND, else "hf".
        env_options: the environment's own options, where `env` is a name.
        config: a YAML file of settings; those given here win.
        callbacks: more `transformers.TrainerCallback`s.
        isolate: train in a child process, whose output appears here. For a process that another backend has patched;
            environment, model and backend are then given by name.
        settings: the fields of `rlvr.config.TrainSettings`, in the names of the command line.

    Raises:
        RlvrError: anything that keeps the run from starting, before the model is loaded where that can be known.
    """
    named = {
        "env": env.name if isinstance(env, Environment) else env,
        "env_options": dict(env_options) if env_options else None,
        "model": model.settings.model if isinstance(model, LoadedPolicy) else model,
        "backend": backend if isinstance(backend, str) or backend is None else backend_name(backend),
    }
    layers = [read_config(config)] if config is not None else []
    layers += [{name: value for name, value in named.items() if value is not None}, settings]
    resolved = resolve_settings(*layers)
    if isinstance(model, LoadedPolicy) and (problems := loaded_policy_problems(model, resolved, merge(*layers))):
        raise ConfigError(problems)
    if isolate:
        from rlvr.trainers.isolated import train_isolated

        objects = {"env": env, "model": model, "backend": backend, "callbacks": callbacks or None}
        named_kinds = (str, Path, type(None))
        return train_isolated(
            resolved, **{name: value for name, value in objects.items() if not isinstance(value, named_kinds)}
        )
    if isinstance(env, Environment) and resolved.env_options:
        raise ConfigError(
            f"options were given for an environment that exists already: {', '.join(resolved.env_options)}. "
            "Make it with them: rlvr.load_environment(name, **options)."
        )
    return train_with(
        resolved,
        environment=env if isinstance(env, Environment) else None,
        backend=backend if not isinstance(backend, str) else None,
        policy=model if isinstance(model, LoadedPolicy) else None,
        callbacks=callbacks,
    )


def resolve_settings(*layers: Mapping[str, Any]) -> TrainSettings:
    """The settings that `layers` give, later ones winning, with everything filled in that follows from them.

    A run that is resumed starts from its own `config.yaml`.

    Raises:
        ConfigError: unknown or impossible settings, or no environment or model; all problems at once.
        RunFolderError: there is nothing to resume from.
    """
    merged = merge(*layers)
    asked = merged.get("resume_from_checkpoint")
    if asked:
        output_dir = merged.get("output_dir") or _default_output_dir(merged.get("run_name"))
        run, checkpoint = find_checkpoint(str(asked), output_dir)
        here = {"output_dir": str(run), "resume_from_checkpoint": str(checkpoint)}
        layers = (RunFolder(run).config(), *layers, here)
    settings = settings_from(*layers, required=("env", "model")).resolved()
    _require_secrets(settings)
    backend = settings.backend or os.environ.get(BACKEND_VARIABLE) or DEFAULT_BACKEND
    if processes() > 1 and not (settings.run_name or settings.output_dir):
        raise ConfigError(
            f"{processes()} processes train, and each would make up another name for the run and its folder. "
            "Give one: --run-name or --output-dir."
        )
    run_name = settings.run_name or _new_run_name(settings, backend)
    return replace(
        settings,
        backend=backend,
        run_name=run_name,
        output_dir=settings.output_dir or _default_output_dir(run_name),
    )


def _require_secrets(settings: TrainSettings) -> None:
    """A run's `config.yaml` has a placeholder for each secret."""
    if names := options_not_kept(settings.env_options):
        flags = " ".join(f"--{name} VALUE".replace("_", "-") for name in names)
        raise ConfigError(
            f"of the options of environment {settings.env!r}, {', '.join(names)} holds {NOT_KEPT!r}: a run's "
            f"config.yaml keeps no secrets. Give again, in env_options or on the command line: {flags}."
        )


def train_with(
    settings: TrainSettings,
    *,
    environment: Environment | None = None,
    backend: ModelBackend | None = None,
    policy: LoadedPolicy | None = None,
    loaded_by_settings: bool = False,
    callbacks: Sequence[Any] = (),
) -> Run:
    """Trains as resolved settings say; see `resolve_settings`. What is given as an object is not loaded.

    Args:
        loaded_by_settings: whether `policy` was loaded as the settings say, so that what they leave open is decided
            here. A user's own policy checkpoints as it was loaded to, whatever memory there is.
    """
    from rlvr.plugins.manager import load_backend, load_environment
    from rlvr.tracking.reporting import reporting

    assert settings.output_dir is not None
    assert settings.env is not None
    _check_services(settings)
    resume_from = settings.resume_from_checkpoint
    checkpoint = Path(resume_from) if resume_from else None
    if checkpoint is not None:
        check_resumed(settings, checkpoint)
    folder = RunFolder.reserve(settings.output_dir, resume_from=checkpoint)
    try:
        # The backend comes first: it may have to be imported before what an environment imports.
        backend = load_backend(backend if backend is not None else settings.backend)
        environment = environment or load_environment(settings.env, **settings.env_options)
        check_tools(environment.tools)
        parser = asked_parser(settings.tool_call_parser, has_tools=bool(environment.tools))
        chooses_checkpointing = settings.gradient_checkpointing is None and (policy is None or loaded_by_settings)
        policy = policy or _load_policy(settings, backend)
        settings = settings.planned(shares=_shares_prompts(policy))
        if checkpoint is not None:
            check_base_commit(recorded_base(folder), policy.settings.revision)
        rows = training_rows(environment, policy, settings)
        evaluator = Evaluator(
            environment, backend, policy, settings, parser, keep=folder.add_trajectories, add_row=folder.add_metrics
        )
        arguments, changes = training_arguments(settings, policy, backend, folder)
        if chooses_checkpointing and arguments["gradient_checkpointing"]:
            from rlvr.trainers.activations import switch_off_checkpointing

            switched_off = switch_off_checkpointing(settings, arguments, policy)
            changes = [change for change in changes if change.name in arguments] + switched_off
        reports = reporting(settings.report_to, folder=folder.path, run_name=settings.run_name)
        with reports as trackers, variables_kept():
            folder.begin(settings.as_dict(), seeds={"run": settings.seed}, policy=_policy_facts(policy, changes))
            arguments["report_to"] = trackers
            return _train(settings, rows, arguments, folder, callbacks, evaluator)
    finally:
        folder.release_if_unused()


def _train(
    settings: TrainSettings,
    rows: Sequence[Any],
    arguments: dict[str, Any],
    folder: RunFolder,
    callbacks: Sequence[Any],
    evaluator: Evaluator,
) -> Run:
    from transformers import PrinterCallback

    from rlvr.tracking.progress import MetricsRows, ProgressDisplay
    from rlvr.trainers import EnhancedGRPOTrainer

    environment, backend, policy = evaluator.environment, evaluator.backend, evaluator.policy
    progress = ProgressDisplay()
    trainer = EnhancedGRPOTrainer(
        model=policy.model,
        processing_class=policy.tokenizer,
        env=environment,
        train_dataset=rows,
        args=grpo_config(arguments),
        callbacks=[MetricsRows(folder.add_metrics), progress, *callbacks],
        rollout_engine=settings.rollout_engine,  # type: ignore[arg-type]
        tool_call_parser=evaluator.parser,
        shared_prefix=settings.shared_prefix,  # type: ignore[arg-type]
        canary_every=settings.canary_every,
        trajectory_sinks=[folder.add_trajectories],
    )
    trainer.remove_callback(PrinterCallback)
    if settings.eval_every:
        trainer.add_callback(evaluator.callback(every=settings.eval_every, trainer=trainer))

    folder.add_origin(origin(policy, folder.resume_from))  # once the trainer is made: TRL may round adapters
    began = time.monotonic()
    before = evaluator.run(step=0) if settings.resume_from_checkpoint is None else None
    try:
        trainer.train(resume_from_checkpoint=settings.resume_from_checkpoint)
    finally:
        progress.close()
    after = evaluator.run(step=trainer.state.global_step)
    trained = adapter_hash(policy.model)
    if trainer.is_world_process_zero():
        saved = folder.path / ("model" if policy.settings.full_finetuning else "adapter")
        backend.save(policy, saved)
        write_base_revision(saved, exact_revision(recorded_base(folder)))
        write_record(saved, adapter=trained, step=trainer.state.global_step)
    summary = {
        **_training_facts(trainer, settings, environment),
        "adapter": trained,
        "seconds": time.monotonic() - began,
        "eval_before": before.metrics if before else _earlier_evaluation(folder),
        "eval_after": after.metrics if after else {},
    }
    folder.write_summary(summary)
    if trainer.is_world_process_zero():
        write_own_card(folder)
        if settings.push_to_hub:
            push(saved, _repository(settings))
    return Run(folder.path, summary, policy)


def training_rows(environment: Environment, policy: LoadedPolicy, settings: TrainSettings) -> Sequence[Any]:
    """The training examples whose prompts fit `max_prompt_length`.

    Raises:
        DataError: none fits, or fewer than the prompts of one step.
    """
    dataset = environment.train_dataset
    fitting = fitting_examples(environment, dataset, policy.tokenizer, max_prompt_length=settings.max_prompt_length)
    if len(fitting) < (settings.prompts_per_step or 1):
        raise DataError(
            f"environment {environment.name!r} has {len(fitting)} training examples, and a step takes "
            f"{settings.prompts_per_step} different prompts. Lower --prompts-per-step, or bring more examples."
        )
    return dataset if len(fitting) == len(dataset) else [dataset[index] for index in fitting]


def _load_policy(settings: TrainSettings, backend: ModelBackend) -> LoadedPolicy:
    from rlvr.backends import load_policy

    return load_policy(backend=backend, lora=settings.lora_settings(), **asdict(settings.model_settings()))


def _shares_prompts(policy: LoadedPolicy) -> bool:
    """Whether the trainer is going to compute each prompt once, as far as the policy and the launcher tell."""
    from rlvr.trainers.sharding import launched_to_shard
    from rlvr.trainers.shared_prefix import unsupported_reason

    return unsupported_reason(policy.model) is None and not launched_to_shard()


def _training_facts(trainer: Any, settings: TrainSettings, environment: Environment) -> dict[str, Any]:
    return {
        "environment": environment.name,
        "model": settings.model,
        "backend": settings.backend,
        "rollout_engine": trainer.engine.name,
        "shared_prefix": trainer.shares_prefix,
        "token_ratio_saved": trainer.token_ratio_saved,
        "steps": trainer.state.global_step,
        "tokens": int(trainer.state.num_input_tokens_seen),
    }


def _policy_facts(policy: LoadedPolicy, changes: Sequence[Any]) -> dict[str, Any]:
    return {
        "model": asdict(policy.settings),
        "lora": asdict(policy.lora) if policy.lora is not None else None,
        "notes": list(policy.notes),
        "training_arguments_changed": [asdict(change) for change in changes],
    }


def _earlier_evaluation(folder: RunFolder) -> dict[str, float]:
    """A resumed run was evaluated before its first step; the first row says how."""
    rows = (row["evaluation"] for row in folder.metrics() if "evaluation" in row)
    return next(rows, {})


def _check_services(settings: TrainSettings) -> None:
    """Refuses at once what would fail hours later, or with an error of another library."""
    from rlvr.tracking.reporting import chosen_trackers

    chosen_trackers(settings.report_to)
    if settings.rollout_engine == "vllm":
        check_vllm_can_start(server=settings.vllm_server is not None)
    if settings.push_to_hub:
        given = settings.hub_model_id is not None
        option = "hub_model_id" if given else "run_name, which names the repository where hub_model_id is not given,"
        check_push(_repository(settings), option=option)


def _repository(settings: TrainSettings) -> str:
    return settings.run_name or "" if settings.hub_model_id is None else settings.hub_model_id


def _new_run_name(settings: TrainSettings, backend: str) -> str:
    parts = [settings.env, Path(settings.model or "").name, backend, time.strftime("%Y%m%d-%H%M%S")]
    name = "-".join(re.sub(r"[^A-Za-z0-9._]+", "-", part).strip("-") for part in parts if part)
    names = (name if number == 1 else f"{name}-{number}" for number in itertools.count(1))  # several in one second
    return next(candidate for candidate in names if not (Path("outputs") / candidate).exists())


def _default_output_dir(run_name: str | None) -> str | None:
    return str(Path("outputs") / run_name) if run_name else None
