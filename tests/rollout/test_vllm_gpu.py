"""vLLM beside the policy, through TRL, on a GPU where it is installed. A process can start it once.

`python tests/rollout/test_vllm_gpu.py FOLDER DTYPE` is a run that leaves the frozen weights as they were, or fails.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from short_runs import SMALL, environment

import rlvr
from rlvr.errors import ConfigError, SamplerDriftError
from rlvr.testing.tiny import save_tiny
from rlvr.tracking.run_folder import RunFolder
from rlvr.trainers import vllm_weights

if find_spec("vllm") is None:
    pytest.skip("vllm is not installed in this environment", allow_module_level=True)

pytestmark = pytest.mark.gpu


def train(folder, steps, dtype="auto"):
    """The canary compares vLLM with the training forward at every step."""
    sizes = {"hidden_size": 256, "heads": 4, "kv_heads": 2, "intermediate_size": 512, "initializer_range": 0.05}
    model = str(save_tiny(folder / "qwen2", **sizes))
    run = rlvr.train(
        environment(), model, "hf", **SMALL | {"max_tokens": 24, "learning_rate": 2e-2}, rollout_engine="vllm",
        dtype=dtype, max_steps=steps, canary_every=1, gpu_memory_utilization=0.1, output_dir=folder / "run",
    )  # fmt: skip
    fresh = dict(rlvr.load_policy(model, dtype=dtype).model.named_parameters())
    trained = run.policy.model.named_parameters()
    assert all(torch.equal(value, fresh[name]) for name, value in trained if not value.requires_grad)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_vllm_samples_from_the_policy_as_it_is_trained(tmp_path, dtype):
    paths = os.pathsep.join(path for path in sys.path if path)
    subprocess.run(
        [sys.executable, __file__, str(tmp_path), dtype], check=True, env={**os.environ, "PYTHONPATH": paths}
    )
    run = RunFolder(tmp_path / "run")
    assert run.summary()["rollout_engine"] == "vllm"
    assert len({row["adapter"] for row in run.trajectories() if row["phase"] == "train"}) == 3
    assert [row["step"] for row in run.metrics() if "loss" in row] == [1, 2, 3]


def test_a_vllm_that_does_not_get_the_adapters_stops_the_run(tmp_path, monkeypatch):
    """And another run of the process is told that it cannot start vLLM again."""
    first = []
    own = vllm_weights.merge_apart
    monkeypatch.setattr(vllm_weights, "merge_apart", lambda generation: first.append(generation) or own(generation))
    monkeypatch.setattr(vllm_weights, "merged_weight", lambda layer: layer.base_layer.weight)
    with pytest.raises(SamplerDriftError, match="'vllm' does not sample from the policy"):
        train(tmp_path / "first", steps=12)
    assert first  # and kept: a vLLM that is collected would make room for the next
    with pytest.raises(ConfigError, match="isolate=True"):
        train(tmp_path / "second", steps=12)


if __name__ == "__main__":
    train(Path(sys.argv[1]), steps=3, dtype=sys.argv[2])
