"""Fused LoRA layers against PEFT's own."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from rlvr.fused import lora
from rlvr.fused.layers import FusedForwards
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
    """The layers that are computed together, for every time that some are."""
    seen = []
    products = lora._lora_products
    monkeypatch.setattr(lora, "_lora_products", lambda x, found: seen.append(found.layers) or products(x, found))
    return seen


@pytest.mark.parametrize(
    ("architecture", "together"),  # qwen2's projections have biases; phi3's are packed
    [("qwen2", [3, 1, 2, 1]), ("llama", [3, 1, 2, 1]), ("phi3", [1, 1, 1, 1])],
)
def test_equals_peft_in_float32(architecture, together, calls):
    model, peft = lora_model(architecture)
    layers = fuse_lora(model)
    assert fuse_lora(model) == layers > 0
    assert_same(model, peft, rtol=1e-4, atol=1e-6)
    assert [len(layers) for layers in calls] == together * model.get_base_model().config.num_hidden_layers


def test_gradcheck():
    generator = torch.Generator().manual_seed(0)
    shapes = (5, 4), (3, 4), (3,), (2, 4), (3, 2), (6, 4), (1, 4), (6, 1)
    x, weight, bias, a, b, second_weight, second_a, second_b = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes
    )

    def outputs(x, a, b, second_a, second_b):
        layers = lora._Layer(weight, bias, a, b, 1.5), lora._Layer(second_weight, None, second_a, second_b, 0.5)
        return lora._lora_products(x, lora.Together.of(layers, x.dtype))

    def alone(x, a, b):
        return lora._lora_products(x, lora.Together.of([lora._Layer(weight, bias, a, b, 1.5)], x.dtype))

    free = [tensor.requires_grad_() for tensor in (x, a, b, second_a, second_b)]
    assert torch.autograd.gradcheck(alone, free[:3])
    assert torch.autograd.gradcheck(outputs, free)
    assert torch.autograd.gradcheck(lambda *free: outputs(*free)[1], free)  # the first without a gradient


def test_the_gradient_of_the_input_takes_its_place_if_asked_for():
    generator = torch.Generator().manual_seed(0)
    x, weight, a, b, grad = (
        torch.randn(shape, generator=generator) for shape in ((5, 6), (4, 6), (2, 6), (4, 2), (5, 4))
    )
    together = lora.Together.of([lora._Layer(weight, None, a, b, 1.5)], torch.float32)
    hidden = together.hidden(x)
    expected, of_adapters = lora.lora_gradients(x, hidden, together, [grad])
    assert expected.data_ptr() != x.data_ptr()
    in_place, also_of_adapters = lora.lora_gradients(x, hidden, together, [grad], in_place=True)
    assert in_place is x
    assert torch.equal(in_place, expected)
    assert all(map(torch.equal, also_of_adapters, of_adapters))


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
    assert sum(map(len, calls)) == 2 * layers


def test_checkpointing_does_not_compute_the_last_product_of_a_block_again(monkeypatch):
    model, _ = lora_model("llama")
    fuse_lora(model)
    blocks = model.get_base_model().config.num_hidden_layers
    counted = []
    outputs = lora.lora_outputs
    monkeypatch.setattr(lora, "lora_outputs", lambda *args: counted.append(1) or outputs(*args))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    outputs_and_gradients(model)
    per_block = 4  # queries, keys and values; their output; gate and up; down
    assert len(counted) == 2 * per_block * blocks - blocks


def test_held_layers_decide_and_cast_once_and_hold_nothing_when_let_go(monkeypatch):
    model, peft = lora_model("llama")
    found = []
    of = lora.Together.of
    monkeypatch.setattr(lora.Together, "of", lambda layers, dtype: found.append(layers) or of(layers, dtype))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    forwards = FusedForwards(model)
    groups = 4 * model.get_base_model().config.num_hidden_layers
    for step in range(3):
        for m in (model, peft):
            for name, parameter in m.named_parameters():
                if "lora_B" in name:
                    parameter.data.fill_(0.1 * step)
        forwards.put_in(hold=True)
        assert_same(model, peft, rtol=1e-4, atol=1e-6)
        assert len(found) == groups * (step + 1)
        if step:  # the last time put in anew, without being taken out
            forwards.take_out()
    forwards.put_in()
    assert_same(model, peft, rtol=1e-4, atol=1e-6)
    assert len(found) == groups * 3 + 2 * groups


def test_held_layers_are_cast_for_each_kind_of_forward():
    model, peft = lora_model("llama")
    forwards = FusedForwards(model)
    forwards.put_in(hold=True)
    for autocast in (True, False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits, expected = model(input_ids=INPUT).logits, peft(input_ids=INPUT).logits
        assert logits.dtype == expected.dtype
        torch.testing.assert_close(logits, expected, **({"rtol": 0.1, "atol": 0.05} if autocast else {}))


def test_a_copy_of_a_layer_that_holds_something_holds_nothing():
    model, peft = lora_model("llama")
    fuse_lora(model)
    lora.hold(module.__dict__.get("forward") for module in model.modules())
    model(input_ids=INPUT)
    copied = copy.deepcopy(model)
    for m in (copied, peft):
        for name, parameter in m.named_parameters():
            if "lora_B" in name:
                parameter.data.mul_(3)
    assert_same(copied, peft, rtol=1e-4, atol=1e-6)


def test_layers_are_computed_together_only_while_all_are_plain(calls):
    model, peft = lora_model("llama")
    fuse_lora(model)
    for m in (model, peft):
        m.get_base_model().model.layers[0].self_attn.v_proj.base_layer.requires_grad_(True)
    assert_same(model, peft, rtol=1e-4, atol=1e-6)
    assert [len(layers) for layers in calls] == [
        1,
        1,
        1,
        2,
        1,
        3,
        1,
        2,
        1,
    ]  # two blocks; `v_proj` by PEFT in the first


def test_a_layer_with_an_input_of_its_own_computes_it(calls):
    model, peft = lora_model("llama")
    fuse_lora(model)
    ours, theirs = (m.get_base_model().model.layers[0].self_attn for m in (model, peft))
    x, other = torch.randn(2, 3, 32), torch.randn(2, 3, 32)
    for name, given in (("q_proj", x), ("k_proj", other), ("v_proj", x), ("v_proj", x)):
        torch.testing.assert_close(getattr(ours, name)(given), getattr(theirs, name)(given))
    assert [len(layers) for layers in calls] == [3, 1, 1]


def test_layers_of_unlike_widths_are_not_computed_together(calls):
    model, peft = lora_model("llama")
    for m in (model, peft):
        attention = m.get_base_model().model.layers[0].self_attn
        attention.k_proj = m.get_base_model().model.layers[0].mlp.down_proj  # as in cross-attention
    fuse_lora(model)
    ours, theirs = (m.get_base_model().model.layers[0].self_attn for m in (model, peft))
    x = torch.randn(2, 3, ours.q_proj.in_features)
    for name, given in (("q_proj", x), ("k_proj", torch.randn(2, 3, ours.k_proj.in_features)), ("v_proj", x)):
        torch.testing.assert_close(getattr(ours, name)(given), getattr(theirs, name)(given))
    assert [len(layers) for layers in calls] == [2, 1]


def test_an_output_made_without_gradients_is_not_taken_where_they_are_asked_for():
    model, _ = lora_model("llama")
    fuse_lora(model)
    attention = model.get_base_model().model.layers[0].self_attn
    x = torch.randn(2, 3, 32)
    with torch.no_grad():
        attention.q_proj(x)
    assert attention.k_proj(x).requires_grad


def test_no_half_precision_copy_of_a_float32_weight_waits_for_the_backward_pass(calls):
    model, _ = lora_model("llama")
    fuse_lora(model)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=INPUT).logits
    kept = {layer.weight.data_ptr() for layers in calls for layer in layers}
    assert logits.requires_grad
    assert kept <= {parameter.data_ptr() for parameter in model.parameters()}


def change_from_outside(model, part, by):
    """Doubles what a part of every LoRA layer computes, as whoever patches models might."""
    for name, module in model.named_modules():
        if type(module) is nn.Linear and part in name.split("."):
            if by == "hook":
                module.register_forward_hook(lambda module, inputs, output: 2 * output)
            else:
                module.forward = lambda x, module=module: 2 * nn.Linear.forward(module, x)


@pytest.mark.parametrize(
    "case",
    [
        "dora", "dropout", "lora_bias", "merged", "disabled", "two adapters", "trained base", "unlike dtypes",
        "base_layer's forward", "lora_A's forward", "lora_B's hook",
    ],
)  # fmt: skip
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
        elif "'s " in case:
            change_from_outside(m, *case.split("'s "))
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
