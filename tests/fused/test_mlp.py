"""Gated MLPs of checkpointed blocks as one function, against PEFT's and the model's own layers."""

from __future__ import annotations

import copy

import pytest
import torch
from fused_twins import INPUT, assert_same, outputs_and_gradients
from peft import LoraConfig, get_peft_model

from rlvr.fused import mlp
from rlvr.fused.layers import FusedForwards
from rlvr.fused.lora import Together, _Layer
from rlvr.testing.tiny import tiny_model

pytestmark = pytest.mark.both

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def pair(architecture="llama", dtype=torch.float32, **options):
    """A checkpointed model with LoRA on all projections, random A and B, and its fused forwards; an untouched copy."""
    config = {"r": 4, "lora_alpha": 6, "target_modules": LINEAR, "task_type": "CAUSAL_LM", **options}
    own = get_peft_model(tiny_model(architecture), LoraConfig(**config)).to(dtype).train()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in own.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    model = copy.deepcopy(own)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model, own, FusedForwards(model)


@pytest.fixture
def calls(monkeypatch):
    """Rows of every MLP that is one function, and of every piece of its backward pass."""
    seen = {"forward": [], "backward": []}
    whole, piece = mlp._MlpInput.apply, mlp._gradients
    monkeypatch.setattr(mlp._MlpInput, "apply", lambda x, *rest: seen["forward"].append(len(x)) or whole(x, *rest))
    monkeypatch.setattr(mlp, "_gradients", lambda x, *rest: seen["backward"].append(len(x)) or piece(x, *rest))
    return seen


@pytest.mark.parametrize("rows", [8, 20, mlp.ROWS], ids=["pieces", "exactly one", "one"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma"])  # with biases, and with gelu
def test_equals_peft_in_float32(architecture, rows, calls, monkeypatch):
    monkeypatch.setattr(mlp, "ROWS", rows)
    model, own, forwards = pair(architecture)
    forwards.put_in(checkpointed=True)
    assert_same(model, own, value=1e-5)
    blocks = model.get_base_model().config.num_hidden_layers
    assert calls["forward"] == [20] * 2 * blocks  # and again in the backward pass
    assert calls["backward"] == ([8, 8, 4] if rows == 8 else [20]) * blocks


def projections(weights, bias, adapters):
    """Gate and up, and down, of which gate has a bias."""
    gate, up, down = (
        _Layer(weight, bias if index == 0 else None, *adapters[2 * index : 2 * index + 2], 1.5 - index)
        for index, weight in enumerate(weights)
    )
    return Together.of([gate, up], adapters[0].dtype), Together.of([down], adapters[0].dtype)


@pytest.mark.parametrize("is_gelu", [False, True])
def test_gradcheck(is_gelu, monkeypatch):
    monkeypatch.setattr(mlp, "ROWS", 2)
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weights, bias = (random(6, 4), random(6, 4), random(4, 6)), random(6)
    shapes = ((2, 4), (6, 2)), ((1, 4), (6, 1)), ((3, 6), (4, 3))
    adapters = [random(*shape) for pair in shapes for shape in pair]

    def output(x, *adapters):
        return mlp.checkpointed_mlp(x, *projections(weights, bias, adapters), is_gelu)

    assert torch.autograd.gradcheck(output, [tensor.requires_grad_() for tensor in (random(5, 4), *adapters)])
    assert output(random(0, 4), *adapters).shape == (0, 4)


def test_a_block_keeps_the_input_alone_and_stops_before_its_mlp(monkeypatch):
    """Products of the MLP: three in the forward; gate and up, and for gradients, in the backward pass. No fourth."""
    model, _, forwards = pair()
    forwards.put_in(checkpointed=True)
    outputs = []
    monkeypatch.setattr(mlp, "_output", lambda x, *rest, own=mlp._output: outputs.append(len(x)) or own(x, *rest))
    outputs_and_gradients(model)
    assert len(outputs) == model.get_base_model().config.num_hidden_layers

    block = model.get_base_model().model.layers[0]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        block.mlp(torch.randn(1, 5, 32).requires_grad_())
    assert [tensor.shape for tensor in kept] == [(5, 32)]


@pytest.mark.parametrize("architecture", ["gemma3_text", "olmo2"])
def test_an_mlp_that_a_norm_follows_is_computed_once_for_the_backward_pass(architecture, calls):
    """The norm keeps its input, so checkpointing computes the MLP again: that is the only time."""
    model, own, forwards = pair(architecture)
    forwards.put_in(checkpointed=True)
    assert_same(model, own, value=1e-5)
    assert not calls["forward"]


def test_under_autocast_as_near_to_float32_as_peft(calls):
    model, own, forwards = pair("qwen2")
    _, truth = outputs_and_gradients(copy.deepcopy(own))
    forwards.put_in(checkpointed=True, hold=True)
    with torch.autocast("cpu", torch.bfloat16):
        (_, ours), (_, theirs) = outputs_and_gradients(model), outputs_and_gradients(own)
    assert calls["backward"]
    for name, gradient in truth.items():
        assert ours[name].dtype == torch.float32
        error, reference = ((g[name] - gradient).norm() / gradient.norm() for g in (ours, theirs))
        assert error <= 2 * reference + 1e-3, name


CASES = [
    "not checkpointed",
    "no gradients",
    "hook",
    "backward hook",
    "forward",
    "no LoRA on up",
    "dropout",
    "disabled",
]


@pytest.mark.parametrize("case", CASES)
def test_else_the_layers_are_computed_one_by_one(case, calls):
    options = {
        "no LoRA on up": {"target_modules": [name for name in LINEAR if name != "up_proj"]},
        "dropout": {"lora_dropout": 0.5},
    }
    model, own, forwards = pair(**options.get(case, {}))
    heard = []
    for up in (block.mlp.up_proj for m in (model, own) for block in m.get_base_model().model.layers):
        if case == "hook":
            up.register_forward_hook(lambda *args: heard.append(1))
        elif case == "backward hook":
            up.register_full_backward_hook(lambda *args: heard.append(1))
        elif case == "forward":
            up.forward = lambda x, up=up: 2 * type(up).forward(up, x)
    forwards.put_in(checkpointed=case != "not checkpointed")
    results = []
    for m in (model, own):
        torch.manual_seed(0)
        with m.disable_adapter() if case == "disabled" else torch.set_grad_enabled(case != "no gradients"):
            results.append(m(input_ids=INPUT).logits)
        if case == "backward hook":
            results[-1].sum().backward()
    assert not calls["forward"]
    assert len(heard) == (2 * len(own.get_base_model().model.layers) if case.endswith("hook") else 0)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


# On a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize("adapters", [torch.bfloat16, torch.float32], ids=["bfloat16", "autocast"])
@pytest.mark.parametrize("rows", [64, mlp.ROWS], ids=["pieces", "one"])
@pytest.mark.parametrize("architecture", ["llama", "gemma"])
def test_on_a_gpu_in_bfloat16_as_near_to_float32_as_peft(architecture, rows, adapters, calls, monkeypatch):
    monkeypatch.setattr(mlp, "ROWS", rows)
    model, own, forwards = pair(architecture, torch.bfloat16)
    for name, parameter in (*model.named_parameters(), *own.named_parameters()):
        if "lora_" in name:
            parameter.data = parameter.data.to(adapters)
    ids = torch.randint(3, 250, (2, 100), generator=torch.Generator().manual_seed(2))
    _, truth = outputs_and_gradients(copy.deepcopy(own).float().cuda(), ids)
    forwards.put_in(checkpointed=True, hold=True)
    with torch.autocast("cuda", torch.bfloat16, enabled=adapters is torch.float32):
        (_, ours), (_, theirs) = outputs_and_gradients(model.cuda(), ids), outputs_and_gradients(own.cuda(), ids)
    assert len(calls["backward"]) == -(-200 // rows) * model.get_base_model().config.num_hidden_layers
    for name, gradient in truth.items():
        error, reference = ((g[name].float() - gradient).norm() / gradient.norm() for g in (ours, theirs))
        assert error <= 2 * reference + 1e-2, f"{name}: {error:.1e}, PEFT {reference:.1e}"


@pytest.mark.gpu
def test_on_a_gpu_an_update_takes_less_memory(monkeypatch):
    monkeypatch.setattr(mlp, "ROWS", 1_024)
    model = tiny_model(hidden_size=128, heads=4, kv_heads=2, intermediate_size=2_048)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=LINEAR, task_type="CAUSAL_LM")).to("cuda").train()
    model = model.to(torch.bfloat16)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    forwards, peaks = FusedForwards(model), []
    decoder, ids = model.get_base_model().get_decoder(), torch.zeros((16, 1_024), dtype=torch.long, device="cuda")
    for checkpointed in (False, True, False, True):  # the first two compile kernels
        forwards.put_in(checkpointed=checkpointed, hold=True)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        decoder(input_ids=ids).last_hidden_state.float().pow(2).mean().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        forwards.take_out()
    assert peaks[3] < 0.6 * peaks[2]


@pytest.mark.gpu
@pytest.mark.parametrize("is_gelu", [False, True])
def test_on_a_gpu_gradients_take_the_place_of_what_they_are_of(is_gelu):
    from rlvr.fused.kernels import gated_backward  # needs Triton

    rows, narrow, wide = 2_048, 64, 8_192
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    gate, up, grad = (random(rows, wide) for _ in range(3))
    apart = gated_backward(grad, gate, up, gelu=is_gelu)
    in_place = gated_backward(grad, gate, up, gelu=is_gelu, in_place=True)
    assert in_place[0] is gate
    assert in_place[1] is up
    assert all(map(torch.equal, apart, in_place))

    del gate, up, grad, apart, in_place
    weights = random(wide, narrow), random(wide, narrow), random(narrow, wide)
    adapters = [random(*shape) for weight in weights for shape in ((4, weight.shape[1]), (weight.shape[0], 4))]
    arguments = random(rows, narrow), random(rows, narrow), *projections(weights, random(wide), adapters), is_gelu
    mlp._gradients(*arguments)  # what the libraries keep for themselves from the first call on
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    mlp._gradients(*arguments)
    of_intermediate = (torch.cuda.max_memory_allocated() - before) / (rows * wide * 2)
    assert 3 <= of_intermediate < 3.5
