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
from typing import TYPE_CHECKING, Any

from rlvr.child_process import keep_error, read_task
from rlvr.comparison import RESULT, BackendRun
from rlvr.errors import RlvrError

if TYPE_CHECKING:
    from rlvr.backends.protocol import LoadedPolicy, ModelBackend
    from rlvr.environments.base import Environment

PROBES = 8  # training prompts whose tokens show whether two starting policies agree


def run(settings_given: Mapping[str, Any]) -> BackendRun:
    from rlvr.plugins.manager import load_backend, load_environment

    backend = load_backend(settings_given["backend"])

    from rlvr.backends import load_policy
    from rlvr.trainers.run import resolve_settings, train_with

    settings = resolve_settings(settings_given)
    assert settings.env is not None
    environment = load_environment(settings.env, **settings.env_options)
    policy = load_policy(backend=backend, lora=settings.lora_settings(), **asdict(settings.model_settings()))
    ids = _probe_ids(environment, policy, settings.max_prompt_length)
    logprobs = _probe_logprobs(backend, policy, ids)
    backend.for_training(policy)
    clock = _step_clock()
    finished = train_with(settings, environment=environment, backend=backend, policy=policy, callbacks=[clock])
    rows = [row for row in finished.metrics() if "loss" in row]  # of a step; without a reward if it rolled nothing out
    first = [row for row in finished.trajectories() if row["phase"] == "train" and row["step"] == 0]
    facts = json.loads((finished.folder / "policy.json").read_text(encoding="utf-8"))
    return BackendRun(
        backend=settings_given["backend"],
        folder=str(finished.folder),
        lora=facts["lora"],
        changed_arguments={change["name"]: change["value"] for change in facts["training_arguments_changed"]},
        rewards=[row.get("reward") for row in rows],
        step_seconds=clock.seconds,
        rollout_seconds=[row.get("rollout_time", 0.0) for row in rows],
        scoring_seconds=[row.get("scoring_time", 0.0) for row in rows],
        tokens=_step_tokens(rows),
        peak_bytes=_peak_bytes(policy.model.device),
        first_loss=rows[0]["loss"],
        first_grad_norm=rows[0]["grad_norm"],
        first_completions=[_text(row["completion"]) for row in first],
        probe_ids=ids,
        probe_logprobs=logprobs,
    )


def _step_tokens(rows: list[dict[str, Any]]) -> list[int]:
    """TRL logs how many there were since the run began, where a step rolls out."""
    tokens, before = [], 0
    for row in rows:
        total = int(row.get("num_tokens", before))
        tokens.append(total - before)
        before = total
    return tokens


def _probe_ids(environment: Environment, policy: LoadedPolicy, max_length: int) -> list[list[int]]:
    from rlvr.rollout.chat import ChatRenderer

    renderer = ChatRenderer(policy.tokenizer, tools=environment.tools)
    dataset = environment.train_dataset
    examples = [dataset[index] for index in range(min(PROBES, len(dataset)))]
    return [renderer.prompt_ids(environment.messages(example))[:max_length] for example in examples]


def _probe_logprobs(backend: ModelBackend, policy: LoadedPolicy, probe_ids: list[list[int]]) -> list[list[float]]:
    """Log-probabilities of the tokens after the first, in nats, a row at a time: nothing is padded."""
    import torch

    backend.for_inference(policy)
    rows = []
    with torch.no_grad():
        for row in probe_ids:
            ids = torch.tensor([row], device=policy.model.device)
            logprobs = policy.model(ids).logits[0, :-1].float().log_softmax(-1)
            rows.append(logprobs.gather(-1, ids[0, 1:, None]).squeeze(-1).tolist())
    return rows


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

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
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
