"""Import order and laziness, each read from a process of its own. Standard library only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from rlvr.testing.conformance.context import Context, expect

HEAVY = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "numpy", "vllm", "unsloth", "wandb")

_LISTING = """
import json, sys, rlvr
(row,) = [row for row in rlvr.list_backends() if row.name == {name!r}]
print(json.dumps({{"available": row.available, "reason": row.reason,
                   "heavy": [module for module in {heavy!r} if module in sys.modules]}}))
"""

_LOAD = """
import contextlib, io, json, os, sys
{before}
import rlvr
seen, error = io.StringIO(), None
try:
    with contextlib.redirect_stdout(seen):
        backend = rlvr.load_backend({name!r})
        backend.capabilities()
except rlvr.RlvrError as refused:
    error = str(refused)
if error is None:
    from rlvr.trainers import EnhancedGRPOTrainer
    from trl import GRPOConfig, GRPOTrainer
print(json.dumps({{"error": error, "stdout": seen.getvalue(), "files": os.listdir(".")}}))
"""


def lazy_plugin(context: Context) -> str:
    found = _run(context, _LISTING.format(name=context.name, heavy=HEAVY))
    expect(found["available"], f"'rlvr backends' lists it as not available: {found['reason']}")
    expect(
        not found["heavy"],
        f"listing it imports {', '.join(found['heavy'])}: import these in rlvr_backend, or in the module that it "
        "imports, not in the plugin module.",
    )
    return "nothing heavy is imported"


def loads_first(context: Context) -> str:
    found = _run(context, _LOAD.format(name=context.name, before=""))
    expect(found["error"] is None, f"it cannot be loaded in a fresh process: {found['error']}")
    return _tidy(found)


def loads_late(context: Context) -> str:
    found = _run(context, _LOAD.format(name=context.name, before="import transformers, peft, trl"))
    if found["error"] is not None:
        return f"refused: {found['error']}"
    return _tidy(found)


def _tidy(found: dict[str, Any]) -> str:
    expect(
        not found["stdout"],
        f"loading it prints to standard output, where commands write JSON: {found['stdout'][:80]!r}",
    )
    expect(not found["files"], f"loading it writes to the working directory: {', '.join(found['files'])}")
    return "works, prints and writes nothing"


def _run(context: Context, program: str) -> dict[str, Any]:
    """What the program prints last, as JSON."""
    path = os.pathsep.join(filter(None, sys.path))
    outcome = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=context.folder(),
        env={**os.environ, "PYTHONPATH": path},
    )
    last = "\n".join(outcome.stderr.strip().splitlines()[-4:])
    expect(outcome.returncode == 0, f"the process ended with {outcome.returncode}:\n{last}")
    return json.loads(outcome.stdout.splitlines()[-1])
