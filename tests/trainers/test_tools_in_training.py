"""An environment with tools through the trainer: which tokens the loss counts, and which it does not."""

from __future__ import annotations

import pytest
import torch
from tests_support import grpo_config

from rlvr import Environment, Rubric
from rlvr.rollout.engine import SampledTurn
from rlvr.testing.tiny import tiny_model
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
