"""Runs the command in this process, in an empty folder, and sets back what it changed."""

import logging
import os
import warnings
from dataclasses import dataclass

import pytest

from rlvr.cli import main


@dataclass
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def command(capsys, monkeypatch, tmp_path):
    """`command("train", "arithmetic", ...)` → exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("RLVR_BACKEND", "WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    environment = dict(os.environ)
    loggers = [logging.getLogger(name) for name in ("rlvr", "rlvr_unsloth")]
    states = [(logger.handlers, logger.propagate, logger.level) for logger in loggers]

    def run(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        code = stopped.value.code
        return Outcome(0 if code is None else code, captured.out, captured.err)

    with warnings.catch_warnings():
        yield run
    for name in set(os.environ) - set(environment):
        del os.environ[name]
    for logger, (handlers, propagate, level) in zip(loggers, states, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)
