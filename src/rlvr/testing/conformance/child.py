"""The child process that runs one group of checks: `python -m rlvr.testing.conformance.child JOB`.

The backend is loaded before anything else is imported, because some have to come first. The checks of the group
`plugin` load it in processes that they start, and this one never does.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlvr.errors import RlvrError
from rlvr.testing.conformance.catalogue import select
from rlvr.testing.conformance.context import Context
from rlvr.testing.conformance.report import CheckResult
from rlvr.testing.conformance.runner import add_result, make_result, run_check


def main(job: dict[str, Any]) -> None:
    from rlvr.plugins.manager import load_backend

    folder = Path(job["scratch"])
    checks = select(job["checks"])
    backend: Any = None
    try:
        if checks[0].group != "plugin":
            backend = load_backend(job["backend"])
    except RlvrError as error:
        for check in checks:
            add_result(folder, make_result(check, 0.0, failure=f"the backend cannot be loaded: {error}"))
        return
    context = Context(job["backend"], backend, job["model"], job["device"], folder)
    for check in checks:
        before = set(os.listdir())
        result = run_check(check, context)
        add_result(folder, _tidy(result, sorted(set(os.listdir()) - before)))


def _tidy(result: CheckResult, written: list[str]) -> CheckResult:
    """A failure, where something was left in the working directory, in which this kit leaves nothing."""
    if not (result.passed and written):
        return result
    finding = f"the backend writes to the working directory: {', '.join(written)}"
    return replace(result, passed=False, message=finding)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
