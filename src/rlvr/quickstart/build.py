"""Builds the quickstart's model: `python -m rlvr.quickstart.build FOLDER --seed SEED`."""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rlvr.errors import ModelError, RlvrError
from rlvr.quickstart import ENV_OPTIONS
from rlvr.quickstart.warm_start import Recipe, Scores, imitate, lessons

RECORD = "quickstart.json"  # beside the weights: what the model was made from
WEIGHTS = "model.safetensors"
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
    folder = Path(folder)
    made_from = {"seed": seed, "recipe": json.loads(json.dumps(asdict(recipe))), "env_options": ENV_OPTIONS}
    if _holds(folder, made_from):
        report(f"warm start: using the model in {folder}")
        return folder
    if folder.exists() and not (folder / RECORD).is_file() and any(folder.iterdir()):
        raise ModelError(f"the folder {str(folder)!r} holds something else; give one that is empty or new.")
    model, tokenizer, scores = _learn(seed, recipe, report)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        made = Path(temporary) / "model"  # moved into place whole: an interrupted build leaves nothing behind
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        record = {**made_from, "sha256": _digest(made / WEIGHTS), "validation": asdict(scores)}
        (made / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        made.rename(folder)
    return folder


def _learn(seed: int, recipe: Recipe, report: Callable[[str], None]) -> tuple[Any, Any, Scores]:
    from rlvr.environments.arithmetic import arithmetic
    from rlvr.testing.tiny import tiny_model, tiny_tokenizer

    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["user\n", "assistant\n"])  # the words of the chat template: one token each, not ten
    rows = arithmetic(**ENV_OPTIONS, seed=seed).train_dataset
    everything = lessons(tokenizer, list(rows))
    taught, validation = everything[VALIDATION:], everything[:VALIDATION]
    for attempt in range(ATTEMPTS):
        model = tiny_model(
            hidden_size=recipe.hidden_size,
            layers=recipe.layers,
            heads=recipe.heads,
            kv_heads=recipe.heads,
            intermediate_size=4 * recipe.hidden_size,
            vocab_size=len(tokenizer),
            initializer_range=recipe.initializer_range,
            rope_parameters={"rope_type": "default", "rope_theta": recipe.rope_theta},
            tie_word_embeddings=True,
            seed=seed + 1000 * attempt,
        ).train()
        scores = imitate(model, taught, validation, recipe, seed=seed + 1000 * attempt, report=report)
        if scores.within(recipe, recipe.least_known):
            return model.eval(), tokenizer, scores
        report(f"warm start: initialisation {attempt + 1} of {ATTEMPTS} got stuck at {scores}")
    raise ModelError(
        f"the warm start did not succeed in {ATTEMPTS} attempts with seed {seed}; the last one ended at {scores}. "
        "Try another --seed."
    )


def _holds(folder: Path, made_from: dict[str, Any]) -> bool:
    """Whether the model in `folder` is whole, and made from just that."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return made_from.items() <= record.items() and record["sha256"] == _digest(folder / WEIGHTS)
    except (OSError, ValueError, KeyError, AttributeError):
        return False


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m rlvr.quickstart.build", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        build(arguments.folder, seed=arguments.seed, report=partial(print, flush=True))
    except RlvrError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
