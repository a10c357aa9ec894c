"""The process that loads one backend for a comparison, or trains with it: `python -m rlvr.comparison.child FOLDER`.

The backend is loaded before anything else is imported, because some have to come first.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlvr.child_process import keep_error, read_task
from rlvr.comparison import RESULT, BackendRun
from rlvr.errors import RlvrError


def run(settings_given: Mapping[str, Any]) -> BackendRun:
    from rlvr.plugins.manager import load_backend, load_environment

    backend = load_backend(settings_given["backend"])

    from rlvr.backends import load_policy
    from rlvr.comparison import probes
    from rlvr.trainers.run import resolve_settings, train_with

    settings = resolve_settings(settings_given)
    assert settings.env is not None
    environment = load_environment(settings.env, **settings.env_options)
    policy = load_policy(backend=backend, lora=settings.lora_settings(), **asdict(settings.model_settings()))
    prompts = probes.prompt_ids(environment, policy, settings.max_prompt_length)
    logprobs = probes.logprobs(backend, policy, prompts)
    gradient = probes.gradient(backend, policy, prompts)
    first_step, clock = probes.first_step(policy), _step_clock()
    finished = train_with(
        settings,
        environment=environment,
        backend=backend,
        policy=policy,
        loaded_by_settings=True,
        callbacks=[first_step, clock],
    )
    rows = [row for row in finished.metrics() if "loss" in row]  # of a step; without a reward if it rolled nothing out
    rolled_out = [row for row in finished.trajectories() if row["phase"] == "train" and row["step"] == 0]
    facts = json.loads((finished.folder / "policy.json").read_text(encoding="utf-8"))
    return BackendRun(
        backend=settings_given["backend"],
        folder=str(finished.folder),
        lora=facts["lora"],
        rollout_engine=finished.summary["rollout_engine"],
        gradient_checkpointing=first_step.checkpoints,
        changed_arguments={change["name"]: change["value"] for change in facts["training_arguments_changed"]},
        rewards=[row.get("reward") for row in rows],
        step_seconds=clock.seconds,
        rollout_seconds=[row.get("rollout_time", 0.0) for row in rows],
        scoring_seconds=[row.get("scoring_time", 0.0) for row in rows],
        tokens=_step_tokens(rows),
        peak_bytes=_peak_bytes(policy.model.device),
        first_loss=rows[0]["loss"],
        first_grad_norm=rows[0]["grad_norm"],
        first_completions=[_text(row["completion"]) for row in rolled_out],
        first_update=first_step.update,
        probe_ids=prompts,
        probe_logprobs=logprobs,
        probe_gradient=gradient,
    )


def _step_tokens(rows: list[dict[str, Any]]) -> list[int]:
    """TRL logs how many there were since the run began, where a step rolls out."""
    tokens, before = [], 0
    for row in rows:
        total = int(row.get("num_tokens", before))
        tokens.append(total - before)
        before = total
    return tokens


def _step_clock() -> Any:
    """A trainer callback that keeps the wall time of each optimizer step, rollout included, in `seconds`."""
    import torch
    from transformers import TrainerCallback

    class StepClock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self._began = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds.append(time.perf_counter() - self._began)

    return StepClock()


def _peak_bytes(device: Any) -> int | None:
    import torch

    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_of_process()


def peak_of_process() -> int | None:
    """The most memory that this process has had, in bytes; None where the system does not say."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux, whose getrusage counts what the parent had when it started this process
        fields = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines())
        if "VmHWM" in fields:
            return int(fields["VmHWM"].split()[0]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _text(messages: list[dict[str, Any]]) -> str:
    return json.dumps(messages, ensure_ascii=False, sort_keys=True)


def main(folder: Path) -> int:
    from rlvr.plugins.manager import load_backend

    task = read_task(folder)
    try:
        if "only_load" in task:
            load_backend(task["only_load"])
        else:
            found = run(task["settings"])
            (folder / RESULT).write_text(json.dumps(asdict(found)), encoding="utf-8")
    except RlvrError as error:
        keep_error(folder, error)
        print(f"rlvr: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
