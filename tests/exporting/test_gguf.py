"""GGUF by a converter that is called as llama.cpp's is; the one here uses its package, and knows Qwen2 alone."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import LlamaTokenizer

import rlvr
from rlvr.errors import ExportError, UnsupportedSettingError
from rlvr.exporting import writers
from rlvr.exporting.writers import LlamaCppWriter, choose_writer

pytestmark = pytest.mark.both

CONVERTER = """
import argparse, gguf, json, types
from safetensors.torch import load_file

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("--outfile", required=True)
parser.add_argument("--outtype", choices=["f32", "f16", "bf16", "q8_0", "auto"])
arguments = parser.parse_args()
config = types.SimpleNamespace(**json.load(open(arguments.model + "/config.json")))
writer = gguf.GGUFWriter(arguments.outfile, "qwen2")
writer.add_vocab_size(config.vocab_size)
writer.add_context_length(config.max_position_embeddings)
writer.add_block_count(config.num_hidden_layers)
writer.add_embedding_length(config.hidden_size)
writer.add_feed_forward_length(config.intermediate_size)
writer.add_head_count(config.num_attention_heads)
writer.add_head_count_kv(config.num_key_value_heads)
writer.add_layer_norm_rms_eps(config.rms_norm_eps)
writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
vocabulary = json.load(open(arguments.model + "/tokenizer.json"))["model"]["vocab"]
tokens = [*sorted(vocabulary, key=vocabulary.get), "ĀĀ", "ĀĀĀ"]  # zero bytes, of no text: readers want some merges
# TOKENS
writer.add_tokenizer_model("gpt2")
writer.add_tokenizer_pre("qwen2")
writer.add_token_list(tokens)
writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])  # control, normal
writer.add_token_merges(["Ā Ā", "ĀĀ Ā"])
names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
for name, tensor in load_file(arguments.model + "/model.safetensors").items():
    # TENSOR
    writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), tensor.float().numpy())
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
"""


@pytest.fixture
def converter(tmp_path, monkeypatch):
    """`converter(text)` puts a program where llama.cpp's converter is looked for."""

    def install(text):
        folder = tmp_path / "llama.cpp"
        folder.mkdir()
        (folder / writers.CONVERTER).write_text(text)
        monkeypatch.setenv(writers.CONVERTER_VARIABLE, str(folder))
        return folder / writers.CONVERTER

    return install


def test_a_gguf_export_is_compared_by_loading_it_back(trained, converter):
    converter(CONVERTER)
    made = rlvr.export(trained(), "gguf")
    assert (made.folder / "model.gguf").read_bytes()[:4] == b"GGUF"
    assert sorted(path.name for path in made.folder.iterdir()) == [
        *("README.md", "lineage.json", "model.gguf", "parity.json")
    ]
    assert made.parity.kept == pytest.approx(1, abs=0.1)
    assert made.parity.error < 0.05 < made.parity.trained
    assert "gguf_file" in (made.folder / "README.md").read_text()


ZEROS = "if 'mlp.down_proj' in name: tensor = tensor * 0"
HALF = "tensor = (tensor + load_file({base!r})[name]) / 2"
SWAPPED = "a, e = tokens.index('a'), tokens.index('e'); tokens[a], tokens[e] = 'e', 'a'"
NO_TOKENS = "writer.add_token_list = lambda tokens: None"


@pytest.mark.parametrize(
    ("mark", "loss", "says"),
    [
        ("# TENSOR", ZEROS, "is not the policy that was trained.*differ from the trained policy's by"),
        ("# TENSOR", HALF, r"it shows (4\d|5\d)% of what was trained \(allowed: 75% to 125%\)"),
        ("# TOKENS", SWAPPED, "its tokenizer reads the same texts as other tokens"),
        ("# TOKENS", NO_TOKENS, "transformers cannot load the GGUF file back"),
    ],
    ids=["weights", "half of the training", "other tokens", "no tokens"],
)
def test_a_converter_that_loses_something_is_found(trained, converter, lively_model, mark, loss, says):
    converter(CONVERTER.replace(mark, loss.format(base=str(lively_model / "model.safetensors"))))
    run = trained()
    with pytest.raises(ExportError, match=says):
        rlvr.export(run, "gguf")
    assert not (run / "exports").exists()


def test_a_converter_that_fails_is_quoted(trained, converter):
    path = converter("import sys; print('BPE pre-tokenizer was not recognized'); sys.exit(3)")
    run = trained()
    with pytest.raises(ExportError) as caught:
        rlvr.export(run, "gguf")
    assert f"{path} ended with exit code 3" in str(caught.value)
    assert "BPE pre-tokenizer was not recognized" in str(caught.value)
    assert not (run / "exports").exists()


def test_a_file_that_transformers_cannot_load_is_no_export(trained, converter):
    converter("import sys; open(sys.argv[3], 'wb').write(b'GGUF nonsense')")
    run = trained()
    with pytest.raises(ExportError, match="transformers cannot load the GGUF file back"):
        rlvr.export(run, "gguf")
    assert not (run / "exports").exists()


@pytest.mark.parametrize("adds_bos", [True, False])
def test_the_converter_gets_what_transformers_leaves_out_of_sentencepiece(tmp_path, converter, adds_bos):
    """The file with the scores, the added tokens and the word on BOS; the stand-in keeps what it was given."""
    vocab = {token: n for n, token in enumerate(["<unk>", "<s>", "</s>", "▁", "a"])}
    base = tmp_path / "base"
    LlamaTokenizer(vocab=vocab, merges=[], add_bos_token=adds_bos).save_pretrained(base)
    (base / "tokenizer.model").write_bytes(b"scores")
    tokenizer = LlamaTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<think>"])
    backend = SimpleNamespace(save=lambda policy, folder, export_format: policy.tokenizer.save_pretrained(folder))
    given = tmp_path / "given"
    path = converter(f"import shutil, sys; shutil.copytree(sys.argv[1], {str(given)!r}); open(sys.argv[3], 'wb')")
    (tmp_path / "gguf").mkdir()
    LlamaCppWriter(backend, path).write(SimpleNamespace(tokenizer=tokenizer), tmp_path / "gguf")
    assert (given / "tokenizer.model").read_bytes() == b"scores"
    config = json.loads((given / "tokenizer_config.json").read_text())
    assert config["add_bos_token"] is adds_bos
    assert config["added_tokens_decoder"]["5"] == {"content": "<think>", "special": False}
    assert config["added_tokens_decoder"]["1"] == {"content": "<s>", "special": True}


def test_where_the_converter_is_looked_for(tmp_path, monkeypatch):
    backend = rlvr.load_backend("hf")
    monkeypatch.delenv(writers.CONVERTER_VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        UnsupportedSettingError, match=r"it offers: adapter, merged-16bit\. llama.cpp's converter would"
    ):
        choose_writer(backend, "hf", "gguf")
    program = tmp_path / writers.CONVERTER
    program.write_text(f"#!{sys.executable}\n")
    program.chmod(0o755)
    assert choose_writer(backend, "hf", "gguf").converter == program
    monkeypatch.setenv(writers.CONVERTER_VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(UnsupportedSettingError, match="nowhere', and there is no convert_hf_to_gguf"):
        choose_writer(backend, "hf", "gguf")
    monkeypatch.setenv(writers.CONVERTER_VARIABLE, str(Path(program)))
    monkeypatch.setattr(writers, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedSettingError, match="pip install gguf"):
        choose_writer(backend, "hf", "gguf")
