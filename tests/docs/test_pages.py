"""The pages are true: their code runs, their commands, options, extras and links exist, their outputs come out."""

from __future__ import annotations

import importlib.util
import itertools
import re
from importlib.metadata import metadata
from pathlib import Path

import musique_commands
import pytest
from doc_blocks import EXTRAS, OWN_TESTS, PAGES, ROOT, blocks, run_block

import rlvr
from rlvr.cli import main

ALL_PAGES = [*PAGES, *sorted(ROOT.glob("[A-Z]*.md")), *(ROOT / "docs" / name for name in sorted(OWN_TESTS))]
NUMBER = re.compile(r"\d+(\.\d+)?")
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)")


def with_unsloth(page):
    return any("unsloth" in block.info for block in blocks(page))


def run_blocks(page, model_folder, *, unsloth):
    """A text block right after a Python block is what that prints, but in the README, whose run is not cut short."""
    namespace = {}
    for block, following in itertools.pairwise([*blocks(page), None]):
        if ("unsloth" in block.info) != unsloth:
            continue
        printed = run_block(block, namespace, model_folder)
        is_output = following is not None and following.language == "text"
        if block.language == "python" and is_output and page.stem != "README":
            assert printed == following.text


@pytest.mark.both
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(page, workplace, short_runs, model_folder):
    run_blocks(page, model_folder, unsloth=False)


@pytest.mark.unsloth
@pytest.mark.parametrize("page", [page for page in PAGES if with_unsloth(page)], ids=lambda page: page.stem)
def test_the_code_for_unsloth_runs(page, workplace, short_runs, model_folder):
    run_blocks(page, model_folder, unsloth=True)


def test_the_example_of_the_readme_prints_what_it_says(workplace):
    """In full: the only page whose numbers are a claim about learning."""
    pairs = itertools.pairwise(blocks(ROOT / "README.md"))
    example, output = next(pair for pair in pairs if pair[0].language == "python")
    assert len([line for line in example.text.splitlines() if line.strip()]) == 12
    printed = run_block(example, {}, workplace).splitlines()[-1]
    assert NUMBER.sub("#", printed) == NUMBER.sub("#", output.text.strip())
    before, after = (float(number) for number in printed.split("→"))
    assert 0.2 <= before <= 0.6
    assert after >= before + 0.3


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_option_exists(page, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # no option is broken over two lines
    known = set()
    environments = [["train", row.name] for row in rlvr.list_environments()]
    commands = ("train", "evaluate", "preflight", "compare", "backends check", "export", "lineage")
    for command in (*map(str.split, commands), *environments):
        with pytest.raises(SystemExit):
            main([*command, "--help"])
        known |= set(re.findall(r"--[a-z][a-z0-9-]*", capsys.readouterr().out))
    for command in (["--help"], ["predict", "--help"]):
        with pytest.raises(SystemExit):
            musique_commands.main("hf", command)
        known |= set(re.findall(r"--[a-z][a-z0-9-]*", capsys.readouterr().out))
    for script in re.findall(r"python (benchmarks/\w+\.py)", page.read_text()):
        known |= set(re.findall(r'"(--[a-z-]+)"', (ROOT / script).read_text()))
    other_programs = {
        *("--no-deps", "--constraint", "--no-build-isolation"),
        *("--generation-config", "--enable-auto-tool-choice", "--tool-call-parser"),
    }
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", page.read_text())) - known - other_programs == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_tables_of_options_are_those_of_the_program(page):
    specification = importlib.util.spec_from_file_location("doc_options", ROOT / "docs" / "options.py")
    options = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(options)
    text = page.read_text(encoding="utf-8")
    assert options.with_tables(text) == text, "run: python docs/options.py"


def test_every_extra_that_is_named_exists():
    sources = [*ALL_PAGES, *(ROOT / "src").rglob("*.py")]
    named = {
        extra
        for source in sources
        for group in EXTRAS.findall(source.read_text(encoding="utf-8"))
        for extra in group.split(",")
    }
    assert {"unsloth", "vllm", "quantization"} <= named
    assert named <= set(metadata("rlvr").get_all("Provides-Extra"))


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for path, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), path
        if anchor:
            assert anchor in _anchors(target), f"{path}#{anchor}"


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
