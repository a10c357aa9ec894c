import pytest
import torch
from tiny_gguf import write_tiny_gguf

import rlvr


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A folder with a GGUF file, and the model that it holds."""
    folder = tmp_path_factory.mktemp("gguf")
    return folder, write_tiny_gguf(folder)


def test_the_weights_are_those_of_the_file(original):
    folder, model = original
    loaded = rlvr.load_policy(str(folder), backend="gguf", lora=None).model.state_dict()
    expected = model.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_special_tokens_and_template_are_those_of_the_file(original):
    tokenizer = rlvr.load_policy(str(original[0] / "tiny-q8_0.gguf"), backend="gguf", lora=None).tokenizer
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert "<|im_start|>user" in tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)


def test_an_adapter_is_saved_and_loaded(original, tmp_path):
    policy = rlvr.load_policy(str(original[0]), backend="gguf", lora=rlvr.LoraSettings(r=4))
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    backend = rlvr.load_backend("gguf")
    backend.for_inference(policy)
    ids = torch.arange(10, 30)[None]
    for format in ("adapter", "merged-16bit"):
        backend.save(policy, tmp_path / format, format)
    expected = policy.model(ids).logits
    assert torch.equal(backend.load_saved(tmp_path / "adapter", policy.settings).model(ids).logits, expected)
    merged = backend.load_saved(tmp_path / "merged-16bit", policy.settings).model
    torch.testing.assert_close(merged(ids).logits.float(), expected, rtol=0, atol=0.05 * expected.abs().max().item())


def test_what_is_no_gguf_is_refused(tmp_path):
    for model, message in ((str(tmp_path), "holds 0 GGUF files"), ("org/name", "is no GGUF file")):
        with pytest.raises(rlvr.RlvrError, match=message):
            rlvr.load_policy(model, backend="gguf")
