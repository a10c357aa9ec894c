"""The ids trained on are the ids sampled, whatever they are, and between them the template's text, tokenized alone.

Templates of published models, a tokenizer that merges, ids that no tokenizer would give, budgets that cut. What stands
between two turns is written down by hand.
"""

from __future__ import annotations

import importlib.resources
import itertools
import json
import re
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import ScriptedEngine
from tokenizers import trainers

from rlvr.environments.base import Environment
from rlvr.rewards.rubric import Rubric
from rlvr.rollout.chat import ChatRenderer
from rlvr.rollout.episodes import play
from rlvr.testing.tiny import tiny_tokenizer
from rlvr.types import StopReason

SPECIAL = r"<\|[A-Za-z_]+\|>|<｜[^｜]+｜>|<(?:start|end)_of_turn>"
AFTER_A_TURN = {
    "qwen2_5": "\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
    "qwen3": "\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
    "llama3_1": (
        "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "gemma3": "\n<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n",
    "phi3": "\n<|user|>\n{}<|end|>\n<|assistant|>\n",
    "deepseek_r1_distill": "<｜User｜>{}<｜Assistant｜><think>\n",
    "gptoss": "<|start|>user<|message|>{}<|end|><|start|>assistant",
}
CHATML_RESULTS = (
    "\n<|im_start|>user{}<|im_end|>\n<|im_start|>assistant\n",
    "\n<tool_response>\n{}\n</tool_response>",
    lambda text: text,
    '<tool_call>\n{{"name": "echo", "arguments": {}}}\n</tool_call>',
)
AFTER_A_CALL = {  # around all results, around each, how it is written, and a call
    "qwen2_5": CHATML_RESULTS,
    "qwen3": CHATML_RESULTS,
    "llama3_1": (
        "{}<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|start_header_id|>ipython<|end_header_id|>\n\n{}<|eot_id|>",
        lambda text: json.dumps(text, ensure_ascii=False),
        '{{"name": "echo", "parameters": {}}}',
    ),
}
letters = st.characters(codec="utf-8", exclude_characters="<>[]{}&'", exclude_categories=["Cc", "Cs"])
sayings = st.text(letters, max_size=12).map(str.strip).filter(bool)


@cache
def tokenizer_of(family: str):
    """A tokenizer with merges and the family's template and special tokens."""
    template = (importlib.resources.files("trl") / "chat_templates" / f"{family}.jinja").read_text()
    tokenizer = tiny_tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=list(tokenizer.backend_tokenizer.pre_tokenizer.alphabet()),
        show_progress=False,
    )
    tokenizer.backend_tokenizer.train_from_iterator([template, "user assistant tool_call arguments echo"], trainer)
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(set(re.findall(SPECIAL, template)))})
    tokenizer.chat_template = template
    tokenizer.bos_token = tokenizer.eos_token = "<|endoftext|>"
    return tokenizer


def echo(word: str) -> str:
    """Gives a word back.

    Args:
        word: the word.
    """
    return word


class Talking(Environment):
    def respond(self, trajectory):
        remarks = trajectory.example["remarks"]
        spoken = len(trajectory.turns) - 1
        return [{"role": "user", "content": remarks[spoken]}] if spoken < len(remarks) else []


def environment(kind=Environment, **settings):
    return kind(name="t", train_dataset=[{"question": "q"}], rubric=Rubric(lambda t: 1.0), **settings)


def check(env, row, renderer, turns, betweens, budget):
    """Plays `turns` (ids without their ends), and compares ids, mask and log-probabilities with what is expected."""
    tokenizer = renderer.tokenizer
    end = tokenizer.convert_tokens_to_ids(renderer.end_of_turn)
    script = [[*turn, end] for turn in turns]
    texts = [tokenizer.encode(text, add_special_tokens=False) for text in betweens]
    expected, mask = [], []
    for turn, text in itertools.zip_longest(script, texts, fillvalue=[]):
        expected += [*turn, *text]
        mask += [1] * len(turn) + [0] * len(text)
    engine = ScriptedEngine([script], end_id=end)
    (rollout,) = play(env, [row], engine=engine, renderer=renderer, max_completion_tokens=budget)

    count = len(rollout.completion_ids)
    assert rollout.completion_ids == expected[:count]
    assert rollout.sampled_mask == mask[:count]
    assert rollout.logprobs == [
        -(token + 1) / 100 if sampled else 0.0 for token, sampled in zip(expected[:count], mask[:count], strict=True)
    ]
    assert rollout.prompt_ids + rollout.completion_ids == engine.sequences[0]  # what the policy saw
    assert rollout.sampled_mask[-1] == 1
    assert count == len(expected) <= budget or rollout.trajectory.stop_reason is StopReason.TOKEN_BUDGET
    assert count <= budget
    return rollout


@pytest.mark.parametrize("family", AFTER_A_TURN)
@settings(max_examples=25, deadline=None, database=None)
@given(data=st.data())
def test_any_ids_with_replies_between(family, data):
    tokenizer = tokenizer_of(family)
    plain = [id for id in range(len(tokenizer)) if id not in tokenizer.all_special_ids]
    turns = data.draw(st.lists(st.lists(st.sampled_from(plain), max_size=8), min_size=1, max_size=4))
    remarks = [data.draw(sayings) for _ in turns[1:]]
    check(
        environment(Talking),
        {"question": "q", "remarks": remarks},
        ChatRenderer(tokenizer),
        turns,
        [AFTER_A_TURN[family].format(remark) for remark in remarks],
        budget=data.draw(st.integers(1, 200)),
    )


@pytest.mark.parametrize("family", AFTER_A_CALL)
@settings(max_examples=25, deadline=None, database=None)
@given(data=st.data())
def test_any_tokenization_of_calls_with_their_results_between(family, data):
    tokenizer = tokenizer_of(family)
    around, each, written, call = AFTER_A_CALL[family]
    separator = "; " if family == "llama3_1" else "\n"
    asked = data.draw(st.lists(st.lists(sayings, min_size=1, max_size=2), max_size=3))
    said = [separator.join(call.format(json.dumps({"word": word})) for word in words) for words in asked]
    turns = [cut_up(tokenizer, text, data) for text in [*said, data.draw(sayings)]]
    betweens = [around.format("".join(each.format(written(word)) for word in words)) for words in asked]
    env = environment(tools=[echo])
    budget = data.draw(st.integers(1, 1500))
    rollout = check(env, {"question": "q"}, ChatRenderer(tokenizer, tools=[echo]), turns, betweens, budget)
    assert rollout.trajectory.failed_calls == 0


def cut_up(tokenizer, text, data):
    """Ids of a text that is cut at random and tokenized piece by piece: not those of the whole text."""
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=6)) | {0, len(text)})
    pieces = [text[start:stop] for start, stop in itertools.pairwise(cuts)]
    return [id for piece in pieces for id in tokenizer.encode(piece, add_special_tokens=False)]
