"""Short runs on a tiny model with lively logits, made once a session, and copies of them."""

import shutil

import pytest
from short_runs import SMALL, environment

import rlvr
from rlvr.testing.tiny import save_tiny


@pytest.fixture(scope="session")
def lively_model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("lively") / "qwen2", initializer_range=0.2)


@pytest.fixture(scope="session")
def made_runs(tmp_path_factory, lively_model):
    """`made_runs(backend, full=False)` → the folder of a run of two steps. Not to be written to."""
    made = {}

    def run(backend, *, full=False):
        if (backend, full) not in made:
            folder = tmp_path_factory.mktemp("runs") / "run"
            rlvr.train(environment(), lively_model, backend, **SMALL, max_steps=2, peft=not full, output_dir=folder)
            made[backend, full] = folder
        return made[backend, full]

    return run


@pytest.fixture
def trained(made_runs, tmp_path):
    """`trained(backend="hf", full=False)` → a run of two steps, to do with as one likes."""

    def copy(backend="hf", *, full=False):
        return shutil.copytree(made_runs(backend, full=full), tmp_path / f"{backend}-{full}")

    return copy
