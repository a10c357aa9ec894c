"""Standard output for programs: with `--json` the JSON and nothing else, with `--dry-run` the YAML."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from typing import TextIO

_results: ContextVar[TextIO] = ContextVar("results")


@contextmanager
def for_programs(words: Sequence[str]) -> Iterator[None]:
    """Where the words of a command ask for it: whatever prints in here, plugins as they are imported above all,
    prints to standard error, but for `write_result`."""
    if "--help" in words or not {"--json", "--dry-run"} & {*words}:
        yield
        return
    token = _results.set(sys.stdout)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _results.reset(token)


def write_result(text: str) -> None:
    print(text, file=_results.get(sys.stdout))
