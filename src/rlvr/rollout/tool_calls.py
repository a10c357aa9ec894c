"""Reads tool calls out of what a policy said. A format is a parser, not the exact text of a template."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from typing import Any, Protocol, runtime_checkable

from rlvr.errors import EnvironmentDefinitionError
from rlvr.types import ToolCall


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

    _call = re.compile(r"<tool_call>(.*?)(?:</tool_call>|(?=<tool_call>)|$)", re.DOTALL)

    def parse(self, text: str) -> tuple[str, list[ToolCall]]:
        calls = []

        def read(match: re.Match[str]) -> str:
            call = _read_json(match[1], arguments="arguments")
            calls.append(call)
            return match[0] if call.error else ""

        content = self._call.sub(read, text)
        return content.strip(), calls


class Llama3JsonParser:
    """A turn that is `{"name": ..., "parameters": {...}}`, several separated by `;`, as Llama 3 writes it."""

    tag = "<|python_tag|>"

    def parse(self, text: str) -> tuple[str, list[ToolCall]]:
        content, tag, body = text.rpartition(self.tag)
        if not tag:
            content, body = "", text
            if not (body.lstrip().startswith("{") and '"name"' in body):
                return text.strip(), []
        calls = [_call_from(value, arguments="parameters") for value in _json_values(body.strip(), between=";")]
        failed = any(call.error for call in calls)
        return (text if failed else content).strip(), calls


class MistralParser:
    """`[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]`, and the newer `[TOOL_CALLS]name[ARGS]{...}`."""

    tag = "[TOOL_CALLS]"
    _named = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\s*(\w+)\s*)?(?:\[ARGS\])?\s*(\{.*)", re.DOTALL)

    def parse(self, text: str) -> tuple[str, list[ToolCall]]:
        content, *bodies = text.split(self.tag)
        calls: list[ToolCall] = []
        for body in bodies:
            named = self._named.fullmatch(body)
            if named:
                call = _read_json(
                    f'{{"name": {json.dumps(named[1])}, "arguments": {named[3]}}}', arguments="arguments"
                )
                calls.append(ToolCall(call.name or named[1], call.arguments, call.error, named[2]))
                continue
            values = _json_values(body.strip(), between=",")
            listed = values[0] if len(values) == 1 and isinstance(values[0], list) else values
            calls += [_call_from(value, arguments="arguments") for value in listed]
        failed = any(call.error for call in calls)
        return (text if failed else content).strip(), calls


PARSERS: dict[str, ToolCallParser] = {
    "hermes": HermesParser(),
    "llama3_json": Llama3JsonParser(),
    "mistral": MistralParser(),
}


def get_parser(parser: str | ToolCallParser) -> ToolCallParser:
    """The parser of that name; a parser object is handed back.

    Raises:
        EnvironmentDefinitionError: no parser has that name, or the object has no `parse`.
    """
    if isinstance(parser, str):
        if parser not in PARSERS:
            raise EnvironmentDefinitionError(
                f"unknown tool-call parser {parser!r}; known: {', '.join(PARSERS)}. An object with "
                "parse(text) -> (text, calls) may be given instead."
            )
        return PARSERS[parser]
    if not isinstance(parser, ToolCallParser):
        raise EnvironmentDefinitionError(
            f"a tool-call parser is a name ({', '.join(PARSERS)}) or an object with a method parse; got "
            f"{type(parser).__name__}."
        )
    return parser


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
        "the chat template writes tool calls in no format that is known here, so a parser must be named: "
        f"tool_call_parser one of {', '.join(PARSERS)}, or an object with parse(text) -> (text, calls)."
    )


def structured_call(part: Any) -> ToolCall:
    """A call as an OpenAI-compatible server gives it: `{"id", "function": {"name", "arguments": "{...}"}}`."""
    function = part.get("function") if isinstance(part, dict) else None
    if not isinstance(function, dict):
        return ToolCall("", error=f"a tool call has a name and arguments, got {json.dumps(part)[:100]}")
    call = _call_from({**function, "arguments": function.get("arguments") or {}}, arguments="arguments")
    call_id = part.get("id")
    return dataclasses.replace(call, call_id=call_id if isinstance(call_id, str) and call_id else None)


def _read_json(text: str, *, arguments: str) -> ToolCall:
    values = _json_values(text.strip(), between="")
    return _call_from(
        values[0] if len(values) == 1 else json.JSONDecodeError("extra data", text, 0), arguments=arguments
    )


def _json_values(text: str, *, between: str) -> list[Any]:
    """The JSON values of a text in order; the first that cannot be read is its error, and the last."""
    decoder = json.JSONDecoder()
    values: list[Any] = []
    rest = text
    while rest or not values:
        try:
            value, end = decoder.raw_decode(rest)
        except (json.JSONDecodeError, RecursionError) as error:
            return [*values, error]
        values.append(value)
        rest = rest[end:].strip()
        if rest and between and rest.startswith(between):
            rest = rest[len(between) :].strip()
    return values


def _call_from(value: Any, *, arguments: str) -> ToolCall:
    if isinstance(value, Exception):
        return ToolCall("", error=f"the tool call is not valid JSON ({value})")
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        return ToolCall("", error=f'a tool call is a JSON object with "name" and "{arguments}"')
    given = value.get(arguments, value.get("arguments", value.get("parameters", {})))
    if isinstance(given, str):  # some models write the arguments as JSON inside a string
        with contextlib.suppress(json.JSONDecodeError):
            given = json.loads(given)
    call_id = value.get("id")
    if not isinstance(given, dict):
        return ToolCall(value["name"], error=f'"{arguments}" must be a JSON object, got {json.dumps(given)[:100]}')
    return ToolCall(value["name"], given, call_id=call_id if isinstance(call_id, str) else None)
