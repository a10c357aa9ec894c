"""`examples/train_musique.py` and its twin for Unsloth, as a user runs them, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import musique_commands
import pytest

from rlvr.types import StopReason, Trajectory, Turn

EXAMPLES = Path(__file__).parents[2] / "examples"
BACKENDS = [pytest.param("hf", marks=pytest.mark.both), pytest.param("unsloth", marks=pytest.mark.unsloth)]
SAMPLE = "--datasets sample --retriever lexical --sample-size 8 --sample-eval-size 2 --max-prompt-length 4000"
SHORT = "--max-tokens 6 --num-generations 2 --prompts-per-step 2 --max-steps 1 --eval-samples 2 --report-to none"


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """`run("hf", "train", ...)` → exit code, standard output and standard error, from a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def call(backend, *words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            musique_commands.main(backend, [str(word) for word in words])
        return (stopped.value.code or 0, *capsys.readouterr())

    return call


@pytest.mark.parametrize("backend", BACKENDS)
def test_train_then_evaluate_then_predict(backend, run, model_folder, tmp_path):
    code, out, err = run(backend, "train", "-m", model_folder, *SAMPLE.split(), *SHORT.split(), "--output-dir", "run")
    assert code == 0, err
    assert "exact_match" in out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["environment"], summary["backend"], summary["steps"]) == ("musique", backend, 1)

    asked = ["-m", model_folder, "--adapter", "run", "--max-tokens", "6", *SAMPLE.split()]
    code, out, err = run(backend, "evaluate", *asked, "--json")
    assert code == 0, err
    assert json.loads(out)["examples"] == 2

    code, out, err = run(backend, "predict", *asked, "--output", "answers.jsonl")
    assert code == 0, err
    assert out == "2 answers are in answers.jsonl\n"
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [answer["id"] for answer in answers] == ["2hop__sample_0_eval_0", "3hop__sample_0_eval_1"]
    assert {answer["stop_reason"] for answer in answers} <= {"token_budget", "no_tool_call"}

    code, _, err = run(backend, "predict", *asked, "--output", "answers.jsonl")
    assert code == 2
    assert "'answers.jsonl' exists" in err


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_weight_is_trained_with_no_peft(backend, run, model_folder, tmp_path):
    words = [*SAMPLE.split(), *SHORT.split(), "--noise", "0.5", "--eval-datasets", "sample", "--dry-run"]
    code, out, err = run(backend, "train", "--no-peft", "--model", model_folder, *words)
    assert code == 0, err
    for line in ("env: musique", f"backend: {backend}", "peft: false", "noise: 0.5", "eval_datasets: sample"):
        assert line in out


def test_what_is_left_out_has_its_default(run):
    code, out, _ = run("hf", "train", "--dry-run")
    assert code == 0
    for line in ("env: musique", "model: Qwen/Qwen2.5-7B-Instruct", "peft: true"):
        assert line in out


def test_a_file_of_settings_names_its_own_model(run, tmp_path):
    (tmp_path / "run.yaml").write_text("model: some/model\nmax_steps: 3\n")
    _, out, _ = run("hf", "train", "--config", "run.yaml", "--dry-run")
    assert "model: some/model" in out
    _, out, _ = run("hf", "train", "--config=run.yaml", "--dry-run", "-m", "another/model")
    assert "model: another/model" in out


def test_another_environment(run, model_folder, tmp_path):
    words = "--levels 1 --eval-size 2 --train-size 8 --max-tokens 4 --max-prompt-length 32 --output answers.jsonl"
    code, _, err = run("hf", "predict", "--env-id", "arithmetic", "-m", model_folder, *words.split())
    assert code == 0, err
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 2
    assert all(answer["question"].endswith("=") for answer in answers)


@pytest.mark.parametrize("command", ["train", "evaluate", "predict"])
def test_help_and_refusals(run, command):
    code, out, _ = run("hf", command, "--help")
    assert code == 0
    for option in ("--max-tokens", "--datasets", "--retriever", "--noise"):
        assert option in out
    more = ["--output", "answers.jsonl"] if command == "predict" else []
    code, _, err = run("hf", command, "--retreiver", "golden", *more)
    assert code == 2
    assert err.startswith("predict: " if command == "predict" else "rlvr: ")
    assert "--retreiver" in err
    assert "Did you mean '--retriever'?" in err


def test_help_of_the_script(run):
    code, out, _ = run("hf", "--help")
    assert code == 0
    for word in ("train", "evaluate", "predict", "--env-id", "Qwen/Qwen2.5-7B-Instruct"):
        assert word in out


def test_the_two_scripts_differ_in_the_backend_alone():
    def lines(name):
        return (EXAMPLES / name).read_text().splitlines()

    pairs = zip(lines("train_musique.py")[1:], lines("train_musique_unsloth.py")[1:], strict=True)
    assert [pair for pair in pairs if pair[0] != pair[1]] == [('    main("hf")', '    main("unsloth")')]


@pytest.mark.parametrize(
    ("state", "answer", "support", "answerable"),
    [
        ({"seen": [4], "answer": "Ann Lee", "citations": [4, 2]}, "Ann Lee", [4, 2], True),
        ({"seen": [], "answer": "Unanswerable.", "citations": []}, "Unanswerable.", [], False),
        ({"seen": [1]}, "", [], False),  # no call of complete: no answer, whatever was said
        ({}, "said", [], True),  # an environment without the tool
    ],
)
def test_a_prediction(state, answer, support, answerable):
    turn = Turn({"role": "assistant", "content": "said"})
    trajectory = Trajectory({"id": "x", "question": "q?"}, (), (turn,), StopReason.COMPLETED, state)
    assert musique_commands.prediction(trajectory) == {
        "id": "x",
        "question": "q?",
        "predicted_answer": answer,
        "predicted_support_idxs": support,
        "predicted_answerable": answerable,
        "stop_reason": "completed",
    }
