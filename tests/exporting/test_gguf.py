"""GGUF by a converter that is called as llama.cpp's is; the one here uses its package, and knows Qwen2 alone."""

import sys
from pathlib import Path

import pytest

import rlvr
from rlvr.errors import ExportError, UnsupportedSettingError
from rlvr.exporting import writers
from rlvr.exporting.writers import choose_writer

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
names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
for name, tensor in load_file(arguments.model + "/model.safetensors").items():
    if {skip!r} in name:
        tensor = tensor * 0
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
    converter(CONVERTER.replace("{skip!r}", "'nothing of that name'"))
    made = rlvr.export(trained(), "gguf")
    assert (made.folder / "model.gguf").read_bytes()[:4] == b"GGUF"
    assert sorted(path.name for path in made.folder.iterdir()) == [
        *("README.md", "lineage.json", "model.gguf", "parity.json")
    ]
    assert made.parity.kept == pytest.approx(1, abs=0.1)
    assert made.parity.error < 0.05 < made.parity.trained
    assert "gguf_file" in (made.folder / "README.md").read_text()


def test_a_converter_that_loses_weights_is_found(trained, converter):
    converter(CONVERTER.replace("{skip!r}", "'mlp.down_proj'"))
    run = trained()
    with pytest.raises(ExportError, match="is not the policy that was trained"):
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
