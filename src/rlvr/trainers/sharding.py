"""Whether training will spread the weights over processes, known before it does: accelerate shards when it begins."""

from __future__ import annotations

from typing import Any


def sharding_problem(trainer: Any) -> str | None:
    """Why a fast path cannot have the weights of this trainer's model whole, in one line; None if it can.

    Asks what accelerate was set up for, by training arguments or by its own launcher. DeepSpeed ZeRO-1 and ZeRO-2
    leave the weights whole.
    """
    if trainer.is_fsdp_enabled:
        return "FSDP shards the weights"
    deepspeed = trainer.accelerator.state.deepspeed_plugin
    if deepspeed is not None and deepspeed.zero_stage == 3:
        return "DeepSpeed ZeRO-3 shards the weights"
    return None


def launched_to_shard() -> bool:
    """Whether accelerate's launcher was told of FSDP or DeepSpeed, of any stage: known before there is a trainer."""
    from accelerate.utils import parse_flag_from_env

    return any(parse_flag_from_env(f"ACCELERATE_USE_{name}") for name in ("FSDP", "DEEPSPEED"))
