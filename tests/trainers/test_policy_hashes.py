"""The hash of each step is that of the weights at that step, whatever was done to the model in between."""

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from rlvr.testing.tiny import tiny_model
from rlvr.tracking.adapter_hash import adapter_hash
from rlvr.trainers import policy_hashes
from rlvr.trainers.policy_hashes import PolicyHashes

LORA = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")


def train_a_weight(model):
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).add_(1)


def replace_a_parameter(model):
    layer = model.get_base_model().model.layers[0].self_attn.q_proj.lora_A["default"]
    layer.weight = torch.nn.Parameter(layer.weight.detach() + 1)


def switch_to_another_adapter(model):
    model.add_adapter("second", LORA)
    model.set_adapter("second")


def add_an_adapter_to_the_active_ones(model):
    model.add_adapter("second", LORA)
    model.base_model.set_adapter(["default", "second"])


def train_a_norm_too(model):
    model.get_base_model().model.norm.weight.requires_grad_(True)


@pytest.mark.parametrize(
    "change",
    [
        train_a_weight,
        replace_a_parameter,
        switch_to_another_adapter,
        add_an_adapter_to_the_active_ones,
        train_a_norm_too,
    ],
)
def test_follows_the_model(change):
    model = get_peft_model(tiny_model(), LORA)
    hashes = PolicyHashes(model)
    first = hashes.at(0)
    assert first == adapter_hash(model)
    change(model)
    assert hashes.at(0) == first  # once a step
    assert hashes.at(1) == adapter_hash(model) != first


def test_peft_is_asked_once_while_the_parameters_are_the_same(monkeypatch):
    asked = []
    own = policy_hashes.trained_tensors
    monkeypatch.setattr(policy_hashes, "trained_tensors", lambda model: asked.append(1) or own(model))
    hashes = PolicyHashes(get_peft_model(tiny_model(), LORA))
    for step in range(3):
        train_a_weight(hashes._model)
        hashes.at(step)
    assert len(asked) == 1


def test_of_tensors_that_peft_computes():
    model = get_peft_model(tiny_model(), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    hashes = PolicyHashes(model)
    first = hashes.at(0)
    train_a_weight(model)
    assert hashes.at(1) == adapter_hash(model) != first


def test_of_adapters_that_transformers_put_in():
    model = tiny_model()
    model.add_adapter(LORA)
    assert PolicyHashes(model).at(0) == adapter_hash(model)
