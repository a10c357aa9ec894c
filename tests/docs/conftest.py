"""A working directory, the quickstart's model, and runs cut short."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
from chat_server import ChatServer, completion
from doc_blocks import ENDPOINT_VARIABLE

from rlvr import quickstart
from rlvr.cli import train as train_command
from rlvr.trainers import run as run_module


@pytest.fixture(scope="session")
def quickstart_model(tmp_path_factory):
    """The model of the quickstart, made as users make it. Half a minute."""
    folder = tmp_path_factory.mktemp("quickstart") / "model"
    quickstart.prepare(folder)
    return folder


@pytest.fixture
def workplace(tmp_path, monkeypatch, quickstart_model):
    """The working directory: the quickstart's model by the names that the pages use, and the user's own questions.

    A server answers where the pages have one.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("quickstart-model", "outputs/quickstart/warm-start-0"):
        shutil.copytree(quickstart_model, tmp_path / name)
    rows = ({"question": f"Say {number}.", "answer": str(number)} for number in range(16))
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with ChatServer(lambda body: completion("7")) as server:
        monkeypatch.setenv(ENDPOINT_VARIABLE, server.url)
        yield tmp_path


@pytest.fixture
def short_runs(monkeypatch):
    """One step of a few tokens for every run, from Python or the command line."""
    resolve = run_module.resolve_settings

    def shortened(*layers):
        settings = resolve(*layers)
        few = min(settings.max_tokens, 8)
        return replace(settings, max_steps=1, max_tokens=few, eval_samples=2, dtype="float32", report_to="none")

    for module in (run_module, train_command):
        monkeypatch.setattr(module, "resolve_settings", shortened)
