"""Fenced code blocks of the pages, and how each kind is run."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from rlvr.cli import main

ROOT = Path(__file__).parents[2]
OWN_TESTS = {"write-a-backend.md", "write-an-environment.md"}  # test_third_party.py follows them to the letter
PAGES = [ROOT / "README.md", *sorted(p for p in (ROOT / "docs").glob("*.md") if p.name not in OWN_TESTS)]
FENCE = re.compile(r"^( *)```(\S*)([^\n]*)\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
MODEL_ID = re.compile(r"Qwen/Qwen[\w.-]+")
EXTRAS = re.compile(r"(?:rlvr|\.)\[([\w,-]+)\]")
ENDPOINT = "http://localhost:8000/v1"  # of the pages; the tests have a server elsewhere, and say so in this variable:
ENDPOINT_VARIABLE = "RLVR_DOCS_ENDPOINT"
NOT_RUN = {"ls"}  # commands of the shell, which say nothing about rlvr


@dataclass(frozen=True)
class Block:
    """`info` is what follows the language: `unsloth` (needs it), `gpu` (only read), `api` (asks a server), or
    `title="name"` (a file).
    """

    page: str
    line: int
    language: str
    info: str
    text: str

    @property
    def title(self) -> str | None:
        found = re.search(r'title="([^"]+)"', self.info)
        return found[1] if found else None


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        indent, language, info, code = match.groups()
        code = re.sub(rf"^{indent}", "", code, flags=re.MULTILINE)
        found.append(Block(page.name, text[: match.start()].count("\n") + 1, language, info.strip(), code))
    return found


def run_block(block: Block, namespace: dict, model_folder: Path) -> str:
    """Runs a block in the working directory, with a tiny model for each model id; what it printed."""
    code = MODEL_ID.sub(str(model_folder), block.text)
    code = code.replace(ENDPOINT, os.environ.get(ENDPOINT_VARIABLE, ENDPOINT))
    if block.title:
        Path(block.title).write_text(code, encoding="utf-8")
        return ""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        if block.language == "python":
            source = compile("\n" * block.line + code, str(ROOT / "docs" / block.page), "exec")
            exec(source, namespace)
        elif block.language == "sh":
            for command in code.strip().splitlines():
                _run_command(command, only_read="gpu" in block.info)
    return printed.getvalue()


def _run_command(command: str, *, only_read: bool) -> None:
    words = shlex.split(command, comments=True)
    variables = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
    words = words[len(variables) :]
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), command
    elif words[:2] == ["pip", "install"]:
        for option, value in itertools.pairwise(words):
            assert option != "--constraint" or (ROOT / value).is_file(), command
    elif words[0] == "python":  # tests/examples runs them
        assert (ROOT / words[1]).is_file(), command
    elif words[0] == "rlvr":
        before, code = dict(os.environ), None
        os.environ.update(variables)
        try:
            main([*words[1:], *(["--dry-run"] if only_read else [])])
        except SystemExit as end:
            code = end.code
        finally:
            os.environ.clear()
            os.environ.update(before)
        assert not code, command
    else:
        assert words[0] in NOT_RUN, f"no test runs this command: {command}"
