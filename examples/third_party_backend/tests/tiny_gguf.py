"""Writes a tiny Qwen2 with random weights, rounded to 8 bits: `python tests/tiny_gguf.py FOLDER`.

As a GGUF file and, beside it, as an ordinary checkpoint of the rounded weights, to compare with. The rounding is
undone there by llama.cpp's own package.
"""

import sys
from pathlib import Path

import gguf
import torch

from rlvr.testing.tiny import tiny_model, tiny_tokenizer

MERGES = ["Ġ Ġ", "ĠĠ Ġ"]  # GGUF's byte-pair vocabularies have some


def write_tiny_gguf(folder):
    tokenizer = tiny_tokenizer()
    tokens = [*tokenizer.convert_ids_to_tokens(range(len(tokenizer))), "ĠĠ", "ĠĠĠ"]
    model = tiny_model(vocab_size=len(tokens))
    config = model.config
    Path(folder).mkdir(exist_ok=True)
    writer = gguf.GGUFWriter(Path(folder) / "tiny-q8_0.gguf", "qwen2")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in tokenizer.all_special_tokens else 1 for token in tokens])  # control, normal
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    weights = model.state_dict()
    for name, tensor in weights.items():
        kind = gguf.GGMLQuantizationType.Q8_0 if tensor.ndim == 2 else gguf.GGMLQuantizationType.F32
        data = gguf.quantize(tensor.numpy(), kind)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), data, raw_dtype=kind)
        weights[name] = torch.from_numpy(gguf.dequantize(data, kind).copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model.load_state_dict(weights)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


if __name__ == "__main__":
    write_tiny_gguf(sys.argv[1])
