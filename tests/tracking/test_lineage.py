"""The chain of a run's weights: hashes of real runs, resumed ones too, and files that were changed afterwards."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file
from short_runs import SMALL, environment

import rlvr
from rlvr.backends.protocol import Capabilities
from rlvr.config import TrainSettings
from rlvr.errors import RunFolderError
from rlvr.testing.tiny import save_tiny
from rlvr.tracking.adapter_hash import hash_of
from rlvr.tracking.lineage import base_difference, base_record, changed_files, file_hashes
from rlvr.tracking.run_folder import RunFolder
from rlvr.trainers.players import load_for_inference

BACKENDS = [pytest.param("hf", marks=pytest.mark.both), pytest.param("unsloth", marks=pytest.mark.unsloth)]


@pytest.fixture(scope="module")
def resumed_runs(tmp_path_factory):
    """`resumed_runs(backend)` → the folder of a run of two steps that went on to four. Not to be written to."""
    made = {}

    def run(backend):
        if backend not in made:
            model = save_tiny(tmp_path_factory.mktemp("models") / "tiny", initializer_range=0.2)
            made[backend] = folder = tmp_path_factory.mktemp("runs") / "run"
            settings = {**SMALL, "lr_scheduler_type": "constant"}
            rlvr.train(environment(), model, backend, **settings, max_steps=2, output_dir=folder)
            rlvr.train(environment(), resume_from_checkpoint="last", output_dir=folder, max_steps=4)
        return made[backend]

    return run


@pytest.fixture
def run(resumed_runs, tmp_path):
    return shutil.copytree(resumed_runs("hf"), tmp_path / "run")


def by_name(run):
    return {link.name: link for link in rlvr.lineage(run).links}


def adapter_of(folder):
    return hash_of(load_file(folder / "adapter_model.safetensors"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_trajectory_and_checkpoint_carries_the_hash_of_its_weights(resumed_runs, backend):
    run = resumed_runs(backend)
    folder = RunFolder(run)
    saved = {step: adapter_of(path) for step, path in folder.saved_checkpoints().items()}
    assert len({*saved.values()}) == 4
    start = folder.origin(1)["adapter"]
    made_by = {0: start, **saved}
    for row in folder.trajectories():  # steps 2 and 3 were sampled in the part that was resumed
        assert row["adapter"] == made_by[row["step"]], row["step"]
    assert folder.summary()["adapter"] == saved[4] == adapter_of(run / "adapter")
    assert folder.origin(2)["resumed_from"] == {"checkpoint": "checkpoint-2", "step": 2, "adapter": saved[2]}

    chain = rlvr.lineage(run)
    assert chain.ok
    assert chain.unattributed == 0
    assert [(link.kind, link.name, link.step) for link in chain.links] == [
        ("base", folder.config()["model"], None),
        ("start", "start", 0),
        *(("checkpoint", f"checkpoint-{step}", step) for step in (1, 2)),
        ("resumed", "resumed from checkpoint-2", 2),
        *(("checkpoint", f"checkpoint-{step}", step) for step in (3, 4)),
        ("trained", "adapter", 4),
    ]
    assert [link.adapter for link in chain.links] == [
        *(None, start, saved[1], saved[2], saved[2], saved[3], saved[4], saved[4])
    ]
    rewards = [row["reward"] for row in folder.trajectories() if row["step"] == 1 and row["phase"] == "train"]
    one = chain.links[2]
    assert (one.trajectories, one.evaluations) == (len(rewards), 0) == (8, 0)
    assert one.mean_reward == pytest.approx(sum(rewards) / 8)
    assert chain.links[-1].trajectories == 0
    assert chain.links[-1].evaluations == 2
    assert chain.links[-1].mean_evaluation_reward == pytest.approx(folder.summary()["eval_after"]["reward"])


@pytest.mark.both
def test_a_tampered_adapter_is_found(run):
    path = run / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] += 1e-6
    save_file(tensors, path, metadata={"format": "pt"})
    chain = rlvr.lineage(run)
    assert not chain.ok
    assert [(link.name, link.changed) for link in chain.links if link.state == "changed"] == [
        ("adapter", ("adapter_model.safetensors",))
    ]


@pytest.mark.both
def test_another_alpha_in_a_checkpoint_is_found(run):
    path = run / "checkpoints" / "checkpoint-3" / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 16', '"lora_alpha": 32'))
    assert by_name(run)["checkpoint-3"].changed == ("adapter_config.json",)


@pytest.mark.both
def test_a_checkpoint_that_was_changed_is_not_resumed_from(run):
    checkpoint = run / "checkpoints" / "checkpoint-4"
    file = checkpoint / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: 2 * value for name, value in tensors.items()}, file)
    with pytest.raises(
        RunFolderError, match=r"no longer the one that the run saved; .*: adapter_model\.safetensors\."
    ):
        rlvr.train(environment(), resume_from_checkpoint=str(checkpoint), output_dir=run, max_steps=5)
    assert not (run / "origin.resumed-2.json").exists()


@pytest.mark.both
def test_an_adapter_that_was_exchanged_together_with_its_record_is_found(run):
    shutil.rmtree(run / "adapter")
    shutil.copytree(run / "checkpoints" / "checkpoint-1", run / "adapter")
    link = by_name(run)["adapter"]
    assert link.state == "changed"
    assert link.changed == ("lineage.json",)
    assert link.adapter == RunFolder(run).summary()["adapter"]


@pytest.mark.both
def test_a_damaged_record_is_a_change_and_a_missing_one_is_said(run):
    (run / "adapter" / "lineage.json").write_text("{")
    (run / "checkpoints" / "checkpoint-1" / "lineage.json").unlink()
    links = by_name(run)
    assert links["adapter"].changed == ("lineage.json",)
    assert links["checkpoint-1"].state == "not recorded"


@pytest.mark.both
def test_an_adapter_beside_a_merged_model_is_a_change(run):
    folder = rlvr.export(run, "merged-16bit").folder
    (folder / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    for name in ("notes.md", "notes.txt", "eval_results.json"):  # nothing that is loaded
        (folder / name).write_text("{}")
    assert rlvr.lineage(run).ok
    shutil.copy(run / "adapter" / "adapter_config.json", folder)
    assert rlvr.lineage(run).links[-1].changed == ("adapter_config.json (added)",)


@pytest.mark.both
@pytest.mark.parametrize("damage", ["{}", '{"adapter": null, "step": 1, "files": null}', "[]", "garbage"])
@pytest.mark.parametrize(
    ("file", "damaged"),
    [
        ("checkpoints/checkpoint-1/lineage.json", ["checkpoint-1"]),
        ("origin.json", ["unknown", "start"]),
        ("summary.json", ["adapter"]),
    ],
)
def test_a_damaged_record_is_named_and_the_others_are_read(run, file, damaged, damage):
    (run / file).write_text(damage)
    chain = rlvr.lineage(run)
    assert not chain.ok
    assert len(chain.links) == 8
    found = {link.name: link.changed for link in chain.links if link.state == "damaged"}
    assert found == dict.fromkeys(damaged, (file.rpartition("/")[2],))
    assert not json.loads(json.dumps(chain.as_json()))["ok"]


@pytest.mark.both
def test_a_part_with_a_damaged_record_of_its_start_is_named(run):
    (run / "origin.resumed-1.json").write_text("garbage")
    assert by_name(run)["resumed"].changed == ("origin.resumed-1.json",)


@pytest.mark.both
def test_a_trained_policy_that_was_deleted_is_gone(run):
    shutil.rmtree(run / "adapter")
    link = rlvr.lineage(run).links[-1]
    assert (link.kind, link.name, link.state, link.step) == ("trained", "adapter", "gone", 4)
    assert link.adapter == RunFolder(run).summary()["adapter"]


@pytest.mark.both
def test_trajectories_of_weights_that_no_link_has_are_counted(run):
    for step in (1, 3):
        shutil.rmtree(run / "checkpoints" / f"checkpoint-{step}")
    rows = [row["step"] for row in RunFolder(run).trajectories()]
    chain = rlvr.lineage(run)
    assert (chain.unlisted, chain.trajectories) == (rows.count(1) + rows.count(3), len(rows)) == (16, 38)
    assert chain.as_json()["unlisted_trajectories"] == 16


@pytest.mark.both
def test_what_was_deleted_is_gone_and_no_fault(run):
    made = rlvr.export(run)
    elsewhere = rlvr.export(run, output=run.parent / "elsewhere")
    assert [link.folder for link in rlvr.lineage(run).links if link.kind == "export"] == [
        *(str(made.folder), str(elsewhere.folder))
    ]
    for folder in (run / "checkpoints" / "checkpoint-1", made.folder, run / "adapter" / "tokenizer.json"):
        shutil.rmtree(folder) if folder.is_dir() else folder.unlink()
    chain = rlvr.lineage(run)
    states = [(link.name, link.state) for link in chain.links if link.state != "ok"]
    assert states == [("adapter", "changed"), ("adapter", "gone")]  # a file that is missing is a change


@pytest.mark.both
def test_a_checkpoint_that_was_made_anew_after_a_run_went_on_from_it_is_told(run):
    path = run / "checkpoints" / "checkpoint-2" / "lineage.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "adapter": "0" * 64}))
    assert by_name(run)["resumed from checkpoint-2"].state == "changed"


@pytest.mark.both
def test_a_base_model_that_was_changed_is_found(tmp_path):
    model = save_tiny(tmp_path / "model")
    record = base_record(str(model), None)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= record["files"].keys()
    assert changed_files(model, record["files"]) == ()
    (model / "README.md").write_text("nothing that a policy is made of")
    assert changed_files(model, record["files"]) == ()
    save_tiny(model, seed=1)
    assert changed_files(model, record["files"]) == ("model.safetensors",)


@pytest.mark.both
def test_a_base_model_of_the_hub_is_known_by_its_commit(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--org--name"
    (folder / "refs").mkdir(parents=True)
    for revision, commit in (("main", "a" * 40), ("v2", "b" * 40)):
        (folder / "refs" / revision).write_text(commit)
        save_tiny(folder / "snapshots" / commit)
        record = {"model": "org/name", "revision": revision, "commit": commit, "files": None}
        assert base_record("org/name", revision) == record
    assert base_record("org/name", None)["commit"] == "a" * 40
    assert base_record("org/other", None)["commit"] is None
    assert base_record("not/a/repository", None)["commit"] is None


@pytest.mark.both
def test_an_adapter_that_is_evaluated_on_another_base_is_told(run, tmp_path, caplog):
    base = rlvr.lineage(run).links[0].name
    copy = shutil.copytree(base, tmp_path / "copy")
    for adapter in (run, run / "adapter", run / "checkpoints" / "checkpoint-2"):
        caplog.clear()
        rlvr.evaluate(environment(), str(copy), adapter=adapter, limit=1, max_tokens=2)
        assert not [record for record in caplog.records if "was not trained on" in record.getMessage()]
        other = save_tiny(tmp_path / "other", initializer_range=0.2, seed=1)
        rlvr.evaluate(environment(), str(other), adapter=adapter, limit=1, max_tokens=2)
        (said,) = (record.getMessage() for record in caplog.records if "was not trained on" in record.getMessage())
        assert f"was not trained on '{other}' as it is here (other files, or missing: model.safetensors)" in said


def test_a_base_that_moved_on_the_hub_while_the_adapter_was_loaded_is_told(run, monkeypatch, caplog):
    """Loading a branch is what fetches where it is now."""
    record = {"model": "org/name", "revision": None, "commit": "a" * 40, "files": None}
    here = {"commit": None}
    monkeypatch.setattr("rlvr.tracking.lineage.recorded_base", lambda run: record)
    monkeypatch.setattr("rlvr.tracking.lineage.cached_commit", lambda model, revision: here["commit"])

    class Backend:
        def capabilities(self):
            return Capabilities()

        def load_saved(self, folder, settings):
            here["commit"] = "b" * 40
            return "policy"

    settings = TrainSettings(model="org/name")
    assert load_for_inference(settings, Backend(), run / "adapter") == "policy"
    assert f"was not trained on 'org/name' as it is here (commit {'b' * 40} instead of {'a' * 40})" in caplog.text


def test_a_damaged_record_of_the_base_keeps_no_adapter_from_being_evaluated(run):
    base = rlvr.lineage(run).links[0].name
    (run / "origin.json").write_text("{}")
    found = rlvr.evaluate(environment(), base, adapter=run, limit=1, max_tokens=2)
    assert len(found.trajectories) == 1


@pytest.mark.parametrize(
    ("model", "revision", "expected"),
    [
        ("org/name", "main", None),
        ("org/name", "v2", f"commit {'b' * 40} instead of {'a' * 40}"),
        ("org/name", "v3", None),  # not here: nothing is known of it
        ("org/other", None, "that is 'org/name'"),
        (".", None, None),  # a folder may hold the same
    ],
)
def test_another_base_of_the_hub_is_known_by_name_and_commit(monkeypatch, model, revision, expected):
    commits = {"main": "a" * 40, "v2": "b" * 40}
    monkeypatch.setattr("rlvr.tracking.lineage.cached_commit", lambda model, revision: commits.get(revision))
    record = {"model": "org/name", "revision": "main", "commit": "a" * 40, "files": None}
    assert base_difference(record, model, revision) == expected


@pytest.mark.both
def test_hashes_of_files_are_those_of_sha256sum(tmp_path):
    (tmp_path / "config.json").write_bytes(b"abc")
    (tmp_path / "optimizer.pt").write_bytes(b"abc")
    assert file_hashes(tmp_path.iterdir(), tmp_path) == {
        "config.json": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, B.1
    }


@pytest.mark.both
def test_an_unfinished_run_has_a_chain_too(run):
    (run / "summary.json").unlink()
    assert [link.kind for link in rlvr.lineage(run).links][-1] == "checkpoint"
