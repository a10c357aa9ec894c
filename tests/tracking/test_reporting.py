import os

import pytest
import wandb

from rlvr.errors import ConfigError
from rlvr.tracking.reporting import chosen_trackers, reporting, wandb_key_is_known


@pytest.fixture(autouse=True)
def logged_out(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_DIR", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    yield
    wandb.teardown()  # it keeps what the environment said when it was first used


def log_in(tmp_path, host="api.wandb.ai"):
    (tmp_path / "netrc").write_text(f"machine {host}\n  login user\n  password {'0' * 40}\n")


def test_a_login_is_found_in_the_environment_and_in_netrc(monkeypatch, tmp_path):
    assert not wandb_key_is_known()
    log_in(tmp_path, "other.example")
    assert not wandb_key_is_known()
    log_in(tmp_path)
    assert wandb_key_is_known()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example")
    assert not wandb_key_is_known()
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert wandb_key_is_known()


def test_auto_reports_to_wandb_only_for_users_of_it(monkeypatch, tmp_path):
    assert chosen_trackers("auto") == []
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert chosen_trackers("auto") == ["wandb"]
    monkeypatch.delenv("WANDB_MODE")
    log_in(tmp_path)
    assert chosen_trackers("auto") == ["wandb"]
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert chosen_trackers("auto") == []
    assert chosen_trackers("none") == []


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr("rlvr.tracking.reporting.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install mlflow"):
        chosen_trackers("mlflow")


def test_wandb_without_a_key_stays_offline_in_the_run_folder(tmp_path):
    before = dict(os.environ)
    with reporting("wandb", folder=tmp_path, run_name="mine") as trackers:
        assert trackers == ["wandb"]
        assert wandb.run.settings.mode == "offline"
        assert wandb.run.name == "mine"
    assert wandb.run is None
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 1
    assert {name for name in os.environ if name not in before} <= {"WANDB_SERVICE"}


def test_a_run_that_is_open_is_used_and_left_open(tmp_path):
    mine = wandb.init(mode="offline", dir=str(tmp_path))
    try:
        with reporting("wandb", folder=tmp_path / "other"):
            assert wandb.run is mine
        assert wandb.run is mine
    finally:
        mine.finish()


def test_other_processes_open_no_run(monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "1")
    with reporting("wandb", folder=tmp_path) as trackers:
        assert trackers == ["wandb"]
        assert wandb.run is None
