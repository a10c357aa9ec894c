"""TRL's own `tools`, `environment_factory` and reward functions through our trainer, beside stock TRL.

Only sampling is by script: a tiny model with random weights calls no tools.
"""

from __future__ import annotations

import importlib.resources
import json

import pytest
import torch
import trl
from datasets import Dataset
from tests_support import grpo_config

from rlvr.rollout.engine import SampledTurn
from rlvr.testing.tiny import tiny_model, tiny_tokenizer
from rlvr.trainers import EnhancedGRPOTrainer

pytestmark = pytest.mark.both

ROWS = [{"prompt": [{"role": "user", "content": f"double {i}"}], "number": i} for i in range(4, 8)]


def double(number: int) -> int:
    """Doubles a number.

    Args:
        number: what to double.

    Returns:
        twice the number.
    """
    return 2 * number


async def halve(number: int) -> float:
    """Halves a number.

    Args:
        number: what to halve.

    Returns:
        half the number.
    """
    return number / 2


class Doubling:
    """An environment as TRL takes it: public methods are tools, `reset` begins a rollout, `get_reward` scores it."""

    def reset(self, number=4, **row):
        self.answers = []
        return f"double {number}"

    def double(self, number: int) -> int:
        """Doubles a number.

        Args:
            number: what to double.

        Returns:
            twice the number.
        """
        self.answers.append(2 * number)
        return self.answers[-1]

    def get_reward(self) -> float:
        return float(8 in self.answers)


async def answered(completions, **_):
    return [float("8" in completion[-1]["content"]) for completion in completions]


def results(completions, number, **_):
    assert len(number) == len(completions)
    return [float(sum(message["role"] == "tool" for message in completion)) for completion in completions]


WAYS = {
    "tools": {"tools": [double, halve], "reward_funcs": [answered, results]},
    "environment": {"environment_factory": Doubling, "reward_funcs": results},
    "environments-by-name": {
        "environment_factory": {"doubling": Doubling},
        "train_dataset": Dataset.from_list([{**row, "environment": "doubling"} for row in ROWS]),
    },
    "environment-with-its-own-prompts": {"environment_factory": Doubling, "train_dataset": None},
}


@pytest.fixture
def qwen3():
    """A tokenizer with the template of Qwen3, which TRL knows how to parse and replaces by one for training."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (importlib.resources.files("trl") / "chat_templates" / "qwen3.jinja").read_text()
    return tokenizer


def scripted(tokenizer, prompt_ids, names):
    """What is said: every other rollout calls the tools, and says 8 once it has seen their results."""
    calls = "\n".join(
        f"<tool_call>\n{json.dumps({'name': name, 'arguments': {'number': 4}})}\n</tool_call>" for name in names
    )
    texts = tokenizer.batch_decode(prompt_ids)
    said = [
        "it is 8" if "<tool_response>" in text else (calls, "no idea")[index % 2] for index, text in enumerate(texts)
    ]
    return [tokenizer.encode(text + "<|im_end|>", add_special_tokens=False) for text in said]


def trained(trainer_class, folder, tokenizer, **arguments):
    trainer = trainer_class(
        model=tiny_model(),
        args=grpo_config(folder, max_steps=1, max_completion_length=400),
        processing_class=tokenizer,
        **{"train_dataset": Dataset.from_list(ROWS), **arguments},
    )
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    trainer.train()
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    return trainer


@pytest.mark.parametrize("engine", ["generate", "grouped"])
@pytest.mark.parametrize("way", WAYS)
def test_it_trains_exactly_as_with_trl(tmp_path, qwen3, monkeypatch, way, engine):
    names = ["double", "halve"] if way == "tools" else ["double"]
    records, used = [], []

    def sample(self, prompt_ids, *_, **__):
        used.append("generate")
        return scripted(qwen3, prompt_ids, names), None

    def sample_all(engine, prompt_ids, **_):
        used.append("grouped")
        return [SampledTurn(i, ids, True) for i, ids in enumerate(scripted(qwen3, prompt_ids, names))]

    monkeypatch.setattr(trl.GRPOTrainer, "_generate_single_turn", sample)
    monkeypatch.setattr("rlvr.rollout.engine.sample_all", sample_all)
    ours = trained(
        EnhancedGRPOTrainer, tmp_path / "ours", qwen3, **WAYS[way],
        rollout_engine=engine, shared_prefix="off", trajectory_sinks=[records.extend],
    )  # fmt: skip
    assert used == [engine, engine]  # the first turn, and the one after the tools
    theirs = trained(trl.GRPOTrainer, tmp_path / "theirs", qwen3, **WAYS[way])

    assert all(torch.equal(a, b) for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True))
    mine, other = ours.state.log_history[0], theirs.state.log_history[0]
    assert {name: mine[name] for name in other if name != "step_time"} == {
        name: value for name, value in other.items() if name != "step_time"
    }
    assert (mine["tools/call_frequency"], mine["tools/failure_frequency"]) == (len(names) / 2, 0.0)
    assert records[0].prompt[0]["content"].startswith("double")
    assert [message["role"] for message in records[0].completion] == ["assistant", *["tool"] * len(names), "assistant"]
    assert records[0].completion[1]["content"] == "8"
    assert records[0].rewards == {
        "tools": {"answered": 1.0, "results": 2.0},
        "environment": {"results": 1.0, "Doubling": 1.0},
    }.get(way, {"Doubling": 1.0})
    assert set(records[1].rewards.values()) == {0.0}
