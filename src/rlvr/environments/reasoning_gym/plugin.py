"""Entry point of the environments `reasoning-gym:TASK`."""

from __future__ import annotations

import importlib.util

from rlvr.environments.base import Environment
from rlvr.plugins.hookspecs import hookimpl


@hookimpl
def rlvr_environment(
    variant: str = "",
    train_size: int = 2000,
    eval_size: int = 200,
    seed: int = 0,
    config: str = "",
    format_weight: float = 0.1,
) -> Environment:
    """A procedural task of reasoning-gym: reasoning-gym:TASK.

    Args:
        variant: the task, for example leg_counting.
        train_size: problems to train on.
        eval_size: problems held out, at most.
        seed: decides which problems are made.
        config: the task's own settings as a JSON object.
        format_weight: weight of an answer in <answer> tags.
    """
    from rlvr.environments.reasoning_gym import reasoning_gym

    return reasoning_gym(
        variant, train_size=train_size, eval_size=eval_size, seed=seed, config=config, format_weight=format_weight
    )


@hookimpl
def rlvr_environment_availability() -> str | None:
    if importlib.util.find_spec("reasoning_gym") is not None:
        return None
    return 'it needs reasoning-gym, which is not installed. Install it with: pip install "rlvr[reasoning-gym]"'
