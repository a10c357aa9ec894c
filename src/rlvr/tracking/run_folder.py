"""The folder of a run.

    config.yaml          the resolved settings: `rlvr train --config … --run-name again` repeats the run
    versions.json        Python, packages, device and seeds
    policy.json          what the backend applied and changed
    origin.json          what identifies the base model; the hash of the weights or the checkpoint that training
                         started from
    metrics.jsonl        a row for each logged step
    trajectories.jsonl   a row for each trajectory, evaluation included
    checkpoints/         checkpoint-<step>
    adapter/ or model/   the trained policy
    summary.json         evaluation before and after, steps, time, tokens
    exports/             what `rlvr export` wrote; exports.jsonl has a row for each

What is saved holds a `lineage.json`: the hash of its weights, and those of its files (`lineage.py`). Nothing is
written over: rows are appended, and a folder that holds another run is refused.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlvr.errors import RunFolderError
from rlvr.plugins.manager import announced_by
from rlvr.secrets import without_secrets
from rlvr.tracking.trajectories import TrajectoryRecord

SUMMARY = "summary.json"
NEWEST = "last"  # --resume-from-checkpoint last
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class RunFolder:
    """A run's folder, for writing while it runs and for reading afterwards.

    `resume_from` is the checkpoint that the run goes on from; None for a new run.
    """

    path: Path
    resume_from: Path | None = None

    @classmethod
    def reserve(cls, path: str | Path, *, resume_from: Path | None = None) -> RunFolder:
        """Makes the folder if need be, and checks that a run may write to it. Nothing is written yet.

        Raises:
            RunFolderError: it is not writable, or holds something and `resume_from` is None.
        """
        path = Path(path)
        if not _is_main_process():
            return cls(path, resume_from)
        try:
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                pass
            held = sorted(entry.name for entry in path.iterdir())
        except OSError as error:
            raise RunFolderError(
                f"the output folder {str(path)!r} cannot be written to: {error.strerror or error}. "
                "Choose another with --output-dir."
            ) from error
        if held and resume_from is None:
            is_run = "config.yaml" in held
            what = "another run" if is_run else f"other files ({', '.join(held[:3])})"
            going_on = ", or go on with the run: --resume-from-checkpoint last" if is_run else ""
            raise RunFolderError(
                f"the output folder {str(path)!r} holds {what}, and nothing is written over. Choose another with "
                f"--output-dir or --run-name{going_on}."
            )
        return cls(path, resume_from)

    def release_if_unused(self) -> None:
        """Takes back what `reserve` made, where the run was refused before it began."""
        if _is_main_process() and self.path.is_dir() and not any(self.path.iterdir()):
            self.path.rmdir()

    def begin(self, config: Mapping[str, Any], *, seeds: Mapping[str, int], policy: Mapping[str, Any]) -> None:
        """Writes what is known before the first step. A resumed run keeps its first files and adds numbered ones.

        The checkpoint that it goes on from is left out of `config`, which is to repeat the run; `add_origin` has it.
        """
        import yaml

        if not _is_main_process():
            return
        count = len(list(self.path.glob("config*.yaml")))
        suffix = "" if count == 0 else f".resumed-{count}"
        kept = {name: value for name, value in without_secrets(config).items() if name != "resume_from_checkpoint"}
        text = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)
        for rows in self.path.glob("*.jsonl"):
            _cut_half_line(rows)
        self._write_new(f"config{suffix}.yaml", text)
        self._write_new(f"versions{suffix}.json", _json({**versions(config), "seeds": dict(seeds)}, indent=2))
        self._write_new(f"policy{suffix}.json", _json(policy, indent=2))

    def add_origin(self, origin: Mapping[str, Any]) -> None:
        """Where the weights of the part that has begun come from (`lineage.py`)."""
        if _is_main_process():
            self._write_new(self._part("origin", ".json").name, _json(origin, indent=2) + "\n")

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def add_metrics(self, row: Mapping[str, Any]) -> None:
        self._append("metrics.jsonl", [row])

    def add_trajectories(self, records: Sequence[TrajectoryRecord]) -> None:
        """A `TrajectorySink`."""
        self._append("trajectories.jsonl", [record.as_json() for record in records])

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Replaces the summary of an earlier part of the same run."""
        if _is_main_process():
            (self.path / SUMMARY).write_text(_json(summary, indent=2) + "\n", encoding="utf-8")

    def add_export(self, row: Mapping[str, Any]) -> None:
        self._append("exports.jsonl", [row])

    def parts(self) -> int:
        """How often it was begun: 1, and 1 more for each time that it was resumed.

        Raises:
            RunFolderError: there is no run in the folder.
        """
        if not (self.path / "config.yaml").is_file():
            raise RunFolderError(
                f"there is no run in {str(self.path)!r}: it has no config.yaml. Give a folder that 'rlvr train' made, "
                "for example outputs/my-run."
            )
        return 1 + len(list(self.path.glob("config.resumed-*.yaml")))

    def config(self) -> dict[str, Any]:
        """The settings of the run; of its latest part, where it was resumed."""
        import yaml

        return yaml.safe_load(self._part("config", ".yaml").read_text(encoding="utf-8"))

    def policy(self) -> dict[str, Any]:
        """What the backend applied and changed, in the latest part."""
        return self._read(self._part("policy", ".json"))

    def versions(self) -> dict[str, Any]:
        """Of the latest part."""
        return self._read(self._part("versions", ".json"))

    def origin(self, part: int) -> dict[str, Any]:
        """Of a part counted from 1; empty where it did not come so far."""
        path = self._part("origin", ".json", part)
        return self._read(path) if path.is_file() else {}

    def summary(self) -> dict[str, Any]:
        """
        Raises:
            RunFolderError: it is not there, or damaged.
        """
        summary = self._read(self.path / SUMMARY)
        if "steps" not in summary:
            raise RunFolderError(f"{str(self.path / SUMMARY)!r} is damaged: it does not say how many steps were done.")
        return summary

    @property
    def is_finished(self) -> bool:
        return (self.path / SUMMARY).is_file()

    def trained(self) -> Path | None:
        """The folder of the trained policy: its adapter, or all its weights. None where the run has not finished."""
        folders = [self.path / name for name in ("adapter", "model") if (self.path / name).is_dir()]
        return folders[0] if folders and self.is_finished else None

    def saved_checkpoints(self) -> dict[int, Path]:
        """Step → folder, in the order of steps. Those cut off while they were written are left out."""
        found = {
            int(match[1]): folder
            for folder in self.checkpoints.glob("checkpoint-*")
            if (match := _CHECKPOINT.fullmatch(folder.name)) and (folder / "trainer_state.json").is_file()
        }
        return dict(sorted(found.items()))

    def exports(self) -> Iterator[dict[str, Any]]:
        return self._rows("exports.jsonl")

    def metrics(self) -> Iterator[dict[str, Any]]:
        """Rows in the order written; a resumed run may have gone through some steps twice."""
        return self._rows("metrics.jsonl")

    def trajectories(self) -> Iterator[dict[str, Any]]:
        return self._rows("trajectories.jsonl")

    def _part(self, name: str, suffix: str, part: int | None = None) -> Path:
        part = self.parts() if part is None else part
        return self.path / (f"{name}{suffix}" if part == 1 else f"{name}.resumed-{part - 1}{suffix}")

    def _read(self, path: Path) -> dict[str, Any]:
        """
        Raises:
            RunFolderError: the file is not there, or holds no JSON object.
        """
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunFolderError(
                f"{str(path)!r} cannot be read: {error}. Bring it back as the run wrote it."
            ) from error
        if not isinstance(found, dict):
            raise RunFolderError(f"{str(path)!r} is damaged: it holds no object. Bring it back as the run wrote it.")
        return found

    def _write_new(self, name: str, text: str) -> None:
        with open(self.path / name, "x", encoding="utf-8") as file:
            file.write(text)

    def _append(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        if _is_main_process():
            with open(self.path / name, "a", encoding="utf-8") as file:
                file.writelines(_json(row) + "\n" for row in rows)

    def _rows(self, name: str) -> Iterator[dict[str, Any]]:
        """Without a last line that was not written to its end.

        Raises:
            RunFolderError: another line is no JSON.
        """
        path = self.path / name
        if not path.exists():
            return
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    return
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise RunFolderError(
                        f"line {number} of {str(path)!r} is no JSON: {error}. Take it out to read the others."
                    ) from error
                yield row


def _cut_half_line(path: Path) -> None:
    """Takes out what follows the last newline: a run that was killed left half a row, and the next would join it."""
    with open(path, "rb+") as file:
        file.truncate(sum(len(line) for line in file if line.endswith(b"\n")))


def find_checkpoint(asked: str, output_dir: str | Path | None) -> tuple[Path, Path]:
    """The run folder and the checkpoint that `--resume-from-checkpoint` means.

    Args:
        asked: a checkpoint's folder, or "last" for the newest in `output_dir`.

    Raises:
        RunFolderError: there is nothing to resume from.
    """
    if asked != NEWEST:
        checkpoint = Path(asked)
        run = checkpoint.resolve().parent.parent
        if not (checkpoint / "trainer_state.json").is_file():
            raise RunFolderError(
                f"there is no checkpoint in {asked!r}: it has no trainer_state.json. Give a folder such as "
                "outputs/my-run/checkpoints/checkpoint-100, or 'last' with --output-dir."
            )
        if output_dir is not None and Path(output_dir).resolve() != run:
            raise RunFolderError(
                f"the checkpoint {asked!r} belongs to the run in {str(run)!r}, and the output folder is "
                f"{str(output_dir)!r}. Leave --output-dir out: a resumed run goes on in its own folder."
            )
        if not (run / "config.yaml").is_file():
            raise RunFolderError(f"the checkpoint {asked!r} is in no run folder: {str(run)!r} has no config.yaml.")
        return (Path(output_dir) if output_dir is not None else checkpoint.parent.parent), checkpoint
    if output_dir is None:
        raise RunFolderError(
            "--resume-from-checkpoint last needs --output-dir or --run-name, to know whose newest checkpoint is meant."
        )
    found = RunFolder(Path(output_dir)).saved_checkpoints()
    if not found or not Path(output_dir, "config.yaml").is_file():
        raise RunFolderError(
            f"there is nothing to resume from: {str(output_dir)!r} holds no run with a checkpoint. "
            "Leave --resume-from-checkpoint out to start anew."
        )
    return Path(output_dir), found[max(found)]


PACKAGES = (
    *("rlvr", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "wandb"),
    *("unsloth", "unsloth_zoo", "vllm", "bitsandbytes", "flash-attn"),
)


def versions(config: Mapping[str, Any]) -> dict[str, Any]:
    """Python, platform, the devices, and the packages that matter, with those of a run's backend and environment."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages | announced_by(str(config.get("backend")), str(config.get("env"))),
        "devices": _devices(),
    }


def _devices() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return ["cpu"]
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _json(value: Any, **options: Any) -> str:
    return json.dumps(_plain(value), ensure_ascii=False, allow_nan=False, **options)


def _plain(value: Any) -> Any:
    """As JSON has it: NaN and infinity become null, tensors and NumPy numbers become numbers, the rest text."""
    if isinstance(value, bool) or value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    item = getattr(value, "item", None)
    return _plain(item()) if item is not None and getattr(value, "ndim", 1) == 0 else str(value)
