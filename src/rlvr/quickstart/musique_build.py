"""Supervised warm start of the MuSiQue model; `rlvr.quickstart.musique` says what it is for."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlvr.errors import ModelError
from rlvr.quickstart.imitation import IGNORED, Course, learn, likelihood, untaught
from rlvr.quickstart.musique import ENV_OPTIONS
from rlvr.quickstart.musique_teacher import demonstrate, sample_tokenizer
from rlvr.quickstart.saved import make_once
from rlvr.rollout.episodes import Rollout

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

LENGTH = 1024  # tokens of a rollout at most
TEACHING_SEED = 1_000_000  # added to the seed: the teacher's questions are others than those of the run


@dataclass(frozen=True, kw_only=True)
class Recipe(Course):
    """What the warm start depends on besides the seed."""

    careless: float = 0.7  # share of the demonstrations in which the teacher answers too early, where it can
    demonstrations: int = 4000
    validation: int = 200  # questions of the training split that the teacher does not show
    vocab_size: int = 1500
    architecture: str = "llama"  # AutoTokenizer gives a Qwen2 the pre-tokenizer of Qwen2, whatever was saved
    hidden_size: int = 128
    heads: int = 4
    initializer_range: float = 0.06
    batch_size: int = 32
    max_steps: int = 600
    known: float = 0.9  # stops once the model can do so many of the golden rollouts
    least_known: float = 0.7  # at max_steps; less means that the model got stuck


@dataclass(frozen=True)
class Scores:
    """On golden rollouts, those of a teacher who takes care, to questions that were not shown.

    Args:
        known: share in which every token is the likeliest one, but for the first of each turn: which tool to call.
        right: mean probability of the rollout.
    """

    known: float
    right: float


def build(
    folder: str | Path,
    *,
    seed: int = 0,
    recipe: Recipe = Recipe(),
    report: Callable[[str], None] = print,
) -> Path:
    """Makes a tiny Llama and its tokenizer, warm-starts it and saves both, as `from_pretrained` reads them.

    A folder that holds the model of this seed and recipe already is left as it is.

    Raises:
        ModelError: the folder holds something else, or the model did not learn enough.
    """
    made_from = {"seed": seed, "recipe": asdict(recipe), "env_options": ENV_OPTIONS}
    return make_once(folder, made_from, make=lambda: _learn(seed, recipe, report), report=report)


def _learn(seed: int, recipe: Recipe, report: Callable[[str], None]) -> tuple[Any, Any, Scores]:
    from rlvr.environments.musique import musique

    chance = random.Random(seed)
    size = recipe.demonstrations + recipe.validation
    environment = musique(**{**ENV_OPTIONS, "sample_size": size, "seed": seed + TEACHING_SEED})
    rows = environment.train_dataset
    tokenizer = sample_tokenizer(environment, rows, vocab_size=recipe.vocab_size)
    hasty = [chance.random() < recipe.careless for _ in range(recipe.demonstrations)]
    rollouts = demonstrate(environment, tokenizer, rows, [*hasty, *[False] * recipe.validation])
    report(f"warm start: {recipe.demonstrations} demonstrations, {len(tokenizer)} tokens in the vocabulary")
    shown = as_batch(rollouts[: recipe.demonstrations], tokenizer.pad_token_id)
    golden = as_batch(rollouts[recipe.demonstrations :], tokenizer.pad_token_id)
    model = untaught(recipe, tokenizer, length=LENGTH, seed=seed)
    scores = imitate(model, shown, golden, recipe, chance=chance, report=report)
    if scores.known < recipe.least_known:
        raise ModelError(
            f"the warm start did not succeed with seed {seed}: the model ended at {scores}. Try another --seed."
        )
    return model.eval(), tokenizer, scores


def as_batch(rollouts: Sequence[Rollout], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, both of shape (N, T), padded on the right. Only what was sampled has labels."""
    import torch

    shape = (len(rollouts), max(len(rollout.prompt_ids) + len(rollout.completion_ids) for rollout in rollouts))
    ids, labels = torch.full(shape, pad_token_id), torch.full(shape, IGNORED)
    for row, rollout in enumerate(rollouts):
        start = len(rollout.prompt_ids)
        end = start + len(rollout.completion_ids)
        ids[row, :end] = torch.tensor([*rollout.prompt_ids, *rollout.completion_ids])
        sampled = torch.tensor(rollout.sampled_mask, dtype=torch.bool)
        labels[row, start:end] = torch.where(sampled, ids[row, start:end], IGNORED)
    return ids, labels


def imitate(
    model: PreTrainedModel,
    shown: tuple[torch.Tensor, torch.Tensor],
    golden: tuple[torch.Tensor, torch.Tensor],
    recipe: Recipe,
    *,
    chance: random.Random,
    report: Callable[[str], None] = print,
) -> Scores:
    """Trains `model` on what was shown until it can do it well enough; how it then stands."""
    ids, labels = shown

    def next_batch() -> tuple[torch.Tensor, torch.Tensor]:
        chosen = chance.choices(range(len(ids)), k=recipe.batch_size)
        return ids[chosen], labels[chosen]

    def good_enough(step: int) -> bool:
        scores = examine(model, golden)
        report(f"warm start: step {step:4d}  known {scores.known:.2f}  right {scores.right:.2f}")
        return scores.known >= recipe.known

    learn(model, recipe, next_batch=next_batch, good_enough=good_enough)
    return examine(model, golden)


def examine(model: PreTrainedModel, golden: tuple[torch.Tensor, torch.Tensor]) -> Scores:
    """One forward pass over golden rollouts, without sampling."""
    logprobs, likeliest = likelihood(model, *golden)
    labels = golden[1]
    first_of_turn = (labels[:, 1:] != IGNORED) & (labels[:, :-1] == IGNORED)
    known = (likeliest | first_of_turn).all(-1).float().mean().item()
    return Scores(known, logprobs.sum(-1).exp().mean().item())
