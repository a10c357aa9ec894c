"""`rlvr lineage RUN`: which weights came from which, and whether their files are as they were saved."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rlvr.cli.output import write_result

if TYPE_CHECKING:
    from rlvr.tracking.lineage import Lineage, Link

EXIT_CHANGED = 1  # a file is no longer what was saved, or its record is damaged
_DIGITS = 12  # of a hash, in the table


def register(app: typer.Typer) -> None:
    app.command("lineage", short_help="Show which weights of a run came from which.")(lineage)


def lineage(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="folder of a run")],
    as_json: Annotated[bool, typer.Option("--json", help="print the chain as JSON, with whole hashes")] = False,
) -> None:
    """Show the chain of a run's weights, from the base model to the exports, and hash their files again.

    Exit code 1 if a file has changed since it was saved, or a record of it is damaged.
    """
    import json

    from rlvr.tracking.lineage import lineage as read_lineage

    found = read_lineage(run)
    if as_json:
        write_result(json.dumps(found.as_json(), indent=2))
    else:
        print_lineage(found)
    if not found.ok:
        raise typer.Exit(EXIT_CHANGED)


def print_lineage(found: Lineage) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    table.add_column("", overflow="fold", min_width=16)
    table.add_column("step", justify="right")
    table.add_column("weights", no_wrap=True)
    table.add_column("rollouts", justify="right", no_wrap=True)
    table.add_column("evaluated", justify="right", no_wrap=True)
    table.add_column("files", overflow="fold", min_width=8)
    for link in found.links:
        table.add_row(*_cells(link))
    console = Console(markup=False)
    console.print(table)
    console.print("rollouts, evaluated: trajectories that these weights sampled · their mean reward", soft_wrap=True)
    if found.unlisted:
        console.print(f"Trajectories of weights that no line has: {found.unlisted} of {found.trajectories}.")
    if found.unattributed:
        console.print(f"Trajectories without a hash of the weights that sampled them: {found.unattributed}.")


def _cells(link: Link) -> list[str]:
    name = f"{link.kind} {link.name}" if link.kind in ("base", "trained", "export") else link.name
    state = f"{link.state}: {', '.join(link.changed)}" if link.changed else link.state
    return [
        name,
        "" if link.step is None else str(link.step),
        (link.adapter or "")[:_DIGITS],
        _sampled(link.trajectories, link.mean_reward),
        _sampled(link.evaluations, link.mean_evaluation_reward),
        state,
    ]


def _sampled(count: int, mean: float | None) -> str:
    return (str(count) if count else "") + ("" if mean is None else f" · {mean:.3f}")
