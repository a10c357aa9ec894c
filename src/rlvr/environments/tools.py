"""Tools: plain functions that a policy may call. What goes wrong in a call is told to the model."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import threading
import typing
from collections.abc import Awaitable, Callable, Coroutine, Mapping, MutableMapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

from rlvr.errors import EnvironmentDefinitionError, RlvrError
from rlvr.types import ToolCall

STATE = "state"  # the parameter that is the rollout's, not the model's
T = TypeVar("T")


@dataclass(frozen=True)
class ToolResult:
    """What a call gave: the text for the model, and whether the call counts as failed."""

    text: str
    failed: bool = False


def tool_schema(function: Callable[..., Any]) -> dict[str, Any]:
    """The JSON schema of a tool, from its type hints and its Google-style docstring; `state` is left out.

    Returns:
        `{"type": "function", "function": {"name", "description", "parameters": {...}}}`, as chat templates
        take it.

    Raises:
        EnvironmentDefinitionError: a type hint or a description is missing.
    """
    from transformers.utils import get_json_schema
    from transformers.utils.chat_template_utils import DocstringParsingException, TypeHintParsingException

    name = getattr(function, "__name__", "")

    def visible() -> None: ...

    try:
        signature = inspect.signature(function)
        hints = typing.get_type_hints(function if name else type(function).__call__)
        parameters = [p.replace(annotation=hints.get(p.name, p.annotation)) for p in _visible(signature)]
        visible.__name__ = name or type(function).__name__
        visible.__doc__ = inspect.getdoc(function)
        visible.__annotations__ = {p.name: p.annotation for p in parameters if p.annotation is not p.empty}
        visible.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        schema = get_json_schema(visible)
    except (DocstringParsingException, TypeHintParsingException, NameError, TypeError, ValueError) as error:
        raise EnvironmentDefinitionError(
            f"tool {name or function!r} has no usable schema: {error}. A tool needs a type hint for every "
            "parameter, and a docstring with a line for each under 'Args:'."
        ) from error
    variadic = [p.name for p in parameters if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD, p.POSITIONAL_ONLY)]
    if variadic:
        raise EnvironmentDefinitionError(
            f"tool {name!r} has parameters that a model cannot name: {', '.join(variadic)}. "
            "Use plain parameters, without *, ** or /."
        )
    return schema


def schema_of(tool: Callable[..., Any] | Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a function, or the one that was given in its place.

    Raises:
        EnvironmentDefinitionError: a function without a usable schema, or something that is neither.
    """
    if callable(tool):
        return tool_schema(tool)
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise EnvironmentDefinitionError(
            f"{tool!r} is no tool; a tool is a function, or a JSON schema "
            '{"type": "function", "function": {"name": ..., "description": ..., "parameters": ...}}.'
        )
    return dict(tool)


def check_tools(tools: Sequence[Callable[..., Any] | Mapping[str, Any]]) -> None:
    """Finds what is wrong with an environment's tools before a model is loaded.

    Raises:
        EnvironmentDefinitionError: a tool without a usable schema, or two of one name.
    """
    _check_names([schema_of(tool)["function"]["name"] for tool in tools])


def _check_names(names: Sequence[str]) -> None:
    if len(set(names)) < len(names):
        raise EnvironmentDefinitionError(f"two tools have one name: {', '.join(sorted(names))}.")


def _visible(signature: inspect.Signature) -> list[inspect.Parameter]:
    return [parameter for name, parameter in signature.parameters.items() if name != STATE]


def schema_problems(value: Any, schema: Mapping[str, Any], *, where: str = "arguments") -> list[str]:
    """What keeps a value from being of a schema: the subset of JSON schema that type hints produce."""
    if "anyOf" in schema:
        problems = [schema_problems(value, option, where=where) for option in schema["anyOf"]]
        return [] if not all(problems) else problems[0]
    if value is None and schema.get("nullable"):
        return []
    types = schema.get("type")
    types = [types] if isinstance(types, str) else types
    if types and not any(_is_type(value, name) for name in types):
        return [f"{where} must be {' or '.join(types)}, got {json.dumps(value, ensure_ascii=False)[:100]}"]
    if "enum" in schema and value not in schema["enum"]:
        return [f"{where} must be one of {json.dumps(schema['enum'])}, got {json.dumps(value)[:100]}"]
    if isinstance(value, list) and "items" in schema:
        return [
            p for i, item in enumerate(value) for p in schema_problems(item, schema["items"], where=f"{where}[{i}]")
        ]
    if isinstance(value, dict) and "properties" in schema:
        return _object_problems(value, schema, where=where)
    return []


def _object_problems(value: Mapping[str, Any], schema: Mapping[str, Any], *, where: str) -> list[str]:
    known = schema["properties"]
    problems = [f"{name!r} is missing" for name in schema.get("required", ()) if name not in value]
    for name, item in value.items():
        if name not in known:
            problems.append(f"{name!r} is not known; known: {', '.join(known) or 'none'}")
        else:
            inner = name if where == "arguments" else f"{where}.{name}"
            problems += schema_problems(item, known[name], where=inner)
    return problems


def _is_type(value: Any, name: str) -> bool:
    if isinstance(value, bool):
        return name in ("boolean", "any")
    if name == "integer":
        return isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    python_types: dict[str, type | tuple[type, ...]] = {
        "string": str,
        "number": (int, float),
        "array": list,
        "object": dict,
        "null": type(None),
        "boolean": bool,
        "any": object,
    }
    return isinstance(value, python_types.get(name, object))


class Toolbox:
    """The tools of an environment by name.

    Args:
        tools: the functions; sync or async.
        timeout_s: seconds that one call may take.

    Raises:
        EnvironmentDefinitionError: a tool without a schema, or two of one name.
    """

    def __init__(self, tools: Sequence[Callable[..., Any]], *, timeout_s: float = 60.0):
        self.timeout_s = timeout_s
        self.schemas = [tool_schema(tool) for tool in tools]
        names = [schema["function"]["name"] for schema in self.schemas]
        _check_names(names)
        self._tools = dict(zip(names, tools, strict=True))
        self._parameters = {s["function"]["name"]: s["function"]["parameters"] for s in self.schemas}

    async def call(self, call: ToolCall, *, state: MutableMapping[str, Any], workers: Workers) -> ToolResult:
        """Runs one call.

        Raises:
            RlvrError: the tool raised it.
        """
        problem = self._refusal(call)
        if problem:
            return ToolResult(f"error: {problem}", failed=True)
        function = self._tools[call.name]
        arguments = _with_integers(dict(call.arguments), self._parameters[call.name])
        if STATE in inspect.signature(function).parameters:
            arguments[STATE] = state
        try:
            return ToolResult(_as_text(await workers.run(function, timeout_s=self.timeout_s, **arguments)))
        except RlvrError:  # a service that is down, or a tool that cannot work: not for the model to repair
            raise
        except TimeLimitError:
            return ToolResult(f"error: {call.name} took longer than {self.timeout_s:g} seconds", failed=True)
        except Exception as error:
            return ToolResult(_as_text(f"error: {call.name} failed with {type(error).__name__}: {error}"), failed=True)

    def _refusal(self, call: ToolCall) -> str | None:
        if call.error:
            return call.error
        if call.name not in self._tools:
            return f"there is no tool {call.name!r}; there are: {', '.join(self._tools)}"
        problems = schema_problems(dict(call.arguments), self._parameters[call.name])
        return f"{call.name}: {'; '.join(problems)}" if problems else None


def _with_integers(value: Any, schema: Mapping[str, Any]) -> Any:
    """The value with whole numbers that were written as 2.0 turned into what the type hints say."""
    if schema.get("type") == "integer" and isinstance(value, float):
        return int(value)
    if isinstance(value, list) and "items" in schema:
        return [_with_integers(item, schema["items"]) for item in value]
    if isinstance(value, dict) and "properties" in schema:
        return {name: _with_integers(item, schema["properties"].get(name, {})) for name, item in value.items()}
    return value


def _as_text(value: Any) -> str:
    """Text that a tokenizer takes: half of a surrogate pair, which no text should hold, becomes a question mark."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text.encode("utf-8", "replace").decode("utf-8")


class TimeLimitError(Exception):
    """A call was given up. A tool's own TimeoutError is another matter."""


async def _contained(awaitable: Awaitable[T]) -> T:
    """What would end the event loop is an error of the function."""
    try:
        return await awaitable
    except (SystemExit, KeyboardInterrupt) as error:
        raise RuntimeError(repr(error)) from error


class Workers:
    """Runs at most `max_calls` functions at a time: async ones on one event loop, the others in threads.

    A thread that has passed its time limit cannot be killed: it is left to itself and no longer counts, so calls that
    hang take no place from others.
    """

    def __init__(self, max_calls: int = 64):
        self._loop = asyncio.new_event_loop()
        self._free = asyncio.Semaphore(max_calls)
        self._thread = threading.Thread(target=self._loop.run_forever, name="rlvr-tools", daemon=True)

    def __enter__(self) -> Workers:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        async def cancel_all() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(cancel_all(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Runs a coroutine on the loop, beside the others."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    async def run(
        self, function: Callable[..., Any], *arguments: Any, timeout_s: float | None = None, **named: Any
    ) -> Any:
        """Calls a function and waits for it, `timeout_s` at most.

        Raises:
            TimeLimitError: it took longer. Waiting for a free place does not count.
        """
        async with self._free:
            if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
                value = function(*arguments, **named)
            else:
                value = await self._limited(self._in_thread(function, *arguments, **named), timeout_s)
            if inspect.isawaitable(value):  # of an async function, perhaps inside a decorator that is not
                value = await self._limited(asyncio.ensure_future(_contained(value)), timeout_s)
            return value

    async def _limited(self, future: asyncio.Future[Any], timeout_s: float | None) -> Any:
        done, _ = await asyncio.wait([future], timeout=timeout_s)
        if not done:
            future.cancel()
            raise TimeLimitError
        if future.cancelled():
            raise RuntimeError("it cancelled itself")
        return future.result()

    def _in_thread(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = self._loop.create_future()

        def finish(value: Any, error: Exception | None) -> None:
            if future.done():
                return
            if error is None:
                future.set_result(value)
            else:
                future.set_exception(error)

        def work() -> None:
            value: Any = None
            error: Exception | None = None
            try:
                value = function(*arguments, **named)
            except BaseException as raised:  # whatever it is, the rollout must not wait for ever
                if isinstance(raised, Exception) and not isinstance(raised, StopIteration):
                    error = raised
                else:  # what a future refuses to hold
                    error = RuntimeError(repr(raised))
            if not self._loop.is_closed():
                # The rollout may end while a call that was given up long ago is still running.
                with contextlib.suppress(RuntimeError):
                    self._loop.call_soon_threadsafe(finish, value, error)

        threading.Thread(target=work, name=f"rlvr-tool-{getattr(function, '__name__', '')}", daemon=True).start()
        return future
