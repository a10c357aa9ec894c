"""`rlvr backends`: what is installed, and usable here; `rlvr backends check NAME`: whether it trains correctly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from rlvr.cli.output import write_result

if TYPE_CHECKING:
    from rlvr.testing.conformance import CheckResult, Report

EXIT_FAILED = 1  # a check failed; a backend that cannot be checked is an RlvrError


def register(app: typer.Typer) -> None:
    group = typer.Typer(help="List the installed model backends, or check one.")
    group.callback(invoke_without_command=True)(backends)
    group.command("check")(check)
    app.add_typer(group, name="backends")


def backends(
    ctx: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="print a list of objects instead of a table")] = False,
) -> None:
    """List the installed model backends, or check one."""
    if ctx.invoked_subcommand is not None:
        return
    from rlvr.cli.listings import print_listing
    from rlvr.plugins.manager import list_backends

    print_listing(list_backends(), as_json=as_json)


def check(
    name: Annotated[str, typer.Argument(metavar="NAME", help="as 'rlvr backends' lists it")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="model id or folder; by default a tiny one made on the spot")
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="cpu or cuda; by default what the backend takes")
    ] = None,
    only: Annotated[
        str | None, typer.Option("--only", help="names of checks or groups, with commas between; by default all")
    ] = None,
    timeout: Annotated[float, typer.Option("--timeout", help="seconds for the checks that share a process")] = 900,
    jobs: Annotated[int, typer.Option("--jobs", help="how many processes run checks at a time, up to 8")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="print the results as JSON")] = False,
) -> None:
    """Check that a backend trains correctly: loading, LoRA, numbers, training, saving.

    Exit code 1 if a check failed.
    """
    import json
    import time

    from rlvr.testing.conformance import check_backend

    began = time.monotonic()
    report = check_backend(
        name,
        model=model,
        device=device,
        only=[part.strip() for part in only.split(",")] if only else None,
        timeout_s=timeout,
        jobs=jobs,
        on_result=None if as_json else print_result,
    )
    if as_json:
        write_result(json.dumps(report.as_json(), indent=2))
    else:
        print_verdict(report, time.monotonic() - began)
    if not report.ok:
        raise typer.Exit(EXIT_FAILED)


def print_result(result: CheckResult) -> None:
    """A line as each check ends: some take a while."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(width=6, style="green" if result.passed else "bold red")
    table.add_column(width=32, no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("ok" if result.passed else "FAILED", result.name, result.message)
    Console(markup=False).print(table)


def print_verdict(report: Report, seconds: float) -> None:
    from rich.console import Console

    failed = ", ".join(result.name for result in report.failures)
    Console(markup=False).print(
        f"backend {report.backend}: {len(report.results) - len(report.failures)} of {len(report.results)} checks "
        f"passed in {seconds:.0f} s, with {report.model} on {report.device}"
        + (f"\nfailed: {failed}" if failed else ""),
        soft_wrap=True,
    )
