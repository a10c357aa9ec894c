"""Gradient checkpointing by default only where activations need it, and what they take is measured right."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from short_runs import SMALL, environment
from transformers import TrainerCallback

import rlvr
from rlvr import LoraSettings
from rlvr.testing.tiny import tiny_model
from rlvr.tracking.run_folder import RunFolder
from rlvr.trainers import activations
from rlvr.trainers.activations import activation_bytes
from rlvr.trainers.run import resolve_settings, train_with

pytestmark = pytest.mark.both

RUN = {name: value for name, value in SMALL.items() if name != "gradient_checkpointing"} | {"max_steps": 1}


def adapted(architecture="qwen2", **options):
    model = tiny_model(architecture, **options)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))


def bytes_in_the_graph(model, ids):
    """What the nodes of the backward graph hold, each piece of memory once, without the weights."""
    output = model.get_base_model().get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held, seen, waiting = {}, set(), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]
        for name in dir(node):
            value = getattr(node, name) if name.startswith("_saved_") else None
            for tensor in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in weights:
                    held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(held.values())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ["qwen2", "llama", "gemma3_text", "phi3"])
def test_three_short_rows_tell_what_a_long_one_keeps(architecture, attention):
    model = adapted(architecture).train()
    model.get_base_model().set_attn_implementation(attention)
    expected = bytes_in_the_graph(model, torch.zeros((1, 700), dtype=torch.long))
    assert activation_bytes(model, tokens=700, longest=700) == pytest.approx(expected, rel=0.02)


def test_rows_of_a_batch_add_up_and_weights_cast_for_autocast_count_once():
    model = adapted().train()
    four = bytes_in_the_graph(model, torch.zeros((4, 200), dtype=torch.long))
    assert activation_bytes(model, tokens=800, longest=200) == pytest.approx(four, rel=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        expected = bytes_in_the_graph(model, torch.zeros((1, 900), dtype=torch.long))
    assert activation_bytes(model, tokens=900, longest=900, autocast=torch.bfloat16) == pytest.approx(
        expected, rel=0.03
    )


def test_measuring_leaves_the_model_and_random_numbers_alone():
    model = get_peft_model(tiny_model(), LoraConfig(r=4, lora_dropout=0.5, target_modules="all-linear")).eval()
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    assert activation_bytes(model, tokens=100, longest=100) > 0
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


class Checkpointing(TrainerCallback):
    """Whether the model checkpoints while it trains."""

    seen = None

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen = args.gradient_checkpointing, model.is_gradient_checkpointing


def checkpoints(model, folder, **options):
    """Whether a run with these options did, and whether it says that it was switched off."""
    callback = Checkpointing()
    run = rlvr.train(environment(), model, "hf", **{**RUN, **options}, callbacks=[callback], output_dir=folder)
    assert len(set(callback.seen)) == 1
    changes = RunFolder(run.folder).policy()["training_arguments_changed"]
    names = [change["name"] for change in changes]
    assert ("gradient_checkpointing_kwargs" in names) is callback.seen[0]
    return callback.seen[0], "gradient_checkpointing" in names


@pytest.mark.parametrize(("free", "expected"), [(2**40, False), (2**20, True), (None, True)])
def test_a_run_checkpoints_where_memory_needs_it(model_folder, tmp_path, monkeypatch, free, expected):
    monkeypatch.setattr(activations, "free_memory", lambda device: free)
    assert checkpoints(str(model_folder), tmp_path / "run") == (expected, not expected)


def test_what_was_asked_for_stands_and_so_does_a_policy_that_was_loaded_before(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(activations, "free_memory", lambda device: 2**40)
    assert checkpoints(str(model_folder), tmp_path / "asked", gradient_checkpointing=True) == (True, False)
    policy = rlvr.load_policy(str(model_folder), lora=LoraSettings(r=4))
    assert checkpoints(policy, tmp_path / "given") == (True, False)


@pytest.mark.parametrize("loaded_by_settings", [True, False])
def test_a_policy_that_was_loaded_by_the_settings_of_the_run_checkpoints_as_one_that_the_run_loads(
    model_folder, tmp_path, monkeypatch, loaded_by_settings
):
    monkeypatch.setattr(activations, "free_memory", lambda device: 2**40)
    names = {"env": "arithmetic", "model": str(model_folder), "output_dir": str(tmp_path / "run")}
    settings, callback = resolve_settings(RUN, names), Checkpointing()
    train_with(
        settings,
        environment=environment(),
        policy=rlvr.load_policy(str(model_folder), lora=LoraSettings(r=4)),
        loaded_by_settings=loaded_by_settings,
        callbacks=[callback],
    )
    assert callback.seen == (not loaded_by_settings, not loaded_by_settings)


def test_a_model_that_cannot_be_measured_checkpoints_and_says_so(model_folder, tmp_path, monkeypatch, caplog):
    def fails(*args, **kwargs):
        raise TypeError("forward() got an unexpected keyword argument")

    monkeypatch.setattr(activations, "activation_bytes", fails)
    assert checkpoints(str(model_folder), tmp_path / "run") == (True, False)
    assert "gradient checkpointing stays on: activations cannot be measured (forward() got" in caplog.text


def test_free_memory_of_this_machine():
    assert 2**20 < activations.free_memory(torch.device("cpu")) < 2**50
    assert activations.free_memory(torch.device("meta")) is None


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["bfloat16 weights", "autocast"])
def test_what_is_measured_is_what_a_gpu_then_holds(autocast):
    model = adapted(hidden_size=512, heads=8, kv_heads=2, intermediate_size=1024).to("cuda").train()
    if autocast is None:
        model = model.to(torch.bfloat16)
    decoder, ids = model.get_base_model().get_decoder(), torch.zeros((1, 4000), dtype=torch.long, device="cuda")

    def allocated_by_a_forward():
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", dtype=autocast, enabled=autocast is not None):
            output = decoder(input_ids=ids, use_cache=False)
            held = torch.cuda.memory_allocated() - before
        del output
        return held

    allocated_by_a_forward()  # what the libraries keep for themselves from the first call on
    expected = allocated_by_a_forward()
    assert activation_bytes(model, tokens=4000, longest=4000, autocast=autocast) == pytest.approx(expected, rel=0.1)


@pytest.mark.gpu
def test_a_run_on_a_gpu_with_room_does_not_checkpoint(model_folder, tmp_path):
    assert checkpoints(str(model_folder), tmp_path / "run") == (False, True)
    assert checkpoints(str(model_folder), tmp_path / "asked", gradient_checkpointing=True) == (True, False)
