"""The trainer beside stock TRL: same arguments, same numbers, and what it adds."""

from __future__ import annotations

import gc
import json
from contextlib import nullcontext

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from tests_support import grpo_config

from rlvr import Environment, Rubric
from rlvr.errors import (
    ConfigError,
    EnvironmentDefinitionError,
    InfrastructureError,
    ModelError,
    PatchedProcessError,
    RewardError,
    RlvrError,
    UnsupportedSettingError,
)
from rlvr.testing.tiny import tiny_model
from rlvr.tracking.adapter_hash import adapter_hash
from rlvr.trainers import EnhancedGRPOTrainer
from rlvr.trainers.compose import composed
from rlvr.types import StopReason

pytestmark = pytest.mark.both

PROMPTS = [{"prompt": [{"role": "user", "content": f"say {i}"}]} for i in range(8)]


def lora():
    return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def distinct_characters(completions, **_):
    return [float(len(set(completion[0]["content"]))) for completion in completions]


def text_length(trajectory):
    return float(len(trajectory.text))


def environment(**overrides):
    rows = [{"question": f"count to {i}", "answer": str(i), "level": i % 2} for i in range(8)]
    settings = {
        "name": "counting",
        "train_dataset": rows,
        "eval_dataset": rows[:2],
        "rubric": Rubric(text_length),
    }
    return Environment(**{**settings, **overrides})


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_trains_exactly_as_trl_does(tmp_path, tokenizer, beta):
    def run(trainer_class, **engine):
        trainer = trainer_class(
            tiny_model(),
            distinct_characters,
            grpo_config(tmp_path, beta=beta, max_steps=3),
            Dataset.from_list(PROMPTS),
            processing_class=tokenizer,
            peft_config=lora(),
            **engine,
        )
        trainer.train()
        return trainer

    ours, theirs = run(EnhancedGRPOTrainer, rollout_engine="generate", shared_prefix="off"), run(trl.GRPOTrainer)
    assert losses(ours) == losses(theirs)
    assert any(loss != 0 for loss in losses(ours)) or beta == 0
    pairs = zip(ours.model.named_parameters(), theirs.model.named_parameters(), strict=False)
    trained = [(mine, other) for (name, mine), (_, other) in pairs if "default" in name]
    assert trained
    assert all(torch.equal(mine, other) for mine, other in trained)


@pytest.mark.parametrize("conversational", [True, False])
def test_a_prompt_is_tokenized_once_for_its_group(tmp_path, tokenizer, monkeypatch, conversational):
    trainer = EnhancedGRPOTrainer(
        tiny_model(),
        distinct_characters,
        grpo_config(tmp_path),
        Dataset.from_list(PROMPTS),
        processing_class=tokenizer,
    )
    one, other = (row["prompt"] if conversational else row["prompt"][0]["content"] for row in PROMPTS[:2])
    rows = [one, one, other, one]
    expected = trl.GRPOTrainer._tokenize_prompts(trainer, rows)
    seen = []

    def counted(self, prompts):
        seen.append(prompts)
        return tokenized(self, prompts)

    tokenized = trl.GRPOTrainer._tokenize_prompts
    monkeypatch.setattr(trl.GRPOTrainer, "_tokenize_prompts", counted)
    ids, images, fields = trainer._tokenize_prompts(rows)
    assert seen == [[one, other]]
    assert (ids, images, fields) == tuple(expected)
    ids[0].append(0)
    assert ids[1] != ids[0]

    monkeypatch.setattr(
        trl.GRPOTrainer, "_tokenize_prompts", lambda self, _: ([[1], [2]], None, {"types": [[3], [4]]})
    )
    assert trainer._tokenize_prompts(rows) == ([[1], [1], [2], [1]], None, {"types": [[3], [3], [4], [3]]})


def test_isinstance_and_subclassing(tmp_path, model, tokenizer):
    class Mine(EnhancedGRPOTrainer):
        def compute_loss(self, *args, **kwargs):
            self.called = True
            return super().compute_loss(*args, **kwargs)

    trainer = Mine(
        model=model,
        reward_funcs=distinct_characters,
        args=grpo_config(tmp_path, max_steps=1),
        train_dataset=Dataset.from_list(PROMPTS),
        processing_class=tokenizer,
    )
    trainer.train()
    assert trainer.called
    assert isinstance(trainer, Mine)
    assert isinstance(trainer, EnhancedGRPOTrainer)
    assert isinstance(trainer, trl.GRPOTrainer)
    assert type(trainer).__name__ == "Mine"


def test_the_base_is_the_trainer_that_trl_has_now(monkeypatch, model):
    class UnslothGRPOTrainer:  # as Unsloth generates it: it does not inherit from TRL's
        pass

    monkeypatch.setattr(trl, "GRPOTrainer", UnslothGRPOTrainer)
    model.for_training = model.for_inference = lambda: None
    trainer = EnhancedGRPOTrainer.__new__(EnhancedGRPOTrainer, model=model)
    assert isinstance(trainer, UnslothGRPOTrainer)
    assert isinstance(trainer, EnhancedGRPOTrainer)


def test_a_plain_model_is_refused_where_unsloth_has_replaced_the_trainer(monkeypatch, model):
    class UnslothGRPOTrainer:
        pass

    monkeypatch.setattr(trl, "GRPOTrainer", UnslothGRPOTrainer)
    with pytest.raises(PatchedProcessError, match="FastLanguageModel"):
        EnhancedGRPOTrainer(model=model, args=None)


def test_what_unsloths_trainer_ignores_is_refused(monkeypatch, model, tmp_path):
    class UnslothGRPOTrainer(trl.GRPOTrainer):
        pass

    monkeypatch.setattr(trl, "GRPOTrainer", UnslothGRPOTrainer)
    model.for_training = model.for_inference = lambda: None
    args = grpo_config(tmp_path, use_adaptive_entropy=True, entropy_coef=0.01)
    with pytest.raises(
        UnsupportedSettingError, match="use_adaptive_entropy is True, and Unsloth's trainer ignores it"
    ):
        EnhancedGRPOTrainer(model=model, reward_funcs=distinct_characters, args=args)
    with pytest.raises(UnsupportedSettingError, match=r"peft_config is given.*every weight would train"):
        EnhancedGRPOTrainer(
            model=model, reward_funcs=distinct_characters, args=grpo_config(tmp_path), peft_config=lora()
        )
    model.vllm_engine = object()
    args = grpo_config(tmp_path, vllm_mode="server", vllm_tensor_parallel_size=2)
    with pytest.raises(UnsupportedSettingError, match=r"^vllm_mode='server', vllm_tensor_parallel_size=2: the model"):
        EnhancedGRPOTrainer(model=model, reward_funcs=distinct_characters, args=args)


def test_a_class_that_has_the_base_already_is_not_composed_again():
    class Base:
        pass

    class Own(EnhancedGRPOTrainer, Base):
        pass

    assert composed(Own, Base) is Own


def test_an_environment_gives_prompts_rewards_and_records(tmp_path, tokenizer):
    records = []
    env = environment(rubric=Rubric(text_length, (lambda_free_metric, 0.0)), system_prompt="Be brief.")
    trainer = EnhancedGRPOTrainer(
        model=tiny_model(),
        processing_class=tokenizer,
        env=env,
        args=grpo_config(tmp_path),
        peft_config=lora(),
        trajectory_sinks=[records.extend],
    )
    trainer.train()
    assert len(records) == 8  # 2 steps of 4 completions
    assert [record.group for record in records] == [0] * 4 + [1] * 4
    assert [record.step for record in records] == [0] * 4 + [1] * 4
    for record in records:
        assert record.prompt[0] == {"role": "system", "content": "Be brief."}
        assert record.rewards == {
            "text_length": float(len(record.completion[0]["content"])),
            "lambda_free_metric": 1.0,
        }
        assert record.reward == record.rewards["text_length"]  # the metric has weight 0
        assert record.stop_reason in (StopReason.END_OF_TURN.value, StopReason.TOKEN_BUDGET.value)
        json.dumps(record.as_json())
    for group in (records[:4], records[4:]):
        mean = sum(record.reward for record in group) / 4
        deviation = (sum((record.reward - mean) ** 2 for record in group) / 3) ** 0.5
        expected = [(record.reward - mean) / (deviation + 1e-4) for record in group]
        assert [record.advantage for record in group] == pytest.approx(expected, abs=1e-4)
    logged = trainer.state.log_history[0]
    assert logged["stop_reason/end_of_turn"] + logged["stop_reason/token_budget"] == 1


def test_a_second_training_hashes_the_weights_that_it_starts_from(tmp_path, tokenizer):
    records, starts = [], []
    trainer = EnhancedGRPOTrainer(
        model=tiny_model(),
        processing_class=tokenizer,
        env=environment(),
        args=grpo_config(tmp_path, max_steps=1),
        peft_config=lora(),
        trajectory_sinks=[records.extend],
    )
    for _ in range(2):
        starts.append(adapter_hash(trainer.model))
        trainer.train()
    assert starts[0] != starts[1]
    assert [record.adapter for record in records] == [starts[0]] * 4 + [starts[1]] * 4


def lambda_free_metric(trajectory):
    return 1.0 if set(trajectory.example) == {"question", "answer", "level"} else 0.0


def test_reward_functions_beside_an_environment_see_its_columns(tmp_path, tokenizer):
    seen = []

    def beside(completions, answer, level, **_):
        seen.extend(zip(answer, level, strict=True))
        assert all(message["role"] == "assistant" for completion in completions for message in completion)
        return [0.5] * len(completions)

    trainer = EnhancedGRPOTrainer(
        model=tiny_model(), processing_class=tokenizer, env=environment(), reward_funcs=beside,
        args=grpo_config(tmp_path, max_steps=1, reward_weights=[2.0]),
    )  # fmt: skip
    trainer.train()
    assert all(int(answer) % 2 == level for answer, level in seen)
    assert trainer.reward_weights.tolist() == [1.0, 2.0]
    assert trainer.state.log_history[0]["rewards/beside/mean"] == 0.5


AWKWARD = ("completions", "prompts", "completion_ids", "trainer_state", "log_extra", "log_metric", "image", "images")


@pytest.mark.parametrize("beside", [False, True])
def test_columns_of_an_environment_are_in_the_way_of_nothing(tmp_path, tokenizer, caplog, beside):
    rows = [{"question": f"count to {i}", **dict.fromkeys(AWKWARD, "text")} for i in range(8)]
    for row in rows[::2]:
        row["level"] = 3
    levels, examples = [], []

    def beside_it(completions, trajectory, level, **columns):
        assert not {"image", "images", "rlvr_row"} & columns.keys()
        assert columns["prompts"][0][-1]["role"] == "user"
        levels.extend(zip(level, (t.example.get("level") for t in trajectory), strict=True))
        return [0.5] * len(completions)

    def image_is_there(trajectory):
        examples.append(trajectory.example)
        return 1.0

    trainer = EnhancedGRPOTrainer(
        model=tiny_model(), processing_class=tokenizer, reward_funcs=beside_it if beside else None,
        env=environment(train_dataset=rows, eval_dataset=None, rubric=Rubric(image_is_there)),
        args=grpo_config(tmp_path, max_steps=4),
    )  # fmt: skip
    trainer.train()
    assert all(example in rows for example in examples)
    assert {len(example) for example in examples} == {9, 10}
    assert set(levels) == ({(3, 3), (None, None)} if beside else set())
    assert ("not given the columns completions, prompts" in caplog.text) == beside


def test_arguments_of_the_caller_are_left_alone(tmp_path, tokenizer):
    args = grpo_config(tmp_path, beta=0.1)
    trainer = EnhancedGRPOTrainer(
        model=tiny_model(), processing_class=tokenizer, env=environment(), args=args, peft_config=lora()
    )
    assert args.beta == 0.1
    assert args.reward_weights is None
    assert trainer.args.beta == trainer.beta == 0.1


def test_an_evaluation_has_records_and_a_mean_reward_and_no_loss(tmp_path, tokenizer):
    records = []
    trainer = EnhancedGRPOTrainer(
        model=tiny_model(), processing_class=tokenizer, env=environment(), peft_config=lora(),
        args=grpo_config(tmp_path, beta=0.1, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=4),
        trajectory_sinks=[records.extend],
    )  # fmt: skip
    metrics = trainer.evaluate()
    assert [record.phase for record in records] == ["eval"] * 8  # 2 rows of 4 completions
    mean = sum(record.reward for record in records) / 8
    assert metrics["eval_reward"] == pytest.approx(mean)
    assert "eval_loss" not in metrics


def evaluating(folder, tokenizer, **config):
    """A trainer whose completions are given, so that every forward is one of scoring; and its forwards."""

    def given(prompts, trainer):
        completions = [[5, 6]] * len(prompts)
        return {"prompt_ids": tokenizer(prompts)["input_ids"], "completion_ids": completions, "logprobs": None}

    rows = Dataset.from_list([{"prompt": "a"}, {"prompt": "bb"}])
    trainer = EnhancedGRPOTrainer(
        model=tiny_model(), processing_class=tokenizer, peft_config=lora(), train_dataset=rows, eval_dataset=rows,
        reward_funcs=lambda completion_ids, **_: [float(row) for row in range(len(completion_ids))],
        rollout_func=given,
        args=grpo_config(folder, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=4, **config),
    )  # fmt: skip
    forwards = []
    trainer.model.get_base_model().model.register_forward_hook(lambda *_: forwards.append(1))
    return trainer, forwards


@pytest.mark.parametrize(
    "config", [{}, {"beta": 0.1}, {"num_iterations": 2}, {"metric_for_best_model": "eval_reward"}]
)
def test_evaluation_generates_and_scores_only(tmp_path, tokenizer, config):
    trainer, forwards = evaluating(tmp_path, tokenizer, **config)
    assert "eval_reward" in trainer.evaluate()
    assert not forwards
    trainer.train()  # afterwards losses have the forwards that they want
    assert forwards


@pytest.mark.parametrize(
    "config",
    [
        {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 0}},
        {"save_strategy": "best", "metric_for_best_model": "loss"},
        {"save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True, "beta": 0.1},
    ],
)
def test_where_the_trainer_wants_its_loss_an_evaluation_has_one(tmp_path, tokenizer, config):
    trainer, _ = evaluating(tmp_path, tokenizer, **config)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "eval_reward" in row]
    assert len(rows) == 2
    assert all("eval_loss" in row for row in rows)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (float("nan"), "nan"),
        (float("inf"), "inf"),
        (-1e39, "-1e+39, which float32 cannot hold"),
        pytest.param(10**400, "returned inf", id="huge"),
        ("good", "'good' of type str"),
        ([1.0], "of type list"),
    ],
)
def test_a_bad_reward_stops_the_run_after_saving(tmp_path, tokenizer, value, words):
    calls = []

    def bad_reward(completions, **_):
        calls.append(1)
        return [1.0] * (len(completions) - 1) + [value if len(calls) == 2 else 0.5]

    trainer = EnhancedGRPOTrainer(
        model=tiny_model(), processing_class=tokenizer, reward_funcs=bad_reward, args=grpo_config(tmp_path),
        train_dataset=Dataset.from_list([{**row, "answer": "7"} for row in PROMPTS]), peft_config=lora(),
    )  # fmt: skip
    with pytest.raises(RewardError) as caught:
        trainer.train()
    assert "bad_reward" in str(caught.value)
    assert words in str(caught.value)
    assert "'answer': '7'" in str(caught.value)
    assert (tmp_path / "checkpoint-1" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("fails", [False, True])
def test_what_exists_when_training_begins_stays_out_of_garbage_collections(tmp_path, tokenizer, fails):
    frozen = []

    def reward(completions, **_):
        frozen.append(gc.get_freeze_count())
        return [float("inf") if fails else 1.0] * len(completions)

    trainer = EnhancedGRPOTrainer(
        model=tiny_model(), processing_class=tokenizer, reward_funcs=reward, args=grpo_config(tmp_path, max_steps=1),
        train_dataset=Dataset.from_list(PROMPTS), peft_config=lora(),
    )  # fmt: skip
    assert gc.get_freeze_count() == 0
    with pytest.raises(RewardError) if fails else nullcontext():
        trainer.train()
    assert frozen[0] > 100_000
    assert gc.get_freeze_count() == 0


def test_objects_that_somebody_else_has_frozen_stay_so(tmp_path, tokenizer):
    trainer = EnhancedGRPOTrainer(
        model=tiny_model(), processing_class=tokenizer, reward_funcs=distinct_characters, peft_config=lora(),
        args=grpo_config(tmp_path, max_steps=1), train_dataset=Dataset.from_list(PROMPTS),
    )  # fmt: skip
    gc.freeze()
    try:
        before = gc.get_freeze_count()
        trainer.train()
        assert gc.get_freeze_count() > 0.9 * before
    finally:
        gc.unfreeze()


class Breaks(Environment):
    """The rollouts of its first step are played; then its code raises `error`."""

    begun = 0

    def new_state(self, example):
        self.begun += 1
        if self.begun > 4:
            raise self.error("the service is gone")
        return {}


@pytest.mark.parametrize("error", [EnvironmentDefinitionError, InfrastructureError, ModelError, ValueError])
def test_a_run_that_its_environment_stops_is_saved_first(tmp_path, tokenizer, caplog, error):
    env = Breaks(name="breaks", train_dataset=environment().train_dataset, rubric=Rubric(text_length))
    env.error = error
    trainer = EnhancedGRPOTrainer(
        model=tiny_model(), processing_class=tokenizer, env=env, args=grpo_config(tmp_path), peft_config=lora()
    )
    with pytest.raises(RlvrError, match="the service is gone"):
        trainer.train()
    assert (tmp_path / "checkpoint-1" / "adapter_model.safetensors").is_file()
    assert f"its state is saved in {tmp_path / 'checkpoint-1'}" in caplog.text


def test_a_state_that_was_not_saved_is_not_said_to_be(tmp_path, tokenizer, caplog, monkeypatch):
    def broken(completions, **_):
        raise KeyError("answers")

    trainer = EnhancedGRPOTrainer(
        model=tiny_model(), processing_class=tokenizer, reward_funcs=broken, args=grpo_config(tmp_path),
        train_dataset=Dataset.from_list(PROMPTS), peft_config=lora(),
    )  # fmt: skip
    (tmp_path / "checkpoint-0").mkdir()
    monkeypatch.setattr(trainer, "_save_checkpoint", lambda model, trial: None)  # as in a process that is not the main
    with pytest.raises(RewardError):
        trainer.train()
    assert "its state is not saved" in caplog.text
    assert "its state is saved" not in caplog.text


def test_a_rubric_function_that_raises_names_itself_and_the_example(tmp_path, tokenizer):
    def broken(trajectory):
        return 1 / 0

    trainer = EnhancedGRPOTrainer(
        model=tiny_model(), processing_class=tokenizer, env=environment(rubric=Rubric(broken)),
        args=grpo_config(tmp_path), peft_config=lora(),
    )  # fmt: skip
    with pytest.raises(RewardError, match=r"(?s)'broken' raised ZeroDivisionError.*count to"):
        trainer.train()


def test_a_reward_list_of_the_wrong_length_names_both_lengths(tmp_path, tokenizer):
    trainer = EnhancedGRPOTrainer(
        model=tiny_model(), processing_class=tokenizer, reward_funcs=lambda completions, **_: [1.0],
        args=grpo_config(tmp_path), train_dataset=Dataset.from_list(PROMPTS), peft_config=lora(),
    )  # fmt: skip
    with pytest.raises(RewardError, match="1 values for 4 completions"):
        trainer.train()


def test_none_still_means_not_applicable(tmp_path, tokenizer):
    def sometimes(completions, **_):
        return [None, 1.0, 0.0, None]

    records = []
    trainer = EnhancedGRPOTrainer(
        model=tiny_model(), processing_class=tokenizer, reward_funcs=sometimes, trajectory_sinks=[records.extend],
        args=grpo_config(tmp_path, max_steps=1), train_dataset=Dataset.from_list(PROMPTS), peft_config=lora(),
    )  # fmt: skip
    trainer.train()
    assert [record.reward for record in records] == [None, 1.0, 0.0, None]
    assert records[0].advantage == 0.0


@pytest.mark.parametrize("argument", ["tools", "rollout_func", "environment_factory"])
def test_an_environment_excludes_trls_own_ways(tmp_path, tokenizer, argument):
    given = {argument: [len] if argument == "tools" else lambda *_: None}
    with pytest.raises(ConfigError, match=argument):
        EnhancedGRPOTrainer(
            model=tiny_model(),
            processing_class=tokenizer,
            env=environment(),
            args=grpo_config(tmp_path),
            **given,
        )
