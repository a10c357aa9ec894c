"""Packed projections: the same numbers as the layers they stand for, and only where they stand for plain ones."""

import gc
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model

from rlvr.fused.layers import is_gated_mlp
from rlvr.rollout.grouped import projections
from rlvr.rollout.grouped.projections import NAMES, PackedProjections
from rlvr.testing.tiny import tiny_model

IDS = torch.arange(3, 27).reshape(2, 12)


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama", "gemma3_text", "mistral"])
@torch.no_grad()
def test_a_model_computes_the_same_with_packed_projections(architecture):
    model = tiny_model(architecture).eval()
    own = dict(model.named_modules())
    expected = model(IDS).logits
    packed = PackedProjections(model)
    with packed.in_place():
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-5, atol=1e-6)
        assert not any(name.endswith(NAMES) and type(m) is torch.nn.Linear for name, m in model.named_modules())
    assert dict(model.named_modules()) == own


@torch.no_grad()
def test_the_copies_are_taken_anew_and_keep_their_addresses():
    model = tiny_model().eval()
    packed = PackedProjections(model)
    before = [product.weight.data_ptr() for _, _, product, _ in packed._layers]
    layer = model.model.layers[0].self_attn
    layer.k_proj.weight.mul_(3)
    layer.v_proj.bias.add_(1)
    expected = model(IDS).logits
    with packed.in_place():
        assert (model(IDS).logits - expected).abs().max() > 1e-3  # still the old weights
    packed.load()
    with packed.in_place():
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-5, atol=1e-6)
    assert [product.weight.data_ptr() for _, _, product, _ in packed._layers] == before


def test_adapted_and_hooked_projections_are_left_alone():
    adapted = get_peft_model(tiny_model(layers=3), LoraConfig(r=2, target_modules=["k_proj"], layers_to_transform=[0]))
    hooked = adapted.base_model.model.model.layers[1].self_attn.q_proj
    hooked.register_forward_hook(lambda *args: None)
    packed = PackedProjections(adapted)
    assert [parent.layer_idx for parent, *_ in packed._layers] == [2]


@torch.no_grad()
def test_a_gated_layer_has_a_stand_in_while_they_are_in_place(monkeypatch):
    """The kernel needs a GPU; here a twin stands for it."""
    calls = []

    class Twin(torch.nn.Module):
        def __init__(self, mlp):
            super().__init__()
            self.own = (mlp,)

        def forward(self, x):
            calls.append(x)
            return self.own[0](x)

    model = tiny_model().eval()
    assert not any(map(projections.takes_gated, model.modules()))
    monkeypatch.setattr(projections, "takes_gated", is_gated_mlp)
    monkeypatch.setattr(projections, "_gated_projections", Twin)
    own = dict(model.named_modules())
    packed = PackedProjections(model)
    expected = model(IDS).logits
    assert not calls
    with packed.in_place():
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-5, atol=1e-6)
    assert len(calls) == model.config.num_hidden_layers
    assert dict(model.named_modules()) == own


class OnCuda(torch.nn.Parameter):
    """A weight that says it is on a GPU."""

    is_cuda = True


def gated_mlp(dtype=torch.bfloat16, bias=False):
    mlp = tiny_model("llama").model.layers[0].mlp
    for name in ("gate_proj", "up_proj"):
        part = mlp._modules[name]
        part.weight = OnCuda(part.weight.detach().to(dtype), requires_grad=False)
        part.bias = torch.nn.Parameter(torch.zeros(part.out_features)) if bias else None
    return mlp


def leave(*args):
    return None


@pytest.mark.parametrize(
    "touch",
    [
        lambda mlp: mlp.register_forward_hook(leave),
        lambda mlp: mlp.register_forward_pre_hook(leave),
        lambda mlp: mlp.act_fn.register_forward_hook(leave),
        lambda mlp: mlp.up_proj.register_forward_hook(leave),
        lambda mlp: setattr(mlp, "forward", mlp.forward),
        lambda mlp: setattr(mlp.gate_proj, "forward", mlp.gate_proj.forward),
        lambda mlp: setattr(mlp, "act_fn", torch.nn.ReLU()),
        lambda mlp: setattr(mlp.up_proj, "weight", OnCuda(mlp.up_proj.weight.t().contiguous().t())),
        lambda mlp: setattr(mlp.up_proj, "weight", OnCuda(mlp.up_proj.weight.detach().half())),
    ],
)
def test_a_gated_layer_that_somebody_changed_computes_itself(touch):
    mlp = gated_mlp()
    assert projections.takes_gated(mlp)
    touch(mlp)
    assert not projections.takes_gated(mlp)


def test_only_half_precision_without_biases_is_gated_by_the_kernel():
    assert projections.takes_gated(gated_mlp(torch.float16))
    assert not projections.takes_gated(gated_mlp(torch.float32))
    assert not projections.takes_gated(gated_mlp(bias=True))


def test_copies_go_with_their_last_owner():
    """Without a garbage collection, which leaves out what exists when training begins."""
    packed = PackedProjections(tiny_model())
    copy = weakref.ref(packed._layers[0][2].weight)
    gc.disable()
    try:
        del packed
        assert copy() is None
    finally:
        gc.enable()


def test_an_attention_in_another_order_is_told():
    model = tiny_model().eval()
    with PackedProjections(model).in_place(), pytest.raises(RuntimeError, match="before it asked for queries"):
        model.model.layers[0].self_attn.k_proj(torch.zeros(1, 32))
