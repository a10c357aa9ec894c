"""Gradient checkpointing only where memory needs it: what is kept for the backward pass is measured, not guessed.

Three short forward passes of the model itself say how many bytes autograd keeps whatever there is to compute (weights
cast for autocast), for a token, and for two tokens of a row (attention that writes its scores down).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rlvr.backends.protocol import ArgumentChange, LoadedPolicy
from rlvr.config import TrainSettings, processes
from rlvr.rollout.grouped.weights import free_on_gpu
from rlvr.trainers.shared_prefix.attention import SHARE
from rlvr.trainers.shared_prefix.support import unsupported_reason, unwrap

logger = logging.getLogger(__name__)

SAMPLES = (64, 128, 192)  # tokens of the forward passes, at equal distances


def switch_off_checkpointing(
    settings: TrainSettings, arguments: dict[str, Any], policy: LoadedPolicy
) -> list[ArgumentChange]:
    """Takes gradient checkpointing out of the training arguments where the largest micro-batch fits memory without it.

    Returns:
        The change, with its reason; none where checkpointing is needed, or where that is not known.
    """
    model: Any = policy.model
    free = free_memory(model.device)
    if free is None or processes() > 1:  # which may shard the model, or differ in what they find
        return []
    dtype = torch.bfloat16 if arguments["bf16"] else torch.float16 if arguments["fp16"] else None
    tokens = _tokens(settings, arguments["per_device_train_batch_size"], model, half=dtype is not None)
    longest = settings.max_prompt_length + settings.max_tokens
    try:
        needed = activation_bytes(model, tokens=tokens, longest=longest, autocast=dtype)
    except Exception as error:  # whatever a model that nobody has seen raises: it trains as it would have
        logger.warning("gradient checkpointing stays on: activations cannot be measured (%s).", error)
        return []
    if needed * SHARE > free:
        return []
    reason = f"activations of a micro-batch take about {_gib(needed)} at most, and {_gib(free)} are free"
    logger.info("gradient checkpointing is off: %s", reason)
    arguments["gradient_checkpointing"] = False
    arguments.pop("gradient_checkpointing_kwargs", None)
    return [ArgumentChange("gradient_checkpointing", False, reason)]


def _tokens(settings: TrainSettings, rows: int, model: Any, *, half: bool) -> int:
    """Of the largest micro-batch. Without the flash kernel, attention keeps a prompt for each of its completions."""
    shares = settings.shared_prefix != "off" and half and model.device.type == "cuda"
    shares = shares and unsupported_reason(model) is None
    prompts = -(-rows // settings.num_generations) if shares else rows
    return prompts * settings.max_prompt_length + rows * settings.max_tokens


def activation_bytes(model: Any, *, tokens: int, longest: int, autocast: torch.dtype | None = None) -> int:
    """What the backward pass of `tokens` tokens, in rows of at most `longest`, finds kept by the decoder, in bytes.

    Without the output head, which TRL computes in pieces.
    """
    short, middle, _ = SAMPLES
    distance = middle - short
    first, second, third = (_kept_bytes(model, count, autocast) for count in SAMPLES)
    by_pair = max(0.0, (third - 2 * second + first) / (2 * distance**2))
    by_token = (second - first) / distance - by_pair * (short + middle)
    constant = max(0.0, first - by_token * short - by_pair * short**2)
    return int(constant + tokens * (by_token + by_pair * longest))


def _kept_bytes(model: Any, count: int, autocast: torch.dtype | None) -> int:
    """Of one row of `count` tokens: the memory that saved tensors hold, each piece once, without the weights."""
    base = unwrap(model)
    weights = {parameter.untyped_storage().data_ptr() for parameter in base.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.zeros((1, count), dtype=torch.long, device=base.device)
    with (
        _training(base),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast(base.device.type, dtype=autocast, enabled=autocast is not None),
    ):
        output = base.get_decoder()(input_ids=ids, use_cache=False)
        del output  # until here it held what was kept: no address was used twice
    return sum(kept.values())


@contextlib.contextmanager
def _training(model: Any) -> Iterator[None]:
    """In training mode, with gradients, and random numbers and mode as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.enable_grad():
        try:
            model.train()
            yield
        finally:
            for module, mode in modes:
                module.training = mode


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process can still get there; None where that is not known."""
    if device.type == "cuda":
        return free_on_gpu(device)
    if device.type == "cpu":
        import psutil

        return psutil.virtual_memory().available
    return None


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
