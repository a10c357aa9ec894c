"""A stranger's backend: `docs/write-a-backend.md` is followed to the letter, with a built wheel of ours.

The blocks of the page are taken in order. One with a title is added to that file; shell and Python are run, and a text
block says what the last one printed.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(900)  # about ten processes, each of which imports torch

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "third_party_backend"
PAGE = (ROOT / "docs" / "write-a-backend.md").read_text(encoding="utf-8")
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)


@dataclass
class Followed:
    """The page's files as written, and what each shell or Python block printed beside what the page says."""

    folder: Path
    outputs: list[tuple[str, str]] = field(default_factory=list)
    expected: list[tuple[str, str]] = field(default_factory=list)


def added(file, piece):
    """Two blank lines before what stands at the margin, one before a method."""
    if not file.exists():
        return piece
    return file.read_text(encoding="utf-8") + ("\n" if piece.startswith(" ") else "\n\n") + piece


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A process environment with a fresh folder for packages, into which our wheel is installed, and no network."""
    packages = tmp_path_factory.mktemp("packages")
    wheels = tmp_path_factory.mktemp("wheels")
    scripts = tmp_path_factory.mktemp("scripts")
    for name, command in (("python", '"$@"'), ("pip", '-m pip "$@"')):
        (scripts / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {command}\n')
        (scripts / name).chmod(0o755)
    variables = {
        **os.environ,
        "PATH": os.pathsep.join([str(scripts), str(packages / "bin"), os.environ["PATH"]]),
        "PYTHONPATH": str(packages),  # before the checkout
        "PIP_NO_INDEX": "1",
        "PIP_NO_DEPS": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # pip reads the value of this one as that of build isolation
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "COLUMNS": "200",
        "WANDB_MODE": "offline",
    }
    variables.pop("RLVR_BACKEND", None)
    run(f"pip wheel --quiet --wheel-dir {wheels} {ROOT}", ROOT, variables)
    variables |= {"PIP_TARGET": str(packages), "PIP_UPGRADE": "1"}
    run(f"pip install --quiet {next(wheels.glob('*.whl'))}", ROOT, variables)
    return variables


def run(command, folder, variables):
    result = subprocess.run(
        ["sh", "-ec", command], cwd=folder, env=variables, capture_output=True, text=True, timeout=240, check=False
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def followed(tmp_path_factory, environment):
    page = Followed(tmp_path_factory.mktemp("page"))
    for language, title, body in BLOCK.findall(PAGE):
        file = page.folder / title
        if title:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(added(file, body), encoding="utf-8")
        elif language == "text":
            page.expected.append((page.outputs[-1][1], body))
        else:
            command = body
            if language == "python":
                (page.folder / "block.py").write_text(body, encoding="utf-8")
                command = "python block.py"
            page.outputs.append((body, run(command, page.folder, environment)))
    return page


def test_the_commands_print_what_the_page_says(followed):
    assert len(followed.expected) >= 5
    for printed, expected in followed.expected:
        for line in expected.splitlines():
            assert line in printed


def test_the_files_of_the_page_are_the_example(followed):
    files = {file.relative_to(EXAMPLE) for kind in ("*.py", "*.toml") for file in EXAMPLE.rglob(kind)}
    assert {Path(title) for _, title, _ in BLOCK.findall(PAGE) if title} == files
    for name in files:
        assert (followed.folder / name).read_text() == (EXAMPLE / name).read_text(), name


def test_it_is_small():
    files = [EXAMPLE / "pyproject.toml", *(EXAMPLE / "src").rglob("*.py")]
    assert sum(len(file.read_text().splitlines()) for file in files) < 150


@pytest.mark.slow
def test_it_passes_every_check(followed, environment):
    report = json.loads(run("rlvr backends check gguf --model tiny --json", followed.folder, environment))
    assert report["ok"], report
    assert report["model"] == "tiny"


def test_our_wheel_was_used_and_the_run_trained(followed, environment):
    where = run("python -c 'import rlvr; print(rlvr.__file__)'", followed.folder, environment)
    assert Path(where.strip()).is_relative_to(environment["PYTHONPATH"])
    rows = (followed.folder / "run" / "metrics.jsonl").read_text().splitlines()
    assert sum('"loss"' in row for row in rows) == 2
    assert (followed.folder / "run" / "adapter" / "adapter_model.safetensors").is_file()
