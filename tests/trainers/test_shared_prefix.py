"""The packed forward against its slow twin, the padded forward of an untouched model with log_softmax."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from padded_twin import (
    ISSUE_ARCHITECTURES,
    WINDOWS,
    assert_parity,
    attach_head,
    even_batch,
    gradients,
    make_batch,
    on,
    padded,
    prepare,
    ragged_batch,
)
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from places import CUDA_BFLOAT16, EXACT, PLACES, assert_as_near_to_the_truth, in_float32
from torch.nn.functional import scaled_dot_product_attention
from transformers import modeling_flash_attention_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rlvr.fused.lora import fuse_lora
from rlvr.testing.tiny import tiny_model
from rlvr.trainers.shared_prefix import SUPPORTED_MODEL_TYPES, enable, shared_prefix_logps, unsupported_reason


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("architecture", ISSUE_ARCHITECTURES)
def test_parity_with_the_padded_forward(architecture, lora, checkpointing, place):
    oracle, model = prepare(
        tiny_model(architecture, **place.sizes), lora=lora, checkpointing=checkpointing, place=place
    )
    assert unsupported_reason(model) is None
    assert_parity(oracle, model, ragged_batch())


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("architecture", ["qwen2", "phi3"])
def test_parity_with_fused_lora_layers(architecture, place):
    oracle, model = prepare(tiny_model(architecture, **place.sizes), lora=True, checkpointing=True, place=place)
    assert fuse_lora(model) > 0
    assert unsupported_reason(model) is None
    assert_parity(oracle, model, ragged_batch())


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("architecture", sorted(SUPPORTED_MODEL_TYPES - set(ISSUE_ARCHITECTURES)))
def test_parity_of_the_further_architectures(architecture, place):
    oracle, model = prepare(tiny_model(architecture, **place.sizes), place=place)
    assert unsupported_reason(model) is None
    assert_parity(oracle, model, ragged_batch())


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("architecture", sorted(WINDOWS))
def test_parity_with_sliding_windows(architecture, place):
    model = tiny_model(architecture, **place.sizes, **WINDOWS[architecture])
    oracle, model = prepare(model, checkpointing=True, place=place)
    batch = on(place.device, ragged_batch())
    full, _ = padded(place.put(tiny_model(architecture, **place.sizes)), batch)
    windowed, _ = padded(oracle, batch)
    assert (full - windowed).abs().max() > 1e-3  # the window matters at this length
    assert_parity(oracle, model, batch)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "batch",
    [
        even_batch(),
        make_batch([0], [7], [14]),
        make_batch([0, 1, 2], [3, 1, 7], [1, 1, 14]),
        make_batch([0, 0, 0, 0, 1, 1], [2, 2, 2, 2, 5, 5], [6, 3]),
        make_batch([0, 0, 0], [0, 0, 4], [6]),
    ],
    ids=["even, no padding", "one row", "singletons", "group cut by the micro-batch", "only one row counts"],
)
def test_parity_of_other_shapes(batch, place):
    oracle, model = prepare(tiny_model("qwen2", **place.sizes), place=place)
    assert_parity(oracle, model, batch)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("extra", [{"tie_word_embeddings": True}, {"attention_bias": True}])
def test_parity_of_tied_heads_and_biases(extra, place):
    assert_parity(*prepare(tiny_model("llama", **place.sizes, **extra), place=place), ragged_batch())


@pytest.mark.parametrize("place", [CUDA_BFLOAT16])
@pytest.mark.parametrize("windows", [True, False], ids=["windows", "no windows"])
@pytest.mark.parametrize("way", ["sdpa", "flash", "flash and fused LoRA"])
@pytest.mark.parametrize("architecture", [*ISSUE_ARCHITECTURES, "glm4"])
def test_parity_by_each_way_of_attention(architecture, way, windows, place):
    options = WINDOWS.get(architecture, {}) if windows else {}
    model = tiny_model(architecture, **place.sizes, **options)
    oracle, model = prepare(model, lora=True, checkpointing=True, place=place)
    if way == "flash and fused LoRA":
        assert fuse_lora(model) > 0
    assert_parity(oracle, model, ragged_batch(), flash=way != "sdpa")


@pytest.mark.parametrize("place", PLACES)
def test_equals_trl_method(place):
    from trl import GRPOTrainer

    untouched = place.put(tiny_model("qwen2", **place.sizes))
    model = attach_head(copy.deepcopy(untouched))
    batch = on(place.device, ragged_batch())
    trainer = SimpleNamespace(accelerator=SimpleNamespace(autocast=nullcontext, is_main_process=False))
    trls = GRPOTrainer._get_per_token_logps_and_entropies(trainer, model, *batch, compute_entropy=True)[:2]
    ours = shared_prefix_logps(model, *batch, compute_entropy=True)[:2]
    for actual, expected, truth in zip(ours, trls, padded(in_float32(untouched), batch), strict=True):
        if place.exact:
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
        else:
            assert_as_near_to_the_truth(actual, expected, truth)


def test_order_of_rows_does_not_matter():
    model = attach_head(tiny_model("qwen2"))
    input_ids, attention_mask, columns = ragged_batch()
    order = torch.randperm(len(input_ids), generator=torch.Generator().manual_seed(3))
    logps, _, packed = shared_prefix_logps(model, input_ids, attention_mask, columns)
    shuffled, none, repacked = shared_prefix_logps(model, input_ids[order], attention_mask[order], columns)
    assert none is None
    assert repacked.packed_tokens == packed.packed_tokens
    torch.testing.assert_close(shuffled, logps[order], rtol=0, atol=1e-5)


def test_nothing_to_score_gives_differentiable_zeros():
    model = attach_head(tiny_model("qwen2"))
    logps, entropies, _ = shared_prefix_logps(model, *make_batch([0, 0], [0, 0], [6]), compute_entropy=True)
    assert not logps.any()
    assert not entropies.any()
    (logps.sum() + entropies.sum()).backward()
    assert not any(p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("place", EXACT)
def test_autocast_in_bfloat16(place):
    oracle, model = prepare(tiny_model("qwen3"), lora=True, checkpointing=True, place=place)
    batch = on(place.device, ragged_batch())
    with torch.autocast(place.device, torch.bfloat16):
        logps, entropies, _ = shared_prefix_logps(model, *batch, compute_entropy=True)
    assert logps.dtype == entropies.dtype == torch.float32
    expected, expected_entropy = padded(oracle, batch)
    torch.testing.assert_close(logps, expected, rtol=0, atol=0.05)
    actual, wanted = gradients(model, logps, entropies), gradients(oracle, expected, expected_entropy)
    for name, gradient in wanted.items():
        assert torch.cosine_similarity(actual[name].flatten(), gradient.flatten(), dim=0) > 0.99, name


def test_through_distributed_data_parallel(tmp_path):
    """The wrapper's own forward runs, so its gradient hooks do."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        oracle, model = prepare(tiny_model("qwen2"), lora=True)
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        assert unsupported_reason(wrapped) is None
        reduced = []
        wrapped.register_comm_hook(None, lambda _, bucket: _note(reduced, bucket))
        logps, entropies, _ = shared_prefix_logps(wrapped, *ragged_batch(), compute_entropy=True)
        actual = gradients(model, logps, entropies)
        expected = gradients(oracle, *padded(oracle, ragged_batch()))
        for name, gradient in expected.items():
            torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-5)
        assert sum(reduced) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    finally:
        torch.distributed.destroy_process_group()


def _note(reduced, bucket):
    reduced.append(bucket.buffer().numel())
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def test_other_forwards_are_left_alone():
    model, untouched = tiny_model("gemma3_text"), tiny_model("gemma3_text")
    enable(model)
    enable(model)
    input_ids, attention_mask, _ = ragged_batch()
    torch.testing.assert_close(
        model(input_ids=input_ids, attention_mask=attention_mask).logits,
        untouched(input_ids=input_ids, attention_mask=attention_mask).logits,
        rtol=0,
        atol=0,
    )
    options = {"attention_mask": attention_mask, "do_sample": False, "max_new_tokens": 5}
    assert torch.equal(model.generate(input_ids, **options), untouched.generate(input_ids, **options))
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "kernels-community/flash-attn2"])
def test_transformers_still_finds_flash_kernels_by_their_name(monkeypatch, name):
    """A stand-in for the kernel, which transformers loads by the name in the configuration at each forward."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, name, ALL_ATTENTION_FUNCTIONS["flash_attention_2"])
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS, name, ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"])
    asked = []

    def kernel(query, key, value, dropout_p=0.0, softmax_scale=None, causal=False, **_):
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        options = {"scale": softmax_scale, "is_causal": causal, "enable_gqa": True}
        return scaled_dot_product_attention(query, key, value, **options).transpose(1, 2)

    def load(implementation, *_, **__):
        asked.append(implementation)
        return kernel, kernel, None, None, None

    monkeypatch.setattr(modeling_flash_attention_utils, "_lazy_imports", load)
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)
    expected = shared_prefix_logps(attach_head(tiny_model("qwen2")), *ragged_batch())[0]
    model = attach_head(tiny_model("qwen2"))
    model.config._attn_implementation = name
    assert unsupported_reason(model) is None
    torch.testing.assert_close(shared_prefix_logps(model, *ragged_batch())[0], expected)
    assert asked == []  # the packed forward has its own
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(model(input_ids=ids).logits, tiny_model("qwen2")(input_ids=ids).logits)
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2)
    assert set(asked) == {name}


def test_a_model_that_drops_the_layout_raises():
    """Nemotron does not hand its keyword arguments to attention: wrong numbers must not come out."""
    model = attach_head(tiny_model("nemotron"))
    assert "no parity test" in unsupported_reason(model)
    with pytest.raises(RuntimeError, match="size"):
        shared_prefix_logps(model, *ragged_batch())


# What is refused.


def _with_config(architecture="qwen2", **values):
    model = tiny_model(architecture)
    for name, value in values.items():
        setattr(model.config, name, value)
    return model


def _with_copied_config():
    model = tiny_model("qwen2")
    model.config = copy.deepcopy(model.config)
    return model


def _unsloth_patched():
    model = tiny_model("qwen2")

    def forward(*args):
        return None

    forward.__module__ = "unsloth.models.llama"
    model.model.layers[0].self_attn.forward = forward
    return model


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: _with_config(_attn_implementation="eager"), "'eager'"),
        (lambda: _with_config(attention_dropout=0.1), "attention_dropout is 0.1"),
        (lambda: _with_config("gemma3_text", attn_logit_softcapping=50.0), "softcapping"),
        (lambda: _with_config("gemma3_text", use_bidirectional_attention=True), "bidirectional"),
        (lambda: _with_config("llama", rope_parameters={"rope_type": "dynamic"}), "'dynamic'"),
        (lambda: _with_config("phi3", rope_parameters={"rope_type": "longrope"}), "'longrope'"),
        (lambda: tiny_model("qwen2_moe"), "'qwen2_moe'"),
        (lambda: tiny_model("gpt2"), "'gpt2'"),
        (_with_copied_config, "model.layers.0.self_attn has a configuration of its own"),
        (
            lambda: _peft(LoraConfig(task_type="CAUSAL_LM", r=2, layer_replication=[(0, 2), (1, 2)]), "llama"),
            "has a configuration of its own",
        ),
        (_unsloth_patched, "Unsloth has replaced the forward of Qwen2Attention"),
        (lambda: torch.nn.DataParallel(tiny_model("qwen2")), "DataParallel"),
        (lambda: _peft(PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)), "PROMPT_TUNING"),
        (
            lambda: _peft(LoraConfig(task_type="CAUSAL_LM", r=2, alora_invocation_tokens=[5])),
            "activated LoRA",
        ),
    ],
)
def test_refusals_name_the_reason(model, words):
    reason = unsupported_reason(model())
    assert words in reason
    assert "\n" not in reason


def _peft(config, architecture="qwen2"):
    return get_peft_model(tiny_model(architecture), config)
