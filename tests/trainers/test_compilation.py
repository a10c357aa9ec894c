"""When the grouped engine compiles layers: where the rollouts of a run, or of an evaluation, pay for it."""

import pytest
from datasets import Dataset
from short_runs import SMALL, bytes_modulo_7
from tests_support import grpo_config

import rlvr
from rlvr.rollout import grouped
from rlvr.rollout.engine import SamplingSettings
from rlvr.rollout.grouped import GroupedEngine
from rlvr.testing.tiny import tiny_model
from rlvr.trainers import EnhancedGRPOTrainer
from rlvr.trainers.engines import rollouts_of_run


def compiles(*, tokens, execution="graphs", **settings):
    engine = GroupedEngine(tiny_model(layers=1), sampling=SamplingSettings(), eos_token_ids=(), **settings)
    engine.execution = execution  # of a GPU
    return engine._compiles(tokens)


@pytest.mark.parametrize(
    ("rollouts", "tokens", "expected"),
    [(1, 256, False), (31, 256, False), (32, 256, True), (7, 1_024, False), (8, 1_024, True), (1, 8_000, True)],
)
def test_layers_are_compiled_from_8000_token_steps(rollouts, tokens, expected):
    """32 × 256 = 8,192 and 31 × 256 = 7,936; 8 × 1,024 and 7 × 1,024 = 7,168."""
    assert compiles(rollouts=rollouts, tokens=tokens) is expected
    assert compiles(rollouts=lambda: rollouts, tokens=tokens) is expected
    assert not compiles(rollouts=rollouts, tokens=tokens, execution="eager")


def test_what_was_asked_for_is_done():
    assert compiles(compile_layers=True, tokens=1)
    assert not compiles(compile_layers=False, rollouts=10**6, tokens=256)


@pytest.mark.both
@pytest.mark.parametrize(
    ("batch", "rollouts"),
    [
        ({"max_steps": 5}, 5),
        ({"max_steps": 5, "gradient_accumulation_steps": 2, "steps_per_generation": 4}, 3),  # of 2, 2 and 1 steps
        ({"max_steps": 5, "num_iterations": 2}, 3),
        ({"max_steps": -1, "num_train_epochs": 2}, 8),  # 8 prompts, 2 a step
    ],
    ids=["a step", "two steps", "twice each", "epochs"],
)
def test_a_trainer_knows_the_rollouts_of_its_run(tmp_path, tokenizer, batch, rollouts):
    known = []

    class Heard(EnhancedGRPOTrainer):
        def _generate(self, prompts):
            known.append(self.engine._rollouts())
            return super()._generate(prompts)

    trainer = Heard(
        model=tiny_model(layers=1), processing_class=tokenizer,
        reward_funcs=lambda completion_ids, **_: [float(len(ids)) for ids in completion_ids],
        args=grpo_config(tmp_path, per_device_train_batch_size=4, num_generations=2, **batch),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in "abcdefgh"]),
    )  # fmt: skip
    assert rollouts_of_run(trainer) == 0  # nothing is known before it trains
    trainer.train()
    assert known == [rollouts] * rollouts


@pytest.fixture
def told(monkeypatch):
    """The rollouts that each engine was made for."""
    told = []

    class Told(GroupedEngine):
        def __init__(self, *args, rollouts, **settings):
            told.append(rollouts)
            super().__init__(*args, rollouts=rollouts, **settings)

    monkeypatch.setattr(grouped, "GroupedEngine", Told)
    return told


@pytest.mark.both
def test_an_evaluation_tells_its_engine_how_many_rollouts_it_has(model_folder, told):
    options = {"limit": 5, "max_prompt_length": 64, "max_tokens": 2, "batch_size": 4}
    rlvr.evaluate("arithmetic", model_folder, "hf", samples=3, **options)
    rlvr.evaluate("arithmetic", model_folder, "hf", samples=1, **options)
    assert told == [4, 2]  # 15 and 5 attempts, 4 at a time


def test_so_does_the_evaluation_within_a_run(model_folder, tmp_path, told):
    rows = [{"question": f"{n}+1", "answer": "2"} for n in range(70)]
    env = rlvr.Environment(name="bytes", train_dataset=rows[:4], eval_dataset=rows, rubric=rlvr.Rubric(bytes_modulo_7))
    rlvr.train(env, model_folder, "hf", **SMALL | {"eval_samples": 70}, max_steps=1, output_dir=tmp_path / "run")
    assert [rollouts for rollouts in told if not callable(rollouts)] == [2, 2]  # before and after; 64 at a time


def test_a_preflight_tells_its_engine_how_many_rollouts_it_has(model_folder, told):
    options = {"max_prompt_length": 64, "max_tokens": 2, "num_generations": 32}
    rlvr.preflight("arithmetic", model_folder, "hf", prompts=5, **options)
    assert told == [3]  # two groups of 32 at a time
