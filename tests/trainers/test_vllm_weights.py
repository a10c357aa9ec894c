"""What vLLM gets of a policy with adapters; tests/rollout/test_vllm_gpu.py trains beside one."""

import contextlib
import copy
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoHaConfig, LoraConfig, get_peft_model
from tests_support import grpo_config
from trl.generation.vllm_generation import VLLMGeneration

from rlvr.errors import AdapterError, ConfigError
from rlvr.testing.tiny import tiny_model
from rlvr.trainers import EnhancedGRPOTrainer
from rlvr.trainers.engines import choose_engine
from rlvr.trainers.vllm_weights import merge_apart

pytestmark = pytest.mark.both

LORA = LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")


def policy(config=LORA, dtype=torch.bfloat16):
    """With adapters that are large enough to be seen in half precision."""
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(), config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = 0.1 * torch.randn(parameter.shape) + (1.0 if "magnitude" in name else 0.0)
    return model.to(dtype)


def generation(model):
    """TRL's, as far as it reads weights, without vLLM."""
    made = VLLMGeneration.__new__(VLLMGeneration)
    made.model = model
    made._dist = SimpleNamespace(
        is_fsdp=False, is_zero3=False, gather_params=lambda parameters: contextlib.nullcontext()
    )
    return made


def given(model, *, apart):
    """By name, as TRL gives them."""
    made = generation(model)
    if apart:
        merge_apart(made)
    return {name: value.clone() for name, value in made._iter_named_params()}


def bits(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


OTHERS = {
    "DoRA": LoraConfig(r=4, use_dora=True, target_modules="all-linear", task_type="CAUSAL_LM"),
    "embeddings": LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM"),
    "not LoRA": LoHaConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("config", [LORA, *OTHERS.values()], ids=["LoRA", *OTHERS])
def test_vllm_gets_what_peft_merges_and_nothing_changes(config):
    model = policy(config, torch.float32)
    before = bits(model)
    names = dict(tiny_model().named_parameters())
    expected = dict(copy.deepcopy(model).merge_and_unload().named_parameters())
    weights = given(model, apart=True)
    assert weights.keys() == names.keys()
    for name, value in weights.items():
        torch.testing.assert_close(value, expected[name].data, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(weights[name], value) for name, value in names.items())
    after = bits(model)
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("config", [LORA, *OTHERS.values()], ids=["LoRA", *OTHERS])
def test_in_half_precision_the_policy_stays_as_it_is(config):
    model = policy(config)
    before = bits(model)
    first = given(model, apart=True)
    for _ in range(3):
        again = given(model, apart=True)
    after = bits(model)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not model.base_model.model.model.layers[0].self_attn.q_proj.merged
    given(model, apart=False)
    drifted = bits(model)
    assert not all(torch.equal(value, drifted[name]) for name, value in before.items()), "TRL does it itself by now"


@pytest.mark.parametrize("config", [LORA, *OTHERS.values()], ids=["LoRA", *OTHERS])
def test_where_vllm_fails_in_the_middle_the_policy_is_whole(config):
    model = policy(config)
    before, ids = bits(model), torch.arange(3, 13)[None]
    expected = model(input_ids=ids).logits
    made = generation(model)
    merge_apart(made)
    weights = made._iter_named_params()
    for _ in range(3):
        next(weights)
    weights.close()
    after = bits(model)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert torch.equal(model(input_ids=ids).logits, expected)


def test_an_adapter_that_vllm_does_not_get_is_an_error():
    made = generation(policy())
    own = made._iter_named_params
    made._iter_named_params = lambda: ((name, value.clone()) for name, value in own())
    merge_apart(made)
    with pytest.raises(AdapterError, match="of 14 layers"):
        list(made._iter_named_params())


@pytest.mark.parametrize("sharded", ["is_fsdp", "is_zero3"])
def test_a_sharded_model_stays_with_trl(sharded):
    made = generation(policy())
    setattr(made._dist, sharded, True)
    merge_apart(made)
    assert "_iter_named_params" not in vars(made)


def test_a_trainer_beside_vllm_gives_weights_in_this_way(tmp_path, tokenizer, monkeypatch):
    """The trainer is TRL's own with its own `VLLMGeneration`, but that no vLLM is started."""
    monkeypatch.setattr(VLLMGeneration, "_init_vllm", lambda self: None)
    trainer = EnhancedGRPOTrainer(
        model=policy(), processing_class=tokenizer, reward_funcs=lambda completions, **_: [0.0] * len(completions),
        train_dataset=Dataset.from_list([{"prompt": "a"}] * 4), rollout_engine="vllm",
        args=grpo_config(tmp_path, use_vllm=True, vllm_mode="colocate"),
    )  # fmt: skip
    before = bits(trainer.model)
    weights = dict(trainer.vllm_generation._iter_named_params())
    after = bits(trainer.model)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    layer = trainer.model.get_base_model().model.layers[0].mlp.up_proj
    assert not torch.equal(weights["model.layers.0.mlp.up_proj.weight"], layer.base_layer.weight)


def test_a_server_is_sent_what_was_announced_to_it(monkeypatch):
    """TRL walks over the weights once for their names and shapes, and at each sync again for their values."""
    made, sent = generation(policy()), []
    made.mode, made._weight_metadata, made.accelerator = "server", None, SimpleNamespace(is_main_process=True)
    made.vllm_client = SimpleNamespace(
        update_named_params=lambda metadata, weights: sent.append((metadata, list(weights))),
        reset_prefix_cache=lambda: None,
    )
    merge_apart(made)
    before = bits(made.model)
    for _ in range(2):
        made.sync_weights()
    assert all(torch.equal(value, before[name]) for name, value in bits(made.model).items())
    expected = copy.deepcopy(made.model).merge_and_unload().state_dict()
    for metadata, weights in sent:
        assert metadata == [(n, str(w.dtype).removeprefix("torch."), list(w.shape)) for n, w in weights]
        assert {name for name, _ in weights} <= set(expected)
        for name, value in weights:
            torch.testing.assert_close(value, expected[name], rtol=0, atol=0.02)


@pytest.mark.parametrize(("processes", "max_turns", "refused"), [(2, 3, True), (2, 1, False), (1, 3, False)])
def test_turns_of_several_processes_on_one_server_are_refused(processes, max_turns, refused):
    trainer = SimpleNamespace(
        args=SimpleNamespace(use_vllm=True, vllm_mode="server"), env=SimpleNamespace(name="talk", max_turns=max_turns),
        accelerator=SimpleNamespace(num_processes=processes), sample_with_trl=None, eos_token_ids=[],
    )  # fmt: skip
    says = "2 processes train with one vLLM server, and environment 'talk' has up to 3 turns"
    with pytest.raises(ConfigError, match=says) if refused else contextlib.nullcontext():
        assert choose_engine(trainer, "vllm").engine.name == "vllm"


def test_half_precision_is_rounded_once():
    """To one of the two numbers of its dtype between which the float32 sum is."""
    model = policy()
    weights = given(model, apart=True)
    expected = copy.deepcopy(model).float().merge_and_unload().state_dict()
    for name, value in weights.items():
        nearest = expected[name].to(torch.bfloat16)
        beyond = torch.where(expected[name] > nearest, torch.inf, -torch.inf).to(torch.bfloat16)
        other = torch.where(expected[name] == nearest, nearest, torch.nextafter(nearest, beyond))
        assert ((value == nearest) | (value == other)).all(), name


def test_a_model_without_adapters_is_given_as_it_is():
    model = tiny_model()
    weights = given(model, apart=True)
    assert all(torch.equal(value, weights[name]) for name, value in model.named_parameters())


def test_what_peft_does_by_itself_still_works_afterwards():
    model = policy(dtype=torch.float32)
    weights = given(model, apart=True)
    model.merge_adapter()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.merged
    torch.testing.assert_close(layer.base_layer.weight.data, weights["model.layers.0.self_attn.q_proj.weight"])
