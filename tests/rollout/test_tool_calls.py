from __future__ import annotations

import json
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlvr.config import TOOL_CALL_PARSERS
from rlvr.errors import ConfigError, EnvironmentDefinitionError
from rlvr.rollout.chat import ChatRenderer
from rlvr.rollout.tool_calls import PARSERS, detect_parser, get_parser, parser_for, read_turn
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
        ("mistral", "[TOOL_CALLS]sub[CALL_ID]abc[ARGS]{}", "", [SUB]),
        ("mistral", '[TOOL_CALLS] [{"name": "sub", "arguments": {}, "id": "call_1"}]', "", [SUB]),
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
        ("hermes", f'<tool_call>{{"name": "add", "arguments": "{"[" * 100_000}"}}</tool_call>', 1),
        ("hermes", f'<tool_call>{{"name": "add", "arguments": {{"a": {"1" * 5000}}}}}</tool_call>', 1),
        ("hermes", '<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call>', 1),
        ("hermes", '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1e999}"}</tool_call>', 1),
        ("hermes", '<tool_call>{"name": "add", "arguments": {"a": "\\ud800"}}</tool_call>', 1),
        ("llama3_json", '{"name": "\\udc00", "parameters": {}}', 1),
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


SUB_AS = {
    "hermes": '<tool_call>{"name": "sub", "arguments": {}}</tool_call>',
    "llama3_json": '<|python_tag|>{"name": "sub", "parameters": {}}',
    "mistral": "[TOOL_CALLS]sub[ARGS]{}",
}


@pytest.mark.parametrize("parser", PARSERS)
@pytest.mark.parametrize(("opening", "closing"), [("<think>", "</think>"), ("[THINK]", "[/THINK]")])
def test_a_call_inside_a_thought_is_not_executed(parser, opening, closing):
    call, parse = SUB_AS[parser], PARSERS[parser].parse
    thought = f"{opening}I could {call} or {{not.{closing}"
    assert parse(thought) == (thought, [])
    assert parse(f"{thought}Done.") == (f"{thought}Done.", [])
    assert parse(f"{thought}So: {call}") == (f"{thought}So:", [SUB])
    unclosed = f"{opening}I could {call} or not."
    assert parse(unclosed) == (unclosed, [])
    opened_by_the_prompt = f"I could {call} or not.{closing}"
    assert parse(opened_by_the_prompt) == (opened_by_the_prompt, [])
    assert parse(opened_by_the_prompt + call) == (opened_by_the_prompt, [SUB])
    assert parse(f"{call}{thought}Done.") == (f"{thought}Done.", [SUB])


@pytest.mark.parametrize("said", ["<think>", "</think>", "</tool_call>", "<tool_call>", 'a "</tool_call>" \\ }'])
@pytest.mark.parametrize("parser", PARSERS)
def test_marks_inside_a_string_of_a_call_mean_nothing(parser, said):
    call = SUB_AS[parser].replace("{}", json.dumps({"a": said}))
    expected = ToolCall("sub", {"a": said})
    assert PARSERS[parser].parse(call) == ("", [expected])
    thought = f"<think>{call}</think>"
    if said != "</think>":  # within a thought, it ends the thought
        assert PARSERS[parser].parse(thought + call) == (thought, [expected])


def test_several_thoughts_and_calls():
    call = SUB_AS["hermes"]
    text = f"<think>a {call}</think>b {call}c<think>d {call}</think>{call}</think>"
    assert PARSERS["hermes"].parse(text) == (f"<think>a {call}</think>b c<think>d {call}</think></think>", [SUB, SUB])


def test_a_call_that_cannot_be_read_ends_where_it_did():
    broken = '<tool_call>{"name": "sub</tool_call>'
    content, calls = PARSERS["hermes"].parse(f"{broken} {SUB_AS['hermes']}")
    assert content == broken
    assert "not valid JSON" in calls[0].error
    assert calls[1:] == [SUB]


def test_a_tag_inside_a_string_ends_no_call_that_junk_follows():
    text = '<tool_call>{"name": "sub", "arguments": {"q": "</tool_call>"}} junk</tool_call>'
    content, (call,) = PARSERS["hermes"].parse(text)
    assert content == text
    assert "extra data" in call.error


PIECES = [
    *("<think>", "</think>", "[THINK]", "[/THINK]"),
    *("<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "add", ";", ","),
    *("{", "}", "[", "]", ":", '"', "\\", "\n", "-", "1e999", "\\ud800", "9" * 5000, "[" * 2000),
    *('"name"', '"arguments"', '"parameters"', '"id"', '{"name": "add", "arguments": {"a": 1}}'),
]
pieces = st.sampled_from(PIECES)


@pytest.mark.parametrize("parser", PARSERS)
@settings(max_examples=200, deadline=None, database=None)
@given(text=st.lists(st.one_of(pieces, st.text(max_size=3)), max_size=12).map("".join))
def test_no_text_is_too_odd_for_a_parser(parser, text):
    content, calls = read_turn(PARSERS[parser], text)
    assert isinstance(content, str)
    for call in calls:
        assert call.error or call.name
        assert not (call.error and call.arguments)
        json.dumps(call.as_message_part(), allow_nan=False, ensure_ascii=False).encode()


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


MODULE = """
from rlvr import ToolCall

class Shouting:
    def parse(self, text):
        return "", [ToolCall("echo", {"word": text})]

parser = Shouting()

def make():
    return Shouting()

def needs(argument):
    return Shouting()

number = 3
"""


class Mine:
    def parse(self, text):
        return text, []


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "my_parsers.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_parsers", raising=False)


def test_parsers_by_name_or_as_objects():
    assert get_parser("hermes") is PARSERS["hermes"]
    mine = Mine()
    assert get_parser(mine) is mine
    assert isinstance(get_parser(Mine), Mine)
    assert isinstance(get_parser(lambda: mine), Mine)
    assert tuple(PARSERS) == TOOL_CALL_PARSERS


@pytest.mark.parametrize(
    "name", ["my_parsers:Shouting", "my_parsers:parser", "my_parsers:make", "my_parsers.py:Shouting"]
)
def test_parsers_of_third_parties(module, name):
    assert get_parser(name).parse("hi") == ("", [ToolCall("echo", {"word": "hi"})])


@pytest.mark.parametrize(
    ("parser", "message"),
    [
        ("hermez", "unknown tool-call parser 'hermez'; allowed: hermes, llama3_json, mistral, or my_module:my_parser"),
        (3, "tool-call parser 3 is of type int, which has no method parse; allowed: hermes"),
        ("my_parsers:nope", "module 'my_parsers' has no 'nope'; it has: Shouting, parser, make, needs"),
        ("my_parsers:number", "'my_parsers:number' is of type int, which has no method parse"),
        ("my_parsers:needs", "'my_parsers:needs' could not be made: TypeError: .*called without arguments"),
        ("my_parser:Shouting", "tool-call parser 'my_parser:Shouting' cannot be loaded: ModuleNotFoundError"),
        ("missing.py:Shouting", "'missing.py:Shouting' cannot be loaded: FileNotFoundError"),
        (":Shouting", "':Shouting' names no object; write module:name"),
        (dict, "which has no method parse"),
    ],
)
def test_parsers_that_cannot_be_used(module, parser, message):
    with pytest.raises(EnvironmentDefinitionError, match=message):
        get_parser(parser)


def test_a_module_that_exits_when_imported_is_an_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "leaving.py").write_text("raise SystemExit(0)")
    with pytest.raises(EnvironmentDefinitionError, match="cannot be loaded: SystemExit: 0"):
        get_parser("leaving.py:parser")


def test_a_parser_without_tools_is_an_error():
    without_tools = ChatRenderer(tiny_tokenizer())
    assert parser_for(without_tools, None) is None
    with pytest.raises(ConfigError, match="tool_call_parser is 'hermes', and the environment has no tools"):
        parser_for(without_tools, "hermes")


class Faulty:
    def __init__(self, gives):
        self.gives = gives

    def parse(self, text):
        return self.gives()


@pytest.mark.parametrize(
    ("gives", "message"),
    [
        (lambda: {}["k"], "tool-call parser Faulty raised KeyError: 'k'.*\n  text: 'said'"),
        (lambda: None, "Faulty raised TypeError"),
        (lambda: ("", None), "Faulty raised TypeError"),
        (lambda: (None, []), "a text of type NoneType and calls of type none; parse returns a str"),
        (lambda: ("", [{"name": "add"}]), "calls of type dict; parse returns a str and rlvr.ToolCall objects"),
    ],
)
def test_a_parser_with_a_fault_is_named(gives, message):
    with pytest.raises(EnvironmentDefinitionError, match=message):
        read_turn(Faulty(gives), "said")
