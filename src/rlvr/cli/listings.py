"""How `rlvr backends` and `rlvr environments` print what is installed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from rlvr.cli.output import write_result

if TYPE_CHECKING:
    from rlvr.plugins.manager import PluginStatus


def print_listing(rows: Sequence[PluginStatus], *, as_json: bool) -> None:
    if as_json:
        import json

        write_result(json.dumps([asdict(row) for row in rows], indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for column in ("name", "distribution", "version", "available"):
        table.add_column(column, no_wrap=True)
    table.add_column("reason and fix", overflow="fold")
    for row in rows:
        table.add_row(row.name, row.distribution, row.version, "yes" if row.available else "no", row.reason or "")
    Console(markup=False).print(table)
