"""`docs/compatibility.md` says what is pinned and declared."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")


def pinned(name, package):
    found = re.search(rf"^{package}==(\S+)", (ROOT / "constraints" / name).read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else "none"


@pytest.mark.parametrize("package", ["torch", "transformers", "trl", "peft", "accelerate", "datasets", "unsloth"])
def test_the_versions_are_those_that_are_pinned(package):
    assert f"\n| {package} | {pinned('latest.txt', package)} | {pinned('unsloth.txt', package)} |\n" in PAGE


def test_the_ranges_are_those_that_are_declared():
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for requirement, words in {
        '"torch>=2.8"': "torch from 2.8",
        '"transformers>=5.17,<6"': "transformers from 5.17 below 6",
        '"trl>=1.15,<1.17"': "trl 1.15 and 1.16",
        '"peft>=0.21,<0.23"': "peft 0.21 and 0.22",
        '"datasets>=4.4,<6"': "datasets from 4.4 below 6",
        'requires-python = ">=3.10"': "Python from 3.10",
    }.items():
        assert requirement in declared
        assert words in " ".join(PAGE.split())
