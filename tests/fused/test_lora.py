"""Fused LoRA layers against PEFT's own."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from rlvr.fused import lora
from rlvr.fused.lora import fuse_lora, unfuse_lora
from rlvr.testing.tiny import tiny_model

INPUT = torch.arange(3, 23).view(2, 10)


def lora_model(architecture="qwen2", **options):
    """LoRA with random A and B, and an untouched copy of it."""
    config = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    model = get_peft_model(tiny_model(architecture), LoraConfig(**config)).train()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model, copy.deepcopy(model)


def outputs_and_gradients(model):
    model.zero_grad()
    logits = model(input_ids=INPUT).logits
    logits.float().pow(2).mean().backward()
    return logits, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model, peft, **tolerance):
    (logits, gradients), (expected, expected_gradients) = map(outputs_and_gradients, (model, peft))
    torch.testing.assert_close(logits, expected, **tolerance)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, **tolerance)


@pytest.fixture
def calls(monkeypatch):
    """How often the fused product runs."""
    seen = []
    product = lora._lora_product
    monkeypatch.setattr(lora, "_lora_product", lambda *args: seen.append(1) or product(*args))
    return seen


@pytest.mark.parametrize("architecture", ["qwen2", "llama", "phi3"])  # qwen2's projections have biases
def test_equals_peft_in_float32(architecture, calls):
    model, peft = lora_model(architecture)
    layers = fuse_lora(model)
    assert fuse_lora(model) == layers > 0
    assert_same(model, peft, rtol=1e-4, atol=1e-6)
    assert len(calls) == layers


def test_gradcheck():
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, a, b = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((5, 4), (3, 4), (3,), (2, 4), (3, 2))
    )
    for tensor in (x, a, b):
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(lambda *free: lora._lora_product(free[0], weight, bias, *free[1:], 1.5), (x, a, b))


@pytest.mark.parametrize("shape", [(0, 32), (2, 0, 32)])
def test_an_input_without_rows_has_an_output_without_rows(shape):
    model, peft = lora_model("llama")
    fuse_lora(model)
    layer, own = (m.get_base_model().model.layers[0].self_attn.k_proj for m in (model, peft))
    assert layer(torch.ones(shape)).shape == own(torch.ones(shape)).shape


def test_under_autocast_as_near_to_float32_as_peft(calls):
    model, peft = lora_model()
    fuse_lora(model)
    _, truth = outputs_and_gradients(copy.deepcopy(peft))
    with torch.autocast("cpu", torch.bfloat16):
        _, ours = outputs_and_gradients(model)
        _, theirs = outputs_and_gradients(peft)
    assert calls
    for name, gradient in truth.items():
        assert ours[name].dtype == torch.float32
        error, reference = ((g[name] - gradient).norm() / gradient.norm() for g in (ours, theirs))
        assert error <= 2 * reference + 1e-3, name


def test_with_gradient_checkpointing(calls):
    model, peft = lora_model("llama")
    layers = fuse_lora(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(model, peft, rtol=1e-4, atol=1e-6)
    assert len(calls) == 2 * layers


def test_checkpointing_does_not_compute_the_last_product_of_a_block_again(monkeypatch):
    model, _ = lora_model("llama")
    layers = fuse_lora(model)
    blocks = model.get_base_model().config.num_hidden_layers
    outputs = []
    apply = lora._LoraOutput.apply
    monkeypatch.setattr(lora._LoraOutput, "apply", lambda *args: outputs.append(1) or apply(*args))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    outputs_and_gradients(model)
    assert len(outputs) == 2 * layers - blocks


@pytest.mark.parametrize(
    "case",
    ["dora", "dropout", "lora_bias", "merged", "disabled", "two adapters", "trained base", "unlike dtypes"],
)
def test_whatever_is_not_plain_lora_stays_with_peft(case, calls):
    options = {"dora": {"use_dora": True}, "dropout": {"lora_dropout": 0.5}, "lora_bias": {"lora_bias": True}}
    model, peft = lora_model(**options.get(case, {}))
    fuse_lora(model)
    for m in (model, peft):
        if case == "merged":
            m.merge_adapter()
        elif case == "two adapters":
            m.add_adapter("second", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=True))
            m.base_model.set_adapter(["default", "second"])
        elif case == "trained base":
            m.get_base_model().requires_grad_(True)
        elif case == "unlike dtypes":
            for name, parameter in m.named_parameters():
                if "lora_" in name:
                    parameter.data = parameter.data.double()
    results = []
    for m in (model, peft):
        torch.manual_seed(0)
        with m.disable_adapter() if case == "disabled" else torch.enable_grad():
            results.append(m(input_ids=INPUT).logits)
    assert not calls
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_copies_and_unfusing(calls):
    model, peft = lora_model()
    fuse_lora(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    expected = peft(input_ids=INPUT).logits
    torch.testing.assert_close(model(input_ids=INPUT).logits, expected)
    assert not torch.allclose(twin(input_ids=INPUT).logits, expected)  # a copy computes with its own weights
    calls.clear()
    unfuse_lora(model)
    torch.testing.assert_close(model(input_ids=INPUT).logits, expected, rtol=0, atol=0)
    assert not calls
