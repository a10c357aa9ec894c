"""`rlvr export` and `rlvr lineage` as a user runs them, on a run that learned nothing."""

import json
import shutil
from pathlib import Path

import pytest

pytestmark = pytest.mark.both

SHORT = "--max-prompt-length 64 --max-tokens 4 --num-generations 2 --prompts-per-step 2 --eval-samples 2 --max-steps 1"


@pytest.fixture
def run(command, model_folder):
    outcome = command(
        "train", "arithmetic", "-m", model_folder, *SHORT.split(), "--save-steps", 1, "--output-dir", "run"
    )
    assert outcome.code == 0, outcome.err
    return Path("run")


def test_export_and_lineage(command, run):
    exported = command("export", run, "--format", "merged-16bit")
    assert exported.code == 0, exported.err
    assert "merged-16bit: 0.0" in exported.out
    assert "Everything is in run/exports/merged-16bit" in exported.out
    assert "run/exports" not in exported.err  # said once
    for line in ("loading the trained policy from run/adapter", "writing merged-16bit", "loading the export back"):
        assert line in exported.err
    assert "the trained policy does not differ from its base on these texts" in exported.err

    report = json.loads(command("export", run, "--checkpoint", "last", "--json").out)
    assert report["folder"] == "run/exports/adapter-checkpoint-1"
    assert report["parity"]["ok"]
    assert report["parity"]["error"] == 0

    shown = command("lineage", run)
    assert shown.code == 0, shown.err
    for words in ("base ", "start", "checkpoint-1", "trained adapter", "export merged-16bit", "4 · 0.000", "ok"):
        assert words in shown.out
    chain = json.loads(command("lineage", run, "--json").out)
    assert chain["ok"]
    assert [link["kind"] for link in chain["links"]] == [
        *("base", "start", "checkpoint", "trained", "export", "export")
    ]

    path = run / "exports" / "merged-16bit" / "config.json"
    path.write_text(path.read_text() + "\n")
    shown = command("lineage", run)
    assert shown.code == 1
    assert "changed: config.json" in shown.out
    assert not json.loads(command("lineage", run, "--json").out)["ok"]


def test_a_damaged_record_and_what_was_not_saved_are_shown(command, run):
    shutil.rmtree(run / "checkpoints")
    (run / "origin.json").write_text("garbage")
    (run / "summary.json").write_text("{}")
    shown = command("lineage", run)
    assert shown.code == 1
    assert shown.out.count("damaged: origin.json") == 2
    assert "damaged: summary.json" in shown.out
    assert "weights that no line has: 8 of 8" in shown.out
    assert command("lineage", run, "--json").code == 1
