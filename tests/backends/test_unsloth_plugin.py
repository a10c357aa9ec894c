"""The light side of the backend `unsloth`, with or without the package: availability, cache, variables."""

import sys

import pytest

from rlvr import list_backends, load_backend
from rlvr.errors import BackendUnavailableError
from rlvr.plugins import manager
from rlvr_unsloth import plugin, process


@pytest.fixture
def without_unsloth(monkeypatch):
    monkeypatch.setattr(plugin, "find_spec", lambda name: None if name == "unsloth" else object())
    manager._load_backend_named.cache_clear()


@pytest.mark.usefixtures("without_unsloth")
def test_without_the_package_it_is_listed_and_refused_with_the_install_line():
    (status,) = [status for status in list_backends() if status.name == "unsloth"]
    assert not status.available
    assert status.reason == 'unsloth not installed. Install with: pip install "rlvr[unsloth]"'
    with pytest.raises(BackendUnavailableError, match=r'cannot be used here: .*pip install "rlvr\[unsloth\]"'):
        load_backend("unsloth")


def test_the_cache_folder_follows_the_variable_then_the_platform(monkeypatch, tmp_path):
    monkeypatch.setenv("RLVR_CACHE", str(tmp_path / "mine"))
    assert process.cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("RLVR_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert process.cache_folder() == tmp_path / "rlvr"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert process.cache_folder() == tmp_path / ".cache" / "rlvr"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert process.cache_folder() == tmp_path / "Library" / "Caches" / "rlvr"


def test_what_the_user_has_set_stays(monkeypatch, tmp_path):
    monkeypatch.setenv("UNSLOTH_COMPILE_LOCATION", str(tmp_path / "own"))
    monkeypatch.setenv("UNSLOTH_AUTO_INSTALL", "1")
    monkeypatch.setenv("UNSLOTH_DISABLE_STATISTICS", "")  # so that it is restored afterwards
    monkeypatch.delenv("UNSLOTH_DISABLE_STATISTICS")
    process.set_environment()
    assert process.os.environ["UNSLOTH_COMPILE_LOCATION"] == str(tmp_path / "own")
    assert process.os.environ["UNSLOTH_AUTO_INSTALL"] == "1"
    assert process.os.environ["UNSLOTH_DISABLE_STATISTICS"] == "1"
    assert not (tmp_path / "own").exists()


@pytest.mark.parametrize(
    ("modules", "early"),
    [
        (["os", "unsloth.import_fixes", "transformers", "trl", "peft", "unsloth"], []),
        (["os", "transformers", "unsloth.import_fixes", "trl", "peft", "unsloth"], ["transformers"]),
        (["rlvr_unsloth.plugin", "peft", "transformers"], ["transformers", "peft"]),
        (["os"], []),
    ],
    ids=["first", "late", "not there", "nothing"],
)
def test_what_came_before_unsloth_is_told_from_the_order_of_imports(modules, early):
    assert process.imported_before_unsloth(modules) == early
