"""`rlvr compare ENV --backends hf,unsloth`: the same run on several backends."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlvr.cli.options import (
    EnvironmentName,
    add_environment_command,
    environment_arguments,
    given,
    settings_fields,
)
from rlvr.cli.output import write_result

if TYPE_CHECKING:
    from rlvr.comparison import Comparison

EXIT_FAILED = 1  # the run of a backend failed; where all did, or one cannot be loaded, it is an RlvrError

_OWN = {  # options of a run that a comparison sets for each backend
    *("backend", "model", "max_steps", "num_epochs", "output_dir", "run_name", "resume_from_checkpoint"),
    *("logging_steps", "push_to_hub", "hub_model_id"),
}


def register(app: typer.Typer) -> None:
    names = [definition.name for definition in settings_fields() if definition.name not in _OWN]
    add_environment_command(app, compare, settings=names, short_help="Train with several backends, and compare.")


def compare(
    ctx: typer.Context,
    env: EnvironmentName,
    backends: Annotated[str, typer.Option("--backends", help="names with commas between; the first is the yardstick")],
    model: Annotated[str, typer.Option("--model", "-m", help="model id on the Hub, or a local folder")],
    steps: Annotated[int, typer.Option("--steps", help="optimizer steps of each run")] = 10,
    as_is: Annotated[
        bool,
        typer.Option(
            "--as-is",
            help="leave each backend its own defaults; else alpha is as asked, and all checkpoint",
        ),
    ] = False,
    output_dir: Annotated[
        Path | None, typer.Option("--output-dir", help="by default outputs/compare-<environment>-<time>")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the numbers as JSON")] = False,
    **options: Any,
) -> None:
    """Train with several backends, each in its own process, and compare rewards, time, memory and the first step.

    Exit code 1 if the run of one failed; the others are compared all the same.
    """
    import json

    from rlvr.comparison import compare as run_comparison
    from rlvr.comparison.plot import INSTALL, can_plot, plot

    env_options = environment_arguments(env, ctx.args)
    folder = output_dir or Path("outputs") / f"compare-{env.replace(':', '-')}-{time.strftime('%Y%m%d-%H%M%S')}"
    comparison = run_comparison(
        env,
        model,
        [name.strip() for name in backends.split(",") if name.strip()],
        steps=steps,
        output_dir=folder,
        as_is=as_is,
        on_start=None if as_json else lambda name: print(f"training with {name} ...", flush=True),
        **({"env_options": env_options} if env_options else {}),
        **given(options),
    )
    picture = folder / "comparison.png"
    if can_plot():
        plot(comparison, picture)
    if as_json:
        write_result(json.dumps(comparison.as_json(), indent=2))
    else:
        print_comparison(comparison)
        print(f"Everything is in {folder}" + ("" if can_plot() else f"; for a plot: {INSTALL}"))
    for how in comparison.failed.values():
        print(f"rlvr: {how}", file=sys.stderr)
    if comparison.failed:
        raise typer.Exit(EXIT_FAILED)


def print_comparison(comparison: Comparison) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    table.add_column("")
    for run in comparison.runs:
        table.add_column(run.backend, justify="right", overflow="fold")
    for name, cells in comparison.rows():
        table.add_row(name, *cells)
    console = Console(markup=False)
    console.print(table)
    first = comparison.runs[0]
    for run in comparison.runs[1:]:
        difference, names = run.loss_difference(first), f"{first.backend} and {run.backend}"
        if difference is None:
            console.print(f"loss at step 1 is not finite, and not compared between {names}")
        else:
            console.print(f"loss at step 1 differs by {difference:.2g} between {names}")
    console.print(
        "Each backend has its own defaults (--as-is)."
        if comparison.as_is
        else "Every backend applies lora alpha as asked and checkpoints; --as-is leaves each its own defaults."
    )
