"""A stranger's backend and environment: the pages that build them are followed to the letter, with our wheel.

The blocks of a page are taken in order. One with a title is added to that file; shell and Python are run, Python with
tests by pytest, and a text block says what the last one printed.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from rlvr.testing.conformance import CHECKS

pytestmark = pytest.mark.timeout(900)  # about ten processes a page, each of which imports torch

ROOT = Path(__file__).parents[1]
KINDS = ("backend", "environment")
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)


def example_of(kind):
    return ROOT / "examples" / f"third_party_{kind}"


def blocks_of(kind):
    article = "an" if kind == "environment" else "a"
    return BLOCK.findall((ROOT / "docs" / f"write-{article}-{kind}.md").read_text(encoding="utf-8"))


@dataclass
class Followed:
    """A page's files as written, and what each shell or Python block printed beside what the page says."""

    kind: str
    folder: Path
    outputs: list[tuple[str, str]] = field(default_factory=list)
    expected: list[tuple[str, str]] = field(default_factory=list)


def added(file, piece):
    """Two blank lines before what stands at the margin, one before a method."""
    if not file.exists():
        return piece
    return file.read_text(encoding="utf-8") + ("\n" if piece.startswith(" ") else "\n\n") + piece


@pytest.fixture(scope="module")
def variables(tmp_path_factory):
    """Of processes: a fresh folder for packages, into which our wheel and then the examples go, and no network."""
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
        ["sh", "-ec", command], cwd=folder, env=variables, capture_output=True, text=True, timeout=480, check=False
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module", params=KINDS)
def followed(request, tmp_path_factory, variables):
    page = Followed(request.param, tmp_path_factory.mktemp(request.param))
    for language, title, body in blocks_of(request.param):
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
                command = "python -m pytest -q block.py" if "def test_" in body else "python block.py"
            page.outputs.append((body, run(command, page.folder, variables)))
    return page


def test_the_commands_print_what_the_page_says(followed):
    assert len(followed.expected) >= 5
    for printed, expected in followed.expected:
        for line in expected.splitlines():
            assert line in printed


def test_the_files_of_the_page_are_the_example(followed):
    example = example_of(followed.kind)
    files = {file.relative_to(example) for kind in ("*.py", "*.toml") for file in example.rglob(kind)}
    assert {Path(title) for _, title, _ in blocks_of(followed.kind) if title} == files
    for name in files:
        assert (followed.folder / name).read_text() == (example / name).read_text(), name


def test_our_wheel_was_used_and_the_run_trained(followed, variables):
    where = run("python -c 'import rlvr; print(rlvr.__file__)'", followed.folder, variables)
    assert Path(where.strip()).is_relative_to(variables["PYTHONPATH"])
    rows = (followed.folder / "run" / "metrics.jsonl").read_text().splitlines()
    assert sum('"loss"' in row for row in rows) == 2
    assert (followed.folder / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_the_backend_is_under_150_lines():
    example = example_of("backend")
    files = [example / "pyproject.toml", *(example / "src").rglob("*.py")]
    assert sum(len(file.read_text().splitlines()) for file in files) < 150


def test_the_environment_is_one_file_of_under_150_lines():
    (file,) = (file for file in example_of("environment").rglob("*.py") if "tests" not in file.parts)
    assert len(file.read_text().splitlines()) < 150


@pytest.mark.parametrize("followed", ["backend"], indirect=True)
def test_the_backend_passes_every_check_as_tests_of_its_own(followed):
    (printed,) = (printed for body, printed in followed.outputs if "backend_checks" in body)
    assert f"{len(CHECKS)} passed" in printed
