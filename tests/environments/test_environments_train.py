"""Every environment trains a step, from its name and options alone."""

from __future__ import annotations

import json
import sys

import pytest

import rlvr
from rlvr.testing.tiny import save_tiny

BACKENDS = [pytest.param("hf", marks=pytest.mark.both), pytest.param("unsloth", marks=pytest.mark.unsloth)]
QUESTIONS = [{"question": f"Say {i}", "answer": str(i)} for i in range(12)]
VERIFIERS_MODULE = """
import verifiers as vf
from datasets import Dataset

def right(completion, answer, **kwargs):
    return float(completion[-1]["content"] == answer)

def add(a: int, b: int) -> int:
    \"\"\"Adds two numbers.

    Args:
        a: one.
        b: the other.
    \"\"\"
    return a + b

def load_environment(size=12):
    rows = Dataset.from_list([{"question": f"Say {i}", "answer": str(i)} for i in range(size)])
    return vf.ToolEnv(dataset=rows, tools=[add], rubric=vf.Rubric(funcs=[right]))
"""
ENVIRONMENTS = {
    "arithmetic": {"train_size": 12, "eval_size": 3},
    "dataset": {"datasets": "questions.jsonl"},
    "musique": {"datasets": "sample", "retriever": "lexical", "sample_size": 12, "sample_eval_size": 3},
    "math": {"datasets": "sample", "sample_size": 12, "sample_eval_size": 2},
    "countdown": {"train_size": 12, "eval_size": 2},
    "wordle": {"train_size": 12, "eval_size": 2},
    "reasoning-gym:chain_sum": {"train_size": 12, "eval_size": 2},
}
if sys.version_info >= (3, 11):  # as verifiers itself
    ENVIRONMENTS["verifiers:tiny-verifiers-env"] = {"env_args": '{"size": 12}'}


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny") / "qwen2")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_a_step(name, backend, small_model, tmp_path, monkeypatch):
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    (tmp_path / "tiny_verifiers_env.py").write_text(VERIFIERS_MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    run = rlvr.train(
        name,
        small_model,
        backend,
        env_options=ENVIRONMENTS[name],
        max_steps=1,
        batch_size=4,
        num_generations=2,
        max_tokens=24,
        max_prompt_length=4000,
        report_to="none",
        output_dir=str(tmp_path / "run"),
    )
    assert run.summary["steps"] == 1
    records = [json.loads(line) for line in (tmp_path / "run" / "trajectories.jsonl").read_text().splitlines()]
    trained = [record for record in records if record.get("phase") != "eval"]
    assert trained
    assert all(record["stop_reason"] and record["rewards"] for record in trained)
