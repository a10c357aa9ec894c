"""Runs checks: those of an installed backend in child processes, those of a backend object in this one.

Some groups of checks share a child (`catalogue.PROCESSES` says why). The child writes a line for each check; one that
dies is a failed check with its last words, and the rest goes on in a new child.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlvr.testing.conformance.catalogue import PROCESSES, Check, select
from rlvr.testing.conformance.context import CheckFailed, Context, first_line
from rlvr.testing.conformance.report import CheckResult, Report

if TYPE_CHECKING:
    from rlvr.backends.protocol import ModelBackend

TINY = "a tiny Qwen2 made on the spot"
_LAST_LINES = 6

Listener = Callable[[CheckResult], None]


def check_backend(
    backend: str | ModelBackend,
    *,
    model: str | None = None,
    device: str | None = None,
    only: Sequence[str] | None = None,
    timeout_s: float = 900,
    on_result: Listener | None = None,
) -> Report:
    """Runs the checks on a backend.

    Args:
        backend: a name from `rlvr backends`, whose checks run in fresh processes; or a backend object, whose checks
            run in this process, those left out that need one of their own.
        model: model id or folder to check with; None for a tiny one that is made on the spot.
        device: "cpu" or "cuda"; None for what the backend takes by itself.
        only: names of checks or of groups; None for all.
        timeout_s: for the checks that share a process.
        on_result: called with each result as it comes.

    Raises:
        ConfigError: `only` names what is no check.
        UnknownPluginError, DuplicatePluginError, PluginLoadError, BackendUnavailableError: as for `load_backend`.
    """
    from rlvr.plugins.manager import require_backend

    by_name = isinstance(backend, str)
    checks = select(only, in_process=not by_name)
    if isinstance(backend, str):
        require_backend(backend)
    results: list[CheckResult] = []
    with tempfile.TemporaryDirectory(prefix="rlvr-check-") as scratch:
        job = _Job(backend, _absolute(model), device, Path(scratch).resolve(), timeout_s)
        for groups in PROCESSES:
            for result in job.run([check for check in checks if check.group in groups]):
                results.append(result)
                if on_result is not None:
                    on_result(result)
    name = backend if isinstance(backend, str) else getattr(backend, "name", type(backend).__name__)
    return Report(backend=name, model=model or TINY, device=device or "default device", results=tuple(results))


@dataclass(frozen=True)
class BackendCheck:
    """One check of one backend, for pytest: call it. Those that share a process run when the first is called."""

    check: Check
    run: Callable[[tuple[str, ...]], dict[str, CheckResult]]  # groups of one process → results by name

    @property
    def __name__(self) -> str:  # pytest takes it as the test's id
        return self.check.name

    def __call__(self) -> None:
        """
        Raises:
            AssertionError: the check failed; says what was found.
        """
        groups = next(groups for groups in PROCESSES if self.check.group in groups)
        result = self.run(groups)[self.check.name]
        if not result.passed:
            raise AssertionError(f"{result.name} ({result.proves}): {result.message}")


def backend_checks(
    backend: str | ModelBackend,
    *,
    model: str | None = None,
    device: str | None = None,
    only: Sequence[str] | None = None,
) -> list[BackendCheck]:
    """The checks as callables, to parametrise a test with; the arguments are those of `check_backend`.

    @pytest.mark.parametrize("check", backend_checks("mine"))
    def test_conformance(check):
        check()
    """
    chosen = select(only, in_process=not isinstance(backend, str))

    @functools.cache
    def run(groups: tuple[str, ...]) -> dict[str, CheckResult]:
        names = [check.name for check in chosen if check.group in groups]
        report = check_backend(backend, model=model, device=device, only=names)
        return {result.name: result for result in report.results}

    return [BackendCheck(check, run) for check in chosen]


@dataclass
class _Job:
    """One run of `check_backend`."""

    backend: str | ModelBackend
    model: str | None
    device: str | None
    scratch: Path
    timeout_s: float

    def run(self, checks: list[Check]) -> Iterator[CheckResult]:
        if not checks:
            return
        group = checks[0].group
        if not isinstance(self.backend, str):
            context = Context(None, self.backend, self.model, self.device, self.scratch)
            yield from (run_check(check, context) for check in checks)
        elif group == "plugin":
            light: Any = None  # these checks load the backend in processes that they start
            context = Context(self.backend, light, None, self.device, self.scratch)
            yield from (run_check(check, context) for check in checks)
        else:
            yield from self._in_children(checks)

    def _in_children(self, checks: list[Check]) -> Iterator[CheckResult]:
        while checks:
            began = time.monotonic()
            results, last_words = self._child(checks)
            yield from results
            checks = checks[len(results) :]
            if checks:
                yield make_result(checks[0], time.monotonic() - began, failure=last_words)
                checks = checks[1:]

    def _child(self, checks: list[Check]) -> tuple[list[CheckResult], str]:
        """What a child found, and how it ended."""
        group = checks[0].group
        folder = Path(tempfile.mkdtemp(prefix=f"{group}-", dir=self.scratch))
        job = {
            "backend": self.backend,
            "model": None if group == "alone" else self.model,
            "device": self.device,
            "checks": [check.name for check in checks],
            "scratch": str(folder),
        }
        command = [sys.executable, "-m", "rlvr.testing.conformance.child", json.dumps(job)]
        with open(folder / "output.txt", "w+", encoding="utf-8", errors="replace") as output:
            try:
                code = subprocess.run(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    timeout=self.timeout_s,
                    check=False,
                    cwd=folder,
                    env=self._environment(group, folder),
                ).returncode
                ending = f"the process died with exit code {code}"
            except subprocess.TimeoutExpired:
                ending = f"the process was ended after {self.timeout_s:g} s"
            output.seek(0)
            last = output.read().strip().splitlines()[-_LAST_LINES:]
        return read_results(folder), "\n".join([f"{ending}; its last lines:", *last])

    def _environment(self, group: str, folder: Path) -> dict[str, str]:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),  # a backend that this process can import
            "WANDB_MODE": "disabled",
            "TRL_EXPERIMENTAL_SILENCE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        if self.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""  # some backends take a GPU wherever they see one
        if group == "alone":
            environment |= {"HF_HUB_CACHE": str(folder / "hub"), "HF_HUB_OFFLINE": "1"}
        return environment


def run_check(check: Check, context: Context) -> CheckResult:
    """Runs one check in this process. Whatever it raises is a failure of the backend."""
    module, _, function = check.function.partition(":")
    began = time.monotonic()
    try:
        run = getattr(import_module(f"rlvr.testing.conformance.checks.{module}"), function)
        with _reproducible():
            measured = run(context) if check.argument is None else run(context, check.argument)
    except CheckFailed as failure:
        return make_result(check, time.monotonic() - began, failure=str(failure))
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        words = f"{type(error).__name__}: {first_line(error)} ({Path(place.filename).name}, line {place.lineno})"
        return make_result(check, time.monotonic() - began, failure=words)
    return make_result(check, time.monotonic() - began, measured=measured)


def make_result(check: Check, seconds: float, *, measured: str = "", failure: str | None = None) -> CheckResult:
    return CheckResult(
        name=check.name,
        group=check.group,
        proves=check.proves,
        passed=failure is None,
        message=measured if failure is None else failure,
        seconds=seconds,
    )


@contextmanager
def _reproducible() -> Iterator[None]:
    """The same random numbers for a check every time, and the global state as it was afterwards."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def add_result(folder: Path, result: CheckResult) -> None:
    with open(folder / "results.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(result)) + "\n")


def read_results(folder: Path) -> list[CheckResult]:
    path = folder / "results.jsonl"
    if not path.exists():
        return []
    with open(path, encoding="utf-8") as file:
        return [CheckResult(**json.loads(line)) for line in file]


def _absolute(model: str | None) -> str | None:
    """A folder's full path: children run in folders of their own."""
    return str(Path(model).expanduser().absolute()) if model and Path(model).expanduser().exists() else model
