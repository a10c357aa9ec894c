"""What is trained keeps its dtype, and one that rounds small updates away is said."""

from __future__ import annotations

import logging

import peft_forms as forms
import pytest
import torch
from peft import get_peft_model
from tests_support import grpo_config

from rlvr.testing.tiny import tiny_model
from rlvr.trainers import EnhancedGRPOTrainer

pytestmark = pytest.mark.both

LEARNING_RATE = 1e-5  # rlvr's own default


def make_trainer(tmp_path, tokenizer, model, **options):
    return EnhancedGRPOTrainer(
        model=model,
        reward_funcs=forms.completions_by_length,
        args=grpo_config(tmp_path, max_steps=2, learning_rate=LEARNING_RATE),
        train_dataset=forms.PROMPTS,
        processing_class=tokenizer,
        **options,
    )


def base(*, quantized):
    model = tiny_model().to(torch.bfloat16)
    model.is_loaded_in_4bit = quantized  # all that TRL looks at
    return model


def share_moved(trainer, factor):
    """The share of a factor's numbers that a run changes."""
    before = forms.trainable(trainer.model)
    trainer.train()
    now = forms.trainable(trainer.model)
    moved = [(now[name] != tensor).flatten() for name, tensor in before.items() if factor in name]
    return torch.cat(moved).float().mean().item()


def test_adapters_on_quantized_weights_stay_as_they_were_and_train(tmp_path, tokenizer):
    model = get_peft_model(base(quantized=True), forms.lora())
    before = forms.trainable(model)
    trainer = make_trainer(tmp_path, tokenizer, model)
    now = forms.trainable(trainer.model)
    assert {tensor.dtype for tensor in now.values()} == {torch.float32}
    assert all(torch.equal(now[name], tensor) for name, tensor in before.items())
    assert share_moved(trainer, "lora_A") > 0.9


def test_adapters_that_the_trainer_puts_on_quantized_weights_are_in_float32(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, base(quantized=True), peft_config=forms.lora())
    assert {tensor.dtype for tensor in forms.trainable(trainer.model).values()} == {torch.float32}


def test_adapters_in_half_precision_are_said_for_hardly_a_tenth_of_them_moves(tmp_path, tokenizer, caplog):
    model = get_peft_model(base(quantized=False), forms.lora(), autocast_adapter_dtype=False)
    with caplog.at_level(logging.WARNING, logger="rlvr"):
        trainer = make_trainer(tmp_path, tokenizer, model)
    count = sum(tensor.numel() for tensor in forms.trainable(model).values())
    (line,) = [record.message for record in caplog.records if "rounds small updates away" in record.message]
    assert line.startswith(f"{count:,} of {count:,} trainable parameters are in bfloat16")
    assert share_moved(trainer, "lora_A") < 0.1


def test_weights_in_half_precision_are_said_with_what_to_do(tmp_path, tokenizer, caplog):
    with caplog.at_level(logging.WARNING, logger="rlvr"):
        make_trainer(tmp_path, tokenizer, base(quantized=False))
    assert "--dtype float32" in caplog.text


def test_adapters_in_float32_are_not_worth_a_line(tmp_path, tokenizer, caplog):
    with caplog.at_level(logging.WARNING, logger="rlvr"):
        make_trainer(tmp_path, tokenizer, get_peft_model(base(quantized=False), forms.lora()))
    assert not [record for record in caplog.records if "rounds small updates away" in record.message]
