"""Model folders and tokenizers that cannot be used: one message each, on a real folder damaged once."""

import json
import shutil

import pytest
from safetensors.torch import save_file

from rlvr import LoraSettings, ModelSettings
from rlvr.backends.checks import check_model_folder, load_config, load_tokenizer, safetensors_problem
from rlvr.backends.hf.backend import HFBackend
from rlvr.errors import ModelError
from rlvr.testing.tiny import save_tiny, tiny_model


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "whole")


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "model")


def edit(path, **changes):
    """Sets keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def drop_weight(folder):
    weights = {name: w for name, w in tiny_model().state_dict().items() if "layers.1.mlp.up_proj" not in name}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


DAMAGE = {
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "cannot be loaded"),
    "unknown architecture": (
        lambda f: edit(f / "config.json", model_type="no_such_model"),
        "cannot be loaded.*no_such",
    ),
    "an adapter": (
        lambda f: ((f / "config.json").unlink(), (f / "adapter_config.json").write_text("{}")),
        "holds a LoRA adapter, not a model",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no weights"),
    "empty weights": (
        lambda f: (f / "model.safetensors").write_bytes(b""),
        "is damaged: its header is cut off",
    ),
    "cut weights": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-100]),
        r"is damaged: it has \d+ bytes where its header says \d+",
    ),
    "weights of something else": (
        lambda f: (f / "model.safetensors").write_bytes(b"<html>" * 100),
        "is damaged: its header is cut off, or it is no safetensors file",
    ),
    "header is no JSON": (
        lambda f: (f / "model.safetensors").write_bytes((4).to_bytes(8, "little") + b"nope"),
        "is damaged: its header cannot be read",
    ),
    "LFS pointer": (
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "is a Git LFS pointer",
    ),
    "missing shard": (
        lambda f: (
            (f / "model.safetensors").unlink(),
            (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}'),
        ),
        "lacks 1 of 1 weights files: model-1.safetensors",
    ),
    "broken index": (
        lambda f: (
            (f / "model.safetensors").unlink(),
            (f / "model.safetensors.index.json").write_text("[]"),
        ),
        "index.*is damaged",
    ),
    "missing weights": (
        drop_weight,
        "lacks weights that its configuration asks for: model.layers.1.mlp.up_proj.weight",
    ),
    "no tokenizer": (
        lambda f: [path.unlink() for path in f.glob("*") if "token" in path.name or path.suffix == ".jinja"],
        "has no tokenizer that can be loaded",
    ),
    "no eos": (lambda f: edit(f / "tokenizer_config.json", eos_token=None), "has no eos token"),
    "no chat template": (lambda f: (f / "chat_template.jinja").unlink(), "has no chat template"),
    "too small for its tokenizer": (
        lambda f: save_tiny_model(f, vocab_size=100),
        "259 tokens and the model 100 emb",
    ),
    "context too short": (
        lambda f: edit(f / "config.json", max_position_embeddings=1024),
        "max_seq_length is 4096, and model .* takes 1024 tokens at most",
    ),
}


def save_tiny_model(folder, **config):
    tiny_model(**config).save_pretrained(folder)


@pytest.mark.parametrize("fault", DAMAGE)
def test_a_folder_that_cannot_be_used_gets_one_message(folder, fault):
    damage, message = DAMAGE[fault]
    damage(folder)
    with pytest.raises(ModelError, match=f"(?s){message}") as raised:
        HFBackend().load_policy(ModelSettings(model=str(folder)))
    assert str(folder) in str(raised.value)


@pytest.mark.parametrize("model", ["./no/such/folder", "~/no-such-folder-at-all", "/no/such", "a/b/c"])
def test_a_folder_that_is_not_there(model):
    with pytest.raises(ModelError, match=r"does not exist"):
        check_model_folder(model)


def test_a_file_is_no_model(folder):
    with pytest.raises(ModelError, match=r"is a file; give the folder"):
        check_model_folder(str(folder / "config.json"))


def test_a_hub_id_is_left_to_the_hub():
    assert check_model_folder("org/name") is None
    assert check_model_folder("name") is None


def test_a_hub_id_that_cannot_be_reached_is_a_model_error(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"'no-org/no-such-model' cannot be loaded"):
        load_config(ModelSettings(model="no-org/no-such-model"))


def test_a_whole_folder_passes(whole):
    assert check_model_folder(str(whole)) == whole
    assert safetensors_problem(whole / "model.safetensors") is None


def test_sharded_weights_pass_and_each_shard_is_looked_at(tmp_path):
    tiny_model().save_pretrained(tmp_path, max_shard_size="50KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    assert check_model_folder(str(tmp_path)) == tmp_path
    shards[-1].write_bytes(shards[-1].read_bytes()[:-1])
    with pytest.raises(ModelError, match=shards[-1].name):
        check_model_folder(str(tmp_path))


@pytest.mark.parametrize(("known", "chosen"), [(True, "<|endoftext|>"), (False, "<|im_end|>")])
def test_a_missing_pad_token_is_chosen_and_said(folder, known, chosen):
    edit(folder / "tokenizer_config.json", pad_token=None, unk_token=None)
    if not known:
        text = (folder / "tokenizer.json").read_text().replace("<|endoftext|>", "<|start|>")
        (folder / "tokenizer.json").write_text(text)
    settings = ModelSettings(model=str(folder))
    tokenizer, notes = load_tokenizer(settings, load_config(settings))
    assert tokenizer.pad_token == chosen
    assert len(notes) == 1
    assert chosen in notes[0]
    policy = HFBackend().load_policy(settings)
    assert policy.model.config.pad_token_id == tokenizer.pad_token_id
    assert notes[0] in policy.notes


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "gemma3_text", "phi3", "gpt2"])
def test_other_architectures_load_and_take_lora(tmp_path, architecture):
    """all-linear takes what they call their layers; fused and convolution-like ones are PEFT's business."""
    extra = {"n_positions": 4096, "n_embd": 32, "n_layer": 2, "n_head": 4} if architecture == "gpt2" else {}
    settings = ModelSettings(model=str(save_tiny(tmp_path, architecture, **extra)))
    policy = HFBackend().apply_lora(HFBackend().load_policy(settings), LoraSettings(r=2))
    assert any(parameter.requires_grad for parameter in policy.model.parameters())
