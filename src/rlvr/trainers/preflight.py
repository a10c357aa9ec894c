"""`rlvr preflight` and `rlvr.preflight`: a few groups, sampled as in training and looked at before it starts."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from rlvr.backends.protocol import LoadedPolicy, ModelBackend
from rlvr.config import PREFLIGHT_SETTINGS, TrainSettings
from rlvr.environments.base import Environment
from rlvr.environments.tools import check_tools
from rlvr.errors import EnvironmentDefinitionError, RewardError
from rlvr.rewards.rubric import call_reward
from rlvr.rollout.chat import ChatRenderer
from rlvr.rollout.engine import RolloutEngine
from rlvr.rollout.episodes import Rollout, play
from rlvr.rollout.evaluation import PASSING
from rlvr.rollout.tool_calls import ToolCallParser, asked_parser
from rlvr.trainers import findings
from rlvr.trainers.findings import Finding
from rlvr.trainers.players import (
    BATCH_SIZE,
    adapter_folder,
    checked_settings,
    load_for_inference,
    sampling_engine,
    sampling_settings,
)
from rlvr.types import Example, StopReason

PROMPTS_MEASURED = 1000


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """What a preflight found. `numbers` has what the findings are about, by name."""

    findings: list[Finding]
    numbers: dict[str, float]

    @property
    def problems(self) -> list[Finding]:
        """What should be mended before training."""
        return [finding for finding in self.findings if finding.level == "problem"]

    def as_json(self) -> dict[str, Any]:
        return {"findings": [finding.as_json() for finding in self.findings], "numbers": self.numbers}


def preflight(
    env: str | Environment,
    model: str | Path | LoadedPolicy,
    backend: str | ModelBackend | None = None,
    *,
    prompts: int = 10,
    adapter: str | Path | None = None,
    env_options: Mapping[str, Any] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> Preflight:
    """Samples groups from an environment's train split as training would, and says what keeps it from learning.

        for finding in rlvr.preflight("arithmetic", "Qwen/Qwen2.5-0.5B-Instruct").findings:
            print(finding.level, finding.topic, finding.text)

    Args:
        env: a name from `rlvr environments`, or an `Environment`.
        model: a model id, a folder, or a loaded policy.
        backend: a name from `rlvr backends`, or a backend; None for RLVR_BACKEND, else "hf".
        prompts: K, groups to sample.
        adapter: folder of a saved adapter, or of a run that has one.
        env_options: the environment's own options, where `env` is a name.
        on_progress: called with (completions sampled, all).
        settings: those in `PREFLIGHT_SETTINGS`, in the names and with the defaults of `TrainSettings`.

    Raises:
        RlvrError: something cannot be used, found before the model is loaded where that can be known.
    """
    from rlvr.plugins.manager import load_backend, load_environment

    problems = [f"prompts is {prompts}; it must be at least 1."] if prompts < 1 else []
    chosen = checked_settings("preflight", model, settings, allowed=PREFLIGHT_SETTINGS, problems=problems)
    folder = adapter_folder(adapter) if adapter is not None else None
    # The backend comes first: it may have to be imported before what an environment imports.
    backend = load_backend(backend if backend is not None else chosen.backend)
    environment = load_environment(env, **(env_options or {}))
    check_tools(environment.tools)
    parser = asked_parser(chosen.tool_call_parser, has_tools=bool(environment.tools))
    policy = model if isinstance(model, LoadedPolicy) else load_for_inference(chosen, backend, folder)
    backend.for_inference(policy)
    engine = sampling_engine(
        policy,
        sampling_settings(chosen, chosen.temperature),
        asked=chosen.rollout_engine,
        rollouts=ceil(prompts / _groups_together(chosen)),
    )
    renderer = ChatRenderer(policy.tokenizer, tools=environment.tools)
    return look_before(
        environment,
        engine(chosen.seed),
        renderer,
        settings=chosen,
        prompts=prompts,
        parser=parser,
        on_progress=on_progress,
    )


def look_before(
    environment: Environment,
    engine: RolloutEngine,
    renderer: ChatRenderer,
    *,
    settings: TrainSettings,
    prompts: int,
    parser: ToolCallParser | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Preflight:
    """The preflight of a policy that is ready.

    Args:
        engine: samples at the training temperature.
        renderer: made with the environment's tools.
        prompts: K, groups to sample.
        parser: of tool calls; None for that of the chat template.
    """
    dataset = environment.train_dataset
    order = random.Random(settings.seed).sample(range(len(dataset)), min(len(dataset), PROMPTS_MEASURED))
    lengths = [len(renderer.prompt_ids(environment.messages(dataset[index]))) for index in order]
    about_prompts = findings.prompts_finding(lengths, limit=settings.max_prompt_length)
    fitting = [index for index, length in zip(order, lengths, strict=True) if length <= settings.max_prompt_length]
    if not fitting:
        return Preflight(findings=[about_prompts], numbers={"longest_prompt": max(lengths)})
    rows = [dataset[index] for index in fitting[:prompts]]
    began = time.perf_counter()
    rollouts = _sample(environment, rows, engine, renderer, settings=settings, parser=parser, on_progress=on_progress)
    seconds = time.perf_counter() - began
    found = review(environment, rollouts, renderer, settings=settings)
    per_step = (settings.resolved().prompts_per_step or 1) * settings.num_generations
    about_time = findings.time_finding(seconds=seconds, completions=len(rollouts), per_step=per_step)
    numbers = {**found.numbers, "longest_prompt": max(lengths), "seconds": seconds}
    return Preflight(findings=[*found.findings, about_prompts, about_time], numbers=numbers)


def _sample(
    environment: Environment,
    rows: Sequence[Example],
    engine: RolloutEngine,
    renderer: ChatRenderer,
    *,
    settings: TrainSettings,
    parser: ToolCallParser | None,
    on_progress: Callable[[int, int], None] | None,
) -> list[Rollout]:
    """G rollouts of each row, a group after the other."""
    together = _groups_together(settings)
    rollouts: list[Rollout] = []
    for start in range(0, len(rows), together):
        batch = [row for row in rows[start : start + together] for _ in range(settings.num_generations)]
        rollouts += play(
            environment,
            batch,
            engine=engine,
            renderer=renderer,
            max_completion_tokens=settings.max_tokens,
            parser=parser,
        )
        if on_progress is not None:
            on_progress(len(rollouts), len(rows) * settings.num_generations)
    return rollouts


def _groups_together(settings: TrainSettings) -> int:
    """Groups that are sampled at the same time."""
    return max(1, BATCH_SIZE // settings.num_generations)


def review(
    environment: Environment, rollouts: Sequence[Rollout], renderer: ChatRenderer, *, settings: TrainSettings
) -> Preflight:
    """What rollouts say, those of a group behind each other."""
    trajectories = [rollout.trajectory for rollout in rollouts]
    failures = [t.failure for t in trajectories if t.stop_reason is StopReason.INFRASTRUCTURE]
    scores = _score(environment, rollouts)
    size = settings.num_generations
    groups = [scores.totals[start : start + size] for start in range(0, len(rollouts), size)]
    rewards = [total for total in scores.totals if total is not None]
    mean_reward = sum(rewards) / len(rewards) if rewards else None
    lengths = [len(rollout.completion_ids) for rollout in rollouts]
    cut = sum(t.stop_reason is StopReason.TOKEN_BUDGET for t in trajectories)
    differences, compared = _rendered_again(rollouts, renderer)
    found = [
        findings.groups_finding(groups),
        findings.difficulty_finding(
            scores.passed, mean_reward=mean_reward, learnable=any(map(findings.varies, groups))
        ),
        *findings.reward_findings(
            scores.values,
            weights=dict(zip(environment.rubric.names, environment.rubric.weights, strict=True)),
            errors=scores.errors,
        ),
        findings.completions_finding(lengths, cut=cut, max_tokens=settings.max_tokens),
    ]
    numbers = {
        "completions": len(rollouts),
        "share_of_groups_without_variance": sum(not findings.varies(group) for group in groups) / len(groups),
        "share_cut": cut / len(rollouts),
        "mean_completion": sum(lengths) / len(lengths),
        "longest_completion": max(lengths),
        "conversations_rendered_otherwise": len(differences),
        "infrastructure_failures": len(failures),
    }
    if mean_reward is not None:
        numbers["mean_reward"] = mean_reward
    if scores.passed:
        numbers["pass_rate"] = sum(scores.passed) / len(scores.passed)
    if environment.tools:
        turns = [turn for trajectory in trajectories for turn in trajectory.turns]
        calls = {
            "turns": len(turns),
            "with_calls": sum(bool(turn.tool_calls) for turn in turns),
            "calls": sum(len(turn.tool_calls) for turn in turns),
            "failed": sum(turn.failed_calls for turn in turns),
        }
        found.append(findings.tools_finding(**calls))
        numbers |= {f"tools_{name}": count for name, count in calls.items()}
    found += [
        findings.template_finding(
            differing=len(differences), compared=compared, difference=differences[0] if differences else None
        ),
        findings.infrastructure_finding(
            failed=len(failures), attempts=len(rollouts), failure=failures[0] if failures else None
        ),
    ]
    return Preflight(findings=found, numbers=numbers)


@dataclass(frozen=True)
class _Scores:
    values: dict[str, list[float | None]]  # of each reward function, for the attempts that count
    totals: list[float | None]  # of every attempt
    passed: list[bool]  # of the attempts that count
    errors: dict[str, str]  # of reward functions that failed


def _score(environment: Environment, rollouts: Sequence[Rollout]) -> _Scores:
    """As training scores, but for a reward function that fails: it is noted, and does not apply."""
    rubric = environment.rubric
    scores = _Scores({name: [] for name in rubric.names}, [], [], {})
    for rollout in rollouts:
        if rollout.trajectory.stop_reason is StopReason.INFRASTRUCTURE:
            scores.totals.append(None)
            continue
        rewards: dict[str, float | None] = {}
        for reward in rubric.rewards:
            try:
                rewards[reward.name] = call_reward(reward, rollout.trajectory)
            except RewardError as error:
                rewards[reward.name] = None
                scores.errors.setdefault(reward.name, str(error).splitlines()[0])
            scores.values[reward.name].append(rewards[reward.name])
        scores.totals.append(rubric.total(rewards))
        first = rewards[rubric.names[0]]
        scores.passed.append(first is not None and first >= PASSING)
    return scores


def _rendered_again(rollouts: Sequence[Rollout], renderer: ChatRenderer) -> tuple[list[str], int]:
    """Where conversations that ended by themselves differ from their rendering, and how many were compared."""
    compared = [rollout for rollout in rollouts if rollout.ended]
    differences = []
    for rollout in compared:
        sampled = rollout.prompt_ids + rollout.completion_ids
        try:
            again = renderer.conversation_ids([*rollout.trajectory.prompt, *rollout.trajectory.completion])
        except EnvironmentDefinitionError as error:
            differences.append(str(error))
            continue
        at = next((i for i, token in enumerate(sampled) if again[i : i + 1] != [token]), None)
        if at is not None:
            there, instead = (renderer.tokenizer.decode(ids[max(0, at - 3) : at + 5]) for ids in (sampled, again))
            differences.append(f"{there!r} became {instead!r}")
    return differences, len(compared)
