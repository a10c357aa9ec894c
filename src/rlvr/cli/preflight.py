"""`rlvr preflight ENV --model M`: what keeps a run from learning, found before it starts."""

from __future__ import annotations

import json
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
from rlvr.config import PREFLIGHT_SETTINGS

if TYPE_CHECKING:
    from rlvr.trainers.preflight import Preflight

EXIT_PROBLEM = 1
_STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}


def register(app: typer.Typer) -> None:
    short_help = "Look, before a run, at what it would learn from."
    add_environment_command(app, preflight, settings=PREFLIGHT_SETTINGS, short_help=short_help)


def preflight(
    ctx: typer.Context,
    env: EnvironmentName,
    adapter: AdapterFolder = None,
    prompts: Annotated[int, typer.Option("--prompts", help="training prompts to sample groups of, K")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="print findings and numbers as JSON")] = False,
    **options: Any,
) -> None:
    """Look, before a run, at what it would learn from: K prompts × G completions, sampled as in training.

    Each line is ok, a warning or a problem. The exit code is 1 if there is a problem, else 0.
    """
    from rlvr.cli.evaluate import progress_bar

    env_options = environment_arguments(env, ctx.args)
    set_up_output()
    from rlvr.trainers.preflight import preflight as run_preflight

    chosen = given(options)
    with progress_bar("completions") as on_progress:
        found = run_preflight(
            env,
            chosen.pop("model", ""),
            chosen.pop("backend", None),
            prompts=prompts,
            adapter=adapter,
            env_options=env_options,
            on_progress=on_progress,
            **chosen,
        )
    if as_json:
        write_result(json.dumps(found.as_json(), indent=2))
    else:
        print_findings(found)
    if found.problems:
        raise typer.Exit(EXIT_PROBLEM)


def print_findings(found: Preflight) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False)
    for finding in found.findings:
        cells = Text(finding.level, style=_STYLES[finding.level]), finding.topic, finding.text
        table.add_row(*cells)
    Console(markup=False).print(table)
