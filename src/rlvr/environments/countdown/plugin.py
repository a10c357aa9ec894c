"""Entry point of the environment `countdown`."""

from __future__ import annotations

from rlvr.environments.base import Environment
from rlvr.plugins.hookspecs import hookimpl


@hookimpl
def rlvr_environment(
    numbers: int = 3,
    largest: int = 50,
    train_size: int = 2000,
    eval_size: int = 200,
    seed: int = 0,
    format_weight: float = 0.1,
) -> Environment:
    """Reach a number from given numbers with + - * /.

    Args:
        numbers: how many numbers a puzzle has, 2 to 6.
        largest: the largest of them.
        train_size: puzzles to train on.
        eval_size: puzzles held out.
        seed: decides which.
        format_weight: weight of an expression that can be calculated.
    """
    from rlvr.environments.countdown import countdown

    return countdown(
        numbers=numbers,
        largest=largest,
        train_size=train_size,
        eval_size=eval_size,
        seed=seed,
        format_weight=format_weight,
    )
