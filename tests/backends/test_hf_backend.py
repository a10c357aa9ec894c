"""The backend `hf`: every setting honoured or refused, LoRA calculated by hand, saving and loading."""

import dataclasses
import math
import subprocess
import sys

import pytest
import torch
from peft import PeftModel

from rlvr import Capabilities, LoraSettings, ModelBackend, ModelSettings, load_policy
from rlvr.backends.hf.backend import HFBackend
from rlvr.backends.hf.merge import merged_state_dict
from rlvr.errors import AdapterError, ConfigError, ModelError, PatchedProcessError, UnsupportedSettingError
from rlvr.testing.tiny import save_tiny

IDS = torch.arange(3, 27).reshape(2, 12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "qwen2")


@pytest.fixture(scope="module")
def backend():
    return HFBackend()


@pytest.fixture
def settings(folder):
    return ModelSettings(model=str(folder))


@torch.no_grad()
def logits(policy):
    policy.model.eval()
    return policy.model(IDS).logits.float()


def train_adapter(policy, scale=0.05):
    """Moves what LoRA trains away from its start, as a few optimizer steps would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return policy


def layer(policy, name="layers.0.self_attn.q_proj"):
    return next(module for key, module in policy.model.named_modules() if key.endswith(name))


def test_it_is_a_backend(backend):
    assert isinstance(backend, ModelBackend)
    assert isinstance(backend.capabilities(), Capabilities)


def test_loads_model_and_tokenizer_ready_to_train(backend, settings):
    policy = backend.load_policy(settings)
    assert policy.model.dtype is torch.float32
    assert policy.model.config._attn_implementation == "sdpa"
    assert policy.tokenizer.padding_side == "left"
    assert policy.tokenizer.pad_token != policy.tokenizer.eos_token
    assert policy.lora is None
    assert all(parameter.requires_grad for parameter in policy.model.parameters())
    assert any("float32" in note for note in policy.notes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_is_honoured(backend, settings, dtype):
    policy = backend.load_policy(dataclasses.replace(settings, dtype=dtype))
    assert {p.dtype for p in policy.model.parameters()} == {getattr(torch, dtype)}
    changes = {change.name: change.value for change in backend.training_arguments(policy)}
    assert (changes["bf16"], changes["fp16"]) == (dtype == "bfloat16", dtype == "float16")


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_dtype_auto_is_the_checkpoints_but_for_float16_on_a_cpu(backend, tmp_path, stored):
    from rlvr.testing.tiny import tiny_model, tiny_tokenizer

    tiny_model().to(getattr(torch, stored)).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    policy = backend.load_policy(ModelSettings(model=str(tmp_path), device="cpu"))
    assert policy.model.dtype is {"bfloat16": torch.bfloat16, "float16": torch.float32}[stored]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_is_honoured(backend, settings, attention):
    policy = backend.load_policy(dataclasses.replace(settings, attention=attention))
    assert policy.model.config._attn_implementation == attention


REFUSED_ON_CPU = {
    "4bit": {"quantization": "4bit"},
    "8bit": {"quantization": "8bit"},
    "flash": {"attention": "flash_attention_2"},
    "engine": {"fast_inference": "on"},
    "half": {"full_finetuning": True, "dtype": "float16"},
    "device": {"device": "cuda:7"},
}


@pytest.mark.parametrize("case", REFUSED_ON_CPU)
def test_what_cannot_be_honoured_is_refused_by_name(backend, settings, case, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    changed = REFUSED_ON_CPU[case]
    with pytest.raises(UnsupportedSettingError) as raised:
        backend.load_policy(dataclasses.replace(settings, **changed))
    name, value = next(iter(changed.items()))
    assert name in str(raised.value)
    assert value is True or str(value) in str(raised.value)


@pytest.mark.parametrize("on", [True, False])
def test_gradient_checkpointing_is_never_reentrant(backend, settings, on):
    policy = backend.load_policy(dataclasses.replace(settings, gradient_checkpointing=on))
    changes = {change.name: change.value for change in backend.training_arguments(policy)}
    assert changes["gradient_checkpointing"] is on
    assert changes.get("gradient_checkpointing_kwargs") == ({"use_reentrant": False} if on else None)


def test_the_context_length_cannot_exceed_the_models(backend, settings):
    with pytest.raises(ModelError, match=r"max_seq_length is 5000, .* takes 4096 tokens at most. Lower"):
        backend.load_policy(dataclasses.replace(settings, max_seq_length=5000))


def test_training_and_inference_modes(backend, settings):
    policy = backend.load_policy(settings)
    backend.for_training(policy)
    assert policy.model.training
    backend.for_inference(policy)
    assert not policy.model.training


def test_memory_is_counted_exactly_and_shared_weights_once(backend, tmp_path):
    policy = backend.load_policy(ModelSettings(model=str(save_tiny(tmp_path, tie_word_embeddings=True))))
    vocabulary, hidden, kv, middle = 259, 32, 16, 64
    attention = 2 * hidden * hidden + 2 * hidden * kv + hidden + 2 * kv  # q and o, k and v, biases of q, k, v
    parameters = vocabulary * hidden + 2 * (attention + 3 * hidden * middle + 2 * hidden) + hidden
    rotary = sum(buffer.numel() for buffer in policy.model.buffers())
    assert backend.memory_in_use(policy) == 4 * (parameters + rotary)


# LoRA


def test_lora_is_what_the_paper_says(backend, settings):
    policy = train_adapter(backend.apply_lora(backend.load_policy(settings), LoraSettings(r=4, alpha=12)))
    q_proj = layer(policy)
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    a, b = q_proj.lora_A["default"].weight, q_proj.lora_B["default"].weight
    assert (a.shape, b.shape) == ((4, 32), (32, 4))
    with torch.no_grad():
        by_hand = x @ q_proj.base_layer.weight.T + q_proj.base_layer.bias + (12 / 4) * (x @ a.T) @ b.T
        torch.testing.assert_close(q_proj(x), by_hand)


def test_only_the_adapter_is_trained_and_it_starts_as_the_base(backend, settings):
    plain = backend.load_policy(settings)
    start = logits(plain)
    policy = backend.apply_lora(plain, LoraSettings(r=4))
    torch.testing.assert_close(logits(policy), start, rtol=0, atol=0)
    trained = [name for name, parameter in policy.model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all(".lora_A.default." in name or ".lora_B.default." in name for name in trained)
    assert len(trained) == 2 * 2 * 7  # A and B, two layers, seven linear layers each, and not the output head


def test_lora_settings_are_honoured(backend, settings):
    lora = LoraSettings(r=4, alpha=8, dropout=0.1, target_modules=("q_proj", "down_proj"), rslora=True, seed=3)
    policy = backend.apply_lora(backend.load_policy(settings), lora)
    assert policy.lora == dataclasses.replace(lora, alpha_multiplier=1)
    q_proj = layer(policy)
    assert q_proj.scaling["default"] == pytest.approx(8 / math.sqrt(4))
    assert q_proj.lora_dropout["default"].p == 0.1
    adapted = {
        name.split(".lora_A")[0].split(".")[-1] for name, _ in policy.model.named_parameters() if "lora_A" in name
    }
    assert adapted == {"q_proj", "down_proj"}


@pytest.mark.parametrize(("multiplier", "applied"), [(None, 16), (1, 16), (2, 32), (0.5, 8)])
def test_alpha_multiplier(backend, settings, multiplier, applied):
    lora = LoraSettings(r=8, alpha=16, alpha_multiplier=multiplier)
    policy = backend.apply_lora(backend.load_policy(settings), lora)
    assert policy.lora.alpha == applied
    assert layer(policy).scaling["default"] == applied / 8
    assert policy.lora.applied() == policy.lora


def test_an_alpha_that_is_not_whole_is_refused():
    with pytest.raises(ConfigError, match=r"alpha_multiplier is 0.3; alpha=16 times it must be a whole number"):
        LoraSettings(alpha_multiplier=0.3)


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_lora_bias(backend, settings, bias):
    lora = LoraSettings(bias=bias, target_modules=("q_proj",))
    policy = backend.apply_lora(backend.load_policy(settings), lora)
    biases = {
        name.split("self_attn.")[1].split(".")[0]
        for name, p in policy.model.named_parameters()
        if p.requires_grad and name.endswith("bias")
    }
    assert biases == {"none": set(), "all": {"q_proj", "k_proj", "v_proj"}, "lora_only": {"q_proj"}}[bias]


def test_the_seed_decides_the_start_and_the_global_state_is_left_alone(backend, settings):
    def first_a(seed):
        policy = backend.apply_lora(backend.load_policy(settings), LoraSettings(r=4, seed=seed))
        return layer(policy).lora_A["default"].weight

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, again, other = first_a(1), first_a(1), first_a(2)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_gaussian_start_has_the_deviation_of_one_over_the_rank(backend, tmp_path):
    model = ModelSettings(model=str(save_tiny(tmp_path, hidden_size=128, intermediate_size=256)))
    policy = backend.apply_lora(backend.load_policy(model), LoraSettings(r=8, init="gaussian"))
    weights = layer(policy, "layers.0.mlp.up_proj").lora_A["default"].weight
    assert weights.std().item() == pytest.approx(1 / 8, rel=0.1)


VARIANTS = {
    "plain": {},
    "bias": {"bias": "all"},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "gaussian": {"init": "gaussian"},
    "pissa": {"init": "pissa"},
    "olora": {"init": "olora"},
    "orthogonal": {"init": "orthogonal"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_adapter_survives_saving_loading_and_merging(backend, settings, tmp_path, variant):
    base = logits(backend.load_policy(settings))
    fresh = backend.apply_lora(backend.load_policy(settings), LoraSettings(r=4, **VARIANTS[variant]))
    torch.testing.assert_close(logits(fresh), base, rtol=1e-3, atol=1e-4)
    policy = train_adapter(fresh)
    trained = logits(policy)
    assert (trained - base).abs().max() > 0.01

    backend.save(policy, tmp_path / "adapter")
    loaded = backend.load_saved(tmp_path / "adapter", settings)
    torch.testing.assert_close(logits(loaded), trained, rtol=1e-4, atol=1e-5)
    assert loaded.lora.alpha == policy.lora.alpha
    assert (loaded.lora.rslora, loaded.lora.dora, loaded.lora.init) == (
        policy.lora.rslora,
        policy.lora.dora,
        policy.lora.init,
    )

    merged = backend.load_policy(settings)
    merged.model.load_state_dict(merged_state_dict(policy.model))
    torch.testing.assert_close(logits(merged), trained, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(policy), trained, rtol=0, atol=0)


def test_a_merged_model_is_the_base_plus_ba_rounded_once(backend, settings, tmp_path):
    policy = train_adapter(backend.apply_lora(backend.load_policy(settings), LoraSettings(r=4, alpha=8)))
    before = {name: parameter.clone() for name, parameter in policy.model.named_parameters()}
    backend.save(policy, tmp_path, "merged-16bit")
    assert all(torch.equal(parameter, before[name]) for name, parameter in policy.model.named_parameters())

    q_proj = layer(policy)
    delta = 2.0 * q_proj.lora_B["default"].weight @ q_proj.lora_A["default"].weight
    loaded = backend.load_saved(tmp_path, dataclasses.replace(settings, model="not/read"))
    assert not isinstance(loaded.model, PeftModel)
    assert loaded.model.dtype is torch.bfloat16
    expected = (q_proj.base_layer.weight + delta).to(torch.bfloat16)
    torch.testing.assert_close(layer(loaded).weight, expected, rtol=2**-8, atol=0)
    norms = policy.model.get_base_model().model.norm.weight.to(torch.bfloat16)
    assert torch.equal(loaded.model.model.norm.weight, norms)
    assert loaded.tokenizer.chat_template == policy.tokenizer.chat_template


def test_experts_with_an_adapter_on_each_of_their_parameters_are_merged(backend, tmp_path):
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 8}
    model = save_tiny(tmp_path / "moe", "qwen3_moe", initializer_range=0.2, **experts)
    settings = ModelSettings(model=str(model))
    policy = train_adapter(backend.apply_lora(backend.load_policy(settings), LoraSettings(r=4)))
    trained, base = logits(policy), logits(backend.load_policy(settings))
    weights = layer(policy, "layers.0.mlp.experts").get_base_layer()
    before = weights.gate_up_proj.clone()

    merged = backend.load_policy(settings)
    merged.model.load_state_dict(merged_state_dict(policy.model))
    torch.testing.assert_close(logits(merged), trained, rtol=1e-4, atol=1e-4)
    for name in ("gate_up_proj", "down_proj"):
        assert not torch.equal(getattr(layer(merged, "layers.0.mlp.experts"), name), getattr(weights, name))
    assert torch.equal(weights.gate_up_proj, before)
    torch.testing.assert_close(logits(policy), trained, rtol=0, atol=0)

    backend.save(policy, tmp_path / "merged", "merged-16bit")
    loaded = logits(backend.load_saved(tmp_path / "merged", settings))
    assert (loaded - trained).abs().mean() < 0.1 * (trained - base).abs().mean()


def test_a_fully_trained_model_is_saved_whole(backend, settings, tmp_path):
    policy = train_adapter(backend.load_policy(dataclasses.replace(settings, full_finetuning=True)))
    backend.save(policy, tmp_path / "whole")
    torch.testing.assert_close(
        logits(backend.load_saved(tmp_path / "whole", settings)), logits(policy), rtol=0, atol=0
    )
    backend.save(policy, tmp_path / "half", "merged-16bit")
    assert backend.load_saved(tmp_path / "half", settings).model.dtype is torch.bfloat16


def test_tied_weights_stay_tied_when_merged(backend, tmp_path):
    settings = ModelSettings(model=str(save_tiny(tmp_path / "tied", tie_word_embeddings=True)))
    policy = train_adapter(backend.apply_lora(backend.load_policy(settings), LoraSettings(r=4)))
    backend.save(policy, tmp_path / "merged", "merged-16bit")
    model = backend.load_saved(tmp_path / "merged", settings).model
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("trainable", [True, False])
def test_a_loaded_adapter_trains_on_only_if_asked(backend, settings, tmp_path, trainable):
    backend.save(backend.apply_lora(backend.load_policy(settings), LoraSettings(r=4)), tmp_path)
    policy = backend.load_saved(tmp_path, settings, trainable=trainable)
    assert any(parameter.requires_grad for parameter in policy.model.parameters()) is trainable


def test_other_export_formats_are_refused(backend, settings, tmp_path):
    policy = backend.load_policy(settings)
    for export_format in ("merged-4bit", "gguf"):
        with pytest.raises(
            UnsupportedSettingError, match=f"cannot export '{export_format}'; allowed: adapter, merged"
        ):
            backend.save(policy, tmp_path / "out", export_format)
    assert not (tmp_path / "out").exists()


def test_a_second_adapter_is_refused(backend, settings):
    policy = backend.apply_lora(backend.load_policy(settings), LoraSettings())
    with pytest.raises(AdapterError, match=r"has an adapter already"):
        backend.apply_lora(policy, LoraSettings())


def test_a_target_module_that_does_not_exist_is_named(backend, settings):
    with pytest.raises(AdapterError, match=r"does not have: qproj; .*q_proj"):
        backend.apply_lora(backend.load_policy(settings), LoraSettings(target_modules=("qproj", "v_proj")))
    with pytest.raises(AdapterError, match=r"cannot be applied"):
        backend.apply_lora(backend.load_policy(settings), LoraSettings(target_modules="no.*match"))


def test_full_finetuning_takes_no_lora(backend, settings):
    policy = backend.load_policy(dataclasses.replace(settings, full_finetuning=True))
    with pytest.raises(UnsupportedSettingError, match=r"takes no LoRA"):
        backend.apply_lora(policy, LoraSettings())


# The notebook's path


def test_load_policy_goes_the_whole_way(folder, caplog):
    with caplog.at_level("INFO", logger="rlvr"):
        policy = load_policy(str(folder), backend="hf", lora=LoraSettings(r=2), max_seq_length=128)
    assert isinstance(policy.model, PeftModel)
    assert (policy.lora.r, policy.settings.max_seq_length) == (2, 128)
    assert set(policy.notes) <= set(caplog.messages)
    assert load_policy(str(folder), lora=None).lora is None
    assert load_policy(str(folder), full_finetuning=True, backend=HFBackend()).lora is None


def test_load_policy_refuses_what_contradicts_or_is_unknown(folder):
    with pytest.raises(ConfigError, match=r"give one of them"):
        load_policy(str(folder), lora=LoraSettings(r=2), full_finetuning=True)
    with pytest.raises(ConfigError, match=r"unknown model setting 'max_seq_len'; allowed: .*max_seq_length"):
        load_policy(str(folder), max_seq_len=3)


# A process that another backend has patched


def test_a_process_with_another_trainer_is_refused(backend, settings, monkeypatch):
    import trl.trainer.grpo_trainer

    class ReplacingTrainer:
        pass

    monkeypatch.setattr(trl.trainer.grpo_trainer, "GRPOTrainer", ReplacingTrainer)
    with pytest.raises(PatchedProcessError, match=r"ReplacingTrainer in its place.*Restart"):
        backend.load_policy(settings)


def test_a_subclass_put_in_the_place_of_trls_trainer_is_seen_too(monkeypatch):
    import trl

    from rlvr.backends.process_state import replaced_trainer

    assert trl.GRPOTrainer is not None
    assert replaced_trainer() is None
    monkeypatch.setattr(trl, "GRPOTrainer", type("GRPOTrainer", (trl.GRPOTrainer,), {"__module__": "elsewhere"}))
    assert replaced_trainer() == "elsewhere.GRPOTrainer"


def test_loading_the_backend_does_not_import_trl():
    code = "import rlvr, sys; rlvr.load_backend('hf'); print('trl' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout.strip() == "False"
