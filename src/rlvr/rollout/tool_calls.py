"""Reads tool calls out of what a policy said. A format is a parser, not the exact text of a template.

A call inside a thought, `<think>…</think>` or `[THINK]…[/THINK]`, is none: it stays in the text, and is not executed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from rlvr.errors import ConfigError, EnvironmentDefinitionError
from rlvr.imports import import_named
from rlvr.types import ToolCall

if TYPE_CHECKING:
    from rlvr.rollout.chat import ChatRenderer


@runtime_checkable
class ToolCallParser(Protocol):
    """Finds the tool calls of a turn."""

    def parse(self, text: str) -> tuple[str, list[ToolCall]]:
        """Splits a turn into its plain text and its calls, in order.

        Args:
            text: the decoded turn, special tokens kept, the end-of-turn token left out.

        Returns:
            The text outside the calls, and the calls. A call that cannot be read stays in the text, and is a
            `ToolCall` whose `error` says to the model what is wrong.
        """
        ...


class HermesParser:
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, as Hermes and Qwen write it."""

    tag = "<tool_call>"
    _end = re.compile(r"</tool_call>|(?=<tool_call>)|\Z")

    def parse(self, text: str) -> tuple[str, list[ToolCall]]:
        return _outside_thoughts(text, self._parse)

    def _parse(self, text: str) -> tuple[str, list[ToolCall]]:
        content, calls, position = "", [], 0
        while (start := text.find(self.tag, position)) >= 0:
            content += text[position:start]
            call, position = self._call_at(text, start + len(self.tag))
            calls.append(call)
            content += text[start:position] if call.error else ""
        return content + text[position:], calls

    def _call_at(self, text: str, start: int) -> tuple[ToolCall, int]:
        """The call whose JSON begins at `start`, and where it ends, for which tags inside its strings mean nothing."""
        end = self._end.search(text, start + _json_length(text[start:]))
        assert end is not None  # the end of the text is one
        return _read_json(text[start : end.start()], arguments="arguments"), end.end()


class Llama3JsonParser:
    """A turn that is `{"name": ..., "parameters": {...}}`, several separated by `;`, as Llama 3 writes it."""

    tag = "<|python_tag|>"

    def parse(self, text: str) -> tuple[str, list[ToolCall]]:
        return _outside_thoughts(text, self._parse)

    def _parse(self, text: str) -> tuple[str, list[ToolCall]]:
        content, tag, body = text.rpartition(self.tag)
        if not tag and not (body.lstrip().startswith("{") and '"name"' in body):
            return text, []
        calls = [_call_from(value, arguments="parameters") for value in _json_values(body.strip(), between=";")]
        return text if any(call.error for call in calls) else content, calls


class MistralParser:
    """`[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]`, and the newer `[TOOL_CALLS]name[ARGS]{...}`."""

    tag = "[TOOL_CALLS]"
    _named = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\s*(\w+)\s*)?(?:\[ARGS\])?\s*(\{.*)", re.DOTALL)

    def parse(self, text: str) -> tuple[str, list[ToolCall]]:
        return _outside_thoughts(text, self._parse)

    def _parse(self, text: str) -> tuple[str, list[ToolCall]]:
        content, *bodies = text.split(self.tag)
        calls: list[ToolCall] = []
        for body in bodies:
            named = self._named.fullmatch(body)
            if named:
                call = _read_json(
                    f'{{"name": {json.dumps(named[1])}, "arguments": {named[3]}}}', arguments="arguments"
                )
                calls.append(ToolCall(call.name or named[1], call.arguments, call.error, _call_id(named[2])))
                continue
            values = _json_values(body.strip(), between=",")
            listed = values[0] if len(values) == 1 and isinstance(values[0], list) else values
            calls += [_call_from(value, arguments="arguments") for value in listed]
        return text if any(call.error for call in calls) else content, calls


PARSERS: dict[str, ToolCallParser] = {
    "hermes": HermesParser(),
    "llama3_json": Llama3JsonParser(),
    "mistral": MistralParser(),
}
ALLOWED = f"{', '.join(PARSERS)}, or my_module:my_parser of your own, with parse(text) -> (text, calls)"


def parser_for(renderer: ChatRenderer, parser: str | ToolCallParser | None) -> ToolCallParser | None:
    """The parser of conversations: the one asked for, else the one for what the chat template writes.

    Returns:
        None where there are no tools.

    Raises:
        ConfigError: one was asked for, and there are no tools.
        EnvironmentDefinitionError: it cannot be used, or none fits the template.
    """
    asked = asked_parser(parser, has_tools=bool(renderer.tools))
    if asked is not None or not renderer.tools:
        return asked
    return detect_parser(renderer.tokenizer, chat_template=renderer.chat_template)


def asked_parser(parser: str | ToolCallParser | None, *, has_tools: bool) -> ToolCallParser | None:
    """As `parser_for`, without looking at a template: None where none was asked for."""
    if parser is not None and not has_tools:
        raise ConfigError(
            f"tool_call_parser is {parser!r}, and the environment has no tools, so there is nothing to read. "
            "Leave it out."
        )
    return None if parser is None else get_parser(parser)


def get_parser(parser: str | ToolCallParser | Callable[[], ToolCallParser]) -> ToolCallParser:
    """A parser by its name, or by `module:name` of a third party's.

    Args:
        parser: a name in `PARSERS`; `module:name` or `file.py:name`; a parser, which is handed back; or a class or
            function that makes one, called without arguments.

    Raises:
        EnvironmentDefinitionError: no parser has that name, or what was given is none.
    """
    label = repr(parser)
    if isinstance(parser, str):
        if parser in PARSERS:
            return PARSERS[parser]
        if ":" not in parser:
            raise EnvironmentDefinitionError(f"unknown tool-call parser {label}; allowed: {ALLOWED}.")
        parser = import_named(parser, what="tool-call parser")
    if isinstance(parser, type) or (callable(parser) and not isinstance(parser, ToolCallParser)):
        try:
            parser = parser()
        except Exception as error:
            raise EnvironmentDefinitionError(
                f"tool-call parser {label} could not be made: {type(error).__name__}: {error}. It is called without "
                "arguments; give an object, or a class or function that needs none."
            ) from error
    if not isinstance(parser, ToolCallParser):
        raise EnvironmentDefinitionError(
            f"tool-call parser {label} is of type {type(parser).__name__}, which has no method parse; "
            f"allowed: {ALLOWED}."
        )
    return parser


def read_turn(parser: ToolCallParser, text: str) -> tuple[str, list[ToolCall]]:
    """What `parser.parse` makes of a turn.

    Raises:
        EnvironmentDefinitionError: the parser raised, or gave something else than a text and calls.
    """
    try:
        content, found = parser.parse(text)
        calls = list(found)
    except Exception as error:
        raise EnvironmentDefinitionError(
            f"tool-call parser {type(parser).__name__} raised {type(error).__name__}: {error}. What cannot be read is "
            f"a ToolCall with an error, for the model to see.\n  text: {text[:300]!r}"
        ) from error
    if not isinstance(content, str) or not all(isinstance(call, ToolCall) for call in calls):
        kinds = ", ".join(dict.fromkeys(type(call).__name__ for call in calls)) or "none"
        raise EnvironmentDefinitionError(
            f"tool-call parser {type(parser).__name__} gave a text of type {type(content).__name__} and calls of type "
            f"{kinds}; parse returns a str and rlvr.ToolCall objects."
        )
    return content, calls


def detect_parser(tokenizer: Any, *, chat_template: str | None = None) -> ToolCallParser:
    """The parser for what the chat template writes for a tool call.

    Raises:
        EnvironmentDefinitionError: the template's format is none of the known ones.
    """
    template = chat_template or getattr(tokenizer, "chat_template", None) or ""
    if isinstance(template, dict):
        template = template.get("tool_use") or template.get("default") or ""
    if "<tool_call>" in template and "<function=" not in template and "<arg_key>" not in template:
        return PARSERS["hermes"]
    if "[TOOL_CALLS]" in template:
        return PARSERS["mistral"]
    if "<|python_tag|>" in template or ("ipython" in template and '"parameters"' in template):
        return PARSERS["llama3_json"]
    raise EnvironmentDefinitionError(
        "the chat template writes tool calls in no format that is known here, so --tool-call-parser must name a "
        f"parser: {ALLOWED}."
    )


def structured_call(part: Any) -> ToolCall:
    """A call as an OpenAI-compatible server gives it: `{"id", "function": {"name", "arguments": "{...}"}}`."""
    function = part.get("function") if isinstance(part, dict) else None
    if not isinstance(function, dict):
        return ToolCall("", error=f"a tool call has a name and arguments, got {json.dumps(part)[:100]}")
    call = _call_from({**function, "arguments": function.get("arguments") or {}}, arguments="arguments")
    call_id = part.get("id")
    return dataclasses.replace(call, call_id=call_id if isinstance(call_id, str) and call_id else None)


_CLOSED_BY = {"<think>": "</think>", "[THINK]": "[/THINK]"}
_THOUGHT_OR_JSON = re.compile("|".join(map(re.escape, [*_CLOSED_BY, *_CLOSED_BY.values(), "{"])))


def _split_thoughts(text: str) -> list[tuple[str, str]]:
    """A turn as pairs of a thought and what is said after it; either may be empty.

    A thought that is not closed lasts to the end, and one that is not opened, which the prompt does, begins at the
    start. In a string of a JSON object these marks mean nothing.
    """
    pairs: list[tuple[str, str]] = []
    if not any(mark in text for both in _CLOSED_BY.items() for mark in both):
        return [("", text)]
    start = said = position = 0  # of the last thought, of what is said after it, of what is not looked at yet
    while mark := _THOUGHT_OR_JSON.search(text, position):
        position = mark.end()
        if mark[0] == "{":
            position = max(position, mark.start() + _json_length(text[mark.start() :]))
        elif mark[0] in _CLOSED_BY:
            pairs.append((text[start:said], text[said : mark.start()]))
            inside, closing, _ = text[position:].partition(_CLOSED_BY[mark[0]])
            start, said = mark.start(), position + len(inside + closing)
            position = said
        elif not pairs:
            said = position
    return [*pairs, (text[start:said], text[said:])]


def _outside_thoughts(text: str, parse: Callable[[str], tuple[str, list[ToolCall]]]) -> tuple[str, list[ToolCall]]:
    """What `parse` makes of what is said outside the thoughts, which stay in the text."""
    content, calls = "", []
    for thought, said in _split_thoughts(text):
        spoken, found = parse(said)
        content += thought + spoken
        calls += found
    return content.strip(), calls


def _read_json(text: str, *, arguments: str) -> ToolCall:
    values = _json_values(text.strip(), between="")
    return _call_from(
        values[0] if len(values) == 1 else json.JSONDecodeError("extra data", text, 0), arguments=arguments
    )


def _json_values(text: str, *, between: str) -> list[Any]:
    """The JSON values of a text in order; the first that cannot be read is its error, and the last."""
    values: list[Any] = []
    rest = text
    while rest or not values:
        try:
            value, end = _decode(rest)
        except (ValueError, RecursionError) as error:
            return [*values, error]
        values.append(value)
        rest = rest[end:].strip()
        if rest and between and rest.startswith(between):
            rest = rest[len(between) :].strip()
    return values


def _json_length(text: str) -> int:
    """The characters of the JSON value that a text begins with, spaces around it included; 0 where it is none."""
    value = text.lstrip()
    try:
        rest = value[_decode(value)[1] :]
    except (ValueError, RecursionError):
        return 0
    return len(text) - len(rest.lstrip())


def _decode(text: str) -> tuple[Any, int]:
    """The JSON value that a text begins with, and where it ends.

    Raises:
        ValueError, RecursionError: it is not JSON, or holds what Python reads and nothing else takes: NaN, infinity,
            half of a surrogate pair.
    """
    value, end = json.JSONDecoder().raw_decode(text)
    json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    return value, end


def _call_from(value: Any, *, arguments: str) -> ToolCall:
    if isinstance(value, Exception):
        return ToolCall("", error=f"the tool call is not valid JSON ({value})")
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        return ToolCall("", error=f'a tool call is a JSON object with "name" and "{arguments}"')
    given = value.get(arguments, value.get("arguments", value.get("parameters", {})))
    if isinstance(given, str):  # some models write the arguments as JSON inside a string
        with contextlib.suppress(ValueError, RecursionError):
            decoded, end = _decode(given.strip())
            given = decoded if end == len(given.strip()) else given
    if not isinstance(given, dict):
        return ToolCall(value["name"], error=f'"{arguments}" must be a JSON object, got {json.dumps(given)[:100]}')
    return ToolCall(value["name"], given, call_id=_call_id(value.get("id")))


def _call_id(value: Any) -> str | None:
    """An id as Mistral's templates take it: nine letters or digits. They refuse a conversation with any other."""
    return value if isinstance(value, str) and re.fullmatch("[A-Za-z0-9]{9}", value) else None
