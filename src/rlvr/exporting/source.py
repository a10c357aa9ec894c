"""What is exported: the trained policy of a run, or one of its checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlvr.backends.protocol import ModelSettings
from rlvr.errors import ConfigError, RunFolderError
from rlvr.tracking.lineage import RECORD, exact_revision, folder_state, read_record, recorded_base
from rlvr.tracking.run_folder import NEWEST, RunFolder


@dataclass(frozen=True, kw_only=True)
class Source:
    """Saved weights of a run, and how they were loaded."""

    run: RunFolder
    folder: Path
    step: int
    checkpoint: int | None  # its step; None for the policy at the end of the run
    settings: ModelSettings  # a Hub model at the commit that was trained on, wherever its branch is now
    base: dict[str, Any] | None  # what identifies the base model (`lineage.recorded_base`)
    adapter: str | None  # the recorded hash of the weights
    config: dict[str, Any]

    @property
    def is_adapter(self) -> bool:
        return (self.folder / "adapter_config.json").is_file()

    @property
    def name(self) -> str:
        return self.folder.name


def find_source(run: str | Path, checkpoint: int | str | None = None) -> Source:
    """The policy that a run left, or a checkpoint of it.

    Args:
        run: the run's folder.
        checkpoint: the step of one, or "last"; None for the policy at the end.

    Raises:
        RunFolderError: there is no such run or checkpoint, the run has not finished, or its files were changed.
        ConfigError: `checkpoint` is neither a step nor "last".
    """
    folder = RunFolder(Path(run))
    folder.parts()
    saved = _finished(folder) if checkpoint is None else _checkpoint(folder, checkpoint)
    settings = ModelSettings(**folder.policy()["model"])
    base = recorded_base(folder)
    record = read_record(saved)
    _, changed = folder_state(saved, record)
    if checkpoint is None:
        step, adapter = folder.summary()["steps"], folder.summary().get("adapter")
        changed += (RECORD,) if record is not None and record["adapter"] != adapter else ()
    else:
        step, adapter = int(saved.name.rpartition("-")[2]), record["adapter"] if record is not None else None
    if changed:
        raise RunFolderError(
            f"files in {str(saved)!r} are no longer those that the run saved: {', '.join(changed)}. Export another "
            f"checkpoint, or bring them back; 'rlvr lineage {folder.path}' shows what has changed."
        )
    return Source(
        run=folder,
        folder=saved,
        step=step,
        checkpoint=step if checkpoint is not None else None,
        settings=replace(
            settings,
            revision=exact_revision(base) or settings.revision,
            fast_inference="off",  # an engine beside the model would only take its memory
        ),
        base=base,
        adapter=adapter,
        config=folder.config(),
    )


def _finished(folder: RunFolder) -> Path:
    trained = folder.trained()
    if trained is not None:
        return trained
    steps = ", ".join(map(str, folder.saved_checkpoints())) or "none"
    raise RunFolderError(
        f"the run in {str(folder.path)!r} has not finished: it has no summary.json, or no trained adapter or model. "
        f"Finish it with 'rlvr train --resume-from-checkpoint last --output-dir {folder.path}', or export a "
        f"checkpoint with --checkpoint; it has: {steps}."
    )


def _checkpoint(folder: RunFolder, asked: int | str) -> Path:
    saved = folder.saved_checkpoints()
    if asked != NEWEST and not str(asked).isdecimal():
        raise ConfigError(f"checkpoint is {asked!r}; it must be the number of a step, or {NEWEST!r}.")
    if not saved or (asked != NEWEST and int(asked) not in saved):
        raise RunFolderError(
            f"the run in {str(folder.path)!r} has no checkpoint {asked}; it has: "
            f"{', '.join(map(str, saved)) or 'none'}."
        )
    return saved[max(saved) if asked == NEWEST else int(asked)]
