"""A training by Unsloth's trainer alone, on the rows that a trainer of ours has played, and what both did.

Importable since pytest puts this folder on the path; Unsloth has to be imported first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from transformers import TrainerCallback

from rlvr.trainers import EnhancedGRPOTrainer


class Forwards(TrainerCallback):
    """Of one training: whether gradients were on, for each forward that shared prompts; and each step's gradient."""

    def __init__(self):
        self.shared: list[bool] = []
        self.gradients: list[torch.Tensor] = []

    def on_train_begin(self, args, state, control, model, **_):
        model.register_forward_hook(self._note, with_kwargs=True)

    def _note(self, model, args, kwargs, output):
        if kwargs.get("prefix_seg_info") is not None:  # what Unsloth gives its attention then
            self.shared.append(torch.is_grad_enabled())

    def on_pre_optimizer_step(self, args, state, control, model, **_):
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        self.gradients.append(torch.cat([gradient.flatten().float() for gradient in gradients]))


@contextmanager
def batches_kept() -> Iterator[list[tuple[dict[str, Any], list[float]]]]:
    """The batches that environments play meanwhile: what TRL's `rollout_func` gives, and the rewards."""
    batches = []
    play = EnhancedGRPOTrainer._play_environment

    def played(trainer, prompts, trl_trainer):
        batch = play(trainer, prompts, trl_trainer)
        rubric = trainer.env.rubric
        rewards = [rubric.total(rubric.score(trajectory)) for trajectory in batch["trajectory"]]
        batches.append(({name: batch[name] for name in ("prompt_ids", "completion_ids", "logprobs")}, rewards))
        return batch

    with patch.object(EnhancedGRPOTrainer, "_play_environment", played):
        yield batches


def train_by_unsloth(model, tokenizer, batches, args) -> Forwards:
    """`batches` are of one optimizer step each."""
    import trl
    from datasets import Dataset

    forwards = Forwards()
    trainer = trl.GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        args=args,
        reward_funcs=lambda completions, trainer_state, **_: batches[trainer_state.global_step][1],
        rollout_func=lambda prompts, trainer: batches[trainer.state.global_step][0],
        train_dataset=Dataset.from_list([{"prompt": f"stands for prompt {n}"} for n in range(8)]),
        callbacks=[forwards],
    )
    assert not isinstance(trainer, EnhancedGRPOTrainer)
    trainer.train()
    return forwards
