"""A policy that is loaded here, and what plays an environment with it outside training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from math import ceil
from pathlib import Path
from typing import Any

from rlvr.backends.protocol import LoadedPolicy, ModelBackend, ModelSettings
from rlvr.config import LOADING, TrainSettings, settings_from
from rlvr.environments.base import Environment, Rows
from rlvr.errors import ConfigError, DataError, ModelError, RunFolderError
from rlvr.rollout.engine import RolloutEngine, SamplingSettings
from rlvr.rollout.evaluation import LocalPlayer
from rlvr.rollout.tool_calls import ToolCallParser
from rlvr.wording import closest

BATCH_SIZE = 64

logger = logging.getLogger(__name__)


def local_player(
    environment: Environment,
    policy: LoadedPolicy,
    settings: TrainSettings,
    *,
    temperature: float,
    parser: ToolCallParser | None = None,
    batch_size: int = BATCH_SIZE,
    attempts: int = 1,
) -> LocalPlayer:
    """
    Args:
        parser: of tool calls; None for that of the chat template.
        attempts: how many it is going to play in all.

    Raises:
        UnsupportedSettingError: the grouped engine was asked for, and cannot run the model.
    """
    from rlvr.rollout.chat import ChatRenderer

    return LocalPlayer(
        engine_for=sampling_engine(
            policy,
            sampling_settings(settings, temperature),
            asked=settings.rollout_engine,
            batch_size=batch_size,
            rollouts=ceil(attempts / batch_size),
        ),
        renderer=ChatRenderer(policy.tokenizer, tools=environment.tools),
        max_completion_tokens=settings.max_tokens,
        parser=parser,
        batch_size=batch_size,
        seed=settings.seed,
    )


def fitting_examples(
    environment: Environment, rows: Rows, tokenizer: Any, *, max_prompt_length: int, what: str = "examples"
) -> list[int]:
    """Indices of the rows whose prompts fit `max_prompt_length` tokens. A warning says how many are left out.

    Args:
        what: the rows, for messages.

    Raises:
        DataError: none fits.
    """
    from rlvr.rollout.chat import ChatRenderer

    renderer = ChatRenderer(tokenizer, tools=environment.tools)
    fitting = [
        index
        for index in range(len(rows))
        if len(renderer.prompt_ids(environment.messages(rows[index]))) <= max_prompt_length
    ]
    if not fitting:
        raise DataError(
            f"every prompt of the {len(rows)} {what} of environment {environment.name!r} is longer than "
            f"max_prompt_length {max_prompt_length} tokens. Raise --max-prompt-length."
        )
    if len(fitting) < len(rows):
        logger.warning(
            "%d of %d %s are left out: their prompts are longer than max_prompt_length %d tokens.",
            *(len(rows) - len(fitting), len(rows), what, max_prompt_length),
        )
    return fitting


def sampling_settings(settings: TrainSettings, temperature: float) -> SamplingSettings:
    return SamplingSettings(
        temperature=temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        min_p=settings.min_p,
        repetition_penalty=settings.repetition_penalty,
    )


def sampling_engine(
    policy: LoadedPolicy,
    sampling: SamplingSettings,
    *,
    asked: str = "auto",
    batch_size: int = BATCH_SIZE,
    rollouts: int = 1,
) -> Callable[[int], RolloutEngine]:
    """What samples outside training, for each seed: the grouped engine where it can run the model, else `generate`,
    of which a warning says why.

    Args:
        rollouts: how many of `batch_size` it is going to be used for, which decides whether compilation pays.

    Raises:
        UnsupportedSettingError: "grouped" was asked for, and cannot run the model.
    """
    from rlvr.rollout.generate import GenerateEngine, end_token_ids, model_generate
    from rlvr.rollout.grouped import GroupedEngine

    ends = end_token_ids(policy.model, policy.tokenizer)
    either = asked not in ("generate", "grouped")
    problem = GroupedEngine.unsupported(policy.model, sampling) if either else None
    if problem is not None:
        _say_once(problem)
    elif asked != "generate":
        grouped = GroupedEngine(
            policy.model, sampling=sampling, eos_token_ids=sorted(ends), max_rows=batch_size, rollouts=rollouts
        )

        def grouped_engine(seed: int) -> RolloutEngine:
            grouped.reseed(seed)
            return grouped

        return grouped_engine

    def plain_engine(seed: int) -> RolloutEngine:
        generate = model_generate(policy.model, policy.tokenizer, sampling, batch_size=batch_size, seed=seed)
        return GenerateEngine(generate, end_token_ids=ends)

    return plain_engine


@cache
def _say_once(problem: str) -> None:
    """A run evaluates many times."""
    logger.warning("outside training plain generate samples, not the grouped engine: %s.", problem)


def checked_settings(
    command: str,
    model: str | Path | LoadedPolicy,
    given: Mapping[str, Any],
    *,
    allowed: Sequence[str],
    problems: Sequence[str] = (),
) -> TrainSettings:
    """The settings of a command that samples outside training.

    Args:
        allowed: the settings that it has.
        problems: what is wrong with its other options.

    Raises:
        ConfigError: all problems at once.
    """
    found = [
        *problems,
        *(f"{command} has no option {name!r}.{closest(name, allowed)}" for name in given if name not in allowed),
    ]
    if given.get("rollout_engine") == "vllm":
        found.append("rollout_engine is 'vllm', which trains only; allowed here: auto, generate, grouped.")
    known = {name: value for name, value in given.items() if name in allowed}
    named = model.settings.model if isinstance(model, LoadedPolicy) else model
    try:
        settings = settings_from(known, {"model": named}, required=("model",))
    except ConfigError as error:
        raise ConfigError([*found, *error.problems]) from None
    if isinstance(model, LoadedPolicy):
        found += loaded_policy_problems(model, settings, given)
    if found:
        raise ConfigError(found)
    return settings


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


def adapter_folder(adapter: str | Path) -> Path:
    """The folder with the adapter's files: the one given, or `adapter` in a run's folder."""
    for folder in (Path(adapter), Path(adapter) / "adapter"):
        if (folder / "adapter_config.json").is_file():
            return folder
    raise ModelError(
        f"there is no adapter in {str(adapter)!r}: it has no adapter_config.json. Give a folder that a run saved, for "
        "example outputs/my-run/adapter."
    )


def load_for_inference(settings: TrainSettings, backend: ModelBackend, adapter: Path | None) -> LoadedPolicy:
    """The policy, in the mode that sampling wants.

    Args:
        adapter: a folder that `adapter_folder` found.

    Raises:
        UnsupportedSettingError: the backend cannot honour the settings, with an adapter or without.
    """
    from rlvr.backends import load_policy, load_saved

    model_settings = settings.model_settings()
    if adapter is not None:
        policy = load_saved(backend, adapter, model_settings)
        _say_other_base(adapter, model_settings)  # now that it is known which commit a branch of the Hub is
        return policy
    return load_policy(backend=backend, lora=None, **asdict(model_settings))


def _say_other_base(adapter: Path, settings: ModelSettings) -> None:
    """An adapter of a run, on its way to a model that the run did not train on, is worth a word."""
    from rlvr.tracking.lineage import ORIGIN, base_difference, recorded_base
    from rlvr.tracking.run_folder import RunFolder

    run = next((folder for folder in adapter.resolve().parents[:2] if (folder / ORIGIN).is_file()), None)
    try:
        record = recorded_base(RunFolder(run)) if run is not None else None
    except RunFolderError:  # damaged, which is for `rlvr lineage` to say
        return
    found = base_difference(record, settings.model, settings.revision) if record is not None else None
    if found is not None:
        logger.warning(
            "the adapter %s was not trained on %r as it is here (%s): what it does here is not what the run trained.",
            *(adapter, settings.model, found),
        )


def backend_name(backend: ModelBackend) -> str:
    return getattr(backend, "name", type(backend).__name__)
