"""Import order and laziness, each read from a process of its own. Standard library only."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rlvr.child_process import environment
from rlvr.testing.conformance.context import Context, expect

HEAVY = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "numpy", "vllm", "unsloth", "wandb")

_LISTING = """
import json, sys, rlvr
(row,) = [row for row in rlvr.list_backends() if row.name == {name!r}]
print(json.dumps({{"available": row.available, "reason": row.reason,
                   "heavy": [module for module in {heavy!r} if module in sys.modules]}}))
"""

EARLIER = ("transformers", "peft", "trl")
"""What users import above their backend, and what a backend may have to patch."""

_LOAD = """
import contextlib, io, json, logging, os, sys, warnings
{before}
import rlvr
seen, told, error, trainer = io.StringIO(), [], None, None
class Told(logging.Handler):
    def emit(self, record):
        told.append(record.getMessage())
logging.getLogger().addHandler(Told(logging.WARNING))
try:
    with contextlib.redirect_stdout(seen), warnings.catch_warnings(record=True) as caught:
        backend = rlvr.load_backend({name!r})
        backend.capabilities()
        {then}
except rlvr.RlvrError as refused:
    error = str(refused)
told += [str(warning.message) for warning in caught]
if error is None:
    from rlvr.trainers import EnhancedGRPOTrainer
    from trl import GRPOConfig, GRPOTrainer
    trainer = GRPOTrainer.__module__ + "." + GRPOTrainer.__qualname__
print(json.dumps({{"error": error, "stdout": seen.getvalue(), "files": os.listdir("."), "told": told,
                   "trainer": trainer}}))
"""
_LATE = f"import {', '.join(EARLIER)}; trl.GRPOTrainer"

_POLICY = """
        import tempfile
        from rlvr.testing.tiny import save_tiny
        model = str(save_tiny(os.path.abspath(tempfile.mkdtemp(dir=".."))))
        rlvr.load_policy(model, backend={name!r}, max_seq_length=256, fast_inference="off", device={device!r})
"""


def lazy_plugin(context: Context) -> str:
    found = answer_of(context, _LISTING.format(name=context.name, heavy=HEAVY))
    expect(found["available"], f"'rlvr backends' lists it as not available: {found['reason']}")
    expect(
        not found["heavy"],
        f"listing it imports {', '.join(found['heavy'])}: import these in rlvr_backend, or in the module that it "
        "imports, not in the plugin module.",
    )
    return "nothing heavy is imported"


def loads_first(context: Context) -> str:
    """Alone, and once more with a policy, for which alone it may print or write."""
    _tidy(_loaded_first(context))
    return _tidy(_loaded_first(context, _POLICY.format(name=context.name, device=context.device)))


def loads_late(context: Context) -> str:
    """The trainer must be the one that there is when the backend is loaded first, or the user must be told."""
    first = _loaded_first(context)
    late = answer_of(context, _LOAD.format(name=context.name, before=_LATE, then=""))
    if late["error"] is not None:
        return f"refused: {late['error']}"
    tidy = _tidy(late)
    if late["trainer"] == first["trainer"]:
        return f"{tidy}; trl.GRPOTrainer is the same class"
    told = [line for line in late["told"] if line not in first["told"] and any(name in line for name in EARLIER)]
    expect(
        told,
        f"loaded after {', '.join(EARLIER)}, it leaves {late['trainer']} as trl.GRPOTrainer; loaded first, "
        f"{first['trainer']}. It says nothing of it: warn, naming what was imported too early, or refuse with an "
        "RlvrError.",
    )
    return f"{tidy}; warned: {' '.join(told)}"


def _loaded_first(context: Context, then: str = "") -> dict[str, Any]:
    """`then`: lines that follow."""
    found = answer_of(context, _LOAD.format(name=context.name, before="", then=then))
    expect(found["error"] is None, f"it cannot be loaded in a fresh process: {found['error']}")
    return found


def _tidy(found: dict[str, Any]) -> str:
    problems = []
    if found["stdout"]:
        problems.append(f"prints to standard output, where commands write JSON: {found['stdout'][:80]!r}")
    if found["files"]:
        problems.append(f"writes to the working directory: {', '.join(found['files'])}")
    expect(not problems, f"loading it {'; and '.join(problems)}")
    return "works, prints and writes nothing"


def answer_of(context: Context, program: str) -> Any:
    """What the program prints last, as JSON."""
    return _answer(context.scratch, program)


@functools.cache
def _answer(scratch: Path, program: str) -> Any:
    """Cached, because two checks ask what a backend is that is loaded first; `scratch` is one run's own."""
    outcome = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=tempfile.mkdtemp(dir=scratch),
        env=environment(),
    )
    last = "\n".join(outcome.stderr.strip().splitlines()[-4:])
    expect(outcome.returncode == 0, f"the process ended with {outcome.returncode}:\n{last}")
    return json.loads(outcome.stdout.splitlines()[-1])
