"""Merged models in the types of a float32 base, which Unsloth leaves so on a GPU, are brought to 16 bits."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rlvr.testing.tiny import save_tiny, tiny_model
from rlvr_unsloth.sixteen_bits import round_to_16_bits

pytestmark = pytest.mark.both


def tensors_of(folder):
    return {name: tensor for shard in folder.glob("*.safetensors") for name, tensor in load_file(shard).items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_weight_is_rounded_once_and_the_files_say_so(tmp_path, dtype):
    model = tiny_model(layers=2)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    before = tensors_of(tmp_path)
    assert {tensor.dtype for tensor in before.values()} == {torch.float32}
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    round_to_16_bits(tmp_path, dtype)
    after = tensors_of(tmp_path)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor.to(dtype)) for name, tensor in before.items())
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.numel() for tensor in before.values()) * 2
    assert index["weight_map"].keys() == after.keys()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert loaded.dtype == dtype
    assert torch.equal(loaded.state_dict()["model.norm.weight"], model.state_dict()["model.norm.weight"].to(dtype))


def test_the_old_name_of_the_dtype_in_a_configuration_stays(tmp_path):
    path = save_tiny(tmp_path) / "config.json"
    config = json.loads(path.read_text())
    config["torch_dtype"] = config.pop("dtype")
    path.write_text(json.dumps(config))
    round_to_16_bits(tmp_path, torch.bfloat16)
    assert json.loads(path.read_text()) == {**config, "torch_dtype": "bfloat16"}


def test_float32_vectors_of_a_16_bit_model_stay(tmp_path):
    folder = save_tiny(tmp_path / "model", dtype=torch.bfloat16)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "model.norm.weight": tensors["model.norm.weight"].float()}, file)
    copy = shutil.copytree(folder, tmp_path / "copy")
    round_to_16_bits(folder, torch.bfloat16)
    assert all(path.read_bytes() == (copy / path.name).read_bytes() for path in folder.iterdir())


def test_a_single_wide_matrix_takes_no_vector_with_it(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"half": torch.randn(4, 4).half(), "wide": torch.randn(4, 4), "norm": torch.randn(4)}, file)
    round_to_16_bits(tmp_path, torch.bfloat16)
    found = {name: tensor.dtype for name, tensor in load_file(file).items()}
    assert found == {"half": torch.bfloat16, "wide": torch.bfloat16, "norm": torch.float32}


def test_whole_numbers_stay(tmp_path):
    save_file({"weight": torch.randn(4, 4), "steps": torch.arange(4)}, tmp_path / "model.safetensors")
    round_to_16_bits(tmp_path, torch.bfloat16)
    found = load_file(tmp_path / "model.safetensors")
    assert (found["weight"].dtype, found["steps"].dtype) == (torch.bfloat16, torch.int64)
