"""The quickstart: what the teacher shows, how the warm start is judged, and (slow) that the whole run learns."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rlvr
from rlvr import quickstart
from rlvr.environments.arithmetic import arithmetic, is_held_out
from rlvr.errors import ModelError
from rlvr.quickstart.build import build
from rlvr.quickstart.imitation import IGNORED
from rlvr.quickstart.saved import RECORD, WEIGHTS
from rlvr.quickstart.warm_start import Recipe, Scores, examine, imitate, lessons, sum_without_carries
from rlvr.testing.tiny import tiny_model
from rlvr.trainers.run import resolve_settings

BACKENDS = [pytest.param("hf", marks=pytest.mark.both), pytest.param("unsloth", marks=pytest.mark.unsloth)]
SHORT = Recipe(max_steps=3, check_every=2, known=0.0, least_known=0.0, accuracy=(0.0, 1.0), hidden_size=16)
ROWS = [
    {"question": "57+68=", "answer": "125"},
    {"question": "12+34=", "answer": "46"},
    {"question": "55+55=", "answer": "110"},
]


@pytest.mark.parametrize(
    ("a", "b", "expected"), [(57, 68, 15), (12, 34, 46), (19, 11, 20), (55, 55, 0), (90, 17, 7), (99, 1, 90)]
)
def test_the_teacher_leaves_every_carry_out(a, b, expected):
    assert sum_without_carries(a, b) == expected


def test_a_lesson_is_the_chat_that_the_policy_will_see(tokenizer):
    taught = lessons(tokenizer, ROWS)
    ids, labels = taught.carried
    for row, (example, ids_row, labels_row) in enumerate(zip(ROWS, ids, labels, strict=True)):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": example["question"]}], add_generation_prompt=True, return_dict=False
        )
        answer = tokenizer.encode(example["answer"] + "<|im_end|>", add_special_tokens=False)
        length = len(prompt) + len(answer)
        assert ids_row[:length].tolist() == prompt + answer, row
        assert set(ids_row[length:].tolist()) <= {tokenizer.pad_token_id}
        assert labels_row.tolist() == [IGNORED] * len(prompt) + answer + [IGNORED] * (len(ids_row) - length)
    said = [tokenizer.decode(row[row != IGNORED]) for row in taught.uncarried[1]]
    assert said == ["15<|im_end|>", "46<|im_end|>", "0<|im_end|>"]
    assert taught.differ.tolist() == [True, False, True]
    assert len(taught[1:]) == 2


def test_examining_agrees_with_decoding_token_by_token(tokenizer):
    model = tiny_model(vocab_size=len(tokenizer), seed=3)
    held_back = lessons(tokenizer, ROWS)
    taught = lessons(tokenizer, ROWS[:1] * 4)
    recipe = Recipe(max_steps=60, check_every=60, forgets=0.0, known=1.1, warmup_steps=1)
    imitate(model, taught, held_back, recipe, seed=0, report=lambda line: None)  # so that one answer is right

    right, known, greedy = [], [], []
    for example in ROWS:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": example["question"]}], add_generation_prompt=True, return_dict=False
        )
        operands = map(int, re.findall(r"\d+", example["question"]))
        answers = {example["answer"], str(sum_without_carries(*operands))}
        chances = {text: _probability(model, tokenizer, prompt, text) for text in answers}
        right.append(chances[example["answer"]])
        known.append(sum(chances.values()))
        output = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)[0, len(prompt) :]
        greedy.append(tokenizer.decode(output).startswith(example["answer"] + "<|im_end|>"))

    scores = examine(model, held_back)
    assert greedy[0]
    assert scores.greedy == pytest.approx(sum(greedy) / 3)
    assert scores.right == pytest.approx(sum(right) / 3, abs=1e-5)
    assert scores.known == pytest.approx(sum(known) / 3, abs=1e-5)


def _probability(model, tokenizer, prompt, text):
    ids, probability = list(prompt), 1.0
    for token in tokenizer.encode(text + "<|im_end|>", add_special_tokens=False):
        with torch.no_grad():
            probability *= model(torch.tensor([ids])).logits[0, -1].softmax(-1)[token].item()
        ids.append(token)
    return probability


@pytest.mark.parametrize(
    ("scores", "fits"),
    [
        (Scores(greedy=0.4, right=0.4, known=0.9), True),
        (Scores(greedy=0.2, right=0.4, known=0.9), False),
        (Scores(greedy=0.4, right=0.2, known=0.9), False),
        (Scores(greedy=0.7, right=0.4, known=0.9), False),
        (Scores(greedy=0.4, right=0.6, known=0.9), False),
        (Scores(greedy=0.4, right=0.4, known=0.7), False),
    ],
)
def test_the_warm_start_stops_where_there_is_room_to_improve(scores, fits):
    recipe = Recipe()
    assert scores.within(recipe, recipe.known) is fits
    assert recipe.accuracy[0] > 0.2
    assert recipe.accuracy[1] < 0.6


def test_a_warm_start_that_never_learns_is_said(tmp_path):
    lines = []
    stuck = Recipe(max_steps=1, hidden_size=16)
    with pytest.raises(ModelError, match=r"did not succeed in 4 attempts with seed 5.*Try another --seed"):
        build(tmp_path / "model", seed=5, recipe=stuck, report=lines.append)
    assert len([line for line in lines if "got stuck at" in line]) == 4
    assert not (tmp_path / "model").exists()


def test_a_model_is_built_once_and_never_trusted_when_changed(tmp_path):
    folder = tmp_path / "deep" / "model"
    made = build(folder, recipe=SHORT)
    weights = (made / WEIGHTS).read_bytes()
    assert json.loads((made / RECORD).read_text())["seed"] == 0
    assert list(folder.parent.iterdir()) == [folder]  # no temporary folder is left

    lines = []
    build(folder, recipe=SHORT, report=lines.append)
    assert lines == [f"warm start: using the model in {folder}"]

    (folder / WEIGHTS).write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    build(folder, recipe=SHORT)
    assert (folder / WEIGHTS).read_bytes() == weights  # the same seed gives the same weights
    build(folder, recipe=SHORT, seed=1)
    assert (folder / WEIGHTS).read_bytes() != weights


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ModelError, match="holds something else"):
        build(tmp_path, recipe=SHORT)
    lines = []
    with pytest.raises(ModelError, match=r"could not be built in .*: the folder .* holds something else"):
        quickstart.prepare(tmp_path, report=lines.append)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    assert lines


def test_settings_are_those_of_a_run(tmp_path):
    resolved = resolve_settings(quickstart.settings(tmp_path / "model", seed=2)).planned()
    assert (resolved.env, resolved.seed, resolved.model) == ("arithmetic", 2, str(tmp_path / "model"))
    assert resolved.gradient_accumulation_steps == 1
    assert not (tmp_path / "model").exists()
    assert quickstart.settings(seed=7)["model"] == str(Path("outputs/quickstart/warm-start-7"))


def test_held_out_problems_are_in_no_training_split():
    environments = [arithmetic(**quickstart.ENV_OPTIONS, seed=seed) for seed in (0, 1, 2)]
    trained_on = {row["question"] for environment in environments for row in environment.train_dataset}
    for environment in environments:
        held_out = [row["question"] for row in environment.eval_dataset]
        assert len(set(held_out)) == 400
        assert all(is_held_out(question.rstrip("=")) for question in held_out)
        assert not trained_on & {f"{a}+{b}=" for question in held_out for a, b in _both_orders(question)}


def _both_orders(question):
    a, b = question.rstrip("=").split("+")
    return (a, b), (b, a)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_short_run_on_a_model_built_on_the_spot(tmp_path, backend):
    folder = build(tmp_path / "model", recipe=SHORT)
    shorter = {"max_steps": 2, "prompts_per_step": 2, "batch_size": 16, "eval_samples": 8}
    run = rlvr.train(
        **{**quickstart.settings(folder), **shorter},
        backend=backend,
        output_dir=str(tmp_path / "run"),
        report_to="none",
    )
    assert run.summary["steps"] == 2
    assert set(run.summary["eval_before"]) >= {"exact_match", "reward"}
    assert run.policy.lora.alpha == 32  # the same on every backend


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_quickstart_learns(tmp_path, backend, seed):
    command = [sys.executable, "-c", "from rlvr.cli import main; main()", "train", "--seed", str(seed)]
    done = subprocess.run(
        [*command, "--output-dir", "run"],
        cwd=tmp_path,
        env={**os.environ, "RLVR_BACKEND": backend},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    before, after = summary["eval_before"]["exact_match"], summary["eval_after"]["exact_match"]
    assert 0.2 <= before <= 0.6
    assert after >= before + 0.3
    assert summary["backend"] == backend
    for text in ("exact_match", f"{before:.3f}", f"{after:.3f}", "Everything is in"):
        assert text in done.stdout
