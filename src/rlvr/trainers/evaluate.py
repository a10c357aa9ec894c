"""`rlvr evaluate` and `rlvr.evaluate`: a policy, loaded here or behind an API, on an environment."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rlvr.backends.protocol import LoadedPolicy, ModelBackend
from rlvr.config import EVALUATION_SETTINGS
from rlvr.environments.base import Environment
from rlvr.environments.tools import check_tools
from rlvr.errors import InfrastructureError
from rlvr.rollout.attempts import AttemptFile
from rlvr.rollout.evaluation import Evaluation, Player, evaluate_policy, evaluation_rows
from rlvr.rollout.tool_calls import asked_parser
from rlvr.tracking.adapter_hash import adapter_hash
from rlvr.trainers.api_options import API_SETTINGS, ApiOptions
from rlvr.trainers.players import (
    BATCH_SIZE,
    adapter_folder,
    backend_name,
    checked_settings,
    fitting_examples,
    load_for_inference,
    local_player,
)


def evaluate(
    env: str | Environment,
    model: str | Path | LoadedPolicy,
    backend: str | ModelBackend | None = None,
    *,
    adapter: str | Path | None = None,
    samples: int = 1,
    limit: int | None = None,
    temperature: float | None = None,
    batch_size: int | None = None,
    env_options: Mapping[str, Any] | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    api_base_url: str | None = None,
    api_key_env: str | None = None,
    api_retries: int | None = None,
    api_timeout_s: float | None = None,
    concurrency: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> Evaluation:
    """Plays an environment's held-out examples with a policy.

        rlvr.evaluate("arithmetic", "Qwen/Qwen2.5-0.5B-Instruct", samples=4).metrics["pass@4"]

    Args:
        env: a name from `rlvr environments`, or an `Environment`.
        model: a model id, a folder, or a loaded policy; with `api_base_url` the server's name for it.
        backend: a name from `rlvr backends`, or a backend; None for RLVR_BACKEND, else "hf".
        adapter: folder of a saved adapter, or of a run that has one.
        samples: N, attempts at each example.
        limit: examples, from the first; None for all. Of a policy loaded here, those whose prompts are longer than
            `max_prompt_length` are left out then, with a warning.
        temperature: None for 0 (greedy) with one attempt, 1.0 with several.
        batch_size: rollouts that are played at the same time; None for 64.
        env_options: the environment's own options, where `env` is a name.
        output: a JSONL file that every attempt is written to when it is scored (see `rlvr.rollout.attempts`).
        resume: go on with `output`, where it exists and was made with the same options and weights.
        api_base_url: of an OpenAI-compatible server, for example http://localhost:8000/v1. Its chat completions are
            the policy then. `top_p`, `top_k`, `min_p`, `repetition_penalty` and `seed` are sent where they are given.
        api_key_env: the environment variable that holds its key; None for OPENAI_API_KEY, where that is set.
        api_retries: times that a request is sent again; None for 5.
        api_timeout_s: seconds that a request may take; None for 600.
        concurrency: rollouts in play, and so requests under way, at the same time; None for 16.
        on_progress: called with (attempts there are, all).
        settings: those in `EVALUATION_SETTINGS`, in the names and with the defaults of `TrainSettings`.

    Raises:
        RlvrError: something cannot be used, found before the model is loaded where that can be known.
        InfrastructureError: no attempt counts, since infrastructure failed in each.
        EndpointError: the server refuses requests, or does not answer any more.
    """
    from rlvr.plugins.manager import load_backend, load_environment

    api = ApiOptions(
        base_url=api_base_url,
        key_env=api_key_env,
        retries=api_retries,
        timeout_s=api_timeout_s,
        concurrency=concurrency,
    )
    here = {"backend": backend, "adapter": adapter, "batch_size": batch_size}  # what only a policy loaded here has
    loaded = {"a loaded policy": model if isinstance(model, LoadedPolicy) else None}
    problems = api.problems([*settings, *(name for name, value in {**here, **loaded}.items() if value is not None)])
    if resume and output is None:
        problems.append("resume was given without output, the file to go on with.")
    temperature = temperature if temperature is not None else 0.0 if samples == 1 else 1.0
    problems += _sampling_problems(temperature, samples=samples, limit=limit, batch_size=batch_size)
    chosen = checked_settings("evaluate", model, settings, allowed=EVALUATION_SETTINGS, problems=problems)

    file = AttemptFile(output, resume=resume) if output is not None else None
    folder = adapter_folder(adapter) if adapter is not None else None
    # The backend comes first: it may have to be imported before what an environment imports.
    loader = load_backend(backend if backend is not None else chosen.backend) if api.base_url is None else None
    environment = load_environment(env, **(env_options or {}))
    check_tools(environment.tools)
    parser = asked_parser(chosen.tool_call_parser, has_tools=bool(environment.tools))
    done = []
    if file is not None:
        made_with = {"env_options": env_options or {}, "samples": samples, "temperature": temperature}
        made_with |= {"api_base_url": api_base_url} if loader is None else {**here, "backend": backend_name(loader)}
        names = API_SETTINGS if loader is None else EVALUATION_SETTINGS
        made_with = {**{name: getattr(chosen, name) for name in names}, **made_with}
        done = file.done(environment, evaluation_rows(environment, limit), made_with)
    player: Player
    fitting = weights = None  # a server counts its own tokens, and keeps its weights to itself
    if loader is None:
        player = api.player(chosen, temperature, seed=chosen.seed if "seed" in settings else None)
    else:
        policy = model if isinstance(model, LoadedPolicy) else load_for_inference(chosen, loader, folder)
        weights = adapter_hash(policy.model)
        loader.for_inference(policy)
        fitting = fitting_examples(
            environment,
            evaluation_rows(environment, limit),
            policy.tokenizer,
            max_prompt_length=chosen.max_prompt_length,
        )
        player = local_player(
            environment,
            policy,
            chosen,
            temperature=temperature,
            parser=parser,
            batch_size=batch_size or BATCH_SIZE,
            attempts=samples * len(fitting),
        )
    if file is not None:
        file.begin(done, adapter=weights)
    found = evaluate_policy(
        environment,
        player,
        samples=samples,
        limit=limit,
        only=fitting,
        adapter=weights,
        done=done,
        keep=file.add if file is not None else None,
        on_progress=on_progress,
    )
    if found.excluded == len(found.trajectories):
        failure = found.trajectories[-1].trajectory.failure
        raise InfrastructureError(f"all {found.excluded} attempts failed, so there is nothing to report. {failure}")
    return found


def _sampling_problems(temperature: float, *, samples: int, limit: int | None, batch_size: int | None) -> list[str]:
    problems = [
        f"{name} is {value}; it must be at least 1."
        for name, value in (("samples", samples), ("limit", limit), ("batch_size", batch_size))
        if value is not None and value < 1
    ]
    if not temperature >= 0:
        problems.append(f"temperature is {temperature}; it must be at least 0, where 0 is greedy.")
    elif temperature == 0 and samples > 1:
        problems.append(f"samples is {samples} with temperature 0: all attempts would be equal. Raise --temperature.")
    return problems
