"""The base model that a run was trained on: what is exported, and what goes on, belongs to that one alone."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from short_runs import SMALL, environment
from transformers import AutoModelForCausalLM

import rlvr
from rlvr.errors import ModelError
from rlvr.testing.tiny import save_tiny
from rlvr.tracking.run_folder import RunFolder

pytestmark = pytest.mark.both

COMMITS = ("a" * 40, "b" * 40)
IDS = torch.arange(3, 43).reshape(1, 40)


@torch.no_grad()
def logits(model):
    return model.eval()(IDS).logits.float()


def train(model, folder, backend="hf", **settings):
    return rlvr.train(environment(), model, backend, **SMALL, max_steps=2, output_dir=folder, **settings).folder


@pytest.fixture
def run_on_a_folder(tmp_path):
    """A run and its base model, both to be written to."""
    base = save_tiny(tmp_path / "base", initializer_range=0.2)
    return train(base, tmp_path / "run"), base


@pytest.fixture
def branch(tmp_path, monkeypatch):
    """`me/tiny` as the Hub's cache has it: `branch(n)` moves main to the n-th of two commits."""
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    for seed, commit in enumerate(COMMITS):
        save_tiny(cache / "models--me--tiny" / "snapshots" / commit, seed=seed, initializer_range=0.2)
    (cache / "models--me--tiny" / "refs").mkdir()

    def move(number):
        (cache / "models--me--tiny" / "refs" / "main").write_text(COMMITS[number])

    move(0)
    return move


def test_an_export_on_a_base_that_was_changed_is_refused(run_on_a_folder):
    run, base = run_on_a_folder
    assert rlvr.export(run).parity.error == 0
    save_tiny(base, seed=9, initializer_range=0.2)
    with pytest.raises(
        ModelError, match=r"no longer the one .*changed or missing: model\.safetensors\. .*Bring those"
    ):
        rlvr.export(run, "merged-16bit")
    shutil.rmtree(base)
    with pytest.raises(ModelError, match="it is gone"):
        rlvr.export(run, "merged-16bit")


def test_a_run_does_not_go_on_on_a_base_that_was_changed(run_on_a_folder):
    run, base = run_on_a_folder
    save_tiny(base, seed=9, initializer_range=0.2)
    with pytest.raises(ModelError, match=r"changed or missing: model\.safetensors"):
        rlvr.train(environment(), resume_from_checkpoint="last", output_dir=run, max_steps=4)
    assert RunFolder(run).parts() == 1


def test_a_base_of_the_hub_is_exported_at_the_commit_that_was_trained_on(branch, tmp_path):
    run = train("me/tiny", tmp_path / "run")
    before = RunFolder(run).summary()["adapter"]
    branch(1)
    made = rlvr.export(run)
    assert made.adapter == before
    assert made.parity.error == 0
    truth = AutoModelForCausalLM.from_pretrained("me/tiny", revision=COMMITS[0])
    policy = logits(PeftModel.from_pretrained(truth, run / "adapter"))
    merged = rlvr.export(run, "merged-16bit").folder
    assert (logits(AutoModelForCausalLM.from_pretrained(merged)) - policy).abs().max() < 0.1 * policy.abs().max()


def test_a_run_on_a_branch_that_has_moved_goes_on_at_its_commit_alone(branch, tmp_path):
    run = train("me/tiny", tmp_path / "run")
    branch(1)
    resumed = {"resume_from_checkpoint": "last", "output_dir": run, "max_steps": 3}
    with pytest.raises(ModelError, match=rf"trained on commit {COMMITS[0]}, .*is {COMMITS[1]} now.*--revision"):
        rlvr.train(environment(), **resumed)
    assert RunFolder(run).parts() == 1
    rlvr.train(environment(), **resumed, revision=COMMITS[0])
    assert RunFolder(run).origin(2)["base"]["commit"] == COMMITS[0]


@pytest.mark.parametrize("backend", ["hf", pytest.param("unsloth", marks=pytest.mark.unsloth)])
def test_an_adapter_names_the_commit_of_its_base_and_so_does_the_code_of_its_card(branch, tmp_path, backend):
    branch(1)
    run = train("me/tiny", tmp_path / "run", backend, revision=COMMITS[0])
    export = rlvr.export(run).folder
    for folder in (run / "adapter", export):
        assert json.loads((folder / "adapter_config.json").read_text())["revision"] == COMMITS[0]
    code = (export / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert f'from_pretrained("me/tiny", revision="{COMMITS[0]}")' in code
    found = {}
    exec(code.replace("PATH_OR_REPOSITORY", str(export)), found)
    truth = AutoModelForCausalLM.from_pretrained("me/tiny", revision=COMMITS[0])
    torch.testing.assert_close(logits(found["model"]), logits(PeftModel.from_pretrained(truth, run / "adapter")))
