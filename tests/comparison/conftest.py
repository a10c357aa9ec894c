"""Backends that are installed for a test."""

import sys

import pytest
from other_backends import OTHER_BACKEND


@pytest.fixture
def install_backend(tmp_path, monkeypatch):
    site = tmp_path / "site"

    def install(name, code):
        info = site / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (site / f"{name}_plugin.py").write_text(code)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[rlvr.backends]\n{name} = {name}_plugin\n")
        monkeypatch.syspath_prepend(site)

    yield install
    for name in ("other_plugin", "negating_plugin"):
        sys.modules.pop(name, None)


@pytest.fixture
def other_backend(install_backend):
    """An installed backend that doubles alpha by default, as Unsloth's does, and is `hf` otherwise."""
    install_backend("other", OTHER_BACKEND)
