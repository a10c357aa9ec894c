"""Supervised warm start of the quickstart's model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlvr.errors import ModelError
from rlvr.quickstart import ENV_OPTIONS
from rlvr.quickstart.imitation import untaught
from rlvr.quickstart.saved import make_once
from rlvr.quickstart.warm_start import Recipe, Scores, imitate, lessons

VALIDATION = 500  # problems of the training split that the teacher does not demonstrate
ATTEMPTS = 4  # initialisations; few get stuck


def build(
    folder: str | Path,
    *,
    seed: int = 0,
    recipe: Recipe = Recipe(),  # noqa: B008 (frozen)
    report: Callable[[str], None] = print,
) -> Path:
    """Makes a tiny Qwen2 and its tokenizer, warm-starts it and saves both, as `from_pretrained` reads them.

    A folder that holds the model of this seed and recipe already is left as it is.

    Raises:
        ModelError: the folder holds something else, or no initialisation learned enough.
    """
    made_from = {"seed": seed, "recipe": asdict(recipe), "env_options": ENV_OPTIONS}
    return make_once(folder, made_from, make=lambda: _learn(seed, recipe, report), report=report)


def _learn(seed: int, recipe: Recipe, report: Callable[[str], None]) -> tuple[Any, Any, Scores]:
    from rlvr.environments.arithmetic import arithmetic
    from rlvr.testing.tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["user\n", "assistant\n"])  # the words of the chat template: one token each, not ten
    rows = arithmetic(**ENV_OPTIONS, seed=seed).train_dataset
    everything = lessons(tokenizer, list(rows))
    taught, validation = everything[VALIDATION:], everything[:VALIDATION]
    for attempt in range(ATTEMPTS):
        model = untaught(recipe, tokenizer, length=4096, seed=seed + 1000 * attempt)
        scores = imitate(model, taught, validation, recipe, seed=seed + 1000 * attempt, report=report)
        if scores.within(recipe, recipe.least_known):
            return model.eval(), tokenizer, scores
        report(f"warm start: initialisation {attempt + 1} of {ATTEMPTS} got stuck at {scores}")
    raise ModelError(
        f"the warm start did not succeed in {ATTEMPTS} attempts with seed {seed}; the last one ended at {scores}. "
        "Try another --seed."
    )
