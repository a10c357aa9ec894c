"""The hash of trained weights, against its definition in Python's own integers, and what it has to tell apart."""

import hashlib

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from rlvr.testing.tiny import tiny_model
from rlvr.tracking import adapter_hash as module
from rlvr.tracking.adapter_hash import ROW, adapter_hash, hash_of, row_sums

pytestmark = pytest.mark.both

MASK = (1 << 64) - 1


def splitmix64(count):
    """The reference implementation, https://prng.di.unimi.it/splitmix64.c, from state 0."""
    state, numbers = 0, []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & MASK
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        numbers.append(z ^ (z >> 31))
    return numbers


def test_the_factors_are_splitmix64_made_odd():
    numbers = splitmix64(ROW)
    assert numbers[:3] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]  # as published
    assert [value & MASK for value in module._factors("cpu").tolist()] == [number | 1 for number in numbers]


def test_the_hash_is_what_it_says_it_is():
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "b": torch.randn(3, 5, generator=generator),
        "a": torch.randint(-100, 100, (ROW + 7,), dtype=torch.int8, generator=generator),
    }
    factors = [number | 1 for number in splitmix64(ROW)]
    digest = hashlib.sha256()
    for name, dtype, shape in (("a", "int8", f"({ROW + 7},)"), ("b", "float32", "(3, 5)")):
        tensor = tensors[name].flatten()
        bits = (tensor.view(torch.int32) if dtype == "float32" else tensor).tolist()
        digest.update(f"{name} {dtype} {shape}\n".encode())
        for start in range(0, len(bits), ROW):
            total = sum(bit * factor for bit, factor in zip(bits[start : start + ROW], factors, strict=False))
            digest.update((total & MASK).to_bytes(8, "little"))
    assert hash_of(tensors) == digest.hexdigest()


def test_rows_are_summed_alike_however_many_at_once(monkeypatch):
    tensor = torch.randn(5 * ROW + 3)
    one = row_sums(tensor)
    monkeypatch.setattr(module, "_ROWS_AT_ONCE", {})
    assert torch.equal(one, row_sums(tensor))
    assert len(one) == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64])
def test_every_change_shows(dtype):
    values = torch.arange(1, 2 * ROW + 7).remainder(251).to(dtype)
    hashes = {hash_of({"w": values})}
    for place in (0, ROW - 1, ROW, len(values) - 1):
        changed = values.clone()
        changed[place] += 1
        hashes.add(hash_of({"w": changed}))
    swapped = values.clone()
    swapped[[3, 4]] = swapped[[4, 3]]
    negative = -values
    hashes |= {hash_of({"w": other}) for other in (swapped, values[:-1], values.view(2, -1), negative)}
    hashes |= {hash_of({"v": values}), hash_of({"w": values, "x": values[:0]})}
    assert len(hashes) == 11


def test_zero_and_minus_zero_are_told_apart_and_layout_in_memory_is_not():
    assert hash_of({"w": torch.zeros(4)}) != hash_of({"w": -torch.zeros(4)})
    matrix = torch.randn(6, 4)
    assert hash_of({"w": matrix.t()}) == hash_of({"w": matrix.t().contiguous()})


def test_16_bits_count_as_the_numbers_that_they_are():
    narrow = torch.randn(100).bfloat16()
    assert hash_of({"w": narrow}) == hash_of({"w": narrow.float()})
    assert hash_of({"w": narrow}) != hash_of({"w": narrow.float() + 1e-6})


# Models


def adapted(seed=0, **config):
    torch.manual_seed(seed)
    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **config})
    model = get_peft_model(tiny_model(), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize(
    "config",
    [{}, {"use_dora": True}, {"bias": "lora_only"}, {"modules_to_save": ["lm_head"]}, {"use_rslora": True}],
    ids=str,
)
def test_the_live_adapter_its_file_and_what_is_loaded_back_have_one_hash(tmp_path, config):
    live = adapted(**config)
    live.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(), str(tmp_path), adapter_name="other")
    assert adapter_hash(live) == hash_of(load_file(tmp_path / "adapter_model.safetensors")) == adapter_hash(loaded)
    assert adapter_hash(live) != adapter_hash(adapted(seed=1, **config))


def test_an_adapter_that_trl_made_bfloat16_is_known_again(tmp_path):
    live = adapted()
    for parameter in live.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    live.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(), str(tmp_path))
    assert {p.dtype for n, p in loaded.named_parameters() if "lora_" in n} == {torch.float32}
    assert adapter_hash(loaded) == adapter_hash(live)


def test_base_weights_count_only_where_they_are_trained():
    model = adapted()
    before = adapter_hash(model)
    embeddings = model.get_input_embeddings()
    with torch.no_grad():
        embeddings.weight += 1
    assert adapter_hash(model) == before
    embeddings.weight.requires_grad_(True)
    beside = adapter_hash(model)
    with torch.no_grad():
        embeddings.weight += 1
    assert len({before, beside, adapter_hash(model)}) == 3


def test_of_a_model_without_adapter_every_weight_counts(tmp_path):
    model = tiny_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert adapter_hash(model) == hash_of(load_file(tmp_path / "model.safetensors"))
    before = adapter_hash(model.requires_grad_(False))
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    assert adapter_hash(model) != before


def test_parameters_spread_over_processes_have_none():
    model = tiny_model()
    next(model.parameters()).ds_id = 0  # as DeepSpeed ZeRO-3 marks them
    assert adapter_hash(model) is None
