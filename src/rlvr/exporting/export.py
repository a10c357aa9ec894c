"""A run's policy in another format: written, loaded back, compared, and only then left under its name."""

from __future__ import annotations

import gc
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Any, get_args

from rlvr.backends.protocol import ExportFormat, LoadedPolicy, ModelBackend
from rlvr.errors import ConfigError, ExportError, RunFolderError
from rlvr.exporting.contents import file_problems, tokenizer_problems
from rlvr.exporting.parity import Expected, Parity, compare, logprobs, tolerance
from rlvr.exporting.source import Source, find_source
from rlvr.exporting.writers import Writer, choose_writer
from rlvr.tracking.hub import check_push, push
from rlvr.tracking.lineage import check_base_files, write_record

if TYPE_CHECKING:
    from rlvr.trainers.run import Run

FORMATS: tuple[str, ...] = get_args(ExportFormat)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Export:
    """An export that is the policy that was trained, within the tolerances of its format."""

    folder: Path
    format: ExportFormat
    adapter: str | None  # hash of the trained weights (`rlvr.tracking.adapter_hash`)
    parity: Parity
    url: str | None = None  # of the repository on the Hub, where it was pushed

    def as_json(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            "format": self.format,
            "adapter": self.adapter,
            "url": self.url,
            "parity": self.parity.as_json(),
        }


def export(
    run: str | Path | Run,
    format: ExportFormat = "adapter",
    *,
    checkpoint: int | str | None = None,
    output: str | Path | None = None,
    backend: str | ModelBackend | None = None,
    push_to_hub: str | None = None,
    private: bool = False,
) -> Export:
    """Writes a run's policy in a format, and makes sure that it is the policy that was trained.

        rlvr.export("outputs/my-run", "merged-16bit").folder

    The export is loaded back and compared with the trained policy and with the base model (`parity.py`). One model is
    in memory at a time. The folder gets `parity.json`, `lineage.json` and a model card, and its name once all is well.

    Args:
        run: a run, or its folder.
        format: adapter, merged-16bit, merged-4bit or gguf.
        checkpoint: the step of one, or "last"; None for the policy at the end of the run.
        output: a folder that does not exist; by default `exports/FORMAT` in the run's folder.
        backend: the run's own unless it is given; for a run that was trained with a backend object.
        push_to_hub: a repository such as "me/my-model", to upload the folder to.
        private: whether that repository is private, if it has to be made.

    Raises:
        ConfigError: no such format, or no Hub token; `UnsupportedSettingError`: nothing here writes that format.
        RunFolderError: no such run or checkpoint, one that was changed since, or `output` exists.
        ModelError: the base model is no longer the one that the run was trained on.
        ExportError: it could not be written, or it is not the policy that was trained. Nothing is left.
    """
    from rlvr.plugins.manager import load_backend

    if format not in FORMATS:
        raise ConfigError(f"format is {format!r}; allowed: {', '.join(FORMATS)}.")
    source = find_source(run if isinstance(run, (str, Path)) else run.folder, checkpoint)
    if format == "adapter" and not source.is_adapter:
        raise ConfigError(
            f"the run in {str(source.run.path)!r} trained every weight and has no adapter; use --format merged-16bit."
        )
    folder = _free_output(source, format, output)
    check_base_files(source.base)
    if push_to_hub is not None:
        check_push(push_to_hub, option="push_to_hub")
    name = source.config["backend"]
    loaded_backend = load_backend(backend if backend is not None else name)
    writer = choose_writer(loaded_backend, name, format)
    with _staged(folder) as staging:
        parity = _written_and_compared(source, loaded_backend, writer, format, staging)
        _describe(source, format, parity, staging)
    source.run.add_export(_row(source, format, folder))
    url = push(folder, push_to_hub, private=private) if push_to_hub is not None else None
    return Export(folder=folder, format=format, adapter=source.adapter, parity=parity, url=url)


def _written_and_compared(
    source: Source, backend: ModelBackend, writer: Writer, export_format: ExportFormat, staging: Path
) -> Parity:
    """One model at a time: the trained policy, its base, the export."""
    from safetensors import SafetensorError  # of a full disk, too

    logger.info("loading the trained policy from %s", source.folder)
    policy = _trained(source, backend)
    expected = _expected(source, backend, policy)
    allowed = tolerance(writer.compared_as, policy)
    logger.info("writing %s", export_format)
    try:
        writer.write(policy, staging)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"the export cannot be written: {error}.") from error
    tokenizer = policy.tokenizer
    del policy
    _free_memory()

    logger.info("loading the base model %s, to compare with", source.settings.model)
    policy = backend.load_policy(source.settings)
    backend.for_inference(policy)
    base = logprobs(policy.model, expected.texts)
    del policy
    _free_memory()

    logger.info("loading the export back, to compare it")
    problems = file_problems(staging, export_format, source.settings)
    model, exported_tokenizer = writer.load(staging, source.settings)
    parity = compare(model, expected, base=base, allowed=allowed)
    del model
    _free_memory()
    problems = [*parity.problems, *problems, *tokenizer_problems(tokenizer, exported_tokenizer, export_format)]
    if problems:
        raise ExportError(
            f"the {export_format} export of {str(source.folder)!r} is not the policy that was trained, and is not "
            f"kept: {'; '.join(problems)}.{_way_out(source, export_format)}"
        )
    if parity.doubt is not None:
        logger.warning("%s.", parity.doubt)
    return parity


def _way_out(source: Source, export_format: ExportFormat) -> str:
    """What else can be had, where the format itself may be the cause."""
    quantization = source.settings.quantization
    if quantization == "none" or export_format == "adapter":
        return ""
    return (
        f" The policy was trained on weights in {quantization}, and the export holds others. --format adapter keeps "
        f"what was trained; load it with --load-in-{quantization}."
    )


def _trained(source: Source, backend: ModelBackend) -> LoadedPolicy:
    from rlvr.backends import load_saved
    from rlvr.tracking.adapter_hash import adapter_hash

    policy = load_saved(backend, source.folder, source.settings)
    found = adapter_hash(policy.model)
    if source.adapter is not None and found != source.adapter:
        raise ExportError(
            f"the policy loaded from {str(source.folder)!r} is not the one that was trained: its weights have the "
            f"hash {found}, and the run recorded {source.adapter}. The files were exchanged, or the backend has saved "
            f"or loaded other weights; 'rlvr lineage {source.run.path}' shows which weights are where."
        )
    backend.for_inference(policy)
    return policy


def _expected(source: Source, backend: ModelBackend, policy: LoadedPolicy) -> Expected:
    from rlvr.exporting.texts import probe_texts

    texts = probe_texts(policy.tokenizer, source.run.trajectories(), max_tokens=source.settings.max_seq_length)
    return Expected.of(policy.model, texts)


def _describe(source: Source, export_format: ExportFormat, parity: Parity, folder: Path) -> None:
    """Writes what goes with the weights: the comparison, the model card, the hashes."""
    from rlvr.exporting.card import model_card

    report = {"format": export_format, "adapter": source.adapter, "step": source.step, **parity.as_json()}
    (folder / "parity.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(model_card(source, export_format, parity), encoding="utf-8")
    write_record(folder, adapter=source.adapter, step=source.step, format=export_format)


def _row(source: Source, export_format: ExportFormat, folder: Path) -> dict[str, Any]:
    run = source.run.path.absolute()
    inside = folder.absolute().is_relative_to(run)
    where = folder.absolute().relative_to(run) if inside else folder.absolute()
    return {
        "format": export_format,
        "folder": where.as_posix(),
        "step": source.step,
        "source": source.name,
        "adapter": source.adapter,
    }


# The folder


def _free_output(source: Source, export_format: ExportFormat, output: str | Path | None) -> Path:
    at = f"-checkpoint-{source.checkpoint}" if source.checkpoint is not None else ""
    folder = Path(output) if output is not None else source.run.path / "exports" / f"{export_format}{at}"
    if folder.exists():
        raise RunFolderError(
            f"the output folder {str(folder)!r} exists, and nothing is written over. Choose another with --output."
        )
    return folder


@contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder`, which becomes `folder` if the block ends well, and is deleted if not."""
    made = [parent for parent in folder.parents if not parent.exists()]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = folder.with_name(f".{folder.name}-unfinished-{token_hex(4)}")
        staging.mkdir()
    except OSError as error:
        raise RunFolderError(
            f"the output folder {str(folder)!r} cannot be made: {error.strerror or error}. Choose another with "
            "--output."
        ) from error
    try:
        yield staging
        staging.rename(folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        with suppress(OSError):  # others may have used them meanwhile
            for parent in made:
                parent.rmdir()
        raise


def _free_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
