from __future__ import annotations

import pytest

from rlvr.errors import EnvironmentDefinitionError
from rlvr.rollout.tool_calls import PARSERS, detect_parser, get_parser
from rlvr.testing.tiny import tiny_tokenizer
from rlvr.types import ToolCall

ADD = ToolCall("add", {"a": 1, "b": [2]})
SUB = ToolCall("sub", {})


@pytest.mark.parametrize(
    ("parser", "text", "content", "calls"),
    [
        ("hermes", "just text", "just text", []),
        ("hermes", '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2]}}\n</tool_call>', "", [ADD]),
        (
            "hermes",
            'so<tool_call>{"name": "add", "arguments": {"a": 1, "b": [2]}}</tool_call>\n'
            '<tool_call>{"name": "sub", "arguments": {}}</tool_call> ok',
            "so\n ok",
            [ADD, SUB],
        ),
        ("hermes", '<tool_call>{"name": "sub"}</tool_call>', "", [SUB]),
        ("hermes", '<tool_call>{"name": "sub"}', "", [SUB]),
        (
            "hermes",
            '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1, \\"b\\": [2]}"}</tool_call>',
            "",
            [ADD],
        ),
        ("llama3_json", "just {text}", "just {text}", []),
        ("llama3_json", '{"answer": 3}', '{"answer": 3}', []),
        ("llama3_json", '{"name": "add", "parameters": {"a": 1, "b": [2]}}', "", [ADD]),
        ("llama3_json", 'so <|python_tag|>{"name": "sub", "parameters": {}}', "so", [SUB]),
        (
            "llama3_json",
            '{"name": "sub", "parameters": {}}; {"name": "add", "parameters": {"a": 1, "b": [2]}}',
            "",
            [SUB, ADD],
        ),
        ("mistral", "just text", "just text", []),
        (
            "mistral",
            'so[TOOL_CALLS] [{"name": "sub", "arguments": {}, "id": "abcdefghi"}, '
            '{"name": "add", "arguments": {"a": 1, "b": [2]}}]',
            "so",
            [ToolCall("sub", {}, call_id="abcdefghi"), ADD],
        ),
        ("mistral", '[TOOL_CALLS]add[ARGS]{"a": 1, "b": [2]}[TOOL_CALLS]sub{}', "", [ADD, SUB]),
        (
            "mistral",
            "[TOOL_CALLS]sub[CALL_ID]abcdefghi[ARGS]{}",
            "",
            [ToolCall("sub", {}, call_id="abcdefghi")],
        ),
    ],
)
def test_calls_that_can_be_read(parser, text, content, calls):
    assert PARSERS[parser].parse(text) == (content, calls)


@pytest.mark.parametrize(
    ("parser", "text", "count"),
    [
        ("hermes", "<tool_call>{'name': 'add'}</tool_call>", 1),
        ("hermes", "<tool_call></tool_call>", 1),
        ("hermes", "<tool_call>[]</tool_call>", 1),
        ("hermes", '<tool_call>{"name": 3}</tool_call>', 1),
        ("hermes", '<tool_call>{"name": "add", "arguments": [1]}</tool_call>', 1),
        ("hermes", '<tool_call>{"name": "add"} {"name": "add"}</tool_call>', 1),
        ("hermes", "<tool_call><tool_call>" + "[" * 100_000, 2),
        ("llama3_json", '{"name": "add", "parameters": {', 1),
        ("llama3_json", "<|python_tag|>print(1)", 1),
        ("mistral", "[TOOL_CALLS]", 1),
        ("mistral", '[TOOL_CALLS] [{"name": "add"', 1),
        ("mistral", '[TOOL_CALLS]add[ARGS]{"a": ', 1),
    ],
)
def test_malformed_calls_are_errors_for_the_model_and_stay_in_the_text(parser, text, count):
    content, calls = PARSERS[parser].parse(text)
    assert content == text.strip()
    assert len(calls) == count
    assert all(call.error and not call.arguments for call in calls)


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("...<tool_call>...", "hermes"),
        ("{{ '[TOOL_CALLS]' }}", "mistral"),
        ("<|python_tag|>", "llama3_json"),
        ('ipython {"name": n, "parameters": p}', "llama3_json"),
    ],
)
def test_the_parser_is_found_from_the_template(template, name):
    assert detect_parser(None, chat_template=template) is PARSERS[name]


def test_the_parser_of_a_tokenizer_with_several_templates():
    tokenizer = tiny_tokenizer()
    assert detect_parser(tokenizer) is PARSERS["hermes"]
    tokenizer.chat_template = {"default": "", "tool_use": "[TOOL_CALLS]"}
    assert detect_parser(tokenizer) is PARSERS["mistral"]


@pytest.mark.parametrize("template", ["plain", "<tool_call>\n<function=", "<tool_call>name<arg_key>"])
def test_an_unknown_format_asks_for_a_parser(template):
    with pytest.raises(EnvironmentDefinitionError, match="hermes, llama3_json, mistral"):
        detect_parser(None, chat_template=template)


def test_parsers_by_name_or_as_objects():
    assert get_parser("hermes") is PARSERS["hermes"]

    class Mine:
        def parse(self, text):
            return text, []

    mine = Mine()
    assert get_parser(mine) is mine
    with pytest.raises(EnvironmentDefinitionError, match="unknown tool-call parser 'hermez'"):
        get_parser("hermez")
    with pytest.raises(EnvironmentDefinitionError, match="got int"):
        get_parser(3)
