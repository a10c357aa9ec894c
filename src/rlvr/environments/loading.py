"""Rows from the user's files or from `datasets.load_dataset`, with errors that say what to do."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rlvr.errors import DataError

Row = dict[str, Any]


def load_rows(spec: str, *, split: str = "train", on_bad_line: Callable[[str], None] | None = None) -> list[Row]:
    """The rows of one or more datasets, one after the other.

    Args:
        spec: `path[,name[,split]]`, several separated by `;`. A path that ends in .jsonl, .json, .parquet or
            .csv is a local file, all of whose rows are taken; any other is for `datasets.load_dataset`.
        split: taken where a dataset names none.
        on_bad_line: told about each line of a .jsonl file that is no JSON object, which is then left out; by
            default such a line is an error.

    Raises:
        DataError: a dataset cannot be loaded or has no rows, a local file has another suffix, or a part of one is
            asked for.
    """
    rows: list[Row] = []
    parts = [part.strip() for part in spec.split(";") if part.strip()]
    if not parts:
        raise DataError(f"datasets is {spec!r}; give 'path[,name[,split]]', several separated by ';'.")
    for part in parts:
        path, name, named_split = _parse(part)
        reader = _READERS.get(Path(path).suffix.lower())
        if reader and (name not in _WHOLE_FILE or named_split not in _WHOLE_FILE):
            raise DataError(
                f"the dataset {part!r} is a local file, which has no name and no split: all its rows are taken. "
                f"Write {path!r}, and keep the rows of a split in a file of their own."
            )
        if reader is None and Path(path).expanduser().is_file():
            raise DataError(
                f"the file {path!r} has none of the suffixes that are read here: {', '.join(_READERS)}. Rename it, or "
                "write its rows in one of these formats."
            )
        found = _read_file(reader, path, on_bad_line) if reader else _load_dataset(path, name, named_split or split)
        if not found:
            raise DataError(f"the dataset {part!r} has no rows.")
        rows += found
    return rows


_WHOLE_FILE = (None, "default", "train")  # the name and the split that `datasets` gives to a file itself


def _parse(part: str) -> tuple[str, str | None, str | None]:
    fields = [field.strip() for field in part.split(",")]
    if len(fields) > 3 or not fields[0]:
        raise DataError(f"the dataset {part!r} cannot be read; write 'path', 'path,name' or 'path,name,split'.")
    path, name, named_split = (*fields, "", "")[:3]
    return path, name or None, named_split or None


def _read_file(
    reader: Callable[[Path, Callable[[str], None]], Iterable[Row]],
    path: str,
    on_bad_line: Callable[[str], None] | None,
) -> list[Row]:
    def refuse(problem: str) -> None:
        raise DataError(problem)

    file = Path(path).expanduser()
    if not file.is_file():
        raise DataError(f"there is no file {path!r} (looked in {file.resolve().parent}).")
    try:
        return list(reader(file, on_bad_line or refuse))
    except (OSError, ValueError, csv.Error) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"the file {path!r} cannot be read: {error}") from error


def _read_jsonl(file: Path, on_bad_line: Callable[[str], None]) -> Iterable[Row]:
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                on_bad_line(f"line {number} of {str(file)!r} is not JSON: {error}")
                continue
            if isinstance(row, dict):
                yield row
            else:
                on_bad_line(f"line {number} of {str(file)!r} is no JSON object: {line.strip()[:80]!r}")


def _read_json(file: Path, on_bad_line: Callable[[str], None]) -> Iterable[Row]:
    rows = json.loads(file.read_text(encoding="utf-8-sig"))
    if not (isinstance(rows, list) and all(isinstance(row, dict) for row in rows)):
        raise DataError(f"the file {str(file)!r} must hold a list of objects. For one object a line, name it .jsonl.")
    return rows


def _read_parquet(file: Path, on_bad_line: Callable[[str], None]) -> Iterable[Row]:
    import pyarrow.parquet as parquet

    return parquet.read_table(file).to_pylist()


def _read_csv(file: Path, on_bad_line: Callable[[str], None]) -> Iterable[Row]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        for number, row in enumerate(csv.DictReader(lines), 2):
            if None in row or None in row.values():
                on_bad_line(f"row {number} of {str(file)!r} has another number of fields than the header.")
            else:
                yield dict(row)


_READERS: dict[str, Callable[[Path, Callable[[str], None]], Iterable[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
}


def _load_dataset(path: str, name: str | None, split: str) -> list[Row]:
    import datasets

    try:
        return list(datasets.load_dataset(path, name, split=split))
    except Exception as error:  # datasets raises many kinds, most of them bare
        named = path if name is None else f"{path} ({name})"
        raise DataError(
            f"the dataset {named}, split {split!r}, cannot be loaded: {type(error).__name__}: {error}\n"
            "Give a local .jsonl, .json, .parquet or .csv file, or 'path,name,split' as "
            "datasets.load_dataset takes it."
        ) from error
