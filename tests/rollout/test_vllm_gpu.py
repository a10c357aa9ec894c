"""vLLM beside the policy, and as a server, through TRL, on a GPU where it is installed. A process can start it once.

`python tests/rollout/test_vllm_gpu.py FOLDER DTYPE [SERVER]` is a run that leaves the frozen weights as they were, or
fails.
"""

import os
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from urllib.request import urlopen

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


def train(folder, steps, dtype="auto", server=None):
    """The canary compares vLLM with the training forward at every step."""
    model = str(policy_in(folder))
    run = rlvr.train(
        environment(), model, "hf", **SMALL | {"max_tokens": 24, "learning_rate": 2e-2}, rollout_engine="vllm",
        dtype=dtype, max_steps=steps, canary_every=1, vllm_server=server,
        gpu_memory_utilization=None if server else 0.1, output_dir=folder / "run",
    )  # fmt: skip
    fresh = dict(rlvr.load_policy(model, dtype=dtype).model.named_parameters())
    trained = run.policy.model.named_parameters()
    assert all(torch.equal(value, fresh[name]) for name, value in trained if not value.requires_grad)


def policy_in(folder):
    sizes = {"hidden_size": 256, "heads": 4, "kv_heads": 2, "intermediate_size": 512, "initializer_range": 0.05}
    return save_tiny(folder / "qwen2", **sizes)


def train_apart(folder, *arguments, **environment):
    paths = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, __file__, str(folder), *arguments]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": paths, **environment})
    run = RunFolder(folder / "run")
    assert run.summary()["rollout_engine"] == "vllm"
    assert len({row["adapter"] for row in run.trajectories() if row["phase"] == "train"}) == 3
    assert [row["step"] for row in run.metrics() if "loss" in row] == [1, 2, 3]
    assert len([row for row in run.metrics() if "sampler_drift" in row]) == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_vllm_samples_from_the_policy_as_it_is_trained(tmp_path, dtype):
    train_apart(tmp_path, dtype)


def test_a_server_samples_from_the_policy_as_it_is_trained(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"127.0.0.1:{port}"
    command = [
        sys.executable, "-m", "trl.scripts.vllm_serve", "--model", str(policy_in(tmp_path)), "--dtype", "bfloat16",
        "--host", "127.0.0.1", "--port", str(port), "--gpu_memory_utilization", "0.1", "--max_model_len", "512",
        "--enforce_eager", "True",
    ]  # fmt: skip
    server = subprocess.Popen(command, env={**os.environ, **apart("server")})
    try:
        while not answers(f"http://{address}/health"):
            assert server.poll() is None, "the server ended"
            time.sleep(1)
        train_apart(tmp_path, "bfloat16", f"http://{address}", **apart("trainer"))
    finally:
        server.terminate()
        server.wait(60)


def apart(role):
    """The environment of a process on a GPU of its own, where there are two. On the only one it is, for NCCL, which
    wants a GPU to each process of a host, on a host of its own."""
    if torch.cuda.device_count() > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
        return {"CUDA_VISIBLE_DEVICES": visible[role == "server"]}
    return {"NCCL_HOSTID": role, "NCCL_IB_DISABLE": "1", "NCCL_SOCKET_IFNAME": "lo", "VLLM_HOST_IP": "127.0.0.1"}


def answers(address):
    try:
        with urlopen(address, timeout=2) as response:
            return response.status == 200
    except OSError:
        return False


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
    train(Path(sys.argv[1]), 3, *sys.argv[2:])
