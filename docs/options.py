"""Writes the tables of options into the pages, from the fields of `rlvr.config.TrainSettings`.

    python docs/options.py

A table stands between `<!-- options: GROUP -->` and `<!-- end -->`. A test checks that the pages are up to date.
"""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from rlvr.config import TrainSettings, option_type
from rlvr.options import option_default

TABLE = re.compile(r"(<!-- options: (?P<group>.+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def with_tables(page: str) -> str:
    """The page with every table as it should be."""
    return TABLE.sub(lambda found: f"{found[1]}{table(found['group'])}{found[3]}", page)


def table(group: str) -> str:
    """The options of a group of `TrainSettings`, in Markdown.

    Raises:
        KeyError: there is no such group.
    """
    chosen = [definition for definition in fields(TrainSettings) if definition.metadata["group"] == group]
    if not chosen:
        raise KeyError(f"no option is in the group {group!r}")
    rows = ["| option | default | meaning |", "|---|---|---|"]
    for definition in chosen:
        meaning = definition.metadata["help"]
        choices = definition.metadata["choices"]
        if choices:
            meaning += f" ({', '.join(choices)})"
        rows.append(f"| {_name(definition)} | {_default(definition)} | {meaning} |")
    return "\n".join(rows) + "\n"


def _name(definition) -> str:
    if not definition.metadata["cli"]:
        return f"`{definition.name}`"
    flag = "--" + definition.name.replace("_", "-")
    if option_type(definition)[0] is bool:
        return f"`{flag}`, `--no-{flag[2:]}`"
    return f"`{flag}`"


def _default(definition) -> str:
    value = option_default(definition)
    if isinstance(value, bool):
        return "on" if value else "off"
    return "" if value is None or value == {} else f"{value}"


def main() -> None:
    for path in sorted(Path(__file__).parent.glob("*.md")):
        page = path.read_text(encoding="utf-8")
        if with_tables(page) != page:
            path.write_text(with_tables(page), encoding="utf-8")
            print(f"wrote {path.name}")


if __name__ == "__main__":
    main()
