"""What a backend should ask of a model folder, a tokenizer and a LoRA before training. Open to third parties.

transformers is imported inside the functions: a backend that must be imported before it stays free to do so.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlvr.backends.protocol import LoraSettings, ModelSettings
from rlvr.errors import AdapterError, ModelError, UnsupportedSettingError

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_PAD_TOKENS = ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|vision_pad|>", "<|endoftext|>")


# Files


def check_model_folder(model: str) -> Path | None:
    """The folder that a model is loaded from, its files looked at; None for a model id on the Hub.

    Raises:
        ModelError: the folder is not there, has no configuration or no weights, or a weights file is damaged.
    """
    folder = Path(model).expanduser()
    if not folder.exists():
        if model.startswith((".", "~", "/", os.sep)) or model.count("/") > 1 or "\\" in model:
            raise ModelError(
                f"model folder {model!r} does not exist. Give an existing folder, or a Hub id like org/name."
            )
        return None
    if not folder.is_dir():
        raise ModelError(f"model {model!r} is a file; give the folder with config.json and the weights.")
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise ModelError(
                f"model folder {model!r} holds a LoRA adapter, not a model. Give its base model as the "
                "model, and this folder as the adapter."
            )
        raise ModelError(
            f"model folder {model!r} has no config.json. Save the model there with model.save_pretrained(folder)."
        )
    for weights in _weight_files(folder):
        problem = safetensors_problem(weights) if weights.suffix == ".safetensors" else None
        if problem:
            raise ModelError(f"weights file {weights} is damaged: {problem}. Copy or download it again.")
    return folder


def _weight_files(folder: Path) -> list[Path]:
    for name in _WEIGHTS:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            try:
                shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ModelError(f"weights index {index} is damaged: {error!r}. Copy or download it again.") from error
            missing = [shard for shard in shards if not (folder / shard).is_file()]
            if missing:
                raise ModelError(
                    f"model folder {str(folder)!r} lacks {len(missing)} of {len(shards)} weights files: "
                    f"{', '.join(missing[:3])}. Copy or download them again."
                )
            return [folder / shard for shard in shards]
    raise ModelError(
        f"model folder {str(folder)!r} has no weights ({' or '.join(_WEIGHTS)}, or their .index.json with "
        "shards). Save the model there with model.save_pretrained(folder)."
    )


def safetensors_problem(path: Path) -> str | None:
    """What is wrong with a safetensors file, seen from its header and its size; None if nothing is.

    The format is 8 bytes with the header's length, little-endian, the header as JSON, and the tensors' bytes
    (https://github.com/huggingface/safetensors).
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start == b"version ":
            return "it is a Git LFS pointer, not the weights themselves"
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8:
            return f"its header is cut off, or it is no safetensors file ({size} bytes)"
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return "its header cannot be read"
    expected = 8 + length + end
    return None if size == expected else f"it has {size} bytes where its header says {expected}"


@contextmanager
def loading_errors(model: str) -> Iterator[None]:
    """Turns what transformers and safetensors raise while loading into a `ModelError` naming the model."""
    from safetensors import SafetensorError

    try:
        yield
    except ModelError:
        raise
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        lines = str(error).strip().splitlines()
        nowhere = "" if Path(model).exists() else f" There is no folder {model!r} either."
        raise ModelError(
            f"model {model!r} cannot be loaded: {type(error).__name__}: {lines[0] if lines else 'no message'}{nowhere}"
        ) from error


def load_config(settings: ModelSettings) -> PretrainedConfig:
    """The model's configuration, checked against the settings.

    Raises:
        ModelError: it cannot be read, or `max_seq_length` is beyond what the model can take.
    """
    from transformers import AutoConfig

    check_model_folder(settings.model)
    with loading_errors(settings.model):
        config = AutoConfig.from_pretrained(
            settings.model, revision=settings.revision, trust_remote_code=settings.trust_remote_code
        )
    check_length(settings, config)
    return config


def check_length(settings: ModelSettings, config: PretrainedConfig) -> None:
    """
    Raises:
        ModelError: `max_seq_length` is beyond what the model can take.
    """
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and settings.max_seq_length > longest:
        raise ModelError(
            f"max_seq_length is {settings.max_seq_length}, and model {settings.model!r} takes {longest} "
            f"tokens at most. Lower max_seq_length to {longest}."
        )


# Tokenizer


def load_tokenizer(settings: ModelSettings, config: PretrainedConfig) -> tuple[PreTrainedTokenizerBase, list[str]]:
    """The tokenizer that goes with the model, ready for training, and what was decided about it.

    Raises:
        ModelError: it is missing, or lacks what training needs (see `check_tokenizer`).
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            settings.model, revision=settings.revision, trust_remote_code=settings.trust_remote_code
        )
        empty = len(tokenizer) <= len(tokenizer.all_special_tokens)
    except Exception as error:  # a missing one surfaces as OSError, ValueError, TypeError, ...
        raise _no_tokenizer(settings.model) from error
    if empty:
        raise _no_tokenizer(settings.model)
    tokenizer.padding_side = "left"
    return tokenizer, check_tokenizer(tokenizer, settings.model, config)


def _no_tokenizer(model: str) -> ModelError:
    return ModelError(
        f"model {model!r} has no tokenizer that can be loaded. Save one beside it with "
        "tokenizer.save_pretrained(folder)."
    )


def check_tokenizer(
    tokenizer: PreTrainedTokenizerBase, model: str, config: PretrainedConfig | None = None
) -> list[str]:
    """Refuses a tokenizer that cannot be trained with, and gives it a pad token if it has none.

    Returns:
        A sentence for each thing that was decided.

    Raises:
        ModelError: no end-of-sequence token, no chat template, or more tokens than the model has embeddings.
    """
    if tokenizer.eos_token is None:
        raise ModelError(
            f"the tokenizer of {model!r} has no eos token, so no completion could end. Set "
            "tokenizer.eos_token to the token that ends a turn, and save the tokenizer."
        )
    if not tokenizer.chat_template:
        raise ModelError(
            f"the tokenizer of {model!r} has no chat template, so messages cannot become tokens. Set "
            "tokenizer.chat_template (for example its instruct version's), and save the tokenizer."
        )
    vocabulary = getattr(config.get_text_config(), "vocab_size", None) if config is not None else None
    if vocabulary is not None and len(tokenizer) > vocabulary:
        raise ModelError(
            f"the tokenizer of {model!r} has {len(tokenizer)} tokens and the model {vocabulary} embeddings. "
            "Use the model's own tokenizer, or resize the model's embeddings and save it."
        )
    if tokenizer.pad_token is not None:
        return []
    known = tokenizer.get_vocab()
    unused = [token for token in _PAD_TOKENS if token in known and token != tokenizer.eos_token]
    tokenizer.pad_token = unused[0] if unused else tokenizer.eos_token
    return [
        f"the tokenizer has no pad token; padding with {tokenizer.pad_token!r}"
        + ("." if unused else ", its eos token. Padded positions are masked and do not count in the loss.")
    ]


# Device and weights


def choose_device(settings: ModelSettings) -> torch.device:
    """The device to load on: the one asked for, else this process's accelerator, else the CPU.

    Raises:
        UnsupportedSettingError: the device asked for does not exist here.
    """
    import torch

    if settings.device is None:
        if not torch.accelerator.is_available():
            return torch.device("cpu")
        kind = torch.accelerator.current_accelerator()
        return torch.device(kind.type if kind else "cpu", int(os.environ.get("LOCAL_RANK", "0")))
    try:
        device = torch.device(settings.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UnsupportedSettingError(
            f"device {settings.device!r} is not there: {str(error).splitlines()[0]}. Leave device out, or use 'cpu'."
        ) from error
    return device


def resolve_dtype(settings: ModelSettings, config: PretrainedConfig, device_type: str) -> torch.dtype:
    """The dtype that `settings.dtype` means for this checkpoint on this device.

    "auto" is the checkpoint's own. A float32 checkpoint becomes bfloat16 on an accelerator that has it,
    unless all of it is trained: small updates would be lost in 8 bits of mantissa. float16 needs loss
    scaling, and training in it overflows easily: it becomes bfloat16 where the accelerator has that, and
    float32 on a CPU.
    """
    import torch

    if settings.dtype != "auto":
        return getattr(torch, settings.dtype)
    stored = config.dtype or config.get_text_config().dtype or torch.float32
    if isinstance(stored, str):
        stored = getattr(torch, stored)
    has_bfloat16 = device_type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if stored is torch.float16:
        return torch.bfloat16 if has_bfloat16 else torch.float32 if device_type == "cpu" else torch.float16
    if stored is torch.float32 and has_bfloat16 and not settings.full_finetuning:
        return torch.bfloat16
    if stored is torch.bfloat16 and device_type == "cuda" and not has_bfloat16:
        return torch.float16
    return stored


def weights_in_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones counted once."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def matrix_dtypes(folder: Path) -> dict[str, str]:
    """Name → dtype, as safetensors has it, of a saved model's matrices. Vectors are left out: norms may be kept in
    float32, as some models ask for."""
    from safetensors import safe_open

    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is no dictionary)
        found.update({name: part.get_dtype() for name, part in slices.items() if len(part.get_shape()) > 1})
    return found


# LoRA


def forked_rng(model: PreTrainedModel) -> AbstractContextManager[None]:
    """A block whose random draws, on the CPU and on the model's device, leave the global state as it was."""
    import torch

    on_gpu = model.device.type == "cuda"
    return torch.random.fork_rng(devices=[model.device] if on_gpu else [])


def linear_names(model: PreTrainedModel) -> list[str]:
    """The last parts of the names of all linear layers but the output head: what "all-linear" means."""
    import torch

    head = model.get_output_embeddings()
    return sorted(
        {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and module is not head
        }
    )


def check_lora_target(model: PreTrainedModel, lora: LoraSettings) -> None:
    """Refuses a second adapter, and names of modules that the model does not have (PEFT passes over those).

    Raises:
        AdapterError: says which, and what may be named.
    """
    if getattr(model, "peft_config", None):
        raise AdapterError(
            "the model has an adapter already, and a fresh one would hide it. Load the model again without "
            "it, or train the adapter that it has."
        )
    if isinstance(lora.target_modules, str):
        return
    names = [name for name, _ in model.named_modules()]
    unknown = [
        target
        for target in lora.target_modules
        if not any(name == target or name.endswith(f".{target}") for name in names)
    ]
    if unknown:
        raise AdapterError(
            f"lora target_modules names modules that the model does not have: {', '.join(unknown)}; its "
            f"linear layers: {', '.join(linear_names(model))}. 'all-linear' takes all of them."
        )


def lora_settings(config: LoraConfig) -> LoraSettings:
    """What a saved adapter's configuration says, in our words. Its seed is not kept there."""
    targets: Any = config.target_modules
    init: Any = "default" if config.init_lora_weights is True else config.init_lora_weights
    return LoraSettings(
        r=config.r,
        alpha=config.lora_alpha,
        alpha_multiplier=1,
        dropout=config.lora_dropout,
        target_modules=targets if isinstance(targets, str) else tuple(sorted(targets or ())),
        bias=config.bias,
        rslora=config.use_rslora,
        dora=config.use_dora,
        init=init,
    )


def describe_missing_weights(keys: Sequence[str]) -> str:
    """The first few names, for an error message."""
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
