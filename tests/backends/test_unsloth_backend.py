"""The backend `unsloth` on the real package's CPU backend, and the parts of its GPU side that need no GPU."""

import dataclasses
import json
import logging
import os
import subprocess
import sys
import warnings
from importlib.util import find_spec

import pytest
import torch

from rlvr import LoraSettings, ModelBackend, ModelSettings, load_backend, load_policy
from rlvr.errors import AdapterError, ModelError, PatchedProcessError, UnsupportedSettingError
from rlvr.testing.tiny import save_tiny
from rlvr_unsloth import process

if find_spec("unsloth") is None:
    pytest.skip("the unsloth package is not installed in this environment", allow_module_level=True)

from rlvr_unsloth import backend as backend_module  # noqa: I001 - Unsloth comes before PEFT
from peft import PeftModel

pytestmark = pytest.mark.unsloth

IDS = torch.arange(3, 27).reshape(2, 12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "qwen2")


@pytest.fixture(scope="module")
def backend():
    return load_backend("unsloth")


@pytest.fixture
def settings(folder):
    return ModelSettings(model=str(folder))


@torch.no_grad()
def logits(backend, policy):
    backend.for_inference(policy)
    return policy.model(IDS).logits.float()


def train_adapter(policy, scale=0.05):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return policy


def layer(policy, name="layers.0.self_attn.q_proj"):
    return next(module for key, module in policy.model.named_modules() if key.endswith(name))


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, **environment},
    )


def test_it_is_a_backend_and_is_listed_without_importing_unsloth(backend):
    assert isinstance(backend, ModelBackend)
    result = run(
        "import rlvr, sys; row = [s for s in rlvr.list_backends() if s.name == 'unsloth'][0];"
        "print(row.available, row.reason, 'unsloth' in sys.modules)"
    )
    assert result.stdout.split() == ["True", "None", "False"]


FINDER = """
import os, sys
asked = []
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name in ("unsloth", "trl", "transformers", "peft") and name not in asked:
            asked.append(name)
sys.meta_path.insert(0, Finder())
"""


def test_unsloth_comes_first_and_writes_neither_to_stdout_nor_to_the_working_directory(tmp_path):
    work, cache = tmp_path / "work", tmp_path / "cache"
    work.mkdir()
    code = (
        f"{FINDER}os.chdir({str(work)!r}); os.environ.pop('UNSLOTH_COMPILE_LOCATION', None)\n"
        "import rlvr; rlvr.load_backend('unsloth')\n"
        "names = ('UNSLOTH_COMPILE_LOCATION', 'UNSLOTH_AUTO_INSTALL', 'UNSLOTH_DISABLE_STATISTICS')\n"
        "print(asked[0], sorted(asked), [os.environ[name] for name in names], os.listdir('.'))"
    )
    result = run(code, RLVR_CACHE=str(cache))
    assert result.returncode == 0, result.stderr
    (line,) = result.stdout.splitlines()
    location = str(cache / "unsloth_compiled")
    assert line == f"unsloth ['peft', 'transformers', 'trl', 'unsloth'] {[location, '0', '1']} []"
    assert (cache / "unsloth_compiled").is_dir()


def test_hf_and_unsloth_share_a_cpu_process(backend, settings):
    from rlvr.backends.process_state import replaced_trainer

    assert replaced_trainer() is None
    hf = load_backend("hf").load_policy(settings)
    ours = backend.load_policy(settings)
    torch.testing.assert_close(logits(backend, ours), hf.model.eval()(IDS).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_dtype_is_honoured_and_auto_is_the_checkpoints(backend, settings, dtype):
    policy = backend.load_policy(dataclasses.replace(settings, dtype=dtype))
    assert {p.dtype for p in policy.model.parameters()} == {torch.bfloat16 if dtype == "bfloat16" else torch.float32}
    changes = {change.name: change.value for change in backend.training_arguments(policy)}
    assert (changes["bf16"], changes["fp16"]) == (dtype == "bfloat16", False)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_is_honoured(backend, settings, attention):
    policy = backend.load_policy(dataclasses.replace(settings, attention=attention))
    assert policy.model.config._attn_implementation == attention


@pytest.mark.parametrize(
    "changed",
    [
        {"dtype": "float16"},
        {"quantization": "4bit"},
        {"quantization": "8bit"},
        {"fast_inference": "on"},
        {"attention": "flash_attention_2"},
        {"device": "cuda:0"},
    ],
    ids=str,
)
def test_what_unsloth_would_replace_in_silence_on_a_cpu_is_refused(backend, settings, changed):
    with pytest.raises(UnsupportedSettingError) as raised:
        backend.load_policy(dataclasses.replace(settings, **changed))
    ((name, value),) = changed.items()
    assert name in str(raised.value)
    assert value in str(raised.value)


@pytest.mark.parametrize("on", [True, False])
def test_checkpointing_is_unsloths_own_and_trls_is_off(backend, settings, on):
    policy = backend.load_policy(dataclasses.replace(settings, gradient_checkpointing=on))
    policy = backend.apply_lora(policy, LoraSettings(r=4))
    backend.for_training(policy)
    assert policy.model.training
    assert any(getattr(module, "gradient_checkpointing", False) for module in policy.model.modules()) is on
    changes = {change.name: change.value for change in backend.training_arguments(policy)}
    assert changes["gradient_checkpointing"] is False


def test_the_context_length_cannot_exceed_the_models(backend, settings):
    with pytest.raises(ModelError, match=r"max_seq_length is 5000"):
        backend.load_policy(dataclasses.replace(settings, max_seq_length=5000))


def test_a_damaged_folder_gets_the_same_message_as_elsewhere(backend, tmp_path):
    with pytest.raises(ModelError, match=r"has no config.json"):
        backend.load_policy(ModelSettings(model=str(tmp_path)))


def test_alpha_is_doubled_unless_told_otherwise_and_said(backend, settings):
    policy = backend.apply_lora(backend.load_policy(settings), LoraSettings(r=8, alpha=16))
    assert policy.lora.alpha == 32
    assert layer(policy).scaling["default"] == 32 / 8
    assert any("alpha 16 became 32" in note and "alpha_multiplier=1" in note for note in policy.notes)
    plain = LoraSettings(r=8, alpha=16, alpha_multiplier=1)
    policy = backend.apply_lora(backend.load_policy(settings), plain)
    assert layer(policy).scaling["default"] == 16 / 8
    assert not any("alpha" in note for note in policy.notes)


def test_the_same_adapter_as_hf_is_put_on_the_same_modules(backend, settings):
    lora = LoraSettings(r=4, alpha=8, alpha_multiplier=1, rslora=True, dropout=0.25, seed=7)
    names = []
    for loader in (load_backend("hf"), backend):
        policy = loader.apply_lora(loader.load_policy(settings), lora)
        names.append({name for name, parameter in policy.model.named_parameters() if parameter.requires_grad})
        assert layer(policy).scaling["default"] == 8 / 4**0.5
        assert layer(policy).lora_dropout["default"].p == 0.25
    assert names[0] == names[1]


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


VARIANTS = {
    "plain": {},
    "bias": {"bias": "all"},
    "lora bias": {"bias": "lora_only"},
    "dora": {"dora": True},
    "gaussian": {"init": "gaussian"},
    "pissa": {"init": "pissa"},
    "olora": {"init": "olora"},
    "orthogonal": {"init": "orthogonal"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_adapter_is_applied_and_survives_saving(backend, settings, tmp_path, variant):
    base = logits(backend, backend.load_policy(settings))
    policy = backend.apply_lora(backend.load_policy(settings), LoraSettings(r=4, **VARIANTS[variant]))
    config = policy.model.peft_config["default"]
    expected = LoraSettings(**VARIANTS[variant])
    assert (config.bias, config.use_dora) == (expected.bias, expected.dora)
    assert config.init_lora_weights == (True if expected.init == "default" else expected.init)
    trained = logits(backend, train_adapter(policy))
    assert (trained - base).abs().max() > 0.01
    backend.save(policy, tmp_path)
    loaded = backend.load_saved(tmp_path, settings)
    torch.testing.assert_close(logits(backend, loaded), trained, rtol=1e-4, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_an_adapter_goes_onto_the_model_that_is_named_not_the_one_it_remembers(backend, settings, tmp_path):
    other = save_tiny(tmp_path / "other", seed=9)
    backend.save(train_adapter(backend.apply_lora(backend.load_policy(settings), LoraSettings(r=4))), tmp_path / "a")
    remembered = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    loaded = backend.load_saved(tmp_path / "a", ModelSettings(model=str(other)), trainable=True)
    base = load_backend("hf").load_policy(ModelSettings(model=str(other)))
    assert torch.equal(layer(loaded).base_layer.weight, layer(base).weight)
    assert any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text()) == remembered


@pytest.mark.parametrize("revision", ["other", "1" * 40])
def test_an_adapter_goes_onto_the_revision_that_is_named(backend, settings, tmp_path, monkeypatch, revision):
    """Given as a folder, since Unsloth on a GPU loads a Hub model's default branch under every adapter."""
    backend.save(train_adapter(backend.apply_lora(backend.load_policy(settings), LoraSettings(r=4))), tmp_path / "a")
    repository, commit = tmp_path / "hub" / "models--org--tiny", "1" * 40
    snapshot = save_tiny(repository / "snapshots" / commit, seed=9)
    (repository / "refs").mkdir()
    (repository / "refs" / "other").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    named = ModelSettings(model="org/tiny", revision=revision)
    with backend_module._adapter_on(tmp_path / "a", named) as staged:
        config = json.loads((staged / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (str(snapshot), None)
    loaded = backend.load_saved(tmp_path / "a", named)
    base = load_backend("hf").load_policy(ModelSettings(model=str(snapshot)))
    assert torch.equal(layer(loaded).base_layer.weight, layer(base).weight)
    said = loaded.model.peft_config["default"]
    assert (said.base_model_name_or_path, said.revision) == ("org/tiny", revision)


def test_a_merged_model_is_the_base_plus_ba(backend, settings, tmp_path):
    policy = train_adapter(backend.apply_lora(backend.load_policy(settings), LoraSettings(r=4, alpha=8)))
    before = {name: parameter.clone() for name, parameter in policy.model.named_parameters()}
    backend.save(policy, tmp_path, "merged-16bit")
    assert all(torch.equal(parameter, before[name]) for name, parameter in policy.model.named_parameters())
    q_proj = layer(policy)
    delta = (16 / 4) * q_proj.lora_B["default"].weight @ q_proj.lora_A["default"].weight
    merged = load_backend("hf").load_saved(tmp_path, settings)
    assert not isinstance(merged.model, PeftModel)
    torch.testing.assert_close(layer(merged).weight.float(), q_proj.base_layer.weight + delta, rtol=2**-7, atol=1e-4)


def test_full_finetuning_trains_everything_and_takes_no_lora(backend, settings, tmp_path):
    policy = backend.load_policy(dataclasses.replace(settings, full_finetuning=True))
    assert all(parameter.requires_grad for parameter in policy.model.parameters())
    with pytest.raises(UnsupportedSettingError, match=r"takes no LoRA"):
        backend.apply_lora(policy, LoraSettings())
    backend.save(train_adapter(policy), tmp_path)
    loaded = backend.load_saved(tmp_path, settings)
    torch.testing.assert_close(logits(backend, loaded), logits(backend, policy), rtol=0, atol=0)


def test_a_second_adapter_and_unknown_modules_are_refused(backend, settings):
    policy = backend.apply_lora(backend.load_policy(settings), LoraSettings())
    with pytest.raises(AdapterError, match=r"has an adapter already"):
        backend.apply_lora(policy, LoraSettings())
    with pytest.raises(AdapterError, match=r"does not have: qproj"):
        backend.apply_lora(backend.load_policy(settings), LoraSettings(target_modules=("qproj",)))


def test_other_export_formats_are_refused(backend, settings, tmp_path):
    policy = backend.load_policy(settings)
    for export_format in ("merged-4bit", "gguf"):
        assert export_format not in backend.capabilities().export_formats
        with pytest.raises(UnsupportedSettingError, match=r"allowed: adapter, merged-16bit"):
            backend.save(policy, tmp_path, export_format)


def test_memory_is_what_hf_counts(backend, settings):
    hf = load_backend("hf")
    assert backend.memory_in_use(backend.load_policy(settings)) == hf.memory_in_use(hf.load_policy(settings))


def test_load_policy_goes_the_whole_way(folder):
    policy = load_policy(str(folder), backend="unsloth", lora=LoraSettings(r=2), max_seq_length=128)
    assert isinstance(policy.model, PeftModel)
    assert policy.model.max_seq_length == 128
    assert callable(policy.model.for_training)


# What differs on a GPU, as far as it can be seen without one


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(backend_module, "on_cpu", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(backend_module, "find_spec", lambda name: object())


@pytest.fixture
def passed(monkeypatch):
    """What is passed to Unsloth's loader."""
    arguments = {}
    loader = backend_module.unsloth.FastLanguageModel

    def from_pretrained(**received):
        arguments.update(received)
        raise NotImplementedError("enough")

    monkeypatch.setattr(loader, "from_pretrained", staticmethod(from_pretrained))
    return arguments


@pytest.mark.usefixtures("on_gpu")
def test_every_setting_reaches_unsloth_on_a_gpu(backend, settings, passed):
    asked = dataclasses.replace(
        settings, quantization="4bit", max_seq_length=99, gpu_memory_utilization=0.7, dtype="float32", seed=4
    )
    with pytest.raises(ModelError, match=r"Unsloth cannot load .*: enough"):
        backend.load_policy(asked)
    expected = {
        "model_name": settings.model,
        "max_seq_length": 99,
        "dtype": torch.float32,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "full_finetuning": False,
        "use_gradient_checkpointing": "unsloth",
        "use_exact_model_name": True,
        "fast_inference": True,
        "gpu_memory_utilization": 0.7,
        "random_state": 4,
        "trust_remote_code": False,
    }
    assert {name: passed[name] for name in expected} == expected


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize(
    "changed",
    [{"full_finetuning": True}, {"revision": "main"}, {"trust_remote_code": True}, {"quantization": "8bit"}],
)
def test_vllm_is_left_out_or_refused_where_unsloth_cannot_have_it(backend, settings, passed, changed):
    settings = dataclasses.replace(settings, dtype="float32", **changed)
    with pytest.raises(UnsupportedSettingError, match=r"fast_inference='on' cannot be had with"):
        backend.load_policy(dataclasses.replace(settings, fast_inference="on"))
    with pytest.raises(ModelError, match=r"enough"):
        backend.load_policy(settings)
    assert passed["fast_inference"] is False


@pytest.mark.usefixtures("on_gpu")
def test_vllm_missing_is_said_with_the_install_line(backend, settings, monkeypatch):
    monkeypatch.setattr(backend_module, "find_spec", lambda name: None if name == "vllm" else object())
    with pytest.raises(UnsupportedSettingError, match=r'fast_inference=.on.(?s:.*)pip install "rlvr\[vllm\]"'):
        backend.load_policy(dataclasses.replace(settings, fast_inference="on"))


def test_beside_vllm_the_trainer_must_use_it_and_some_adapters_are_refused(backend, settings):
    policy = backend.load_policy(settings)
    policy.model.vllm_engine = object()
    changes = {change.name: change.value for change in backend.training_arguments(policy)}
    assert (changes["use_vllm"], changes["vllm_mode"]) == (True, "colocate")
    with pytest.raises(UnsupportedSettingError) as raised:
        backend.apply_lora(policy, LoraSettings(r=128, bias="all", dora=True))
    assert len(raised.value.problems) == 3


@pytest.mark.parametrize(
    ("location", "has_gpu", "told"),
    [(None, True, True), ("own", True, False), (None, False, False)],
    ids=["told", "the folder was chosen", "a CPU compiles nothing"],
)
def test_an_import_before_rlvrs_is_told_where_compiled_code_goes(monkeypatch, caplog, location, has_gpu, told):
    monkeypatch.setattr(process, "_has_gpu", lambda: has_gpu)
    monkeypatch.setattr(process, "imported_before_unsloth", lambda modules: [])
    monkeypatch.setenv("UNSLOTH_COMPILE_LOCATION", "own")
    if location is None:
        monkeypatch.delenv("UNSLOTH_COMPILE_LOCATION")
    with caplog.at_level(logging.WARNING, logger="rlvr_unsloth"):
        process.import_unsloth()
    assert len(caplog.messages) == told
    assert all("compiled code, which goes to the working directory" in message for message in caplog.messages)
    assert os.environ.get("UNSLOTH_COMPILE_LOCATION") == location  # too late to set


@pytest.fixture
def late(monkeypatch):
    monkeypatch.setattr(process, "_has_gpu", lambda: True)
    monkeypatch.setattr(process, "imported_before_unsloth", lambda modules: ["trl", "transformers", "peft"])
    monkeypatch.setattr(process, "import_module", lambda name: backend_module.unsloth)


@pytest.mark.usefixtures("late")
def test_a_late_import_is_told_once_with_the_fix(monkeypatch, caplog):
    monkeypatch.delenv("RLVR_STRICT_IMPORTS", raising=False)
    with caplog.at_level(logging.WARNING, logger="rlvr_unsloth"):
        process.import_unsloth()
    (message,) = caplog.messages
    assert "trl, transformers, peft were imported before Unsloth" in message
    assert 'rlvr.load_backend("unsloth"), in the first cell' in message
    with warnings.catch_warnings(record=True) as caught:
        warnings.warn("WARNING: Unsloth should be imported before [trl, transformers, peft] to ensure", stacklevel=1)
    assert not caught  # not told twice


@pytest.mark.usefixtures("late")
def test_a_late_import_is_an_error_where_asked(monkeypatch):
    monkeypatch.setenv("RLVR_STRICT_IMPORTS", "1")
    with pytest.raises(PatchedProcessError, match=r"imported before Unsloth.*RLVR_STRICT_IMPORTS is set"):
        process.import_unsloth()


@pytest.mark.parametrize(
    ("imports", "refused"),
    [
        ("import transformers, trl, peft, unsloth", "trl, transformers, peft were"),
        ("import peft; import unsloth", "transformers, peft were"),
        ("import transformers, trl, peft", "trl, transformers, peft were"),
        ("import unsloth, transformers, trl, peft", None),
        ("import torch, datasets, unsloth", None),
    ],
)
def test_what_came_before_unsloth_is_known_whoever_imported_it(imports, refused, tmp_path):
    code = (
        f"{imports}\nimport rlvr, rlvr_unsloth.process as process\nprocess._has_gpu = lambda: True\n"
        "try: process.import_unsloth()\nexcept rlvr.RlvrError as error: print('REFUSED', error)\nelse: print('TAKEN')"
    )
    result = run(code, RLVR_STRICT_IMPORTS="1", UNSLOTH_COMPILE_LOCATION=str(tmp_path))
    last = result.stdout.splitlines()[-1]
    assert last.startswith("TAKEN" if refused is None else f"REFUSED {refused} imported before Unsloth"), result.stderr
