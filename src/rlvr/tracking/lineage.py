"""Which weights came from which: base model → start → checkpoints → trained adapter → exports.

Whatever a run saves holds a `lineage.json` with the hash of its weights (`adapter_hash.py`), which the trajectories
carry too, and the SHA-256 of its files. `lineage` reads these back and looks at the files again.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rlvr.errors import ModelError, RunFolderError
from rlvr.tracking.run_folder import SUMMARY, RunFolder

RECORD = "lineage.json"
ORIGIN = "origin.json"
_SUFFIXES = (".safetensors", ".bin", ".gguf", ".json", ".jinja", ".model", ".txt")
_LOADED = re.compile(  # by name, where a folder is loaded
    r"\.(safetensors|bin|jinja|model)$|config\.json$|token|vocab|merges|chat_template", re.IGNORECASE
)
_OTHERS = (RECORD, "trainer_state.json", "training_args.bin")  # of a checkpoint, and no part of the policy

_GONE = "it is gone, if its path is not one from another working directory"

State = Literal["ok", "changed", "damaged", "gone", "not recorded"]


@dataclass(frozen=True, kw_only=True)
class Link:
    """One set of weights of a run. `changed` names the files that are no longer those that were saved, or, where they
    are damaged, the records that should say so.

    `trajectories` were sampled from exactly these weights to train on, `evaluations` to measure; mean rewards of each,
    None where there are none.
    """

    kind: Literal["base", "start", "checkpoint", "resumed", "trained", "export"]
    name: str
    adapter: str | None  # hash of the trained weights
    state: State
    step: int | None = None  # optimizer steps that they have seen
    folder: str | None = None
    changed: tuple[str, ...] = ()
    trajectories: int = 0
    mean_reward: float | None = None
    evaluations: int = 0
    mean_evaluation_reward: float | None = None


@dataclass(frozen=True)
class Lineage:
    """The chain of a run's weights, in the order in which they came to be."""

    run: Path
    links: tuple[Link, ...]
    trajectories: int
    unlisted: int  # trajectories of weights that no link has: between two checkpoints, or of one that is gone
    unattributed: int  # trajectories that carry no hash

    @property
    def ok(self) -> bool:
        """Whether no record is damaged and no recorded file has changed. What was deleted as a whole is gone."""
        return all(link.state not in ("changed", "damaged") for link in self.links)

    def as_json(self) -> dict[str, Any]:
        links = [asdict(link) for link in self.links]
        return {
            "run": str(self.run),
            "ok": self.ok,
            "trajectories": self.trajectories,
            "unlisted_trajectories": self.unlisted,
            "unattributed_trajectories": self.unattributed,
            "links": links,
        }


def lineage(run: str | Path) -> Lineage:
    """Reads the chain of a run's weights, and hashes the files again.

    Args:
        run: a run's folder, finished or not.

    Raises:
        RunFolderError: there is no run in the folder, or rows of it cannot be read.
    """
    folder = RunFolder(Path(run))
    parts = folder.parts()
    sampled = _Sampled(folder.trajectories())
    links = _origin(folder, sampled)
    links += sorted([*_checkpoints(folder, sampled), *_resumed(folder, parts)], key=lambda link: link.step or 0)
    links += [*_trained(folder, sampled), *_exports(folder)]
    unlisted = sampled.total - sampled.unattributed - sampled.of_weights({link.adapter for link in links})
    return Lineage(folder.path, tuple(links), sampled.total, unlisted, sampled.unattributed)


def write_record(folder: Path, *, adapter: str | None, step: int, **facts: Any) -> None:
    """Writes `lineage.json` beside files that are complete.

    Args:
        adapter: the hash of the weights in them, None where it is not known.
        step: optimizer steps that they have seen.
        facts: more that is known, as JSON has it.
    """
    record = {"adapter": adapter, "step": step, **facts, "files": file_hashes(folder.rglob("*"), folder)}
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def read_record(folder: Path) -> dict[str, Any] | None:
    """What `write_record` wrote; None if there is nothing, or nothing that can be used."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_whole = isinstance(record, dict) and isinstance(record.get("files"), dict) and {"adapter", "step"} <= {*record}
    return record if is_whole else None


def base_record(model: str, revision: str | None) -> dict[str, Any]:
    """What identifies a base model: its commit on the Hub, or the SHA-256 of its files where it is local."""
    path = Path(model).expanduser()
    paths = path.iterdir() if path.is_dir() else [path]
    files = file_hashes(paths, _folder(model)) if path.exists() else None
    commit = None if path.exists() else cached_commit(model, revision)
    return {"model": model, "revision": revision, "commit": commit, "files": files}


def recorded_base(run: RunFolder) -> dict[str, Any] | None:
    """What `base_record` gave when a run began; None where it did not come so far.

    Raises:
        RunFolderError: the file that says so is damaged.
    """
    if not (run.path / ORIGIN).is_file():
        return None
    base = run.origin(1).get("base")
    if not isinstance(base, dict) or not {"model", "revision", "commit", "files"} <= {*base}:
        raise RunFolderError(f"{str(run.path / ORIGIN)!r} is damaged: it names no base model.")
    return base


def check_base_files(record: Mapping[str, Any] | None) -> None:
    """
    Args:
        record: as `recorded_base` gives it; nothing is checked where it is None.

    Raises:
        ModelError: the files of a local base are no longer those, or a folder has taken the place of a Hub model.
    """
    if record is None:
        return
    model = record["model"]
    if record["files"] is None:
        replaced = record["commit"] and Path(model).expanduser().exists()
        found = f"it was loaded from the Hub, commit {record['commit']}, and is a local folder now" if replaced else ""
    else:
        state, changed = folder_state(_folder(model), record)
        found = _GONE if state == "gone" else f"changed or missing: {', '.join(changed)}" if changed else ""
    if found:
        raise ModelError(
            f"the base model {model!r} is no longer the one that the run was trained on: {found}. What was trained "
            "belongs to the files whose SHA-256 are in the run's origin.json. Bring those back, or train again."
        )


def check_base_commit(record: Mapping[str, Any] | None, revision: str | None) -> None:
    """
    Args:
        record: as for `check_base_files`.
        revision: that a Hub model was loaded with now.

    Raises:
        ModelError: that is another commit than the record's.
    """
    if record is None:
        return
    now = _other_commit(record, revision)
    if now is not None:
        raise ModelError(
            f"the base model {record['model']!r} has moved: the run was trained on commit {record['commit']}, and "
            f"{revision or 'its default branch'} is {now} now. Give --revision {record['commit']}."
        )


def base_difference(record: Mapping[str, Any], model: str, revision: str | None) -> str | None:
    """What tells that a model is not the base of a record, which is as `recorded_base` gives it; None if nothing does,
    as where one is a folder and the other a model of the Hub."""
    is_local = Path(model).expanduser().exists()
    if is_local != (record["files"] is not None):
        return None
    if is_local:
        _, changed = folder_state(_folder(model), record)
        return f"other files, or missing: {', '.join(changed)}" if changed else None
    if model != record["model"]:
        return f"that is {record['model']!r}"
    now = _other_commit(record, revision)
    return f"commit {now} instead of {record['commit']}" if now is not None else None


def _other_commit(record: Mapping[str, Any], revision: str | None) -> str | None:
    """The commit of the record's Hub model at this revision, where both are known and it is not the record's."""
    now = cached_commit(record["model"], revision) if record["commit"] is not None else None
    return now if now != record["commit"] else None


def exact_revision(record: Mapping[str, Any] | None) -> str | None:
    """With which the base of a record is loaded again: its commit where it is known."""
    return (record["commit"] or record["revision"]) if record is not None else None


def cached_commit(model: str, revision: str | None) -> str | None:
    """The commit of a Hub model as this machine has it, which is what was loaded; None where it has it not."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(model, "config.json", revision=revision)
    except HFValidationError:  # no name of a repository: a backend may take others
        return None
    return Path(config).parent.name if isinstance(config, str) else None


def file_hashes(paths: Iterable[Path], folder: Path) -> dict[str, str]:
    """Name within `folder` → SHA-256 of the files that make a policy: weights, configuration, tokenizer."""
    files = sorted(filter(_makes_a_policy, paths))
    with ThreadPoolExecutor(max_workers=4) as pool:  # hashing releases the interpreter's lock
        return dict(
            zip((path.relative_to(folder).as_posix() for path in files), pool.map(_sha256, files), strict=True)
        )


def _makes_a_policy(path: Path) -> bool:
    return path.suffix in _SUFFIXES and path.name not in _OTHERS and path.is_file()


def _folder(model: str) -> Path:
    """That a local model's files are in: a backend may take a file for a model."""
    path = Path(model).expanduser()
    return path.parent if path.is_file() else path


def changed_files(folder: Path, recorded: Mapping[str, str]) -> tuple[str, ...]:
    """The names among `recorded` whose files are not as they were, or not there."""
    now = file_hashes((folder / name for name in recorded), folder)
    return tuple(name for name, digest in recorded.items() if now.get(name) != digest)


def added_files(folder: Path, recorded: Mapping[str, str]) -> tuple[str, ...]:
    """The names of files that make a policy and are not among `recorded`: an adapter beside a merged model is loaded
    with it. GGUF files may be there, `llama-quantize` makes smaller ones; so may notes and results."""
    files = sorted(path for path in folder.rglob("*") if _makes_a_policy(path) and _LOADED.search(path.name))
    names = (path.relative_to(folder).as_posix() for path in files)
    return tuple(f"{name} (added)" for name in names if name not in recorded)


def folder_state(folder: Path, record: Mapping[str, Any] | None) -> tuple[State, tuple[str, ...]]:
    """Whether a folder's files are those of its record (`read_record`), and which are not."""
    if not folder.is_dir():
        return "gone", ()
    if record is None:
        return ("damaged", (RECORD,)) if (folder / RECORD).exists() else ("not recorded", ())
    changed = changed_files(folder, record["files"])
    return ("changed" if changed else "ok"), changed


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# The links


def _origin(folder: RunFolder, sampled: _Sampled) -> list[Link]:
    try:
        return [_base(recorded_base(folder)), _start(folder.origin(1).get("adapter"), sampled)]
    except RunFolderError:
        return [
            Link(kind="base", name="unknown", adapter=None, state="damaged", changed=(ORIGIN,)),
            Link(kind="start", name="start", step=0, adapter=None, state="damaged", changed=(ORIGIN,)),
        ]


def _base(record: Mapping[str, Any] | None) -> Link:
    if record is None:
        return Link(kind="base", name="unknown", adapter=None, state="not recorded")
    version = record["commit"] or record["revision"]
    name = record["model"] + (f" @ {version}" if version else "")
    if record["files"] is None:
        return Link(kind="base", name=name, adapter=None, state="ok" if record["commit"] else "not recorded")
    folder = _folder(record["model"])
    state, changed = folder_state(folder, record)
    return Link(kind="base", name=name, adapter=None, folder=str(folder), state=state, changed=changed)


def _start(adapter: str | None, sampled: _Sampled) -> Link:
    state: State = "ok" if adapter else "not recorded"
    return Link(kind="start", name="start", step=0, adapter=adapter, state=state, **sampled.of(adapter))


def _checkpoints(folder: RunFolder, sampled: _Sampled) -> Iterator[Link]:
    for step, path in folder.saved_checkpoints().items():
        yield _saved("checkpoint", path.name, path, step, sampled)


def _resumed(folder: RunFolder, parts: int) -> Iterator[Link]:
    for part in range(2, parts + 1):
        try:
            source = folder.origin(part).get("resumed_from") or {}
        except RunFolderError:
            file = f"origin.resumed-{part - 1}.json"
            yield Link(kind="resumed", name="resumed", adapter=None, state="damaged", changed=(file,))
            continue
        record = read_record(folder.checkpoints / source.get("checkpoint", "")) or {}
        adapter = source.get("adapter")
        replaced = bool(adapter and record.get("adapter")) and record["adapter"] != adapter
        yield Link(
            kind="resumed",
            name=f"resumed from {source.get('checkpoint', 'an unknown checkpoint')}",
            step=source.get("step"),
            adapter=adapter,
            state="changed" if replaced else "ok" if adapter else "not recorded",
            changed=(source["checkpoint"],) if replaced else (),
        )


def _trained(folder: RunFolder, sampled: _Sampled) -> Iterator[Link]:
    if not folder.is_finished:
        return
    path = folder.path / ("model" if folder.policy()["model"]["full_finetuning"] else "adapter")
    try:
        summary = folder.summary()
    except RunFolderError:
        yield Link(kind="trained", name=path.name, adapter=None, state="damaged", changed=(SUMMARY,))
        return
    yield _saved("trained", path.name, path, summary["steps"], sampled, expected=summary.get("adapter"))


def _exports(folder: RunFolder) -> Iterator[Link]:
    for row in folder.exports():
        path = folder.path / row["folder"]  # an absolute one stays as it is
        yield _saved("export", row["format"], path, row["step"], None, expected=row["adapter"])


def _saved(
    kind: Any, name: str, path: Path, step: int, sampled: _Sampled | None, *, expected: str | None = None
) -> Link:
    """A folder with a record. `expected` is what the run says that the record says."""
    record = read_record(path)
    state, changed = folder_state(path, record)
    if record is not None and (added := added_files(path, record["files"])):
        state, changed = "changed", (*changed, *added)
    adapter = record["adapter"] if record else expected
    if expected is not None and adapter != expected:
        state, changed, adapter = "changed", (*changed, RECORD), expected
    counts = sampled.of(adapter) if sampled else {}
    return Link(
        kind=kind, name=name, step=step, adapter=adapter, folder=str(path), state=state, changed=changed, **counts
    )


class _Sampled:
    """Numbers and rewards of a run's trajectories, by the weights that sampled them."""

    def __init__(self, rows: Iterator[dict[str, Any]]):
        self.total = self.unattributed = 0
        self._rewards: dict[tuple[str, str], list[float | None]] = defaultdict(list)
        for row in rows:
            self.total += 1
            if row.get("adapter"):
                self._rewards[row["adapter"], row["phase"]].append(row["reward"])
            else:
                self.unattributed += 1

    def of_weights(self, adapters: Collection[str | None]) -> int:
        """How many are of these weights, to train on or to measure."""
        return sum(len(rewards) for (adapter, _), rewards in self._rewards.items() if adapter in adapters)

    def of(self, adapter: str | None) -> dict[str, Any]:
        trained, evaluated = (self._rewards.get((adapter or "", phase), []) for phase in ("train", "eval"))
        return {
            "trajectories": len(trained),
            "mean_reward": _mean(trained),
            "evaluations": len(evaluated),
            "mean_evaluation_reward": _mean(evaluated),
        }


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
