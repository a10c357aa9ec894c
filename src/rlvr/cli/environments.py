"""`rlvr environments`: what is installed, and the options of one."""

from __future__ import annotations

import inspect
import re
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from rlvr.cli.output import write_result


def register(app: typer.Typer) -> None:
    app.command("environments")(environments)


def environments(
    ctx: typer.Context,
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="list the options of this one")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print a list of objects instead of a table")] = False,
) -> None:
    """List the installed environments, or the options of one."""
    from rlvr.cli.listings import print_listing
    from rlvr.plugins.manager import list_environments

    if name is None:
        print_listing(list_environments(), as_json=as_json)
        return
    rows = option_rows(name)
    if as_json:
        import json

        write_result(json.dumps(rows, indent=2, default=str))
    else:
        formatter = ctx.make_formatter()
        write_options(formatter, name, rows)
        print(formatter.getvalue().strip("\n"))


def option_rows(environment: str) -> list[dict[str, Any]]:
    """An object for each option of an environment: `option, type, default, required, meaning`."""
    from rlvr.cli.options import environment_flag, flag_of, value_type
    from rlvr.plugins.manager import environment_description, environment_options

    meanings = described_arguments(environment_description(environment))
    rows = []
    for name, parameter in environment_options(environment).items():
        meaning = meanings.get(name, "")
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            row = {"option": "--…", "type": "any option", "default": None, "required": False, "meaning": meaning}
            rows.append(row)
            continue
        kind = value_type(parameter)
        required = parameter.default is inspect.Parameter.empty
        rows.append(
            {
                "option": f"{flag_of(name)}/{flag_of('no_' + name)}" if kind is bool else environment_flag(name),
                "type": _type_words(kind),
                "default": None if required else parameter.default,
                "required": required,
                "meaning": meaning,
            }
        )
    return rows


def described_arguments(docstring: str) -> dict[str, str]:
    """Name → what a docstring in Google's style says of it under `Args:`."""
    meanings: dict[str, str] = {}
    name = None
    for line in docstring.partition("Args:\n")[2].splitlines():
        entry = re.match(r" {4}(\w+): (.+)", line)
        if entry:
            name, meanings[entry[1]] = entry[1], entry[2]
        elif name is not None and line.startswith(" " * 8):
            meanings[name] += f" {line.strip()}"
        else:
            break
    return meanings


def write_options(formatter: Any, name: str, rows: list[dict[str, Any]]) -> None:
    """In the manner of the command's own help."""
    with formatter.section(f"Options of environment {name}"):
        formatter.write_dl([(_flag_and_type(row), _meaning_and_default(row)) for row in rows])


def _flag_and_type(row: dict[str, Any]) -> str:
    return row["option"].replace("/", " / ") if row["type"] == "bool" else f"{row['option']} <{row['type']}>"


def _meaning_and_default(row: dict[str, Any]) -> str:
    default = row["default"]
    if isinstance(default, bool):
        default = "on" if default else "off"
    elif isinstance(default, (list, tuple)):
        default = ",".join(map(str, default))
    note = "(required)" if row["required"] else "" if default in (None, "") else f"(default {default})"
    return " ".join(filter(None, (row["meaning"].removesuffix("."), note)))


def _type_words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    if get_origin(kind) in (list, tuple):
        return f"{_type_words(get_args(kind)[0])},…"
    return getattr(kind, "__name__", str(kind))
