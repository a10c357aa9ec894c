"""Entry point of the environment `arithmetic`."""

from __future__ import annotations

from rlvr.environments.base import Environment
from rlvr.plugins.hookspecs import hookimpl


@hookimpl
def rlvr_environment(
    levels: str = "1,2,3",
    train_size: int = 2000,
    eval_size: int = 200,
    seed: int = 0,
    answer_format: str = "bare",
) -> Environment:
    """Arithmetic problems made on the spot.

    Args:
        levels: 1: 3+4, 2: 17+25, 3: 17-25, 4: 17*6, 5: 40+17*6, 6: 1234+5678; several with commas.
        train_size: rows to train on.
        eval_size: rows held out, at most.
        seed: decides which problems are drawn.
        answer_format: bare (the number alone) or tags (between <answer> and </answer>).
    """
    from rlvr.environments.arithmetic import arithmetic

    return arithmetic(
        levels=levels, train_size=train_size, eval_size=eval_size, seed=seed, answer_format=answer_format
    )
