"""Supervised learning of what a teacher shows: a tiny transformer from scratch, on a CPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

IGNORED = -100  # labels that the loss leaves out


@dataclass(frozen=True, kw_only=True)
class Course:
    """The model, and how long and how fast it learns."""

    architecture: str = "qwen2"
    hidden_size: int = 64
    layers: int = 2
    heads: int = 2
    rope_theta: float = 100.0  # sequences are short
    initializer_range: float = 0.05
    batch_size: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    warmup_steps: int = 50
    max_steps: int = 1500
    check_every: int = 50


def untaught(course: Course, tokenizer: PreTrainedTokenizerBase, *, length: int, seed: int) -> PreTrainedModel:
    """A model with random weights, for sequences of at most `length` tokens."""
    from rlvr.testing.tiny import tiny_model

    return tiny_model(
        course.architecture,
        hidden_size=course.hidden_size,
        layers=course.layers,
        heads=course.heads,
        kv_heads=course.heads,
        intermediate_size=4 * course.hidden_size,
        vocab_size=len(tokenizer),
        max_position_embeddings=length,
        initializer_range=course.initializer_range,
        rope_parameters={"rope_type": "default", "rope_theta": course.rope_theta},
        tie_word_embeddings=True,
        seed=seed,
    ).train()


def learn(
    model: PreTrainedModel,
    course: Course,
    *,
    next_batch: Callable[[], tuple[torch.Tensor, torch.Tensor]],
    good_enough: Callable[[int], bool],
) -> None:
    """Trains `model` until it is good enough, or for `max_steps`.

    Args:
        next_batch: gives token ids and labels, both of shape (batch, T).
        good_enough: asked every `check_every` steps, with the number of the step.
    """
    import torch

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=course.learning_rate, betas=(0.9, 0.95), weight_decay=course.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, course))
    for step in range(1, course.max_steps + 1):
        ids, labels = next_batch()
        model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % course.check_every == 0 and good_enough(step):
            break


def _rate(step: int, course: Course) -> float:
    """Share of the learning rate: linear warm-up, then half a cosine down to a tenth."""
    progress = step / course.max_steps
    return min((step + 1) / course.warmup_steps, 0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def likelihood(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How a model stands to what was shown, without sampling.

    Returns:
        The log-probability of each labelled token, in nats, and whether it is the likeliest: both of shape
        (N, T - 1), 0.0 and true where the label is ignored.
    """
    import torch

    was_training = model.training
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    model.train(was_training)
    labels = labels[:, 1:]
    counts = labels != IGNORED
    logprobs = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return logprobs * counts, (logits.argmax(-1) == labels) | ~counts
