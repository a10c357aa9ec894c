"""Fused norms, rotations and activations against the models' own."""

from __future__ import annotations

import copy

import pytest
import torch
from fused_twins import INPUT, assert_same, outputs_and_gradients
from peft import LoraConfig, get_peft_model

from rlvr.fused.layers import FusedForwards, _Rotary, fuse_layers, unfuse_layers
from rlvr.fused.lora import fuse_lora, unfuse_lora
from rlvr.fused.mlp import Gated
from rlvr.testing.tiny import tiny_model
from rlvr.trainers.shared_prefix import SUPPORTED_MODEL_TYPES

pytestmark = pytest.mark.both

# Norms, gated activations and rotations in two layers, and the norm before the head.
FUSED = {
    **dict.fromkeys(("llama", "qwen2", "mistral", "phi3", "granite", "smollm3", "gemma"), 2 * (2 + 1 + 1) + 1),
    "qwen3": 2 * (4 + 1 + 1) + 1,
    "gemma3_text": 2 * (6 + 1 + 1) + 1,
    "olmo2": 2 * (4 + 1) + 1,
    "olmo3": 2 * (4 + 1) + 1,
    "glm4": 2 * (4 + 1) + 1,
    "starcoder2": 2,
    "cohere2": 0,
}


def pair(architecture, **options):
    """The model with weights of norms away from their start, and an untouched copy."""
    model = tiny_model(architecture, **options).train()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model, copy.deepcopy(model)


@pytest.fixture
def calls(monkeypatch):
    """The shapes that the fused rotation saw."""
    seen = []
    apply = _Rotary.apply
    monkeypatch.setattr(_Rotary, "apply", lambda *args: seen.append(args[0].shape) or apply(*args))
    return seen


def test_every_architecture_of_the_shared_prefix_is_accounted_for():
    assert FUSED.keys() == SUPPORTED_MODEL_TYPES


@pytest.mark.parametrize("architecture", sorted(FUSED))
def test_equals_the_models_own_layers_in_float32(architecture):
    model, own = pair(architecture)
    assert fuse_layers(model) == fuse_layers(model) == FUSED[architecture]
    assert_same(model, own)


def test_gelu_and_partial_rotation(calls):
    model, own = pair("phi3", partial_rotary_factor=0.5, hidden_act="gelu_pytorch_tanh")
    fuse_layers(model)
    assert_same(model, own)
    assert not calls  # a partial rotation stays with the model


def test_an_activation_that_is_not_known_stays():
    model, own = pair("llama", hidden_act="relu")
    assert fuse_layers(model) == 2 * (2 + 1) + 1
    assert_same(model, own)


def test_rounds_as_the_models_own_norms_in_bfloat16():
    for architecture in ("llama", "gemma3_text", "olmo2"):
        model, own = (m.to(torch.bfloat16) for m in pair(architecture))
        x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
        fuse_layers(model)
        assert torch.equal(model.model.norm(x), own.model.norm(x)), architecture


@pytest.mark.parametrize("is_gelu", [False, True])
def test_gradcheck(is_gelu):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    assert torch.autograd.gradcheck(lambda *x: Gated.apply(*x, is_gelu), (random(3, 4), random(3, 4)))
    cos, sin = random(1, 3, 4).detach(), random(1, 3, 4).detach()  # unlike halves: the backward is the transpose
    q, k = random(2, 2, 3, 4), random(2, 1, 3, 4)
    assert torch.autograd.gradcheck(lambda *x: _Rotary.apply(*x, cos, sin), (q, k))


def test_with_lora_checkpointing_and_autocast(calls):
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(0)
    model = get_peft_model(pair("qwen3")[0], config).train()
    own = copy.deepcopy(model)
    fuse_layers(model)
    fuse_lora(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(model, own, value=1e-5, gradient=1e-4)
    assert len(calls) == 4  # two layers, twice
    _, truth = outputs_and_gradients(own)
    unfuse_lora(model)
    with torch.autocast("cpu", torch.bfloat16):
        (_, ours), (_, theirs) = outputs_and_gradients(model), outputs_and_gradients(own)
    for name, wanted in truth.items():
        error, reference = ((g[name] - wanted).norm() / wanted.norm() for g in (ours, theirs))
        assert error <= 2 * reference + 1e-3, name


def test_copies_caches_and_unfusing(calls):
    model, own = pair("llama")
    fuse_layers(model)
    twin = copy.deepcopy(model)
    options = {"do_sample": False, "max_new_tokens": 5}
    assert torch.equal(model.generate(INPUT, **options), own.generate(INPUT, **options))
    assert calls
    calls.clear()
    unfuse_layers(model)
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert torch.equal(model(input_ids=INPUT).logits, own(input_ids=INPUT).logits)
    assert not calls
    with torch.no_grad():
        twin.model.norm.weight.zero_()
    assert not twin(input_ids=INPUT).logits.any()  # a copy computes with its own weights


def test_a_patched_layer_stays_as_it_is(monkeypatch):
    model, _ = pair("llama")
    model.model.norm.forward = lambda x: 0 * x

    def forward(self, x):
        return x

    monkeypatch.setattr(type(model.model.layers[0].mlp), "forward", forward)
    assert fuse_layers(model) == 2 * (2 + 1)
    assert not model(input_ids=INPUT).logits.any()


def test_putting_fused_forwards_in_and_out(calls):
    model, own = pair("qwen2")
    expected = own(input_ids=INPUT).logits
    patched = model.model.layers[0].mlp
    patched.forward = patched.forward
    forwards = FusedForwards(model)
    assert [module for module in model.modules() if "forward" in module.__dict__] == [patched]
    forwards.put_in()
    forwards.put_in()
    torch.testing.assert_close(model(input_ids=INPUT).logits, expected)
    assert len(calls) == 2
    forwards.take_out()
    assert [module for module in model.modules() if "forward" in module.__dict__] == [patched]
    assert torch.equal(model(input_ids=INPUT).logits, expected)
    assert len(calls) == 2


# On a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", sorted(set(FUSED) - {"cohere2"}))
def test_triton_kernels_on_a_gpu(architecture, dtype):
    """In float32 equal; in bfloat16 as near to the float32 truth as the model's own layers, within a factor."""
    torch.backends.cuda.matmul.allow_tf32 = False
    truth, _ = pair(architecture, hidden_size=96, heads=6, kv_heads=3, intermediate_size=1_100)
    truth.cuda()
    own, model = copy.deepcopy(truth).to(dtype), copy.deepcopy(truth).to(dtype)
    assert fuse_layers(model) == FUSED[architecture]
    if dtype == torch.float32:
        assert_same(model, own, value=1e-5, gradient=1e-4)
        return
    (expected, wanted), (plain, theirs), (logits, ours) = map(outputs_and_gradients, (truth, own, model))
    assert (logits - expected).abs().max() <= 2 * (plain - expected).abs().max() + 1e-3
    for name, gradient in wanted.items():
        error, reference = ((g[name].float() - gradient).norm() / gradient.norm() for g in (ours, theirs))
        assert error <= 2 * reference + 1e-2, f"{name}: {error:.1e}, own layers {reference:.1e}"
