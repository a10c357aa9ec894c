"""vLLM beside the policy, through TRL, on a GPU where it is installed."""

from importlib.util import find_spec

import pytest

import rlvr
from rlvr.testing.tiny import save_tiny

if find_spec("vllm") is None:
    pytest.skip("vllm is not installed in this environment", allow_module_level=True)

pytestmark = pytest.mark.gpu


def test_vllm_samples_from_the_policy_as_it_is_trained(tmp_path):
    """The canary compares it with the training forward at every step."""
    sizes = {"hidden_size": 256, "heads": 4, "kv_heads": 2, "intermediate_size": 512, "initializer_range": 0.05}
    folder = save_tiny(tmp_path / "qwen2", **sizes)
    run = rlvr.train(
        "arithmetic", str(folder), "hf", rollout_engine="vllm", dtype="bfloat16", max_prompt_length=256, max_tokens=24,
        num_generations=4, prompts_per_step=2, learning_rate=5e-3, eval_samples=2, max_steps=3, canary_every=1,
        gpu_memory_utilization=0.1, report_to="none", output_dir=tmp_path / "run",
    )  # fmt: skip
    assert run.summary["rollout_engine"] == "vllm"
    hashes = [row["adapter"] for row in run.trajectories() if row["phase"] == "train"]
    assert len(set(hashes)) == 3
    assert [row["step"] for row in run.metrics() if "loss" in row] == [1, 2, 3]
