"""`rlvr evaluate ENV --model M`: mean reward, metrics and pass@k, with their confidence intervals."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlvr.cli.options import (
    AdapterFolder,
    EnvironmentName,
    add_environment_command,
    environment_arguments,
    given,
    set_up_output,
)
from rlvr.cli.output import write_result
from rlvr.config import EVALUATION_SETTINGS
from rlvr.wording import counted

if TYPE_CHECKING:
    from rich.table import Table

    from rlvr.rollout.evaluation import Evaluation
    from rlvr.rollout.intervals import Interval

_API = {"rich_help_panel": "A model behind an API"}


def register(app: typer.Typer) -> None:
    add_environment_command(app, evaluate, settings=EVALUATION_SETTINGS)


def evaluate(
    ctx: typer.Context,
    env: EnvironmentName,
    adapter: AdapterFolder = None,
    samples: Annotated[int, typer.Option("--samples", help="attempts at each example, N")] = 1,
    limit: Annotated[int | None, typer.Option("--limit", help="examples, from the first; by default all")] = None,
    temperature: Annotated[
        float | None,
        typer.Option("--temperature", help="by default 0 (greedy) with one attempt, 1 with several"),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", help="rollouts played at the same time (default 64)")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", help="write every attempt to this JSONL file, as it is scored"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with --output, where it exists")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the numbers as JSON")] = False,
    api_base_url: Annotated[
        str | None,
        typer.Option(
            "--api-base-url", help="an OpenAI-compatible server is the policy: http://localhost:8000/v1", **_API
        ),
    ] = None,
    api_key_env: Annotated[
        str | None,
        typer.Option("--api-key-env", help="environment variable with its key (default OPENAI_API_KEY)", **_API),
    ] = None,
    api_retries: Annotated[
        int | None, typer.Option("--api-retries", help="times that a request is sent again (default 5)", **_API)
    ] = None,
    api_timeout: Annotated[
        float | None, typer.Option("--api-timeout", help="seconds that a request may take (default 600)", **_API)
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option("--concurrency", help="requests at the same time (default 16)", **_API)
    ] = None,
    **options: Any,
) -> None:
    """Evaluate a policy on an environment's held-out examples.

    An attempt passes if the environment's first reward function gives it 1. Behind each number are the bounds of its
    95% confidence interval over examples.
    """
    env_options = environment_arguments(env, ctx.args)
    set_up_output()
    from rlvr.trainers.evaluate import evaluate as run_evaluation

    chosen = given(options)
    with progress_bar("attempts") as on_progress:
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
            output=output,
            resume=resume,
            api_base_url=api_base_url,
            api_key_env=api_key_env,
            api_retries=api_retries,
            api_timeout_s=api_timeout,
            concurrency=concurrency,
            on_progress=on_progress,
            **chosen,
        )
    if as_json:
        write_result(json.dumps(found.as_json(), indent=2))
    else:
        print_evaluation(found)


_SPLITS = {"eval": "held-out example", "train": "training example"}


def print_evaluation(found: Evaluation) -> None:
    from rich.console import Console

    console = Console(markup=False)
    intervals = {"all": found.intervals, **found.group_intervals}
    console.print(metrics_table({"all": found.metrics, **found.groups}, intervals))
    reasons = ", ".join(f"{reason} {share:.0%}" for reason, share in found.stop_reasons.items())
    console.print(
        f"{counted(found.examples, _SPLITS[found.split])} × {counted(found.samples, 'attempt')} · "
        f"{counted(found.tokens, 'token')} · stopped by: {reasons}"
    )
    if found.excluded:
        console.print(f"Not counted, since infrastructure failed: {counted(found.excluded, 'attempt')}.")


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar, on a terminal only, gone at the end."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def metrics_table(
    columns: Mapping[str, Mapping[str, float]], intervals: Mapping[str, Mapping[str, Interval]] | None = None
) -> Table:
    """A row for each metric, a column for each set of them; `0.343 [0.297, 0.391]` where there is an interval."""
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    table.add_column("metric", no_wrap=True)
    for heading in columns:
        table.add_column(heading, justify="right")
    names = dict.fromkeys(name for metrics in columns.values() for name in metrics)
    for name in names:
        cells = []
        for heading, metrics in columns.items():
            cell = f"{metrics[name]:.3f}" if name in metrics else ""
            bounds = (intervals or {}).get(heading, {}).get(name)
            cells.append(f"{cell} [{bounds[0]:.3f}, {bounds[1]:.3f}]" if bounds else cell)
        table.add_row(name, *cells)
    return table
