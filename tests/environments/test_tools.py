from __future__ import annotations

import asyncio
import functools
import threading
from typing import Literal

import pytest

from rlvr.environments.tools import Toolbox, ToolResult, Workers, check_tools, schema_problems, tool_schema
from rlvr.errors import EnvironmentDefinitionError, InfrastructureError
from rlvr.types import ToolCall


def search(query: str, state: dict, top_n: int = 3, kinds: list[str] | None = None) -> list[str]:
    """Searches the library.

    Args:
        query: what to look for.
        top_n: how many results.
        kinds: of books.

    Returns:
        titles.
    """
    state["query"] = query
    return [f"{query} {i}" for i in range(top_n)]


class Desk:
    def ask(self, question: str) -> str:
        """Asks.

        Args:
            question: the question.
        """
        return f"{question}? {self.answer}"

    answer = "yes"


def run_call(tool, *, state=None, timeout_s=30.0, name=None, **arguments) -> ToolResult:
    toolbox = Toolbox([tool], timeout_s=timeout_s)
    call = ToolCall(name or toolbox.schemas[0]["function"]["name"], arguments)
    with Workers() as workers:
        coroutine = toolbox.call(call, state={} if state is None else state, workers=workers)
        return workers.start(coroutine).result(timeout=60)


def test_schema_leaves_the_state_out():
    schema = tool_schema(search)["function"]
    assert schema["name"] == "search"
    assert schema["description"] == "Searches the library."
    assert schema["parameters"] == {
        "type": "object",
        "properties": {
            "query": {"type": "string", "description": "what to look for."},
            "top_n": {"type": "integer", "description": "how many results."},
            "kinds": {
                "type": "array",
                "items": {"type": "string"},
                "nullable": True,
                "description": "of books.",
            },
        },
        "required": ["query"],
    }


def test_bound_methods_are_tools():
    assert list(tool_schema(Desk().ask)["function"]["parameters"]["properties"]) == ["question"]
    assert run_call(Desk().ask, question="ok") == ToolResult("ok? yes")


def no_docstring(a: int) -> int:
    return a


def no_hint(a) -> int:
    """Adds.

    Args:
        a: number.
    """
    return a


def not_described(a: int) -> int:
    """Adds."""
    return a


def variadic(*words: str) -> str:
    """Joins.

    Args:
        words: some.
    """
    return ""


@pytest.mark.parametrize("tool", [no_docstring, no_hint, not_described, variadic])
def test_tools_that_are_not_well_formed(tool):
    with pytest.raises(EnvironmentDefinitionError, match=tool.__name__):
        tool_schema(tool)


def test_two_tools_of_one_name():
    with pytest.raises(EnvironmentDefinitionError, match="two tools have one name: search, search"):
        Toolbox([search, search])
    schema = {"function": {"name": "search", "parameters": {}}}
    with pytest.raises(EnvironmentDefinitionError, match="two tools have one name: search, search"):
        check_tools([search, schema])
    check_tools([search, Desk().ask])


@pytest.mark.parametrize("tool", [3, "search", {}, {"name": "search"}, {"function": {"parameters": {}}}])
def test_what_is_no_tool(tool):
    with pytest.raises(EnvironmentDefinitionError, match="is no tool; a tool is a function, or a JSON schema"):
        check_tools([tool])


@pytest.mark.parametrize(
    ("value", "schema", "problems"),
    [
        ("a", {"type": "string"}, []),
        (1, {"type": "string"}, ["arguments must be string, got 1"]),
        (1, {"type": "number"}, []),
        (1.5, {"type": "integer"}, ["arguments must be integer, got 1.5"]),
        (2.0, {"type": "integer"}, []),
        (True, {"type": "integer"}, ["arguments must be integer, got true"]),
        (True, {"type": "boolean"}, []),
        (None, {"type": "string"}, ["arguments must be string, got null"]),
        (None, {"type": "string", "nullable": True}, []),
        (1, {"type": ["integer", "string"]}, []),
        ([], {"type": ["integer", "string"]}, ["arguments must be integer or string, got []"]),
        ("c", {"type": "string", "enum": ["a", "b"]}, ['arguments must be one of ["a", "b"], got "c"']),
        (
            [1, "x"],
            {"type": "array", "items": {"type": "integer"}},
            ['arguments[1] must be integer, got "x"'],
        ),
        (3, {"anyOf": [{"type": "string"}, {"type": "integer"}]}, []),
        ([], {"anyOf": [{"type": "string"}, {"type": "integer"}]}, ["arguments must be string, got []"]),
        (
            {"a": {"b": 1}, "x": 2},
            {
                "type": "object",
                "properties": {"a": {"type": "object", "properties": {"b": {"type": "string"}}}, "c": {}},
                "required": ["a", "c"],
            },
            ["'c' is missing", "a.b must be string, got 1", "'x' is not known; known: a, c"],
        ),
        ({"anything": 1}, {"type": "object"}, []),
    ],
)
def test_arguments_against_the_schema(value, schema, problems):
    assert schema_problems(value, schema) == problems


def test_a_call_gets_the_state_and_gives_text():
    state: dict = {}
    assert run_call(search, state=state, query="é", top_n=2.0) == ToolResult('["é 0", "é 1"]')
    assert state == {"query": "é"}


def test_the_model_cannot_pass_the_state():
    toolbox = Toolbox([search])
    with Workers() as workers:
        call = ToolCall("search", {"query": "a", "state": {}})
        result = workers.start(toolbox.call(call, state={}, workers=workers)).result(timeout=60)
    assert result == ToolResult("error: search: 'state' is not known; known: query, top_n, kinds", failed=True)


def test_literals_and_unknown_tools():
    def pick(color: Literal["red", "blue"]) -> str:
        """Picks.

        Args:
            color: one.
        """
        return color

    assert run_call(pick, color="red") == ToolResult("red")
    assert run_call(pick, color="green").failed
    assert run_call(pick, name="chose", color="red").text == "error: there is no tool 'chose'; there are: pick"


def raising(kind: str) -> str:
    """Raises.

    Args:
        kind: of error.
    """
    raise {
        "key": KeyError("k"),
        "stop": StopIteration(),
        "exit": SystemExit(3),
        "timeout": TimeoutError("own"),
        "infrastructure": InfrastructureError("down"),
    }[kind]


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("key", "error: raising failed with KeyError: 'k'"),
        ("stop", "error: raising failed with RuntimeError: StopIteration()"),
        ("exit", "error: raising failed with RuntimeError: SystemExit(3)"),
        ("timeout", "error: raising failed with TimeoutError: own"),
    ],
)
def test_exceptions_are_results(kind, text):
    assert run_call(raising, kind=kind) == ToolResult(text, failed=True)


def test_infrastructure_errors_are_not_the_models():
    with pytest.raises(InfrastructureError, match="down"):
        run_call(raising, kind="infrastructure")


async def slow(seconds: float) -> str:
    """Sleeps.

    Args:
        seconds: how long.
    """
    await asyncio.sleep(seconds)
    return "awake"


def test_async_tools_and_their_time_limit():
    assert run_call(slow, seconds=0) == ToolResult("awake")
    assert run_call(slow, timeout_s=0.05, seconds=600) == ToolResult(
        "error: slow took longer than 0.05 seconds", failed=True
    )


async def leaving(how: str) -> str:
    """Leaves.

    Args:
        how: as.
    """
    raise {"exit": SystemExit(3), "cancelled": asyncio.CancelledError(), "key": KeyError("k")}[how]


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("exit", "error: leaving failed with RuntimeError: SystemExit(3)"),
        ("cancelled", "error: leaving failed with RuntimeError: it cancelled itself"),
        ("key", "error: leaving failed with KeyError: 'k'"),
    ],
)
def test_an_async_tool_cannot_end_the_loop(how, text):
    assert run_call(leaving, how=how) == ToolResult(text, failed=True)


def test_an_async_tool_in_a_decorator_that_is_not():
    @functools.wraps(slow)
    def decorated(*arguments, **named):
        return slow(*arguments, **named)

    assert run_call(decorated, seconds=0) == ToolResult("awake")
    assert run_call(decorated, timeout_s=0.05, seconds=600).text.startswith("error: slow took longer than 0.05 s")


def test_whole_numbers_inside_lists_are_integers():
    def add(numbers: list[int]) -> str:
        """Adds.

        Args:
            numbers: some.
        """
        return repr(numbers)

    assert run_call(add, numbers=[1.0, 2]) == ToolResult("[1, 2]")


def test_text_that_no_tokenizer_takes():
    def halves(fail: bool) -> str:
        """Gives half of a surrogate pair.

        Args:
            fail: raise it.
        """
        if fail:
            raise ValueError("a\ud800")
        return "a\ud800"

    assert run_call(halves, fail=False) == ToolResult("a?")
    assert run_call(halves, fail=True) == ToolResult("error: halves failed with ValueError: a?", failed=True)


def test_tools_that_hang_take_no_place_from_others():
    release = threading.Event()

    def hang() -> str:
        """Hangs."""
        release.wait(60)
        return "late"

    def quick() -> str:
        """Is quick."""
        return "quick"

    hanging, others = Toolbox([hang], timeout_s=0.05), Toolbox([quick])
    try:
        with Workers(max_calls=2) as workers:
            calls = [hanging.call(ToolCall("hang"), state={}, workers=workers) for _ in range(4)]
            calls += [others.call(ToolCall("quick"), state={}, workers=workers) for _ in range(4)]
            results = [workers.start(call) for call in calls]
            texts = [result.result(timeout=60).text for result in results]
        assert texts == ["error: hang took longer than 0.05 seconds"] * 4 + ["quick"] * 4
    finally:
        release.set()


@pytest.mark.parametrize("kind", ["threads", "coroutines"])
def test_the_number_of_calls_is_bounded(kind):
    running, most, lock, turn = 0, 0, threading.Lock(), threading.Event()

    def count() -> str:
        """Counts."""
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
            if most == 3:
                turn.set()
        turn.wait(60)
        with lock:
            running -= 1
        return "done"

    async def count_on_the_loop() -> str:
        """Counts."""
        nonlocal running, most
        running += 1
        most = max(most, running)
        while most < 3:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        running -= 1
        return "done"

    count_on_the_loop.__name__ = "count"
    toolbox = Toolbox([count if kind == "threads" else count_on_the_loop])
    with Workers(max_calls=3) as workers:
        calls = [workers.start(toolbox.call(ToolCall("count"), state={}, workers=workers)) for _ in range(9)]
        assert [call.result(timeout=60).text for call in calls] == ["done"] * 9
    assert most == 3


def test_leaving_the_workers_cancels_what_still_runs():
    with Workers() as workers:
        future = workers.start(slow(600))
    assert future.cancelled()
