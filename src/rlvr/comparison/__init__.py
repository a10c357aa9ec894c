"""One training run on several backends, each in a process of its own: is it the same training, and what does it cost?

`rlvr compare` is this. Seeds, data and options are the same; what backends change of their own accord is shown.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from math import dist, hypot, isfinite
from pathlib import Path
from statistics import fmean, median
from typing import Any

from rlvr.child_process import as_text, environment, kept_error, task_folder
from rlvr.errors import BackendError, ConfigError

RESULT = "result.json"  # what a child writes into the folder of its task
_LAST_LINES = 6
_NOT_SHOWN = ("first_update", "probe_gradient")  # thousands of numbers, of which the differences are shown


@dataclass(frozen=True, kw_only=True)
class BackendRun:
    """What one backend did. Lists have an entry for each step; times in seconds.

    With `num_iterations` above 1 several steps train on one batch of rollouts: those after its first roll nothing out.
    """

    backend: str
    folder: str
    lora: dict[str, Any] | None  # as applied
    rollout_engine: str
    gradient_checkpointing: bool
    changed_arguments: dict[str, Any]
    rewards: list[float | None]  # None where a step uses the rollouts of an earlier one
    step_seconds: list[float]
    rollout_seconds: list[float]
    scoring_seconds: list[float]
    tokens: list[int]  # prompts and completions rolled out
    peak_bytes: int | None  # of GPU memory, or of the process where there is no GPU
    first_loss: float | None  # None: not finite
    first_grad_norm: float | None  # None: not finite, as it may be in float16 until its loss is scaled right
    first_completions: list[str]
    first_update: dict[str, list[float]]  # trained tensor → how much a few of its elements changed at the first step
    probe_ids: list[list[int]]  # the first training prompts, and
    probe_logprobs: list[list[float]]  # the starting policy's log-probabilities of their tokens, in nats
    probe_gradient: dict[str, list[float]]  # trained tensor → a few elements of the gradient of their loss

    def steady(self, seconds: Sequence[float]) -> float:
        """Time of a step once caches are full and kernels compiled."""
        return self._median(lambda steps: fmean(seconds[steps]))

    def _median(self, of: Callable[[slice], float]) -> float:
        """Over the batches of rollouts after the first; a batch is given as the steps that train on it."""
        starts = [step for step, reward in enumerate(self.rewards) if reward is not None]
        values = [of(slice(*steps)) for steps in pairwise([*starts, len(self.rewards)])]
        return median(values[1:] or values)

    @property
    def batch_rewards(self) -> list[tuple[int, float]]:
        """Step, from 1, and mean reward of each batch of rollouts."""
        return [(step, reward) for step, reward in enumerate(self.rewards, 1) if reward is not None]

    @property
    def update_seconds(self) -> list[float]:
        parts = zip(self.step_seconds, self.rollout_seconds, self.scoring_seconds, strict=True)
        return [step - rollout - scoring for step, rollout, scoring in parts]

    @property
    def tokens_per_second(self) -> float:
        """Over the steps that `steady` looks at."""
        return self._median(lambda steps: sum(self.tokens[steps]) / sum(self.step_seconds[steps]))

    def probe_difference(self, other: BackendRun) -> float | None:
        """Largest difference between the two starting policies, in nats a token; None if they read other tokens."""
        if self.probe_ids != other.probe_ids:
            return None
        pairs = zip(self.probe_logprobs, other.probe_logprobs, strict=True)
        return max(abs(x - y) for mine, theirs in pairs for x, y in zip(mine, theirs, strict=True))

    def gradient_difference(self, other: BackendRun) -> float | None:
        """Between the gradients of the probes, as a share of the other's norm: 0 for the same, 2 for the opposite;
        None if they read other tokens or train other tensors, or if a gradient is not finite."""
        if self.probe_ids != other.probe_ids:
            return None
        return _relative_difference(self.probe_gradient, other.probe_gradient)

    def update_difference(self, other: BackendRun) -> float | None:
        """Between the first updates, as a share of the other's norm; None if the completions of the first step are not
        the same, or if the other's changed nothing: with equal rewards there is nothing to learn."""
        if self.first_completions != other.first_completions:
            return None
        return _relative_difference(self.first_update, other.first_update)

    def loss_difference(self, other: BackendRun) -> float | None:
        """How far the losses of the first step are apart; None if one is not finite. On fresh rollouts a loss follows
        from rewards and lengths, whatever the gradients are."""
        if self.first_loss is None or other.first_loss is None:
            return None
        return abs(self.first_loss - other.first_loss)

    def same_first_completions(self, other: BackendRun) -> int:
        """How many completions of the first step are the same text, one by one."""
        return sum(x == y for x, y in zip(self.first_completions, other.first_completions, strict=False))


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The runs that finished, in the order asked for. The first is what the others are compared with."""

    env: str
    model: str
    as_is: bool
    runs: tuple[BackendRun, ...]
    failed: Mapping[str, str] = field(default_factory=dict)  # backend → how its run ended

    def rows(self) -> list[tuple[str, list[str]]]:
        """A table: what was measured → a text for each run."""
        first = self.runs[0]

        def cells(text: Callable[[BackendRun], str]) -> list[str]:
            return [text(run) for run in self.runs]

        ways = [
            ("rollout engine", cells(lambda run: run.rollout_engine)),
            ("gradient checkpointing", cells(lambda run: "on" if run.gradient_checkpointing else "off")),
        ]
        return [
            ("reward, first → last step", cells(_rewards_text)),
            ("step, s", cells(lambda run: f"{run.steady(run.step_seconds):.3f}")),
            ("  rollout, s", cells(lambda run: f"{run.steady(run.rollout_seconds):.3f}")),
            ("  scoring, s", cells(lambda run: f"{run.steady(run.scoring_seconds):.3f}")),
            ("  update, s", cells(lambda run: f"{run.steady(run.update_seconds):.3f}")),
            ("tokens a second", cells(lambda run: f"{run.tokens_per_second:,.0f}")),
            ("peak memory, MiB", cells(lambda run: f"{run.peak_bytes / 2**20:,.0f}" if run.peak_bytes else "?")),
            ("loss at step 1", cells(lambda run: _number_text(run.first_loss))),
            ("gradient norm at step 1", cells(lambda run: _number_text(run.first_grad_norm))),
            (
                "start differs by, nats a token",
                cells(lambda run: _difference_text(run.probe_difference(first), "other tokens")),
            ),
            (
                "gradient differs by",
                cells(lambda run: _difference_text(run.gradient_difference(first), "not comparable")),
            ),
            (
                "same completions at step 1",
                cells(lambda run: f"{run.same_first_completions(first)} of {len(run.first_completions)}"),
            ),
            ("update at step 1 differs by", cells(lambda run: _update_text(run, first))),
            ("lora alpha / r", cells(lambda run: f"{run.lora['alpha']} / {run.lora['r']}" if run.lora else "no LoRA")),
            *((name, texts) for name, texts in ways if len(set(texts)) > 1),
            ("changed arguments", cells(lambda run: _changes_text(run.changed_arguments))),
        ]

    def as_json(self) -> dict[str, Any]:
        return {
            "env": self.env,
            "model": self.model,
            "as_is": self.as_is,
            "backends": {
                run.backend: {
                    **{name: value for name, value in asdict(run).items() if name not in _NOT_SHOWN},
                    "update_seconds": run.update_seconds,
                    "tokens_per_second": run.tokens_per_second,
                    "start_differs_by_nats": run.probe_difference(self.runs[0]),
                    "gradient_differs_by": run.gradient_difference(self.runs[0]),
                    "first_update_differs_by": run.update_difference(self.runs[0]),
                    "first_loss_differs_by": run.loss_difference(self.runs[0]),
                    "same_first_completions": run.same_first_completions(self.runs[0]),
                }
                for run in self.runs
            },
            "failed": dict(self.failed),
        }


def compare(
    env: str,
    model: str,
    backends: Sequence[str],
    *,
    steps: int,
    output_dir: str | Path,
    as_is: bool = False,
    on_start: Callable[[str], None] | None = None,
    **settings: Any,
) -> Comparison:
    """Trains with each backend for a few steps. One whose run fails is named in `failed`, and the others go on.

    Args:
        env: a name from `rlvr environments`.
        backends: names from `rlvr backends`, at least two; the first is what the others are compared with.
        steps: optimizer steps.
        output_dir: gets a run folder for each backend, and `comparison.json`, written anew after each run.
        as_is: leave each backend its own defaults of `lora_alpha_multiplier` and `gradient_checkpointing`; otherwise
            they are 1 and True for all.
        on_start: called with each backend's name before its run.
        settings: fields of `rlvr.config.TrainSettings`. Without them nothing is evaluated and nothing is reported.

    Raises:
        ConfigError: impossible settings, or fewer than two different backends; before anything is trained.
        PluginError, BackendError: a backend cannot be loaded; before anything is trained.
        BackendError: every backend's run failed; says how they ended.
        RunFolderError: the output folder cannot be written to, or holds something.
    """
    from rlvr.plugins.manager import require_backend
    from rlvr.tracking.run_folder import RunFolder
    from rlvr.trainers.run import resolve_settings

    if len(set(backends)) < 2 or len(set(backends)) < len(backends):
        raise ConfigError(
            f"backends is {', '.join(backends) or 'empty'}; give at least two different ones: hf,unsloth."
        )
    for name in backends:
        require_backend(name)
    shared = {"env": env, "model": model, "max_steps": steps, "eval_samples": 0, "report_to": "none", **settings}
    shared["logging_steps"] = 1
    if not as_is:
        shared.setdefault("lora_alpha_multiplier", 1)
        shared.setdefault("gradient_checkpointing", True)
    resolve_settings(shared)
    for name in backends:
        _try_to_load(name)
    folder = RunFolder.reserve(output_dir).path
    comparison = Comparison(env=env, model=model, as_is=as_is, runs=())
    for name in backends:
        if on_start is not None:
            on_start(name)
        settings = {**shared, "backend": name, "run_name": name, "output_dir": str(folder / name)}
        try:
            comparison = replace(comparison, runs=(*comparison.runs, _run(settings, folder)))
        except BackendError as error:
            comparison = replace(comparison, failed={**comparison.failed, name: str(error)})
        (folder / "comparison.json").write_text(json.dumps(comparison.as_json(), indent=2) + "\n", encoding="utf-8")
    if not comparison.runs:
        raise BackendError("\n".join(comparison.failed.values()))
    return comparison


def _try_to_load(name: str) -> None:
    """In a process that ends with it: some backends patch theirs.

    Raises:
        PluginError, BackendError: why it cannot be loaded.
    """
    with task_folder(as_text({"only_load": name})) as task:
        ended = subprocess.run(
            [sys.executable, "-m", "rlvr.comparison.child", str(task)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
            env=environment(),
        )
        if error := kept_error(task):
            raise error
    if ended.returncode:
        raise BackendError(
            f"backend {name!r} cannot be loaded: the process ended with exit code {ended.returncode}; its last "
            f"lines:\n{_last_lines(ended.stdout)}"
        )


def _run(settings: Mapping[str, Any], folder: Path) -> BackendRun:
    """One backend, in a child process."""
    name = settings["backend"]
    log = folder / f"{name}.log"
    with task_folder(as_text({"settings": settings})) as task:
        with open(log, "w", encoding="utf-8") as output:
            code = subprocess.run(
                [sys.executable, "-m", "rlvr.comparison.child", str(task)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
                env=environment(),
            ).returncode
        result = task / RESULT
        if code or not result.exists():
            raise BackendError(
                f"the run with backend {name!r} ended with exit code {code}; the last lines of {log}:\n"
                f"{_last_lines(log.read_bytes())}"
            )
        return BackendRun(**json.loads(result.read_text(encoding="utf-8")))


def _relative_difference(found: Mapping[str, list[float]], wanted: Mapping[str, list[float]]) -> float | None:
    """The norm of the difference over that of what is wanted, all tensors together; None where that says nothing."""
    if found.keys() != wanted.keys() or any(len(found[name]) != len(wanted[name]) for name in wanted):
        return None
    mine, other = ([x for name in wanted for x in tensors[name]] for tensors in (found, wanted))
    size = hypot(*other)
    difference = dist(mine, other)
    return difference / size if size and isfinite(size + difference) else None


def _last_lines(output: bytes) -> str:
    return "\n".join(output.decode("utf-8", errors="replace").strip().splitlines()[-_LAST_LINES:])


def _rewards_text(run: BackendRun) -> str:
    rewards = [reward for _, reward in run.batch_rewards]
    return f"{rewards[0]:.3f} → {rewards[-1]:.3f}"


def _number_text(number: float | None) -> str:
    return "not finite" if number is None else f"{number:.6f}"


def _difference_text(difference: float | None, otherwise: str) -> str:
    return otherwise if difference is None else f"{difference:.2g}"


def _update_text(run: BackendRun, first: BackendRun) -> str:
    if run.first_completions != first.first_completions:
        return "other completions"
    moved = any(map(any, (*first.first_update.values(), *run.first_update.values())))
    return _difference_text(run.update_difference(first), "not comparable" if moved else "no update")


def _changes_text(changes: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in changes.items()) or "none"
