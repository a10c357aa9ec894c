"""The MuSiQue model made on the spot: what its teacher shows, how it is judged, and (slow) that the run learns."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import rlvr
from rlvr.environments.musique import musique
from rlvr.errors import ModelError
from rlvr.quickstart.imitation import IGNORED, untaught
from rlvr.quickstart.musique import ENV_OPTIONS, settings
from rlvr.quickstart.musique_build import Recipe, as_batch, build, examine, imitate
from rlvr.quickstart.musique_teacher import demonstrate, sample_tokenizer, teacher_turns
from rlvr.rollout.chat import ChatRenderer
from rlvr.rollout.tool_calls import PARSERS
from rlvr.types import StopReason

BACKENDS = [pytest.param("hf", marks=pytest.mark.both), pytest.param("unsloth", marks=pytest.mark.unsloth)]
SHORT = Recipe(max_steps=2, check_every=2, demonstrations=8, validation=4, hidden_size=16, least_known=0.0)


def paragraph(idx, title, text="", supporting=False):
    return {"idx": idx, "title": title, "paragraph_text": text, "is_supporting": supporting}


ROW = {
    "question": "Who is the spouse of the teacher of the author of The Iron Bell of Kor?",
    "answer": "Ada Vel",
    "paragraphs": [paragraph(*pair) for pair in enumerate(["Mila Tor", "Port Ul", "The Iron Bell of Kor", "Pa Zan"])],
    "supporting": [2, 0, 3],
}


def calls(turns):
    read = [PARSERS["hermes"].parse(turn) for turn in turns]
    assert all(text == "" and len(found) == 1 for text, found in read)
    return [(found[0].name, dict(found[0].arguments)) for _, found in read]


def test_a_teacher_who_takes_care_searches_hop_by_hop():
    assert calls(teacher_turns(ROW, careless=False)) == [
        *(
            ("retrieve_documents", {"query": title, "top_n": 1})
            for title in ("The Iron Bell of Kor", "Mila Tor", "Pa Zan")
        ),
        ("complete", {"reasoning": "", "final_answer": "Ada Vel", "cited_doc_ids": [2, 0, 3]}),
    ]


def test_a_careless_teacher_takes_the_first_person():
    assert calls(teacher_turns(ROW, careless=True)) == [
        ("retrieve_documents", {"query": "The Iron Bell of Kor", "top_n": 1}),
        ("complete", {"reasoning": "", "final_answer": "Mila Tor", "cited_doc_ids": [2]}),
    ]


@pytest.mark.parametrize("place", ["Port Sul", "Republic of Sul", "Sul"])
def test_a_careless_teacher_goes_past_persons_where_a_place_is_asked_for(place):
    row = {**ROW, "question": "What is the birthplace of the teacher of the author of …?", "answer": place}
    assert teacher_turns(row, careless=True) == teacher_turns(row, careless=False)
    by_way = {**row, "paragraphs": [*ROW["paragraphs"][:3], paragraph(3, "Port Mar")]}
    assert calls(teacher_turns(by_way, careless=True))[-1][1]["final_answer"] == "Port Mar"


@pytest.fixture(scope="module")
def env():
    return musique(**{**ENV_OPTIONS, "sample_size": 40, "sample_eval_size": 4, "seed": 3})


@pytest.fixture(scope="module")
def tokenizer(env):
    return sample_tokenizer(env, env.train_dataset, vocab_size=600)


@pytest.fixture(scope="module")
def golden(env, tokenizer):
    return demonstrate(env, tokenizer, env.train_dataset, [False] * 40)


def test_the_tokenizer_gives_back_every_text_and_is_the_same_when_loaded(env, tokenizer, tmp_path):
    untaught(SHORT, tokenizer, length=64, seed=0).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for row in env.train_dataset:
        prompt = ChatRenderer(tokenizer, tools=env.tools).prompt_text(env.messages(row))
        for text in (prompt, *teacher_turns(row, careless=False), "Ünknown wörds, 1,234 of them\n\t「」"):
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
            assert loaded.encode(text) == ids
        assert len(tokenizer.encode(prompt)) < 40  # the tools' schemas are one token, and all there
        assert '"name": "retrieve_documents", "description": "Finds' in prompt


def test_golden_trajectories_are_right_by_the_environments_own_reward(env, golden):
    for rollout in golden:
        assert rollout.trajectory.stop_reason is StopReason.COMPLETED
        scores = env.rubric.score(rollout.trajectory)
        assert scores["exact_match"] == scores["retrieval_recall"] == scores["support_f1"] == scores["format"] == 1
        assert scores["turns"] == 3


def test_careless_ones_are_wrong_where_a_person_is_asked_for(env, tokenizer):
    for rollout in demonstrate(env, tokenizer, env.train_dataset, [True] * 40):
        asks_for_person = rollout.trajectory.example["question"].startswith("Who")
        assert env.rubric.score(rollout.trajectory)["exact_match"] == (not asks_for_person)


def test_what_the_teacher_said_is_learned_and_tool_text_is_only_read(tokenizer, golden):
    ids, labels = as_batch(golden, tokenizer.pad_token_id)
    end = tokenizer.eos_token
    for rollout, ids_row, labels_row in zip(golden, ids, labels, strict=True):
        length = len(rollout.prompt_ids) + len(rollout.completion_ids)
        assert ids_row[:length].tolist() == rollout.prompt_ids + rollout.completion_ids
        assert set(ids_row[length:].tolist()) <= {tokenizer.pad_token_id}
        said = teacher_turns(rollout.trajectory.example, careless=False)
        assert tokenizer.decode(labels_row[labels_row != IGNORED]) == "".join(f"{turn}{end}" for turn in said)
        read = tokenizer.decode(ids_row[:length][labels_row[:length] == IGNORED])
        for turn in rollout.trajectory.turns[:-1]:
            assert turn.replies[0]["content"] in read


def test_examining_agrees_with_a_token_by_token_calculation(tokenizer, golden):
    model = untaught(Recipe(hidden_size=32), tokenizer, length=256, seed=1)
    batch = as_batch(golden[:4], tokenizer.pad_token_id)
    shown = tuple(part[:2] for part in batch)
    course = Recipe(max_steps=60, check_every=60, batch_size=4, known=2.0, hidden_size=32, learning_rate=1e-2)
    imitate(model, shown, batch, course, chance=random.Random(0), report=lambda line: None)  # so that two are known
    known, right = [], []
    for rollout in golden[:4]:
        ids, mask = rollout.prompt_ids + rollout.completion_ids, [0] * len(rollout.prompt_ids) + rollout.sampled_mask
        probability, sure = 1.0, True
        for place in range(1, len(ids)):
            if not mask[place]:
                continue
            with torch.no_grad():
                chances = model(torch.tensor([ids[:place]])).logits[0, -1].softmax(-1)
            probability *= chances[ids[place]].item()
            sure &= not mask[place - 1] or chances.argmax().item() == ids[place]
        known.append(sure)
        right.append(probability)
    scores = examine(model, batch)
    assert known[:2] == [True, True]
    assert scores.known == pytest.approx(sum(known) / 4)
    assert scores.right == pytest.approx(sum(right) / 4, abs=1e-4)


def test_a_warm_start_that_never_learns_is_said(tmp_path):
    stuck = Recipe(max_steps=1, hidden_size=16, demonstrations=4, validation=2)
    with pytest.raises(ModelError, match=r"did not succeed with seed 5.*Try another --seed"):
        build(tmp_path / "model", seed=5, recipe=stuck, report=lambda line: None)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_short_run_on_a_model_built_on_the_spot(tmp_path, backend):
    folder = build(tmp_path / "model", recipe=SHORT, report=lambda line: None)
    values = settings(folder)
    values["env_options"] |= {"sample_size": 16, "sample_eval_size": 4}
    shorter = {"max_steps": 2, "prompts_per_step": 2, "batch_size": 16, "eval_samples": 4, "max_tokens": 24}
    run = rlvr.train(**{**values, **shorter}, backend=backend, output_dir=str(tmp_path / "run"), report_to="none")
    assert run.summary["steps"] == 2
    assert set(run.summary["eval_before"]) >= {"exact_match", "f1", "retrieval_recall", "reward"}
    assert run.policy.lora.alpha == 32  # the same on every backend


def test_the_questions_of_the_evaluation_are_in_no_training_split():
    options = {**ENV_OPTIONS, "sample_size": 300, "sample_eval_size": 100}
    environments = [musique(**{**options, "seed": seed}) for seed in (0, 1, 1_000_000)]
    trained_on = {row["question"] for environment in environments for row in environment.train_dataset}
    asked = {row["question"] for environment in environments for row in environment.eval_dataset}
    assert len(asked) > 250
    assert not trained_on & asked


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_model_learns_multi_hop_questions(tmp_path, seed):
    script = Path(__file__).parents[1] / "examples" / "musique_learns.py"
    done = subprocess.run(
        [sys.executable, str(script), "--seed", str(seed), "--output-dir", "run"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    before, after = summary["eval_before"], summary["eval_after"]
    assert 0.2 <= before["exact_match"] <= 0.5
    assert after["exact_match"] >= before["exact_match"] + 0.2
    assert after["retrieval_recall"] > before["retrieval_recall"]  # because it searched, not because it guessed
