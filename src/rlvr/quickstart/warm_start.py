"""Supervised warm start of a tiny model, by a teacher who knows better than it does.

The teacher adds two numbers in columns, and six times in ten leaves every carry out: 57+68 is 15 then, and 125
otherwise. A model that imitates it knows both procedures, and its greedy answers are right where nothing has to be
carried and now and then elsewhere.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlvr.quickstart.imitation import IGNORED, Course, learn, likelihood

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Recipe(Course):
    """What the warm start depends on besides the seed."""

    forgets: float = 0.6  # share of the demonstrations in which the teacher leaves the carries out
    known: float = 0.85  # stops once so much probability lies on one of the teacher's two answers
    least_known: float = 0.6  # at max_steps; less means that the model got stuck
    accuracy: tuple[float, float] = (0.28, 0.5)  # greedy, on validation problems: room to improve, and to sample


@dataclass(frozen=True)
class Scores:
    """On problems that are not demonstrated: validation problems of the training split.

    Args:
        greedy: share whose greedy answer is right.
        right: mean probability of the right answer: the accuracy of samples at temperature 1.
        known: mean probability of the right answer or of the one without carries.
    """

    greedy: float
    right: float
    known: float

    def within(self, recipe: Recipe, least_known: float) -> bool:
        low, high = recipe.accuracy
        return low <= self.greedy <= high and low <= self.right <= high and self.known >= least_known


@dataclass(frozen=True)
class Lessons:
    """N problems with both answers of the teacher: token ids and labels, shape (N, T), padded on the right."""

    carried: tuple[torch.Tensor, torch.Tensor]
    uncarried: tuple[torch.Tensor, torch.Tensor]
    differ: torch.Tensor  # (N,) bool: whether there is something to carry

    def __len__(self) -> int:
        return len(self.differ)

    def __getitem__(self, rows: slice) -> Lessons:
        ids, labels = self.carried
        other_ids, other_labels = self.uncarried
        return Lessons((ids[rows], labels[rows]), (other_ids[rows], other_labels[rows]), self.differ[rows])


def sum_without_carries(a: int, b: int) -> int:
    """Column by column, each carry left out: 57 and 68 give 15."""
    total, place = 0, 1
    while a or b:
        total += (a % 10 + b % 10) % 10 * place
        a, b, place = a // 10, b // 10, place * 10
    return total


def lessons(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Any]) -> Lessons:
    """The rows of an arithmetic environment of level 2 ("17+25=", "42") as the chat that the policy will see."""
    import torch

    wrong = [str(sum_without_carries(*map(int, row["question"].rstrip("=").split("+")))) for row in rows]
    right = [row["answer"] for row in rows]
    template = str(
        tokenizer.apply_chat_template([{"role": "user", "content": "@"}], add_generation_prompt=True, tokenize=False)
    )
    prompts = [template.replace("@", row["question"]) for row in rows]
    return Lessons(
        _encoded(tokenizer, prompts, right),
        _encoded(tokenizer, prompts, wrong),
        torch.tensor([one != other for one, other in zip(right, wrong, strict=True)]),
    )


def _encoded(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], answers: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    prompt_ids = tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
    answer_ids = tokenizer([f"{text}{tokenizer.eos_token}" for text in answers], add_special_tokens=False)["input_ids"]
    width = max(len(ids) for ids in prompt_ids) + 4  # three digits at most, and the end of the turn
    shape = (len(prompts), width)
    ids, labels = torch.full(shape, tokenizer.pad_token_id), torch.full(shape, IGNORED)
    for row, (prompt, answer) in enumerate(zip(prompt_ids, answer_ids, strict=True)):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor([*prompt, *answer])
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return ids, labels


def imitate(
    model: PreTrainedModel,
    taught: Lessons,
    validation: Lessons,
    recipe: Recipe,
    *,
    seed: int,
    report: Callable[[str], None] = print,
) -> Scores:
    """Trains `model` on the teacher's answers until it knows them well enough; how it then stands."""
    import torch

    chance = random.Random(seed)

    def next_batch() -> tuple[torch.Tensor, torch.Tensor]:
        chosen = torch.tensor(chance.choices(range(len(taught)), k=recipe.batch_size))
        forgetful = torch.tensor([[chance.random() < recipe.forgets] for _ in chosen])
        ids, labels = (
            torch.where(forgetful, wrong[chosen], right[chosen])
            for wrong, right in zip(taught.uncarried, taught.carried, strict=True)
        )
        return ids, labels

    def good_enough(step: int) -> bool:
        scores = examine(model, validation)
        done = scores.within(recipe, recipe.known)
        if done or step % (2 * recipe.check_every) == 0:
            report(f"warm start: step {step:4d}  exact match {scores.greedy:.2f}  known {scores.known:.2f}")
        return done

    learn(model, recipe, next_batch=next_batch, good_enough=good_enough)
    return examine(model, validation)


def examine(model: PreTrainedModel, validation: Lessons) -> Scores:
    """One forward pass with each of the teacher's answers, without sampling."""
    right, greedy = likelihood(model, *validation.carried)
    wrong, _ = likelihood(model, *validation.uncarried)
    right, wrong = right.sum(-1).exp(), wrong.sum(-1).exp()
    known = right + wrong * validation.differ
    return Scores(greedy.all(-1).float().mean().item(), right.mean().item(), known.mean().item())
