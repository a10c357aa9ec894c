"""Set-up for all tests: nothing is downloaded, nothing phones home, one thread, and Unsloth's import order."""

from __future__ import annotations

import importlib.util
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: more threads only wait for each other
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("UNSLOTH_AUTO_INSTALL", "0")
os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", os.path.join(os.path.expanduser("~"), ".cache", "rlvr", "tests"))

# Before trl, transformers and peft, as it asks. On a GPU it patches transformers for the whole process, so the tests
# of the hf backend run there with RLVR_TEST_UNSLOTH=0 (see `make gpu-test`).
if importlib.util.find_spec("unsloth") is not None and os.environ.get("RLVR_TEST_UNSLOTH", "1") != "0":
    import unsloth  # noqa: F401

import pytest

from rlvr.testing.tiny import save_tiny, tiny_model, tiny_tokenizer


@pytest.fixture
def model():
    """A fresh tiny Qwen2 with random weights."""
    return tiny_model()


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A tiny Qwen2 and its tokenizer, as `from_pretrained` reads them. Not to be written to."""
    return save_tiny(tmp_path_factory.mktemp("tiny") / "qwen2")


@pytest.fixture
def hub(monkeypatch):
    """The calls to a Hub that stands for the real one, whose user is `me`."""
    from huggingface_hub import RepoUrl

    calls = []

    class Hub:
        def create_repo(self, repository, **options):
            calls.append(("create", repository, options))
            return RepoUrl(f"https://huggingface.co/{repository if '/' in repository else f'me/{repository}'}")

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            calls.append(("upload", repo_id, sorted(path.name for path in folder_path.iterdir())))

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    return calls
