"""An environment with tools through the trainer: which tokens the loss counts, and which it does not."""

from __future__ import annotations

import sys

import pytest
import torch
from datasets import Dataset
from tests_support import grpo_config

import rlvr
from rlvr import Environment, Rubric
from rlvr.errors import ConfigError, EnvironmentDefinitionError
from rlvr.rollout.engine import SampledTurn
from rlvr.testing.tiny import save_tiny, tiny_model
from rlvr.trainers import EnhancedGRPOTrainer
from rlvr.types import StopReason

pytestmark = pytest.mark.both


def double(number: int) -> int:
    """Doubles a number.

    Args:
        number: what to double.
    """
    return 2 * number


def answered(trajectory):
    return float(trajectory.text.count("8"))


class Scripted:
    """An engine that 'samples' given texts, so that the ids of a whole rollout can be written down by hand."""

    name = "scripted"

    def __init__(self, tokenizer, turns):
        self.tokenizer, self.turns = tokenizer, turns

    def open(self, prompt_ids, *, max_completion_tokens):
        from contextlib import nullcontext

        return nullcontext(ScriptedSession(self, len(prompt_ids)))


class ScriptedSession:
    def __init__(self, engine, count):
        self.engine, self.queue, self.said = engine, [], [0] * count

    @property
    def pending(self):
        return len(self.queue)

    def submit(self, index, new_ids, max_new_tokens):
        self.queue.append(index)

    def step(self):
        done = []
        for index in self.queue:
            script = self.engine.turns[index % len(self.engine.turns)]
            ids = self.engine.tokenizer.encode(script[self.said[index]] + "<|im_end|>", add_special_tokens=False)
            self.said[index] += 1
            done.append(SampledTurn(index, ids, ended=True))
        self.queue = []
        return done


CALL = '<tool_call>\n{"name": "double", "arguments": {"number": 4}}\n</tool_call>'
TOOL_TEXT = "\n<|im_start|>user\n<tool_response>\n8\n</tool_response><|im_end|>\n<|im_start|>assistant\n"


def test_tool_text_is_in_the_ids_and_not_in_the_loss(tmp_path, tokenizer):
    records, batches = [], []
    env = Environment(
        name="doubling", train_dataset=[{"question": "double 4"}], rubric=Rubric(answered), tools=[double]
    )
    trainer = EnhancedGRPOTrainer(
        model=tiny_model(), processing_class=tokenizer, env=env, trajectory_sinks=[records.extend],
        args=grpo_config(tmp_path, max_steps=1, max_completion_length=400),
    )  # fmt: skip
    trainer.engine = Scripted(tokenizer, [[CALL, "it is 8"], ["no idea"]])
    trainer._check_sampler = lambda *samples: None  # a script is not the policy
    compute_loss = trainer.compute_loss
    trainer.compute_loss = lambda model, inputs, **kwargs: (
        batches.append(inputs),
        compute_loss(model, inputs, **kwargs),
    )[1]
    trainer.train()

    with_tool = f"{CALL}<|im_end|>{TOOL_TEXT}it is 8<|im_end|>"
    counted = [1] * len(f"{CALL}<|im_end|>".replace("<|im_end|>", "E")) + [0] * len(
        TOOL_TEXT.replace("<|im_end|>", "E").replace("<|im_start|>", "S")
    )
    counted += [1] * len("it is 8E")
    (batch,) = batches
    long_rows = [row for row in range(4) if batch["completion_mask"][row].sum() == len(counted)]
    assert len(long_rows) == 2
    for row in long_rows:
        ids = batch["completion_ids"][row][: len(counted)]
        assert tokenizer.decode(ids) == with_tool
        assert batch["tool_mask"][row][: len(counted)].tolist() == counted
    assert torch.all(batch["tool_mask"][[row for row in range(4) if row not in long_rows]] == 1)

    first = records[0]
    assert [message["role"] for message in first.completion] == ["assistant", "tool", "assistant"]
    assert first.completion[0]["tool_calls"][0]["function"] == {"name": "double", "arguments": {"number": 4}}
    assert first.completion[1] == {"role": "tool", "name": "double", "content": "8"}
    assert first.reward == 1.0
    assert {record.stop_reason for record in records} == {StopReason.NO_TOOL_CALL.value}
    logged = trainer.state.log_history[0]
    assert logged["tools/call_frequency"] == 0.5
    assert logged["turns"] == 1.5


def test_a_model_that_samples_with_tools_trains(tmp_path, tokenizer):
    env = Environment(
        name="doubling", train_dataset=[{"question": f"double {i}"} for i in range(4)], tools=[double],
        rubric=Rubric(lambda_length),
    )  # fmt: skip
    trainer = EnhancedGRPOTrainer(
        model=tiny_model(), processing_class=tokenizer, env=env, args=grpo_config(tmp_path, max_completion_length=12)
    )
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    assert any(not torch.equal(before[name], parameter) for name, parameter in trainer.model.named_parameters())


def lambda_length(trajectory):
    return float(len(trajectory.text))


PARSER = """
from rlvr import ToolCall

class Always:
    def parse(self, text):
        return text, [ToolCall("double", {"number": 4})]
"""


def doubling():
    rows = [{"question": f"double {i}"} for i in range(4)]
    return Environment(
        name="doubling", train_dataset=rows, eval_dataset=rows[:1], tools=[double], max_turns=2,
        rubric=Rubric(answered, (calls, 0.0)),
    )  # fmt: skip


def calls(trajectory):
    return float(len(trajectory.tool_calls))


@pytest.fixture(scope="module")
def terse_model(tmp_path_factory):
    """It ends its turn at one token in ten, and at once when it is greedy: the end token's logit is a constant."""
    folder = save_tiny(tmp_path_factory.mktemp("tiny") / "terse")
    model = tiny_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 5.0
        model.lm_head.weight[model.config.eos_token_id, 0] = 0.6
    model.save_pretrained(folder)
    return str(folder)


def test_a_third_partys_parser_reads_training_and_evaluation(tmp_path, terse_model, monkeypatch):
    (tmp_path / "my_parser.py").write_text(PARSER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_parser", raising=False)
    options = {"tool_call_parser": "my_parser:Always", "max_prompt_length": 600, "max_tokens": 300}
    assert rlvr.evaluate(doubling(), terse_model, "hf", **options).metrics["calls"] == 2.0
    run = rlvr.train(
        *(doubling(), terse_model, "hf"),
        **options,
        max_steps=1,
        num_generations=2,
        prompts_per_step=2,
        report_to="none",
        output_dir=str(tmp_path / "run"),
    )
    assert run.summary["eval_before"]["calls"] == 2.0
    trained = [record for record in run.trajectories() if record["phase"] == "train"]
    with_result = [
        record for record in trained if {"role": "tool", "name": "double", "content": "8"} in record["completion"]
    ]
    assert len(with_result) >= 3


def test_parsers_are_checked_when_the_trainer_is_made(tmp_path, tokenizer):
    def make(**arguments):
        EnhancedGRPOTrainer(
            model=tiny_model(), processing_class=tokenizer, args=grpo_config(tmp_path), **arguments,
        )  # fmt: skip

    with pytest.raises(EnvironmentDefinitionError, match="unknown tool-call parser 'hermez'; allowed: hermes"):
        make(env=doubling(), tool_call_parser="hermez")
    plain = Environment(name="plain", train_dataset=[{"question": "q"}], rubric=Rubric(answered))
    with pytest.raises(ConfigError, match="tool_call_parser is 'hermes', and the environment has no tools"):
        make(env=plain, tool_call_parser="hermes")
    rows = Dataset.from_list([{"prompt": "q"}])
    with pytest.raises(ConfigError, match="tool_call_parser is 'hermes', and there is no env"):
        make(train_dataset=rows, reward_funcs=lambda completions, **_: [0.0], tool_call_parser="hermes")


def test_a_tool_without_a_schema_is_found_before_the_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def halve(number):
        """Halves."""

    env = Environment(name="halving", train_dataset=[{"question": "q"}], rubric=Rubric(answered), tools=[halve])
    for start in (rlvr.train, rlvr.evaluate):
        with pytest.raises(EnvironmentDefinitionError, match="tool 'halve' has no usable schema"):
            start(env, "no-such-model", "hf")
