"""The chat templates of real model families, as TRL ships them, on a tokenizer that has their special tokens."""

from __future__ import annotations

import importlib.resources
import re

import pytest

from rlvr.errors import EnvironmentDefinitionError
from rlvr.rollout.chat import ChatRenderer
from rlvr.rollout.tool_calls import PARSERS, detect_parser
from rlvr.testing.tiny import tiny_tokenizer

SPECIAL = r"<\|[A-Za-z_]+\|>|<｜[^｜]+｜>|<(?:start|end)_of_turn>|<\|turn>|<turn\|>"


def echo(word: str) -> str:
    """Gives a word back.

    Args:
        word: the word.
    """
    return word


def tokenizer_of(family: str):
    template = (importlib.resources.files("trl") / "chat_templates" / f"{family}.jinja").read_text()
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(set(re.findall(SPECIAL, template)))})
    tokenizer.chat_template = template
    tokenizer.bos_token = tokenizer.eos_token = "<|endoftext|>"
    return tokenizer


def after(renderer: ChatRenderer, *replies) -> str:
    return renderer.tokenizer.decode(renderer.reply_ids(list(replies)))


@pytest.mark.parametrize(
    ("family", "text"),
    [
        ("qwen2_5", "\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"),
        ("qwen3", "\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"),
        ("qwen3_instruct_2507", "\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"),
        (
            "llama3_1",
            "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        ("gemma3", "\n<start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n"),
        ("phi3", "\n<|user|>\nhi<|end|>\n<|assistant|>\n"),
        ("deepseek_r1_distill", "<｜User｜>hi<｜Assistant｜><think>\n"),
        ("gptoss", "<|start|>user<|message|>hi<|end|><|start|>assistant"),
    ],
)
def test_what_follows_a_turn(family, text):
    assert after(ChatRenderer(tokenizer_of(family)), {"role": "user", "content": "hi"}) == text


@pytest.mark.parametrize(
    ("family", "parser", "text"),
    [
        (
            "qwen2_5",
            "hermes",
            "\n<|im_start|>user\n<tool_response>\nres\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "qwen3",
            "hermes",
            "\n<|im_start|>user\n<tool_response>\nres\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "llama3_1",
            "llama3_json",
            "<|start_header_id|>ipython<|end_header_id|>\n\n"
            '"res"<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n',
        ),
    ],
)
def test_what_follows_a_tool_call(family, parser, text):
    tokenizer = tokenizer_of(family)
    renderer = ChatRenderer(tokenizer, tools=[echo])
    assert after(renderer, {"role": "tool", "name": "echo", "content": "res"}) == text
    assert detect_parser(tokenizer) is PARSERS[parser]


def test_several_results_after_a_template_that_knows_one_call():
    renderer = ChatRenderer(tokenizer_of("llama3_1"), tools=[echo])
    text = after(renderer, *({"role": "tool", "name": "echo", "content": word} for word in ("one", "two")))
    assert text.count("ipython") == 2
    assert text.index('"one"') < text.index('"two"')


def test_the_tokenizers_end_token_ends_the_turn_where_another_special_token_stands_before_it():
    """Cohere's turns end with two special tokens; the policy samples both."""
    tokenizer = tokenizer_of("cohere2")
    tokenizer.eos_token = "<|END_OF_TURN_TOKEN|>"
    text = after(ChatRenderer(tokenizer), {"role": "user", "content": "hi"})
    assert text.startswith("<|START_OF_TURN_TOKEN|><|USER_TOKEN|>hi")


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("gemma3", "leaves out the tools echo"),
        ("llama3", "leaves out the tools echo"),
        ("gemma4", "puts tool results inside the assistant's turn"),
        ("gptoss", "puts tool results inside the assistant's turn"),
        ("glm4moe", "but not a turn that is followed by a 'tool' message"),
    ],
)
def test_templates_that_cannot_serve_tools_say_so(family, message):
    with pytest.raises(EnvironmentDefinitionError, match=message):
        ChatRenderer(tokenizer_of(family), tools=[echo])
