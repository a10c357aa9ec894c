"""`rlvr evaluate ENV --model M`: mean reward, metrics, pass@1 and pass@N."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table


def register(app: typer.Typer) -> None:
    from rlvr.cli.options import EnvironmentCommand, settings_parameters, with_parameters
    from rlvr.config import EVALUATION_SETTINGS

    app.command("evaluate", cls=EnvironmentCommand, context_settings=EnvironmentCommand.CONTEXT)(
        with_parameters(evaluate, settings_parameters(EVALUATION_SETTINGS))
    )


def evaluate(
    ctx: typer.Context,
    env: Annotated[str, typer.Argument(metavar="ENV", help="as 'rlvr environments' lists it")],
    adapter: Annotated[
        Path | None,
        typer.Option("--adapter", help="folder of a saved adapter, or of a run"),
    ] = None,
    samples: Annotated[int, typer.Option("--samples", help="attempts at each example, N")] = 1,
    limit: Annotated[int | None, typer.Option("--limit", help="examples, from the first; by default all")] = None,
    temperature: Annotated[
        float | None,
        typer.Option("--temperature", help="by default 0 (greedy) with one attempt, 1 with several"),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="rollouts played at the same time")] = 64,
    output: Annotated[
        Path | None,
        typer.Option("--output", help="write every trajectory to this JSONL file"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the numbers as JSON")] = False,
    **options: Any,
) -> None:
    """Evaluate a policy on an environment's held-out examples.

    An attempt passes if the environment's first reward function gives it 1.
    """
    from rlvr.cli.options import environment_arguments, given, set_up_output
    from rlvr.errors import RunFolderError

    env_options = environment_arguments(env, ctx.args)
    if output is not None and output.exists():
        raise RunFolderError(f"the file {str(output)!r} exists, and nothing is written over. Choose another --output.")
    if output is not None and not output.parent.is_dir():
        raise RunFolderError(f"there is no folder {str(output.parent)!r} for --output; make it, or choose another.")
    set_up_output()
    from rlvr.trainers.evaluate import evaluate as run_evaluation
    from rlvr.trainers.evaluate import records

    chosen = given(options)
    with _progress() as on_progress:
        found = run_evaluation(
            env,
            chosen.pop("model", ""),
            chosen.pop("backend", None),
            adapter=adapter,
            samples=samples,
            limit=limit,
            temperature=temperature,
            batch_size=batch_size,
            env_options=env_options,
            on_progress=on_progress,
            **chosen,
        )
    if output is not None:
        with open(output, "x", encoding="utf-8") as file:
            for record in records(found.trajectories, step=0):
                file.write(json.dumps(record.as_json(), ensure_ascii=False) + "\n")
    if as_json:
        print(json.dumps(found.as_json(), indent=2))
        return
    from rich.console import Console

    console = Console(markup=False)
    console.print(metrics_table({"all": found.metrics, **found.groups}))
    reasons = ", ".join(f"{reason} {share:.0%}" for reason, share in found.stop_reasons.items())
    console.print(
        f"{found.examples} examples × {found.samples} attempts · {found.tokens} tokens · stopped by: {reasons}"
    )
    if found.excluded:
        console.print(f"{found.excluded} attempts are not counted: infrastructure failed.")


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar of the attempts, on a terminal only, gone when all are played."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("attempts", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def metrics_table(columns: Mapping[str, Mapping[str, float]]) -> Table:
    """A row for each metric, a column for each set of them."""
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    table.add_column("metric", no_wrap=True)
    for heading in columns:
        table.add_column(heading, justify="right")
    names = dict.fromkeys(name for metrics in columns.values() for name in metrics)
    for name in names:
        table.add_row(name, *(f"{metrics[name]:.3f}" if name in metrics else "" for metrics in columns.values()))
    return table
