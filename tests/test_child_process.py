"""What a child process is given, and the error that it leaves behind."""

import stat

import pytest

from rlvr.child_process import as_text, environment, keep_error, kept_error, read_task, task_folder
from rlvr.errors import ConfigError, RunFolderError
from rlvr.testing.conformance.runner import _Job


def test_a_task_is_read_by_its_owner_only_and_gone_afterwards():
    with task_folder(as_text({"key": "hush"})) as folder:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert read_task(folder) == {"key": "hush"}
        assert kept_error(folder) is None
    assert not folder.exists()


def test_a_precision_that_a_trainer_of_this_process_exported_stays_here(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("SOMETHING_ELSE", "goes along")
    of_a_check = _Job("hf", model=None, device=None, scratch=tmp_path, timeout_s=1)._environment("policy", tmp_path)
    for variables in (environment(), of_a_check):
        assert "ACCELERATE_MIXED_PRECISION" not in variables
        assert variables["SOMETHING_ELSE"] == "goes along"


def test_what_cannot_be_sent_is_refused():
    with pytest.raises(ConfigError, match="Object of type set is not JSON serializable"):
        as_text({"levels": {1, 2}})


def test_a_list_of_problems_travels_too(tmp_path):
    keep_error(tmp_path, ConfigError(["one.", "two."]))
    error = kept_error(tmp_path)
    assert type(error) is ConfigError
    assert error.problems == ("one.", "two.")


def test_a_strangers_error_travels_as_the_nearest_of_ours(tmp_path):
    class TheirError(RunFolderError):
        pass

    keep_error(tmp_path, TheirError("full"))
    error = kept_error(tmp_path)
    assert type(error) is RunFolderError
    assert str(error) == "full"
