"""Entry point of the environment `wordle`."""

from __future__ import annotations

from rlvr.environments.base import Environment
from rlvr.plugins.hookspecs import hookimpl


@hookimpl
def rlvr_environment(
    guesses: int = 6,
    train_size: int | None = None,
    eval_size: int | None = None,
    seed: int = 0,
    progress_weight: float = 0.2,
    format_weight: float = 0.1,
) -> Environment:
    """Guess a word of five letters; the environment answers each guess.

    Args:
        guesses: guesses at most.
        train_size: words to train on; all by default.
        eval_size: words held out; all by default.
        seed: of their order.
        progress_weight: weight of the most letters that a guess had right.
        format_weight: weight of the share of turns with a proper guess.
    """
    from rlvr.environments.wordle import wordle

    return wordle(
        guesses=guesses,
        train_size=train_size,
        eval_size=eval_size,
        seed=seed,
        progress_weight=progress_weight,
        format_weight=format_weight,
    )
