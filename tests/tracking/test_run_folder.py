import json
import math
from pathlib import Path

import pytest
import yaml

from rlvr.errors import RunFolderError
from rlvr.tracking.run_folder import RunFolder, find_checkpoint, versions
from rlvr.tracking.trajectories import TrajectoryRecord


def begun(path, **config):
    folder = RunFolder.reserve(path)
    folder.begin({"env": "sums", **config}, seeds={"run": 3}, policy={"lora": None})
    return folder


def with_checkpoint(folder, step):
    checkpoint = folder.checkpoints / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text("{}")
    return checkpoint


def test_a_run_leaves_its_settings_versions_and_rows(tmp_path):
    folder = begun(tmp_path / "deep" / "run", seed=3)
    folder.add_metrics({"step": 1, "reward": 0.5})
    folder.add_metrics({"step": 2, "reward": math.nan})
    record = TrajectoryRecord(
        step=1,
        phase="train",
        group=0,
        prompt=[{"role": "user", "content": "1+1"}],
        completion=[{"role": "assistant", "content": "2"}],
        rewards={"right": 1.0, "tool": None},
        reward=1.0,
        advantage=0.5,
        stop_reason="end_of_turn",
    )
    folder.add_trajectories([record, record])
    folder.add_trajectories([record])
    folder.write_summary({"steps": 2})

    assert folder.config() == {"env": "sums", "seed": 3, "env_options": {}}
    assert list(folder.metrics()) == [{"step": 1, "reward": 0.5}, {"step": 2, "reward": None}]
    rows = list(folder.trajectories())
    assert len(rows) == 3
    assert rows[0]["completion"] == [{"role": "assistant", "content": "2"}]
    assert rows[0]["rewards"] == {"right": 1.0, "tool": None}
    assert folder.summary() == {"steps": 2}
    versions = json.loads((folder.path / "versions.json").read_text())
    assert versions["seeds"] == {"run": 3}
    assert {"rlvr", "torch", "trl"} <= versions["packages"].keys()


def test_versions_have_the_distributions_of_backend_and_environment(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "rlvr.tracking.run_folder.announced_by", lambda backend, environment: {f"{backend}-of": environment}
    )
    assert versions({"backend": "mine", "env": "sums"})["packages"]["mine-of"] == "sums"


def test_a_folder_that_holds_anything_is_refused_and_left_alone(tmp_path):
    begun(tmp_path / "run")
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    with pytest.raises(RunFolderError, match="holds another run, and nothing is written over"):
        RunFolder.reserve(tmp_path / "run")
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(RunFolderError, match=r"holds other files \(thesis.tex\)"):
        RunFolder.reserve(tmp_path / "mine")


def test_an_empty_folder_is_taken_and_given_back_when_unused(tmp_path):
    (tmp_path / "run").mkdir()
    folder = RunFolder.reserve(tmp_path / "run")
    folder.release_if_unused()
    assert not (tmp_path / "run").exists()
    used = begun(tmp_path / "used")
    used.release_if_unused()
    assert used.path.exists()


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="cannot be written to"):
        RunFolder.reserve(tmp_path / "file" / "run")


def test_a_resumed_run_keeps_its_first_files_and_adds_numbered_ones(tmp_path):
    folder = begun(tmp_path / "run", seed=1)
    for expected in ("config.resumed-1.yaml", "config.resumed-2.yaml"):
        again = RunFolder.reserve(folder.path, resume_from=with_checkpoint(folder, int(expected[15]) * 5))
        again.begin({"env": "sums", "seed": 1, "max_steps": 9}, seeds={"run": 1}, policy={})
        assert yaml.safe_load((folder.path / expected).read_text())["max_steps"] == 9
    assert folder.config()["max_steps"] == 9
    assert "max_steps" not in yaml.safe_load((folder.path / "config.yaml").read_text())


def test_the_newest_checkpoint_is_found_by_its_number(tmp_path):
    folder = begun(tmp_path / "run")
    for step in (9, 10, 2):
        with_checkpoint(folder, step)
    (folder.checkpoints / "checkpoint-99").mkdir()  # cut off while it was being written
    assert find_checkpoint("last", folder.path) == (folder.path, folder.checkpoints / "checkpoint-10")
    named = str(folder.checkpoints / "checkpoint-2")
    assert find_checkpoint(named, None) == (folder.path, Path(named))


@pytest.mark.parametrize(
    ("asked", "output_dir", "says"),
    [
        ("last", None, "needs --output-dir or --run-name"),
        ("last", "empty", "there is nothing to resume from"),
        ("nowhere/checkpoint-5", None, "there is no checkpoint in 'nowhere/checkpoint-5'"),
        ("run/checkpoints/checkpoint-5", "other", "belongs to the run in"),
        ("loose/x/checkpoint-5", None, "is in no run folder"),
    ],
)
def test_resuming_from_nothing_is_refused(tmp_path, monkeypatch, asked, output_dir, says):
    monkeypatch.chdir(tmp_path)
    with_checkpoint(begun("run"), 5)
    (tmp_path / "loose" / "x" / "checkpoint-5").mkdir(parents=True)
    (tmp_path / "loose" / "x" / "checkpoint-5" / "trainer_state.json").write_text("{}")
    with pytest.raises(RunFolderError, match=says):
        find_checkpoint(asked, output_dir)


@pytest.mark.parametrize("half", ['{"step": 3, "no', "é" * 50_000, '{"step": 3}'])
@pytest.mark.parametrize("steps", [(), (1, 2)])
def test_half_a_row_of_a_killed_run_is_not_read_and_not_joined(tmp_path, steps, half):
    folder = begun(tmp_path / "run")
    path = folder.path / "metrics.jsonl"
    rows = [{"step": step} for step in steps]
    path.write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in rows) + half.encode()[:-1])
    assert list(folder.metrics()) == rows
    again = RunFolder.reserve(folder.path, resume_from=with_checkpoint(folder, 2))
    again.begin({"env": "sums"}, seeds={"run": 3}, policy={})
    again.add_metrics({"step": 9})
    assert path.read_text().splitlines() == [json.dumps(row) for row in [*rows, {"step": 9}]]
    assert list(again.metrics()) == [*rows, {"step": 9}]


def test_a_row_that_is_broken_elsewhere_is_named(tmp_path):
    folder = begun(tmp_path / "run")
    (folder.path / "trajectories.jsonl").write_text('{"step": 1}\n{"step": 2, "no{"step": 3}\n{"step": 4}\n')
    rows = folder.trajectories()
    assert next(rows) == {"step": 1}
    with pytest.raises(RunFolderError, match=r"line 2 of '.*trajectories.jsonl' is no JSON"):
        next(rows)


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    folder = begun(tmp_path / "run")
    folder.add_metrics({"step": 1})
    assert not folder.path.exists()
