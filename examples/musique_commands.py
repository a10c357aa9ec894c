"""What `train_musique.py` and `train_musique_unsloth.py` share. They differ in the backend alone.

`train` and `evaluate` are `rlvr train` and `rlvr evaluate`, with their options and the environment's. `predict` writes
answers in the format that MuSiQue's own evaluation reads.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from rlvr.cli import EXIT_REFUSED
from rlvr.cli import main as rlvr_command
from rlvr.cli.options import (
    AdapterFolder,
    EnvironmentName,
    add_environment_command,
    environment_arguments,
    given,
    set_up_output,
)
from rlvr.config import EVALUATION_SETTINGS
from rlvr.environments.musique.data import UNANSWERABLE
from rlvr.errors import RlvrError, RunFolderError
from rlvr.rewards.text import exact_match
from rlvr.types import Trajectory

DEFAULT_MODEL = "Qwen/Qwen2.5-7B-Instruct"
MODEL_SOURCES = ("--config", "--resume-from-checkpoint")  # what names a model as well


def main(backend: str, arguments: Sequence[str] | None = None) -> None:
    """Runs a command and exits, as `rlvr` does: 0 if all went well, 2 if it was refused with a message."""
    own = argparse.ArgumentParser(
        description="Train, evaluate or ask a policy on MuSiQue.",
        epilog="COMMAND --help lists the options. Those of the environment are written in the same way.",
        add_help=False,
        allow_abbrev=False,
    )
    own.add_argument("command", choices=("train", "evaluate", "predict"))
    own.add_argument("--env-id", default="musique", help="environment, as 'rlvr environments' lists it")
    own.add_argument("-m", "--model", help=f"model id or folder (default {DEFAULT_MODEL})")
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        own.print_help()
        sys.exit(0)
    chosen, rest = own.parse_known_args(words)
    model = chosen.model
    if model is None and not any(word.split("=")[0] in MODEL_SOURCES for word in rest):
        model = DEFAULT_MODEL
    line = [chosen.env_id, "--backend", backend, *(["--model", model] if model else []), *rest]
    if chosen.command == "predict":
        _predict_command(line)
    rlvr_command([chosen.command, *line])


def predict(
    ctx: typer.Context,
    env: EnvironmentName,
    output: Annotated[Path, typer.Option("--output", help="JSONL file to write")],
    adapter: AdapterFolder = None,
    limit: Annotated[int | None, typer.Option("--limit", help="questions, from the first; by default all")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="rollouts played at the same time")] = 64,
    **options: Any,
) -> None:
    """Write a policy's greedy answers to the held-out questions, or to --datasets where nothing is held out.

    A line has id, question, predicted_answer, predicted_support_idxs, predicted_answerable and stop_reason.
    """
    if output.exists():
        raise RunFolderError(f"the file {str(output)!r} exists, and nothing is written over. Choose another --output.")
    env_options = environment_arguments(env, ctx.args)
    set_up_output()
    from rlvr.trainers.evaluate import evaluate

    settings = given(options)
    found = evaluate(
        env,
        settings.pop("model"),
        settings.pop("backend"),
        adapter=adapter,
        limit=limit,
        batch_size=batch_size,
        env_options=env_options,
        **settings,
    )
    with open(output, "x", encoding="utf-8") as file:
        for item in found.trajectories:
            file.write(json.dumps(prediction(item.trajectory), ensure_ascii=False) + "\n")
    print(f"{len(found.trajectories)} answers are in {output}")


def prediction(trajectory: Trajectory) -> Mapping[str, Any]:
    """A line of MuSiQue's prediction format, with the question and the stop reason.

    The answer is that of the tool `complete`; in an environment without it, the last message's text.
    """
    searched = "seen" in trajectory.state
    answer = trajectory.state.get("answer", "" if searched else trajectory.text)
    return {
        "id": trajectory.example.get("id"),
        "question": trajectory.example.get("question"),
        "predicted_answer": answer,
        "predicted_support_idxs": trajectory.state.get("citations", []),
        "predicted_answerable": bool(answer) and not exact_match(answer, [UNANSWERABLE]),
        "stop_reason": str(trajectory.stop_reason),
    }


def _predict_command(line: Sequence[str]) -> None:
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    add_environment_command(app, predict, settings=EVALUATION_SETTINGS)
    try:
        app(list(line), prog_name="predict")
    except RlvrError as error:
        print(f"predict: {error}", file=sys.stderr)
        sys.exit(EXIT_REFUSED)
