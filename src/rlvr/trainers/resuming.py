"""What has to hold before a run goes on from a checkpoint. Found before anything is loaded or written."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

from rlvr.config import LORA, TrainSettings
from rlvr.errors import ConfigError, RunFolderError
from rlvr.tracking.lineage import check_base_files, exact_revision, folder_state, read_record, recorded_base
from rlvr.tracking.run_folder import RunFolder
from rlvr.wording import counted

_OF_THE_ADAPTER = [field.name for field in fields(TrainSettings) if field.metadata["group"] == LORA]
KEPT = ("env", "model", "revision", *_OF_THE_ADAPTER)
"""What the checkpoint's weights belong to: a run that goes on cannot change it."""


def check_resumed(settings: TrainSettings, checkpoint: Path) -> None:
    """
    Args:
        settings: of the run as it is to go on.

    Raises:
        ConfigError: they say another environment, model or adapter than the run's own; all differences at once.
        ModelError: the files of the base model are no longer those that the run began with.
        RunFolderError: the checkpoint's files are no longer those that the run saved, or it is at the end of the run
            already.
    """
    assert settings.output_dir is not None
    run = RunFolder(Path(settings.output_dir))
    before, now = run.config(), settings.as_dict()
    base = recorded_base(run)
    if settings.revision is not None and settings.revision == exact_revision(base):
        before["revision"] = settings.revision  # the same, said exactly
    changed = [
        f"{name} was {before[name]!r} in the run that is to go on, and is {now[name]!r}. Leave it out, or start a new "
        "run in another --output-dir."
        for name in KEPT
        if name in before and before[name] != now[name]
    ]
    if changed:
        raise ConfigError(changed)
    check_base_files(base)
    _, replaced = folder_state(checkpoint, read_record(checkpoint))
    if replaced:
        raise RunFolderError(
            f"the checkpoint {str(checkpoint)!r} is no longer the one that the run saved; changed or missing: "
            f"{', '.join(replaced)}. Bring them back, or resume from another checkpoint."
        )
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    end = settings.max_steps
    if end is None and settings.num_epochs == before.get("num_epochs"):
        end = state.get("max_steps")
    if end and state["global_step"] >= end:
        raise RunFolderError(
            f"the checkpoint {str(checkpoint)!r} has done all that the run was to do, {counted(end, 'step')}, so "
            "there is nothing to go on with. Raise --max-steps, or evaluate the run: rlvr evaluate ... --adapter "
            f"{settings.output_dir}."
        )
