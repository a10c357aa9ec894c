"""Whole comparisons of tiny runs."""

import importlib.util
import json

import pytest
from other_backends import NEGATING_BACKEND

from rlvr.cli import main

has_unsloth = importlib.util.find_spec("unsloth") is not None

SHORT = (
    *("--max-tokens", "6", "--max-prompt-length", "64", "--num-generations", "4", "--prompts-per-step", "2"),
    *("--learning-rate", "0.01"),
)
DENSE_REWARD = """
import zlib

def reward(trajectory):
    return zlib.crc32(trajectory.text.encode()) % 8 / 7
"""


@pytest.fixture
def comparison_of(capsys, tmp_path, monkeypatch):
    """Compares in an environment whose rewards differ, whatever a tiny model says."""
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"question": "say {n}", "answer": "x"}}\n' for n in range(20)))
    (tmp_path / "dense_reward.py").write_text(DENSE_REWARD)
    monkeypatch.syspath_prepend(tmp_path)
    data = ("--datasets", str(tmp_path / "rows.jsonl"), "--reward", "dense_reward:reward")

    def run(folder, *arguments):
        with pytest.raises(SystemExit) as stop:
            main(["compare", "dataset", *data, "--output-dir", str(folder), "--json", *arguments, *SHORT])
        assert not stop.value.code
        found = json.loads(capsys.readouterr().out)
        assert found == json.loads((folder / "comparison.json").read_text())
        return found

    return run


def test_alpha_is_equalised_and_the_same_backend_twice_is_the_same_training(
    tmp_path, comparison_of, model_folder, other_backend
):
    arguments = ("--backends", "hf,other", "-m", str(model_folder), "--steps", "2")
    found = comparison_of(tmp_path / "equalised", *arguments)["backends"]
    assert [run["lora"]["alpha"] for run in found.values()] == [16, 16]
    assert found["other"]["start_differs_by_nats"] == 0
    assert found["other"]["same_first_completions"] == len(found["hf"]["first_completions"]) == 8
    assert found["other"]["first_loss_differs_by"] == 0
    assert found["other"]["gradient_differs_by"] == found["other"]["first_update_differs_by"] == 0
    assert found["other"]["rewards"] == found["hf"]["rewards"]
    assert found["hf"]["first_grad_norm"] > 0
    for run in found.values():
        assert len(run["step_seconds"]) == len(run["rewards"]) == 2
        assert all(seconds > 0 for seconds in run["rollout_seconds"] + run["scoring_seconds"] + run["update_seconds"])
        assert len(run["tokens"]) == 2
        assert all(tokens > 0 for tokens in run["tokens"])
        assert run["peak_bytes"] > 2**20
        assert run["gradient_checkpointing"] is True
    assert (tmp_path / "equalised" / "hf" / "metrics.jsonl").exists()
    assert (tmp_path / "equalised" / "comparison.png").exists()


def test_a_backend_that_climbs_down_is_told_from_one_that_is_right(
    tmp_path, comparison_of, model_folder, other_backend, install_backend
):
    install_backend("negating", NEGATING_BACKEND)
    arguments = ("--backends", "hf,other,negating", "-m", str(model_folder), "--steps", "1")
    found = comparison_of(tmp_path / "out", *arguments)["backends"]
    right, wrong = found["other"], found["negating"]
    for run in (right, wrong):  # none of these tells the two apart
        assert run["start_differs_by_nats"] == run["first_loss_differs_by"] == 0
        assert run["same_first_completions"] == 8
        assert run["first_grad_norm"] == found["hf"]["first_grad_norm"] > 0
    assert (right["gradient_differs_by"], right["first_update_differs_by"]) == (0, 0)
    assert wrong["gradient_differs_by"] == pytest.approx(2)
    assert wrong["first_update_differs_by"] == pytest.approx(2, abs=0.01)


def test_steps_may_use_rollouts_again(tmp_path, comparison_of, model_folder, other_backend):
    arguments = ("--backends", "hf,other", "-m", str(model_folder), "--steps", "3", "--num-iterations", "2")
    for run in comparison_of(tmp_path / "again", *arguments)["backends"].values():
        assert [reward is None for reward in run["rewards"]] == [False, True, False]
        assert [tokens > 0 for tokens in run["tokens"]] == [True, False, True]
        assert [seconds > 0 for seconds in run["rollout_seconds"]] == [True, False, True]
        assert len(run["step_seconds"]) == 3


def test_as_is_leaves_each_backend_its_own_defaults(tmp_path, comparison_of, model_folder, other_backend):
    arguments = ("--backends", "other,hf", "-m", str(model_folder), "--steps", "1", "--as-is")
    found = comparison_of(tmp_path / "as_is", *arguments)
    assert found["as_is"] is True
    assert [run["lora"]["alpha"] for run in found["backends"].values()] == [32, 16]
    for run in found["backends"].values():  # as a run of its own: the activations of a tiny model fit memory
        assert (run["gradient_checkpointing"], run["rollout_engine"]) == (False, "grouped")


@pytest.mark.unsloth
@pytest.mark.skipif(not has_unsloth, reason="the unsloth package is not installed in this environment")
def test_hf_and_unsloth_are_the_same_training(tmp_path, comparison_of, model_folder):
    arguments = ("--backends", "hf,unsloth", "-m", str(model_folder), "--steps", "2")
    found = comparison_of(tmp_path / "out", *arguments)["backends"]
    assert [run["lora"]["alpha"] for run in found.values()] == [16, 16]
    assert [run["gradient_checkpointing"] for run in found.values()] == [True, True]
    assert found["unsloth"]["start_differs_by_nats"] < 1e-4
    assert found["unsloth"]["first_loss_differs_by"] < 1e-4
    assert found["unsloth"]["gradient_differs_by"] < 1e-3
    assert found["unsloth"]["first_update_differs_by"] < 0.05  # Adam's first step has the size of the learning rate
    assert found["hf"]["first_grad_norm"] > 0
    assert found["unsloth"]["same_first_completions"] == 8
