"""`rlvr.train(..., isolate=True)`: the run of this process, made in another."""

import signal
import subprocess
from importlib.util import find_spec

import pytest
import trl

import rlvr
from rlvr.errors import ConfigError, PatchedProcessError, RunFolderError, TrainingProcessError
from rlvr.trainers import isolated

SMALL = {
    "backend": "unsloth" if find_spec("unsloth") else "hf",
    "env_options": {"train_size": 16, "eval_size": 4},
    "max_prompt_length": 256,
    "max_tokens": 4,
    "num_generations": 2,
    "prompts_per_step": 2,
    "max_steps": 2,
    "eval_samples": 2,
    "learning_rate": 1e-2,
    "report_to": "none",
}
KILLER = "import os, signal\n\n\ndef reward(trajectory):\n    os.kill(os.getpid(), signal.SIGKILL)\n"


class UnslothGRPOTrainer:
    """As Unsloth leaves a process on a GPU: its own class where TRL's was."""


@pytest.fixture
def patched(monkeypatch):
    """A process that another backend has patched, with what Unsloth's trainer exports."""
    with monkeypatch.context() as patch:
        patch.setattr(trl, "GRPOTrainer", UnslothGRPOTrainer)
        patch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
        yield


def tensors(folder):
    from safetensors.torch import load_file

    return load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.mark.usefixtures("patched")
def test_a_patched_process_is_refused_with_two_ways_out(model_folder, tmp_path):
    with pytest.raises(PatchedProcessError, match=r"UnslothGRPOTrainer in its place.*Restart.*isolate=True") as error:
        rlvr.train("arithmetic", model_folder, **SMALL, output_dir=tmp_path / "run")
    assert "backend='hf'" in str(error.value)


@pytest.mark.both
def test_the_run_is_the_one_of_an_unpatched_process(model_folder, tmp_path, request, capfd):
    here = rlvr.train("arithmetic", model_folder, **SMALL, output_dir=tmp_path / "here")
    request.getfixturevalue("patched")
    capfd.readouterr()
    there = rlvr.train("arithmetic", model_folder, **SMALL, output_dir=tmp_path / "there", isolate=True)
    assert "step 2/2" in capfd.readouterr().err  # its progress was passed on
    assert there.policy is None
    assert there.folder == tmp_path / "there"
    assert there.summary["steps"] == 2
    assert there.summary["eval_after"] == here.summary["eval_after"]
    assert [row["completion"] for row in there.trajectories()] == [row["completion"] for row in here.trajectories()]
    ours, theirs = tensors(here.folder), tensors(there.folder)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)


def test_what_stops_it_is_raised_here_as_the_same_error(model_folder, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    with pytest.raises(RunFolderError, match=r"holds other files \(notes.txt\)"):
        rlvr.train("arithmetic", model_folder, **SMALL, output_dir=tmp_path / "taken", isolate=True)


def test_a_process_that_is_killed_is_an_error_with_its_last_lines(model_folder, tmp_path, monkeypatch):
    (tmp_path / "killing_reward.py").write_text(KILLER)
    monkeypatch.syspath_prepend(str(tmp_path))  # a module beside a script, say
    (tmp_path / "rows.jsonl").write_text('{"question": "1+1", "answer": "2"}\n' * 8)
    options = {"datasets": str(tmp_path / "rows.jsonl"), "reward": "killing_reward:reward"}
    settings = {**SMALL, "env_options": options, "eval_samples": 0}
    with pytest.raises(TrainingProcessError, match="was killed by signal 9"):
        rlvr.train("dataset", model_folder, **settings, output_dir=tmp_path / "run", isolate=True)


def test_what_cannot_be_sent_is_refused_all_at_once(model_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError) as refused:
        rlvr.train(
            rlvr.load_environment("arithmetic"),
            model_folder,
            rlvr.load_backend("hf"),
            callbacks=[object()],
            env_options={"levels": {1, 2}},
            output_dir=tmp_path / "run",
            isolate=True,
        )
    text = " ".join(refused.value.problems)
    for part in ("cannot get env", "cannot get backend", "cannot get callbacks", "torchrun", "set is not JSON"):
        assert part in text
    assert not (tmp_path / "run").exists()


def test_an_interrupted_cell_leaves_no_process_behind(model_folder, tmp_path, monkeypatch):
    children = []

    class Recorded(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            children.append(self)

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(isolated.subprocess, "Popen", Recorded)
    monkeypatch.setattr(isolated, "print", interrupt, raising=False)
    with pytest.raises(KeyboardInterrupt):
        rlvr.train("arithmetic", model_folder, **SMALL, output_dir=tmp_path / "run", isolate=True)
    assert [child.returncode for child in children] == [-signal.SIGTERM]
