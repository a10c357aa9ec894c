"""Merging LoRA for a rollout: what is computed, and that everything is bit for bit as it was afterwards."""

import copy
import sys

import pytest
import torch
from generated import assert_as_generate, generate_greedily
from peft import IA3Config, LoHaConfig, LoraConfig, get_peft_model
from places import PLACES, Place
from torch import nn

from rlvr.rollout.engine import SamplingSettings
from rlvr.rollout.grouped import GroupedEngine, weights
from rlvr.rollout.grouped.weights import causal_lm, fingerprint, mergeable, merged_lora, merged_weight, rollout_mode
from rlvr.testing.tiny import tiny_model

GREEDY = SamplingSettings(temperature=0)
PROMPTS, TOKENS = [[5, 6, 7, 8], [5, 6, 7, 8], [9, 10]], 12
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS = {
    "lora": {"target_modules": LINEAR},
    "some-layers": {"target_modules": ["q_proj", "down_proj"]},
    "rslora": {"target_modules": LINEAR, "use_rslora": True},
    "dora": {"target_modules": LINEAR, "use_dora": True},
    "bias": {"target_modules": LINEAR, "lora_bias": True},
    "embedding-and-head": {"target_modules": [*LINEAR, "embed_tokens", "lm_head"]},
    "module-to-save": {"target_modules": ["q_proj"], "modules_to_save": ["o_proj"]},
}


def adapted(dtype=torch.float32, device="cpu", **lora):
    place = Place(device, dtype)
    model = place.put(tiny_model(dtype=dtype, **place.sizes))
    torch.manual_seed(1)
    lora.setdefault("target_modules", LINEAR)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, init_lora_weights=False, **lora))
    for name, parameter in model.named_parameters():
        if ".modules_to_save." in name:  # else a copy of what it stands for
            parameter.data += 0.2 * torch.randn(parameter.shape).to(parameter)
    return model


def complete(model, **settings):
    engine = GroupedEngine(model, sampling=GREEDY, eos_token_ids=(), compile_layers=False, **settings)
    with engine.open(PROMPTS, max_completion_tokens=TOKENS) as session:
        for index in range(3):
            session.submit(index, [], TOKENS)
        turns = []
        while session.pending:
            turns += session.step()
    return [turn.token_ids for turn in sorted(turns, key=lambda turn: turn.index)]


def generated(model):
    """The slow twin, with the adapter applied layer by layer."""
    training = model.training
    model.eval()
    outputs = [generate_greedily(model, ids, TOKENS) for ids in PROMPTS]
    model.train(training)
    return outputs


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_state(model, before):
    after = model.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("merge_lora", [True, False], ids=["merged", "apart"])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_every_kind_complete_as_generate_does(kind, merge_lora, place):
    model = adapted(place.dtype, place.device, **KINDS[kind])
    model.train()
    before, modules = state(model), list(model.named_modules())
    completed = complete(model, merge_lora=merge_lora)
    assert same_state(model, before)
    assert list(model.named_modules()) == modules  # the wrappers are back, in their places
    assert all(module.training for module in model.modules())
    model.eval()
    for ids, tokens in zip(PROMPTS, completed, strict=True):
        assert_as_generate(model, ids, tokens, TOKENS)


@pytest.mark.parametrize("device", DEVICES)
def test_merging_in_bfloat16_restores_every_bit_and_rounds_once(device):
    model = adapted(torch.bfloat16, device)
    before = state(model)
    layer = causal_lm(model).model.layers[0].mlp.up_proj
    adapter = (layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()) * 2
    exact = (layer.base_layer.weight.double() + adapter).detach()
    with merged_lora(list(causal_lm(model).modules())):
        merged = causal_lm(model).model.layers[0].mlp.up_proj
        assert type(merged) is nn.Linear
        assert not torch.equal(merged.weight, before["base_model.model.model.layers.0.mlp.up_proj.base_layer.weight"])
        error = (merged.weight.double() - exact).abs()
        assert (error <= exact.abs() * 2**-7 + 1e-7).all()  # one of the two bfloat16 numbers beside it
    complete(model)
    assert same_state(model, before)


@pytest.mark.gpu
def test_originals_that_find_no_room_on_the_gpu_come_back_from_the_host(monkeypatch):
    monkeypatch.setattr(weights, "_room", lambda modules: 0)
    model = adapted(torch.bfloat16, "cuda")
    before = state(model)
    complete(model)
    assert same_state(model, before)


def test_merged_weight_by_hand():
    layer = causal_lm(adapted(target_modules=["q_proj"])).model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.base_layer.weight.fill_(1.0)
        layer.lora_A["default"].weight.fill_(0.5)
        layer.lora_B["default"].weight.fill_(0.25)
    # scaling 8 / 4 = 2, rank 4: 1 + 2 · 4 · 0.25 · 0.5
    assert torch.equal(merged_weight(layer), torch.full_like(layer.base_layer.weight, 2.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_weights_keep_what_a_young_adapter_does(dtype):
    """After a step of Adam an element of s·BA is a few percent of what lies between two numbers of half precision."""
    layer = causal_lm(adapted(dtype=dtype, target_modules=["q_proj"])).model.layers[0].self_attn.q_proj
    torch.manual_seed(0)
    weight = nn.Parameter((0.02 * torch.randn(768, 768)).to(dtype))
    layer.base_layer.weight, lora_a, lora_b = weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    lora_a.data = (torch.rand(4, 768) - 0.5) / 20
    lora_b.data = (1e-4 if dtype == torch.bfloat16 else 1e-5) * torch.randn(768, 4).sign()
    lora_b.data[:100] = 0
    adapter = 2 * lora_b.data.double() @ lora_a.data.double()
    moved = (merged_weight(layer).double() - weight.double()).detach()
    kept = (moved * adapter).sum() / (adapter * adapter).sum()
    nearest = (weight.double() + adapter).to(dtype).double() - weight.double()
    assert (nearest * adapter).sum() / (adapter * adapter).sum() < 0.5  # what is usually done
    assert abs(kept - 1) < 0.03
    assert not moved[:100].any()
    assert torch.equal(merged_weight(layer), merged_weight(layer))


def test_weights_keep_their_addresses_while_merged():
    model = causal_lm(adapted())
    addresses = {p.data_ptr() for name, p in model.named_parameters() if "base_layer" in name}
    with merged_lora(list(model.modules())):
        assert addresses <= {p.data_ptr() for p in model.parameters()}


@pytest.mark.parametrize("device", DEVICES)
def test_an_exception_leaves_model_and_engine_as_they_were(device):
    model = adapted(torch.bfloat16, device)
    model.train()
    before, config = state(model), copy.deepcopy(causal_lm(model).config)
    engine = GroupedEngine(model, sampling=GREEDY, eos_token_ids=(), compile_layers=False)

    def failing_rollout():
        with engine.open([[4, 5]], max_completion_tokens=4) as session:
            session.submit(0, [], 4)
            session.step()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing_rollout()
    assert same_state(model, before)
    assert causal_lm(model).config._attn_implementation == config._attn_implementation == "sdpa"
    assert all(module.training for module in model.modules())
    assert torch.is_grad_enabled()
    with engine.open([[4, 5]], max_completion_tokens=4) as session:  # and it can be used again
        session.submit(0, [], 4)
        assert len(session.step()) == 1


def test_an_interrupt_while_weights_are_put_back_leaves_none_behind(monkeypatch):
    """Each interrupt of a rollout's end at another line of what puts back."""
    model = adapted()
    before, modules = state(model), list(model.named_modules())
    interrupted = 0
    for line in range(60):
        seen = 0

        def trace(frame, event, _, line=line):
            nonlocal seen, interrupted
            if frame.f_code.co_name == "_put_back" and event == "line":
                seen += 1
                if seen == line + 1:
                    interrupted += 1
                    raise KeyboardInterrupt
            return trace

        def roll_out(trace=trace):
            with merged_lora(list(causal_lm(model).modules())):
                sys.settrace(trace)

        try:
            roll_out()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        assert same_state(model, before)
        assert list(model.named_modules()) == modules
    assert interrupted > 20


def test_a_disabled_or_second_adapter_is_followed():
    model = adapted()
    base = tiny_model()
    with model.disable_adapter():
        assert complete(model) == generated(base)
    model.add_adapter("other", LoraConfig(r=2, lora_alpha=8, target_modules=LINEAR, init_lora_weights=False))
    first = complete(model)
    model.set_adapter("other")
    assert complete(model) == generated(model) != first


def test_tied_or_quantized_weights_stay_apart():
    class Quantized(nn.Linear):
        pass

    model = adapted()
    layer = causal_lm(model).model.layers[0].self_attn.q_proj
    assert mergeable(layer)
    layer.base_layer.__class__ = Quantized
    assert not mergeable(layer)
    assert complete(model) == generated(model)
    with merged_lora(list(causal_lm(model).modules())):
        assert causal_lm(model).model.layers[0].self_attn.q_proj is layer
        assert causal_lm(model).model.layers[1].self_attn.q_proj is not layer


@pytest.mark.parametrize("touched", ["layer", "part", "base", "forward", "base-forward"])
def test_a_layer_with_a_hook_or_another_forward_stays_apart(touched):
    model = adapted()
    plain = complete(model)
    layer = causal_lm(model).model.layers[0].mlp.up_proj
    targets = {"part": layer.lora_B["default"], "base": layer.base_layer, "base-forward": layer.base_layer}
    target = targets.get(touched, layer)
    own = target.forward
    if touched.endswith("forward"):
        target.forward = lambda x: 3 * own(x)
    else:
        target.register_forward_hook(lambda module, inputs, output: 30 * output)
    assert complete(model) == generated(model) != plain
    with merged_lora(list(causal_lm(model).modules())):
        assert causal_lm(model).model.layers[0].mlp.up_proj is layer
        assert type(causal_lm(model).model.layers[1].mlp.up_proj) is nn.Linear


APART = {  # what is not merged for a rollout
    "dora": LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM"),
    "module-to-save": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["o_proj"], task_type="CAUSAL_LM"),
    "tokens": LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[5, 6], task_type="CAUSAL_LM"),
    "ia3": IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
    "loha": LoHaConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("kind", APART)
def test_graphs_are_made_anew_where_a_layer_uses_other_adapters(kind):
    """A captured graph computes with the adapters that it was captured with."""
    model = get_peft_model(tiny_model(), copy.deepcopy(APART[kind]))
    model.add_adapter("other", copy.deepcopy(APART[kind]))

    def found():
        with rollout_mode(causal_lm(model)):
            return fingerprint(causal_lm(model))

    first = found()
    assert found() == first
    model.set_adapter("other")
    second = found()
    with model.disable_adapter():
        assert len({first, second, found()}) == 3
    assert found() == second
    model.set_adapter("default")
    assert found() == first


def test_graphs_are_made_anew_where_an_adapter_is_scaled_otherwise():
    model = get_peft_model(tiny_model(), copy.deepcopy(APART["loha"]))
    first = fingerprint(causal_lm(model))
    causal_lm(model).model.layers[1].self_attn.q_proj.set_scale("default", 3.0)
    assert fingerprint(causal_lm(model)) != first
