"""Unsloth on a GPU, where it replaces TRL's trainer: trained through `rlvr.train`, Unsloth imported first."""

import json
from importlib.util import find_spec

import pytest
import torch
from unsloth_script import Forwards, batches_kept, train_by_unsloth

import rlvr
from rlvr import LoraSettings, load_backend, load_policy
from rlvr.errors import PatchedProcessError, UnsupportedSettingError
from rlvr.testing.tiny import save_tiny
from rlvr.tracking.adapter_hash import adapter_hash

if find_spec("unsloth") is None:
    pytest.skip("the unsloth package is not installed in this environment", allow_module_level=True)

pytestmark = [pytest.mark.gpu, pytest.mark.unsloth]

SMALL = {
    "max_prompt_length": 1024,
    "max_tokens": 24,
    "num_generations": 4,
    "prompts_per_step": 2,
    "learning_rate": 5e-3,
    "eval_samples": 2,
    "save_steps": 2,
    "report_to": "none",
}


def double(number: int) -> int:
    """Doubles a number.

    Args:
        number: what to double.
    """
    return 2 * number


def bytes_modulo_7(trajectory):
    return float(sum(map(ord, trajectory.text)) % 7)


def environment(tools):
    rows = [{"question": f"{n}+1", "answer": str(n + 1)} for n in range(12)]
    return rlvr.Environment(
        name="bytes",
        train_dataset=rows[:9],
        eval_dataset=rows[9:],
        rubric=rlvr.Rubric(bytes_modulo_7),
        tools=[double] if tools else [],
    )


def model_folder(folder, initializer_range):
    """Large enough for Unsloth's kernels and for 4-bit blocks."""
    sizes = {"hidden_size": 256, "heads": 4, "kv_heads": 2, "intermediate_size": 512}
    return save_tiny(folder, initializer_range=initializer_range, **sizes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Its logits differ, so that rewards do."""
    return model_folder(tmp_path_factory.mktemp("models") / "qwen2", 0.1)


@pytest.fixture(scope="module")
def smooth_folder(tmp_path_factory):
    """4 bits change its log-probabilities by 0.2 nats, as a real model's; those of the other by 0.6."""
    return model_folder(tmp_path_factory.mktemp("models") / "smooth", 0.05)


def loaded(folder, quantization="none", dtype="auto"):
    return load_policy(
        str(folder), backend="unsloth", max_seq_length=1280, dtype=dtype, quantization=quantization,
        fast_inference="off", lora=LoraSettings(r=8, alpha=8),
    )  # fmt: skip


def adapter_and_rest(policy):
    """Copies of the adapter's parameters, and of all others."""
    values = {name: value.detach().clone() for name, value in policy.model.named_parameters()}
    adapter = {name for name in values if "lora_" in name}
    return {n: values[n] for n in adapter}, {n: v for n, v in values.items() if n not in adapter}


@pytest.mark.parametrize("tools", [False, True], ids=["plain", "tools"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("quantization", ["none", "4bit"])
def test_unsloths_own_trainer_trains_the_adapter_alone(folder, tmp_path, monkeypatch, quantization, beta, tools):
    import trl

    from rlvr.trainers.compose import is_unsloth_class

    monkeypatch.chdir(tmp_path)
    policy = loaded(folder, quantization)
    adapter, rest = adapter_and_rest(policy)
    start = adapter_hash(policy.model)
    run = rlvr.train(
        environment(tools), policy, "unsloth", **SMALL, kl_beta=beta, max_steps=2, output_dir=tmp_path / "run"
    )

    assert is_unsloth_class(trl.GRPOTrainer)  # which is the base that the trainer takes
    assert not (tmp_path / "unsloth_compiled_cache").exists()
    trained, kept = adapter_and_rest(policy)
    assert all(torch.equal(value, kept[name]) for name, value in rest.items())
    assert any(not torch.equal(value, trained[name]) for name, value in adapter.items())
    rows = [row for row in run.metrics() if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["grad_norm"] > 0 for row in rows)
    if beta:
        assert rows[0]["kl"] == pytest.approx(0.0, abs=1e-3)
    hashes = [row["adapter"] for row in run.trajectories() if row["phase"] == "train"]
    assert hashes[0] == start
    assert run.summary["adapter"] == adapter_hash(policy.model) != start


@pytest.mark.parametrize("quantization", ["none", "4bit"])
def test_a_saved_adapter_loads_back_as_the_same_policy(smooth_folder, tmp_path, quantization):
    """The hash of the live adapter is the loaded one's, and an export passes its own comparison."""
    run = rlvr.train(
        environment(False), loaded(smooth_folder, quantization), "unsloth", **SMALL, max_steps=2,
        output_dir=tmp_path / "run",
    )  # fmt: skip
    again = load_backend("unsloth").load_saved(run.folder / "adapter", run.policy.settings)
    assert adapter_hash(again.model) == run.summary["adapter"]
    for export_format in ("adapter", "merged-16bit", "merged-4bit"):
        exported = rlvr.export(run.folder, export_format, output=tmp_path / export_format)
        assert json.loads((exported.folder / "parity.json").read_text())["ok"]


def test_prompts_are_shared_where_unsloths_own_trainer_shares_them(folder, tmp_path, monkeypatch):
    """One prompt a step, so that its loss shares it too: it shuffles the rows of several."""
    import trl
    from unsloth.utils import prefix_grouper

    common = {"loss_type": "grpo", "max_grad_norm": 1e6, "learning_rate": 1e-3, "warmup_steps": 0, "max_steps": 2}
    starts = []

    def policy():
        fresh = loaded(folder, dtype="bfloat16")
        starts.append(adapter_hash(fresh.model))
        return fresh

    def train_by_script(batches):
        fresh = policy()
        args = trl.GRPOConfig(
            output_dir=str(tmp_path / "script"), beta=0.1, num_generations=4, per_device_train_batch_size=4,
            gradient_accumulation_steps=1, max_completion_length=24, temperature=1.0, mask_truncated_completions=False,
            optim="adamw_torch", bf16=True, gradient_checkpointing=False, save_strategy="no", report_to="none",
            **common,
        )  # fmt: skip
        return train_by_unsloth(fresh.model, fresh.tokenizer, batches, args)

    rows = [{"question": "A prompt of many tokens. " * 25 + str(n)} for n in range(8)]
    env = rlvr.Environment(name="long prompts", train_dataset=rows, rubric=rlvr.Rubric(bytes_modulo_7))
    settings = {**SMALL, **common, "prompts_per_step": 1, "eval_samples": 0, "kl_beta": 0.1}
    ours = Forwards()
    with batches_kept() as batches:
        rlvr.train(
            env, policy(), "unsloth", **settings, output_dir=tmp_path / "run", callbacks=[ours],
            canary_every=100,  # its forwards come before all others then
        )  # fmt: skip
    unsloths = train_by_script(batches)
    monkeypatch.setattr(prefix_grouper, "_ENABLED", False)  # as UNSLOTH_GRPO_PREFIX_GROUPER=0 sets it
    without = train_by_script(batches)

    assert all(len(batch["prompt_ids"][0]) > 512 for batch, _ in batches)
    assert starts == [starts[0]] * 3
    assert unsloths.shared.count(True) == 2, "Unsloth's own trainer does not share the prompt of each step's loss"
    assert ours.shared[-len(unsloths.shared) :] == unsloths.shared  # after the canary's
    assert without.shared == []
    expected = without.gradients[0]
    assert expected.norm() > 0
    for forwards in (ours, unsloths):  # rounding makes 0.015, attention to other completions 0.4
        assert (forwards.gradients[0] - expected).norm() < 0.1 * expected.norm()


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vllm is installed in this environment")
def test_without_vllm_fast_inference_is_refused_in_one_line(folder):
    with pytest.raises(UnsupportedSettingError, match=r'pip install "rlvr\[vllm\]"'):
        load_policy(str(folder), backend="unsloth", max_seq_length=1280, fast_inference="on")


@pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed in this environment")
def test_vllm_samples_from_the_policy_as_it_is_trained(smooth_folder, tmp_path):
    """The canary compares it with the training forward at every step."""
    policy = load_policy(
        str(smooth_folder), backend="unsloth", max_seq_length=1280, dtype="bfloat16", fast_inference="on",
        gpu_memory_utilization=0.1, lora=LoraSettings(r=8, alpha=8),
    )  # fmt: skip
    assert hasattr(policy.model, "vllm_engine")
    adapter, rest = adapter_and_rest(policy)
    run = rlvr.train(
        environment(False), policy, "unsloth", **SMALL, max_steps=3, canary_every=1, output_dir=tmp_path / "run"
    )
    assert run.summary["rollout_engine"] == "vllm"
    trained, kept = adapter_and_rest(policy)
    assert all(torch.equal(value, kept[name]) for name, value in rest.items())
    assert any(not torch.equal(value, trained[name]) for name, value in adapter.items())
    assert all(row["grad_norm"] > 0 for row in run.metrics() if "loss" in row)


def test_hf_is_refused_in_the_patched_process_and_trains_in_a_child(folder, tmp_path):
    with pytest.raises(PatchedProcessError, match="isolate=True"):
        rlvr.train("arithmetic", str(folder), "hf", **SMALL, max_steps=1, output_dir=tmp_path / "refused")
    run = rlvr.train(
        "arithmetic", str(folder), "hf", **SMALL, max_steps=1, output_dir=tmp_path / "isolated", isolate=True
    )
    assert [row["step"] for row in run.metrics() if "loss" in row] == [1]
