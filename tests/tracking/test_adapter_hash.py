"""The hash of trained weights, against its definition in Python's own integers, and what it has to tell apart."""

import hashlib
import operator
import struct

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from rlvr.testing.tiny import tiny_model
from rlvr.tracking import adapter_hash as module
from rlvr.tracking.adapter_hash import ROW, adapter_hash, hash_of, row_sums

pytestmark = pytest.mark.both

MASK = (1 << 64) - 1


class CountedOperations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


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


def reference(tensors):
    """The documented hash, of integers and `struct`'s bits."""
    factors, digest = [number | 1 for number in splitmix64(ROW)], hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        if tensor.dtype in (torch.bfloat16, torch.float16):
            tensor = tensor.float()
        kind = {"float32": "f", "float64": "d", "int8": "b", "int64": "q"}[str(tensor.dtype).removeprefix("torch.")]
        values = tensor.flatten().tolist()
        packed = struct.pack(f"<{len(values)}{kind}", *values)
        bits = struct.unpack(f"<{len(packed)}b" if kind == "b" else f"<{len(packed) // 4}i", packed)
        digest.update(f"{name} {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}\n".encode())
        for start in range(0, len(bits) + 1, ROW):
            total = sum(map(operator.mul, bits[start : start + ROW], factors))
            digest.update((total & MASK).to_bytes(8, "little"))
    return digest.hexdigest()


def varied_tensors():
    """Shapes, dtypes and names shuffled among each other: more alike than are summed at once, whole rows, none."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(3, 5, generator=generator) for _ in range(4)]
    made += [torch.randn(5, 3, generator=generator), torch.randn(5, 3, generator=generator).t()]
    made += [torch.randn(3, 5, generator=generator).to(d) for d in (torch.bfloat16, torch.float16, torch.float64)]
    made += [torch.randn(ROW // 4 + 1, generator=generator) for _ in range(5)]
    made += [torch.randn(2, ROW, generator=generator), torch.randn(2, ROW, generator=generator)]
    made += [torch.randint(-(2**62), 2**62, (ROW // 2 + 3,), generator=generator) for _ in range(2)]
    made += [torch.randint(-100, 100, (ROW + 7,), dtype=torch.int8, generator=generator) for _ in range(2)]
    made += [torch.nn.Parameter(torch.randn(7, generator=generator)), torch.tensor(2.5), torch.zeros(0, 4)]
    return {f"{place * 11 % len(made)}.weight": tensor for place, tensor in enumerate(made)}


@pytest.mark.parametrize("rows_at_once", [1, 2, 64])
def test_the_hash_is_what_it_says_it_is(monkeypatch, rows_at_once):
    monkeypatch.setattr(module, "_at_once", lambda device: rows_at_once * ROW)
    tensors = varied_tensors()
    assert hash_of(tensors) == reference(tensors)


def test_the_hash_stays_what_it_was():
    tensors = {f"{layer}.w": torch.arange(layer, layer + 6).view(2, 3) / 8 for layer in range(12)}
    tensors |= {"whole": torch.arange(2 * ROW, dtype=torch.int64), "few": torch.tensor([1.5, -2.5]).bfloat16()}
    assert hash_of(tensors) == reference(tensors) == "1a65feb5de840e300af40d4863d8427f865d71c548e51aa64b9e0ca688fa83ec"


def test_a_large_tensor_is_summed_in_parts(monkeypatch):
    tensor = torch.randn(5 * ROW + 3)
    sums = row_sums([tensor])
    monkeypatch.setattr(module, "_at_once", lambda device: 2 * ROW)
    assert torch.equal(sums, row_sums([tensor]))
    assert sums.shape == (1, 6)


def test_tensors_alike_are_summed_together(monkeypatch):
    """Launching a kernel costs more than an adapter's tensor does: their number must not grow with the layers."""
    monkeypatch.setattr(module, "_at_once", lambda device: 64 * ROW)

    row_sums([torch.ones(1)])  # makes the factors, once

    def operations(layers):
        matrices = {f"{layer}.{name}": torch.ones(4, 6) for layer in range(layers) for name in "qkv"}
        with CountedOperations() as counted:
            hash_of(matrices)
        return counted.count

    assert operations(layers=28) == operations(layers=1) < 20


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
