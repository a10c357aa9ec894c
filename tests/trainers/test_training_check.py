"""The check after the first step that counts: when it passes, when it waits, when it stops the run."""

from __future__ import annotations

import peft_forms as forms
import pytest
import torch
from tests_support import grpo_config
from torch import nn

from rlvr.errors import FrozenTrainingError
from rlvr.testing.tiny import tiny_model
from rlvr.trainers import EnhancedGRPOTrainer
from rlvr.trainers.adapters import TrainingCheck

pytestmark = pytest.mark.both

ADVANTAGES = torch.tensor([0.5, -0.5])


def small_model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).to(dtype)


def step(check, model, optimizer, *, advantages=ADVANTAGES, gradient=1.0, mask=None):
    """One optimizer step with the same gradient everywhere."""
    check.note_advantages(advantages, mask)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, gradient)
    check.before_step(optimizer)
    optimizer.step()
    check.after_step(optimizer)
    optimizer.zero_grad()


def test_passes_once_and_is_over():
    model = small_model()
    check = TrainingCheck(model)
    step(check, model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert check.done
    frozen = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    step(check, model, frozen)  # not looked at any more


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_of_other_parameters_is_found_out(optimizer_class):
    model = small_model()
    check = TrainingCheck(model)
    with pytest.raises(FrozenTrainingError) as error:
        step(check, model, optimizer_class(small_model().parameters(), lr=0.1))
    message = str(error.value)
    assert "not one bit of the trainable parameters changed (4 trainable tensors, for example 0.weight)" in message
    assert "made from other parameters" in message


def test_one_changed_bit_is_enough():
    model = small_model()
    check = TrainingCheck(model)
    check.note_advantages(ADVANTAGES)
    check.before_step(None)
    with torch.no_grad():
        bits = model[1].bias.view(torch.int32)
        bits[0] ^= 1
    check.after_step(None)
    assert check.done


def test_waits_for_an_advantage_that_is_not_zero():
    model = small_model()
    check = TrainingCheck(model)
    frozen = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    step(check, model, frozen, advantages=torch.zeros(2))
    assert not check.done
    with pytest.raises(FrozenTrainingError):
        step(check, model, frozen)


def test_a_change_before_the_first_advantage_proves_nothing():
    model = small_model()
    check = TrainingCheck(model)
    step(check, model, torch.optim.SGD(model.parameters(), lr=0.1), advantages=torch.zeros(2))
    assert not check.done
    with pytest.raises(FrozenTrainingError):
        step(check, model, torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1))


def test_advantages_of_completions_that_the_loss_leaves_out_do_not_count():
    model = small_model()
    check = TrainingCheck(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    left_out = torch.tensor([[0, 0, 0], [1, 1, 0]])
    step(check, model, optimizer, advantages=torch.tensor([0.5, 0.0]), gradient=0.0, mask=left_out)
    step(check, model, optimizer, advantages=torch.tensor([[0.5] * 3, [0.0] * 3]), gradient=0.0, mask=left_out)
    assert not check.done
    with pytest.raises(FrozenTrainingError, match="gradient is exactly zero"):
        step(check, model, optimizer, advantages=torch.tensor([0.0, 0.5]), gradient=0.0, mask=left_out)


def test_weight_decay_without_gradients_is_not_training():
    model = small_model()
    check = TrainingCheck(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    with pytest.raises(FrozenTrainingError, match="every gradient is exactly zero"):
        step(check, model, optimizer, gradient=0.0)


def test_waits_while_the_learning_rate_is_zero():
    model = small_model()
    check = TrainingCheck(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(i, 1))  # linear warmup: 0 first
    step(check, model, optimizer)
    assert not check.done
    schedule.step()
    step(check, model, optimizer)
    assert check.done


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_waits_where_a_loss_scaler_skips_the_step(value):
    model = small_model()
    check = TrainingCheck(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    check.note_advantages(ADVANTAGES)
    model[0].weight.grad = torch.full_like(model[0].weight, value)
    model[1].weight.grad = torch.ones_like(model[1].weight)
    check.before_step(optimizer)
    check.after_step(optimizer)  # skipped: nothing changed
    assert not check.done
    step(check, model, optimizer)
    assert check.done


def test_half_precision_may_stand_still_in_warmup_and_not_after():
    model = small_model(torch.bfloat16)
    check = TrainingCheck(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 0.1 if i == 0 else 1.0)
    step(check, model, optimizer)
    assert not check.done
    schedule.step()
    with pytest.raises(FrozenTrainingError, match="too small for half precision"):
        step(check, model, optimizer)


def test_callback_calls_it_around_the_optimizer_step():
    model = small_model()
    check = TrainingCheck(model)
    callback = check.callback()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    check.note_advantages(ADVANTAGES)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    callback.on_pre_optimizer_step(None, None, None, optimizer=optimizer)
    with pytest.raises(FrozenTrainingError):
        callback.on_optimizer_step(None, None, None, optimizer=optimizer)
    optimizer.step()
    callback.on_optimizer_step(None, None, None, optimizer=optimizer)
    assert check.done


# --- in the trainer --------------------------------------------------------------------------------------------


def make_trainer(tmp_path, tokenizer, model, *, optimizer=None, **arguments):
    return EnhancedGRPOTrainer(
        model=model,
        reward_funcs=forms.completions_by_length,
        args=grpo_config(tmp_path, **arguments),
        train_dataset=forms.PROMPTS,
        processing_class=tokenizer,
        optimizers=(optimizer, None),
    )


def test_a_run_that_trains_other_parameters_stops_at_its_first_step(tmp_path, tokenizer):
    optimizer = torch.optim.SGD(tiny_model().parameters(), lr=0.1)
    trainer = make_trainer(tmp_path, tokenizer, tiny_model(), optimizer=optimizer, max_steps=3)
    with pytest.raises(FrozenTrainingError, match="made from other parameters"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_an_adapter_disabled_after_construction_stops_the_run(tmp_path, tokenizer):
    model = forms.perturbed(forms.wrapped())
    trainer = make_trainer(tmp_path, tokenizer, model)
    model.get_base_model().lm_head.weight.requires_grad_(True)  # so that the loss still has a gradient
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if "lora_" in n], lr=0.1)
    trainer.optimizer = optimizer
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module._disable_adapters = True
    with pytest.raises(FrozenTrainingError, match="disabled"):
        trainer.train()


def test_a_run_whose_rewards_never_differ_goes_on(tmp_path, tokenizer):
    trainer = EnhancedGRPOTrainer(
        model=tiny_model(),
        reward_funcs=lambda completions, **_: [1.0] * len(completions),
        args=grpo_config(tmp_path),
        train_dataset=forms.PROMPTS,
        processing_class=tokenizer,
    )
    trainer.train()
    assert trainer.state.global_step == 2
    assert not trainer._training_check.done


def test_warmup_from_zero_trains(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, tiny_model(), warmup_steps=1, max_steps=2)
    trainer.train()
    assert trainer.state.log_history[0]["learning_rate"] == 0
    assert trainer._training_check.done
