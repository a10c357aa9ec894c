"""vLLM in the process that trains, as TRL starts it: once in a process, and announced in environment variables."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec

from rlvr.errors import ConfigError

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What TRL sets for vLLM. In the next run of this process they would say that it is one of several."""


def check_vllm_can_start(*, server: bool = False) -> None:
    """
    Args:
        server: whether it runs elsewhere; TRL sends it weights through vLLM's own code, which is needed here too.

    Raises:
        ConfigError: vLLM is not installed, or was started in this process before.
    """
    if find_spec("vllm") is None:
        raise ConfigError(
            "rollout_engine is 'vllm', and vLLM is not installed. Install it with 'pip install \"rlvr[vllm]\"', "
            "or use --rollout-engine auto."
        )
    if not server and _memory_of_an_earlier_vllm():
        raise ConfigError(
            "rollout_engine is 'vllm', and an earlier run of this process started vLLM, which can be done once in a "
            "process. Restart, train with isolate=True, which takes a child process, or use rollout_engine='auto'."
        )


def _memory_of_an_earlier_vllm() -> bool:
    """Whether vLLM's allocator, of which a process has one, holds the weights of an engine, awake or asleep."""
    module = sys.modules.get("vllm.device_allocator.cumem")
    allocator = module and module.CuMemAllocator.instance
    return bool(allocator and allocator.get_current_usage())


@contextlib.contextmanager
def variables_kept() -> Iterator[None]:
    """`VARIABLES` are afterwards what they were before."""
    before = {name: os.environ.get(name) for name in VARIABLES}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
