"""What an option of a run is, and how a value of one is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, field
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

from rlvr.wording import closest


def option(
    default: Any,
    help: str,
    group: str,
    *,
    choices: tuple[str, ...] | None = None,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    cli: bool = True,
) -> Any:
    """A field of `TrainSettings`. The bounds are `least <= value <= most` and `above < value < below`."""
    bounds = {"at least": least, "above": above, "at most": most, "below": below}
    metadata = {"help": help, "group": group, "choices": choices, "bounds": bounds, "cli": cli}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


def value_type(hint: Any) -> tuple[Any, bool]:
    """The type that a hint such as `int | None` names, and whether it allows None."""
    if get_origin(hint) in (Union, UnionType):
        return next(part for part in get_args(hint) if part is not type(None)), True
    return get_origin(hint) or hint, False


def option_default(definition: Field[Any]) -> Any:
    return {} if definition.default is MISSING else definition.default


_TYPE_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    dict: "a mapping",
}


def checked(definition: Field[Any], expected: tuple[Any, bool], value: Any) -> tuple[Any, str | None]:
    """The value in its type, and what is wrong with it.

    Args:
        expected: its type and whether it may be None, as `value_type` gives them.
    """
    kind, optional = expected
    if value is None and optional:
        return None, None
    name = definition.name
    value = _converted(value, kind)
    if type(value) is not kind:
        return value, f"{name} is {value!r}; it must be {_TYPE_WORDS[kind]}."
    choices = definition.metadata["choices"]
    if choices and value not in choices:
        return value, f"{name} is {value!r}; allowed: {', '.join(choices)}.{closest(value, choices)}"
    if kind in (int, float):
        limits = {words: limit for words, limit in definition.metadata["bounds"].items() if limit is not None}
        if not all(_within(value, words, limit) for words, limit in limits.items()):
            allowed = " and ".join(f"{words} {limit}" for words, limit in limits.items())
            allowed += " and finite" if value == float("inf") else ""
            hint = _WHY_TWO if name == "num_generations" else ""
            return value, f"{name} is {value}; it must be {allowed}.{hint}"
    return value, None


_WHY_TWO = " GRPO compares completions of one prompt with each other, so it needs two or more."


def _within(value: float, words: str, limit: float) -> bool:
    comparisons = {
        "at least": value >= limit,
        "above": value > limit,
        "at most": value <= limit,
        "below": value < limit,
    }
    return comparisons[words] and value != float("inf")


def _converted(value: Any, kind: Any) -> Any:
    """Numbers as YAML 1.1 and NumPy write them (`1e-5` is text to YAML), paths and lists of names as text."""
    if kind is float and not isinstance(value, bool) and (isinstance(value, str) or hasattr(value, "__float__")):
        try:
            return float(value)
        except (ValueError, TypeError, OverflowError):
            return value
    if kind is int and not isinstance(value, (bool, str)):
        return int(value) if isinstance(value, float) and value.is_integer() else _as_int(value)
    if kind is str and isinstance(value, Path):
        return str(value)
    if kind is str and isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    return dict(value) if kind is dict and isinstance(value, Mapping) else value


def _as_int(value: Any) -> Any:
    try:
        return value.__index__()
    except (AttributeError, TypeError):
        return value
