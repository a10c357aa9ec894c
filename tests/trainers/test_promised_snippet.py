"""The snippet that the project promises, as it stands, on Unsloth and on transformers + PEFT."""

from __future__ import annotations

import pytest
import torch
from tests_support import grpo_config

from rlvr import Environment, Rubric, load_policy
from rlvr.trainers import EnhancedGRPOTrainer


@pytest.fixture
def env():
    rows = [{"question": f"say {i}", "answer": str(i)} for i in range(8)]
    return Environment(name="saying", train_dataset=rows, rubric=Rubric(distinct))


def distinct(trajectory):
    return float(len(set(trajectory.text)))


def check_trains(trainer):
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainable = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    changed = {n for n, p in trainer.model.named_parameters() if not torch.equal(before[n], p)}
    assert changed
    assert changed <= trainable
    assert all("lora_" in name for name in changed)
    assert sum("base_model.model" in name for name in before) == len(before)  # wrapped once
    assert not any("base_model.model.base_model" in name for name in before)


@pytest.mark.unsloth
def test_unsloths_model_trains_as_it_is(tmp_path, model_folder, env):
    from unsloth import FastLanguageModel

    training_args = grpo_config(tmp_path)
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=str(model_folder), max_seq_length=1024, load_in_4bit=False, dtype=torch.float32
    )
    model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=32, use_gradient_checkpointing="unsloth")
    trainer = EnhancedGRPOTrainer(
        model=model, processing_class=tokenizer, env=env, args=training_args, peft_config=None
    )
    check_trains(trainer)


@pytest.mark.both
def test_a_peft_model_trains_as_it_is(tmp_path, model_folder, env):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    training_args = grpo_config(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    trainer = EnhancedGRPOTrainer(
        model=model, processing_class=tokenizer, env=env, args=training_args, peft_config=None
    )
    check_trains(trainer)


@pytest.mark.parametrize(
    "backend", [pytest.param("hf", marks=pytest.mark.both), pytest.param("unsloth", marks=pytest.mark.unsloth)]
)
def test_one_word_switches_the_backend(tmp_path, model_folder, env, backend):
    policy = load_policy(str(model_folder), backend=backend, max_seq_length=1024, dtype="float32")
    trainer = EnhancedGRPOTrainer(
        model=policy.model, processing_class=policy.tokenizer, env=env, args=grpo_config(tmp_path)
    )
    check_trains(trainer)
