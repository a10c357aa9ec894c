"""Runs checks: those of an installed backend in child processes, those of a backend object in this one.

Some groups of checks share a child (`catalogue.PROCESSES` says why). The child writes a line for each check; one that
dies is a failed check with its last words, and the rest goes on in a new child.
"""

from __future__ import annotations

import functools
import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib import import_module
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from rlvr.child_process import environment
from rlvr.errors import ConfigError
from rlvr.testing.conformance.catalogue import PROCESSES, Check, select
from rlvr.testing.conformance.context import CheckFailed, Context, first_line
from rlvr.testing.conformance.report import CheckResult, Report

if TYPE_CHECKING:
    from rlvr.backends.protocol import ModelBackend

TINY = "a tiny Qwen2 made on the spot"
_LAST_LINES = 6
_LOOK_EVERY_S = 0.2  # for new results of a child

Listener = Callable[[CheckResult], None]
Results = Generator[CheckResult, None, None]


def check_backend(
    backend: str | ModelBackend,
    *,
    model: str | None = None,
    device: str | None = None,
    only: Sequence[str] | None = None,
    timeout_s: float = 900,
    jobs: int = 1,
    on_result: Listener | None = None,
) -> Report:
    """Runs the checks on a backend.

    Args:
        backend: a name from `rlvr backends`, whose checks run in fresh processes; or a backend object, whose checks
            run in this process, those left out that need one of their own.
        model: model id or folder to check with; None for a tiny one that is made on the spot.
        device: "cpu", "cuda", "xpu" or "mps", or "cuda:1" and the like; None for what the backend takes by itself.
        only: names of checks or of groups; None for all.
        timeout_s: seconds for the checks that share a process.
        jobs: how many processes run checks at the same time, eight at most; each has a copy of the tiny model, and of
            the libraries in memory. A backend object's checks run one after the other.
        on_result: called with each result as it comes.

    Raises:
        ConfigError: `only` names what is no check, or `device`, `timeout_s` or `jobs` is none; all problems at once.
        UnknownPluginError, DuplicatePluginError, PluginLoadError, BackendUnavailableError: as for `load_backend`.
    """
    from rlvr.plugins.manager import require_backend

    problems = _option_problems(device, timeout_s, jobs)
    if problems:
        raise ConfigError(problems)
    by_name = isinstance(backend, str)
    checks = select(only, in_process=not by_name)
    if isinstance(backend, str):
        require_backend(backend)
    shares = [[check for check in checks if check.group in groups] for groups in PROCESSES]
    results: list[CheckResult] = []
    with tempfile.TemporaryDirectory(prefix="rlvr-check-") as scratch:
        job = _Job(backend, _absolute(model), device, Path(scratch).resolve(), timeout_s)
        with closing(job.all(shares, jobs if by_name else 1)) as found:
            for result in found:
                results.append(result)
                if on_result is not None:
                    on_result(result)
    places = {check.name: place for place, check in enumerate(checks)}
    results.sort(key=lambda result: places[result.name])
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


def at_the_same_time(sources: Iterable[Results], jobs: int, stopped: threading.Event) -> Results:
    """What the sources give, as it comes, from so many of them at a time. Closed early, or when one raises, it sets
    `stopped`, on which they are to end: one that does not look at it is ended at its next result."""
    if jobs == 1:
        yield from chain.from_iterable(sources)
        return
    arrived: queue.Queue[CheckResult | Exception | None] = queue.Queue()  # None: a source has ended

    def read(source: Results) -> None:
        try:
            for result in source:
                arrived.put(result)
                if stopped.is_set():
                    source.close()
            arrived.put(None)
        except Exception as error:
            arrived.put(error)

    with ThreadPoolExecutor(jobs) as pool:
        running = [pool.submit(read, source) for source in sources]
        ended = 0
        try:
            while ended < len(running):
                item = arrived.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    ended += 1
                else:
                    yield item
        finally:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)


@dataclass
class _Job:
    """One run of `check_backend`."""

    backend: str | ModelBackend
    model: str | None
    device: str | None
    scratch: Path
    timeout_s: float
    stopped: threading.Event = field(default_factory=threading.Event)  # nobody waits for results any more

    def all(self, shares: Sequence[list[Check]], jobs: int) -> Results:
        """What the processes find, so many at a time. That of the engine, the last share, is before all others where
        vLLM is installed: it measures a GPU's memory while it starts, and gives up if another process frees some."""
        if isinstance(self.backend, str) and find_spec("vllm") is not None:
            *shares, engine = shares
            yield from self.run(engine)
        yield from at_the_same_time(map(self.run, shares), jobs, self.stopped)

    def run(self, checks: list[Check]) -> Results:
        if not checks:
            return
        if isinstance(self.backend, str):
            yield from self._in_children(checks)
        else:
            context = Context(None, self.backend, self.model, self.device, self.scratch)
            yield from (run_check(check, context) for check in checks)

    def _in_children(self, checks: list[Check]) -> Results:
        while checks:
            began = time.monotonic()
            done = 0
            with self._child(checks) as child:
                for result in child.results():
                    done += 1
                    yield result
            if self.stopped.is_set():
                return
            checks = checks[done:]
            if checks:
                yield make_result(checks[0], time.monotonic() - began, failure=child.last_words())
                checks = checks[1:]

    @contextmanager
    def _child(self, checks: list[Check]) -> Iterator[_Child]:
        group = checks[0].group
        folder = Path(tempfile.mkdtemp(prefix=f"{group}-", dir=self.scratch))
        job = {
            "backend": self.backend,
            "model": None if group == "alone" else self.model,
            "device": self.device,
            "checks": [check.name for check in checks],
            "scratch": str(folder),
        }
        working = folder / "working"  # empty, so that what a backend leaves there is seen
        working.mkdir()
        with open(folder / "output.txt", "w", encoding="utf-8") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "rlvr.testing.conformance.child", json.dumps(job)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=working,
                env=self._environment(group, folder),
                start_new_session=True,
            )
        try:
            yield _Child(process, folder, self.timeout_s, self.stopped)
        finally:
            _end(process)

    def _environment(self, group: str, folder: Path) -> dict[str, str]:
        variables = {
            **environment(),
            "WANDB_MODE": "disabled",
            "TRL_EXPERIMENTAL_SILENCE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        if self.device == "cpu":
            variables["CUDA_VISIBLE_DEVICES"] = ""  # some backends take a GPU wherever they see one
        if group == "alone":
            variables |= {"HF_HUB_CACHE": str(folder / "hub"), "HF_HUB_OFFLINE": "1"}
        return variables


@dataclass
class _Child:
    """A process that runs checks, and writes a line for each into its folder."""

    process: subprocess.Popen[bytes]
    folder: Path
    timeout_s: float
    stopped: threading.Event
    _timed_out: bool = False

    def results(self) -> Iterator[CheckResult]:
        """What it found, as it finds it, until it ends, its time is up or nobody waits any more."""
        deadline = time.monotonic() + self.timeout_s
        told = 0
        running = True
        while running and not self.stopped.is_set():
            running = self._is_running(until=deadline)
            found = read_results(self.folder)
            yield from found[told:]
            told = len(found)

    def last_words(self) -> str:
        """How it ended, and what it printed last."""
        code = self.process.returncode
        died = f"the process died with exit code {code}"
        ending = f"the process was ended after {self.timeout_s:g} s" if self._timed_out else died
        output = (self.folder / "output.txt").read_text(encoding="utf-8", errors="replace")
        return "\n".join([f"{ending}; its last lines:", *output.strip().splitlines()[-_LAST_LINES:]])

    def _is_running(self, *, until: float) -> bool:
        """Waits for a moment; false once the process has ended, by itself or because its time is up."""
        try:
            self.process.wait(timeout=_LOOK_EVERY_S)
        except subprocess.TimeoutExpired:
            self._timed_out = time.monotonic() > until
            return not self._timed_out
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """With the processes that it has started, where the system knows groups of them."""
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()


def run_check(check: Check, context: Context) -> CheckResult:
    """Runs one check in this process. Whatever it raises is a failure of the backend."""
    module, _, function = check.function.partition(":")
    began = time.monotonic()
    try:
        run = getattr(import_module(f"rlvr.testing.conformance.checks.{module}"), function)
        with _reproducible():
            measured = run(context) if check.argument is None else run(context, check.argument)
    except CheckFailed as failure:
        return make_result(check, time.monotonic() - began, failure=f"{failure}{context.unjudged}")
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        words = f"{type(error).__name__}: {first_line(error)} ({Path(place.filename).name}, line {place.lineno})"
        return make_result(check, time.monotonic() - began, failure=words + context.unjudged)
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
        return [
            CheckResult(**json.loads(line)) for line in file if line.endswith("\n")
        ]  # the last may be half written


def _option_problems(device: str | None, timeout_s: float, jobs: int) -> list[str]:
    problems = []
    if device is not None and not re.fullmatch(r"cpu|(cuda|xpu|mps)(:\d+)?", device):
        problems.append(f"device is {device!r}; allowed: cpu, cuda, xpu, mps, or with a number behind it: cuda:1.")
    if not timeout_s > 0:
        problems.append(f"timeout_s is {timeout_s:g}; it must be a number of seconds above 0.")
    if jobs < 1:
        problems.append(f"jobs is {jobs}; at least 1 process has to run the checks.")
    return problems


def _absolute(model: str | None) -> str | None:
    """A folder's full path: children run in folders of their own."""
    return str(Path(model).expanduser().absolute()) if model and Path(model).expanduser().exists() else model
