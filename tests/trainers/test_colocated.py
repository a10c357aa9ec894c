"""vLLM in the process that trains; tests/rollout/test_vllm_gpu.py trains with it."""

import os
import sys
from importlib.machinery import ModuleSpec
from types import SimpleNamespace

import pytest
from short_runs import SMALL, environment

import rlvr
from rlvr.errors import ConfigError
from rlvr.trainers import colocated
from rlvr.trainers.colocated import VARIABLES, check_vllm_can_start, variables_kept

pytestmark = pytest.mark.both


def installed(monkeypatch, bytes_held=None):
    """As if vLLM were, with an engine in this process that holds so much."""
    monkeypatch.setattr(colocated, "find_spec", lambda name: ModuleSpec(name, None))
    if bytes_held is not None:
        allocator = SimpleNamespace(get_current_usage=lambda: bytes_held)
        module = SimpleNamespace(CuMemAllocator=SimpleNamespace(instance=allocator))
        monkeypatch.setitem(sys.modules, "vllm.device_allocator.cumem", module)


@pytest.mark.parametrize("bytes_held", [None, 0])
def test_a_first_vllm_may_start(monkeypatch, bytes_held):
    installed(monkeypatch, bytes_held)
    check_vllm_can_start()


def test_beside_an_earlier_vllm_a_server_may_be_used(monkeypatch):
    installed(monkeypatch, bytes_held=2**30)
    check_vllm_can_start(server=True)


def train(folder, model):
    rlvr.train(environment(), str(model), "hf", **SMALL, rollout_engine="vllm", output_dir=folder / "run")


def test_a_second_vllm_of_a_process_is_refused_before_anything_is_loaded(model_folder, tmp_path, monkeypatch):
    installed(monkeypatch, bytes_held=2**30)
    with pytest.raises(ConfigError, match=r"once in a process\. Restart, train with isolate=True"):
        train(tmp_path, model_folder)
    assert not (tmp_path / "run").exists()


def test_without_vllm_the_refusal_says_how_to_install_it(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(colocated, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "rlvr\[vllm\]"'):
        train(tmp_path, model_folder)


def test_a_run_leaves_the_variables_of_several_processes_as_they_were(model_folder, tmp_path, monkeypatch):
    """A trainer that sets them, as TRL does for vLLM."""
    from rlvr.trainers import EnhancedGRPOTrainer

    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    own, seen = EnhancedGRPOTrainer.__init__, []

    def sets_them(self, *args, **kwargs):
        own(self, *args, **kwargs)
        os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "29500"})
        seen.append(True)

    monkeypatch.setattr(EnhancedGRPOTrainer, "__init__", sets_them)
    rlvr.train(environment(), str(model_folder), "hf", **SMALL, max_steps=1, output_dir=tmp_path / "run")
    assert seen
    assert not set(VARIABLES) & set(os.environ)


def test_variables_come_back_after_an_error_too(monkeypatch):
    monkeypatch.setenv("RANK", "3")

    def fails():
        with variables_kept():
            os.environ.update({"RANK": "0", "LOCAL_RANK": "0"})
            raise RuntimeError("the run stopped")

    with pytest.raises(RuntimeError, match="the run stopped"):
        fails()
    assert os.environ["RANK"] == "3"
    assert "LOCAL_RANK" not in os.environ
