"""Who writes a format and loads it back: the backend, or for GGUF llama.cpp's converter."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rlvr.errors import ExportError, UnsupportedSettingError

if TYPE_CHECKING:
    from rlvr.backends.protocol import ExportFormat, LoadedPolicy, ModelBackend, ModelSettings

CONVERTER = "convert_hf_to_gguf.py"
CONVERTER_VARIABLE = "RLVR_LLAMA_CPP"
GGUF_FILE = "model.gguf"
_SENTENCEPIECE_FILE = "tokenizer.model"
_LAST_LINES = 8


class Writer(Protocol):
    @property
    def compared_as(self) -> ExportFormat:
        """The format whose tolerances hold for what it writes."""
        ...

    def write(self, policy: LoadedPolicy, folder: Path) -> None:
        """Writes the policy to a folder that is there and empty."""
        ...

    def load(self, folder: Path, settings: ModelSettings) -> tuple[Any, Any]:
        """The model that was written, in inference mode, and its tokenizer."""
        ...


def choose_writer(backend: ModelBackend, name: str, export_format: ExportFormat) -> Writer:
    """
    Args:
        name: the backend's, for messages.

    Raises:
        UnsupportedSettingError: nothing here writes this format; says why, and what would help.
    """
    capabilities = backend.capabilities()
    if export_format in capabilities.export_formats:
        return BackendWriter(backend, export_format)
    offered = ", ".join(capabilities.export_formats)
    reasons = [note for note in capabilities.notes if export_format in note]
    refused = " ".join([f"backend {name!r} cannot export {export_format!r} here; it offers: {offered}.", *reasons])
    if export_format == "gguf" and "merged-16bit" in capabilities.export_formats:
        converter = find_converter()
        if converter is None:
            raise UnsupportedSettingError(
                f"{refused} llama.cpp's converter would do it: set {CONVERTER_VARIABLE} to a checkout of llama.cpp, "
                f"or put {CONVERTER} on the PATH."
            )
        if find_spec("gguf") is None:
            raise UnsupportedSettingError(
                f"{refused} llama.cpp's converter would do it, and needs the package gguf, as the comparison "
                "afterwards does. Install it with 'pip install gguf'."
            )
        return LlamaCppWriter(backend, converter)
    raise UnsupportedSettingError(refused)


def find_converter() -> Path | None:
    """llama.cpp's converter of Hugging Face models: in the checkout that the variable names, or on the PATH.

    Raises:
        UnsupportedSettingError: the variable leads to no converter.
    """
    named = os.environ.get(CONVERTER_VARIABLE)
    if not named:
        found = shutil.which(CONVERTER)
        return Path(found) if found else None
    for path in (Path(named), Path(named) / CONVERTER):
        if path.is_file():
            return path.absolute()
    raise UnsupportedSettingError(
        f"{CONVERTER_VARIABLE} is {named!r}, and there is no {CONVERTER}. Set it to a checkout of llama.cpp."
    )


@dataclass(frozen=True)
class BackendWriter:
    backend: ModelBackend
    export_format: ExportFormat

    @property
    def compared_as(self) -> ExportFormat:
        return self.export_format

    def write(self, policy: LoadedPolicy, folder: Path) -> None:
        self.backend.save(policy, folder, self.export_format)
        write_base_revision(folder, policy.settings.revision)

    def load(self, folder: Path, settings: ModelSettings) -> tuple[Any, Any]:
        policy = self.backend.load_saved(folder, settings_to_load(self.export_format, settings))
        self.backend.for_inference(policy)
        return policy.model, _tokenizer_in(folder, settings)


def settings_to_load(export_format: ExportFormat, settings: ModelSettings) -> ModelSettings:
    """With the export's own quantization; an adapter goes on the base as it was in training. Weights in 4 bits cannot
    be trained, whatever the run did with its own."""
    own = {"merged-16bit": "none", "merged-4bit": "4bit"}
    quantization: Any = own.get(export_format, settings.quantization)
    trained = settings.full_finetuning and quantization == "none"
    return replace(settings, quantization=quantization, full_finetuning=trained)


def _tokenizer_in(folder: Path, settings: ModelSettings) -> Any:
    """As others load it: a backend may take the base's, and find in the folder's what others do not."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=settings.trust_remote_code)
    except Exception as error:  # a missing one surfaces as OSError, ValueError, TypeError, ...
        reason = (str(error).splitlines() or ["no message"])[0]
        raise ExportError(
            "the export holds no tokenizer that transformers can load, and is not kept. The backend's 'save' has to "
            f"write it beside the weights. {type(error).__name__}: {reason}"
        ) from error


@dataclass(frozen=True)
class LlamaCppWriter:
    """Merges to 16 bits through the backend and converts that; no weight is quantized further."""

    backend: ModelBackend
    converter: Path
    compared_as: ExportFormat = "merged-16bit"

    def write(self, policy: LoadedPolicy, folder: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="merged-", dir=folder) as merged:
            self.backend.save(policy, Path(merged), "merged-16bit")
            _complete_sentencepiece(policy.tokenizer, Path(merged))
            command = [sys.executable, str(self.converter), merged, "--outfile", str(folder / GGUF_FILE)]
            result = subprocess.run(
                [*command, "--outtype", "auto"],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
            )
        if result.returncode or not (folder / GGUF_FILE).is_file():
            last = "\n".join(result.stdout.strip().splitlines()[-_LAST_LINES:])
            raise ExportError(
                f"llama.cpp's converter {self.converter} ended with exit code {result.returncode} and wrote no "
                f"model. Its last lines:\n{last}"
            )

    def load(self, folder: Path, settings: ModelSettings) -> tuple[Any, Any]:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        from rlvr.backends.checks import choose_device

        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                gguf_file=GGUF_FILE,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.bfloat16 if settings.dtype == "auto" else getattr(torch, settings.dtype),
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_FILE)
        except Exception as error:  # an unknown architecture, a damaged file: readers raise what they meet
            raise ExportError(
                f"transformers cannot load the GGUF file back, so that it cannot be compared: {error}. Export "
                "'merged-16bit', and convert that by hand."
            ) from error
        return model.to(choose_device(settings)).eval(), tokenizer


def write_base_revision(folder: Path, revision: str | None) -> None:
    """Writes into an adapter's configuration which commit of its base it goes on; PEFT loads the newest otherwise."""
    path = folder / "adapter_config.json"
    if revision is None or not path.is_file():
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "revision": revision}, indent=2), encoding="utf-8")


def _complete_sentencepiece(tokenizer: Any, folder: Path) -> None:
    """Adds what the converter reads of a sentencepiece tokenizer, and transformers 5 does not save.

    Without its scores llama.cpp merges in another order, and it puts a BOS before every text unless told not to.
    """
    vocabulary = Path(getattr(tokenizer, "vocab_file", None) or "")
    if vocabulary.name != _SENTENCEPIECE_FILE or not vocabulary.is_file():
        return
    shutil.copy(vocabulary, folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    added = tokenizer.added_tokens_decoder.items()
    config["added_tokens_decoder"] = {n: {"content": token.content, "special": token.special} for n, token in added}
    config["add_bos_token"] = tokenizer.bos_token_id in tokenizer("a")["input_ids"]
    path.write_text(json.dumps(config), encoding="utf-8")
