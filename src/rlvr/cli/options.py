"""Command-line options made from `TrainSettings`, and from the options of an environment."""

from __future__ import annotations

import copy
import functools
import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import Field, fields
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from typer.core import TyperCommand

from rlvr.config import TrainSettings, option_type
from rlvr.errors import ConfigError
from rlvr.options import option_default
from rlvr.wording import closest

SHORT = {"model": "-m"}
COMMAND_OPTIONS = frozenset(  # of the commands on environments themselves, beside settings
    [
        *("config", "dry_run", "adapter", "samples", "limit", "output", "resume", "json", "help", "debug"),
        *("api_base_url", "api_key_env", "api_retries", "api_timeout", "concurrency"),  # evaluate
        *("backends", "steps", "as_is"),  # compare
        "prompts",  # preflight
    ]
)


EnvironmentName = Annotated[str, typer.Argument(metavar="ENV", help="as 'rlvr environments' lists it")]
AdapterFolder = Annotated[Path | None, typer.Option("--adapter", help="folder of a saved adapter, or of a run")]


class EnvironmentCommand(TyperCommand):
    """A command on an environment, which has options of its own. `ENV --help` lists these too."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        self._environment = args[0] if args and not args[0].startswith("-") else None
        return super().parse_args(ctx, args)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                kind = "Arguments" if parameter.param_type_name == "argument" else "Options"
                heading = getattr(parameter, "rich_help_panel", None) or kind
                sections.setdefault(heading, []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        if self._environment is not None:
            from rlvr.cli.environments import option_rows, write_options

            write_options(formatter, self._environment, option_rows(self._environment))


def add_environment_command(
    app: typer.Typer,
    function: Callable[..., None],
    *,
    settings: Iterable[str] | None = None,
    short_help: str | None = None,
) -> None:
    """Adds a command on an environment, under the function's name.

    Args:
        function: its `**keywords` are the settings.
        settings: the names of those that the command has; None for all.
        short_help: its line in `rlvr --help`; by default the first of its docstring.
    """
    command = app.command(
        function.__name__,
        cls=EnvironmentCommand,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
        short_help=short_help,
    )
    command(with_parameters(function, settings_parameters(settings)))


def environment_arguments(environment: str | None, arguments: Sequence[str]) -> dict[str, Any]:
    """The environment's options among the words that no option of the command took."""
    if environment is None:
        return parse_environment_options(arguments, None, {})
    from rlvr.plugins.manager import environment_options

    return parse_environment_options(arguments, environment, environment_options(environment))


def set_up_output() -> None:
    """Our own notes on standard error; the libraries' bars, notes and deprecations off, unless the user set these."""
    import logging
    import warnings

    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    for name in ("rlvr", "rlvr_unsloth"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    for library in ("transformers", "trl", "peft", "accelerate"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=library)


_QUIET = {
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_SILENT": "true",
}


def settings_fields(names: Iterable[str] | None = None) -> list[Field[Any]]:
    """The fields of `TrainSettings` that are options on the command line, all of them or those named."""
    wanted = None if names is None else set(names)
    return [
        definition
        for definition in fields(TrainSettings)
        if definition.metadata["cli"] and (wanted is None or definition.name in wanted)
    ]


def settings_parameters(names: Iterable[str] | None = None) -> list[inspect.Parameter]:
    """Parameters for a typer command. All default to None, so that what was not given is known."""
    parameters = []
    for definition in settings_fields(names):
        kind, _ = option_type(definition)
        declaration = typer.Option(
            *([flag_of(definition.name)] if kind is not bool else []),
            *([SHORT[definition.name]] if definition.name in SHORT else []),
            help=help_text(definition),
            rich_help_panel=definition.metadata["group"],
            show_default=False,
        )
        parameters.append(keyword(definition.name, Annotated[kind | None, declaration], None))
    return parameters


def keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def with_parameters(function: Callable[..., None], parameters: Sequence[inspect.Parameter]) -> Callable[..., None]:
    """The function with its `**keywords` spelled out, as typer reads them.

    typer reads numbers as text, and they become numbers here: its own message leaves out what was given.
    """
    own = [
        parameter
        for parameter in inspect.signature(function, eval_str=True).parameters.values()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    numbers = {p.name: kind for p in (*own, *parameters) if (kind := _number_type(p.annotation)) is not None}

    @functools.wraps(function)
    def spelled_out(*args: Any, **keywords: Any) -> None:
        function(*args, **{**keywords, **_as_numbers({name: keywords[name] for name in numbers}, numbers)})

    shown = [_as_text(p, numbers[p.name]) if p.name in numbers else p for p in (*own, *parameters)]
    spelled_out.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    spelled_out.__annotations__ = {parameter.name: parameter.annotation for parameter in shown}
    return spelled_out


def _number_type(annotation: Any) -> Any:
    """int or float, for `Annotated[int, ...]` and `Annotated[int | None, ...]` and the like; else None."""
    if get_origin(annotation) is not Annotated:
        return None
    kind = get_args(annotation)[0]
    return next((number for number in (int, float) if kind in (number, number | None)), None)


def _as_text(parameter: inspect.Parameter, kind: Any) -> inspect.Parameter:
    option = copy.copy(get_args(parameter.annotation)[1])
    option.metavar = option.metavar or f"<{kind.__name__}>"
    default = None if parameter.default is None else str(parameter.default)
    return parameter.replace(annotation=Annotated[str | None, option], default=default)


def _as_numbers(texts: Mapping[str, str | None], kinds: Mapping[str, Any]) -> dict[str, Any]:
    problems, numbers = [], dict[str, Any](texts)
    for name, text in texts.items():
        if text is not None:
            try:
                numbers[name] = _as_type(text, kinds[name])
            except ValueError as error:
                problems.append(f"option {flag_of(name)} is {text!r}; {error}.")
    if problems:
        raise ConfigError(problems)
    return numbers


def given(values: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were on the command line."""
    return {name: value for name, value in values.items() if value is not None}


def environment_flag(name: str) -> str:
    """The flag of an environment's option: with `env` in front where a command has an option of that name."""
    taken = {definition.name for definition in settings_fields()} | COMMAND_OPTIONS
    return flag_of(f"env_{name}" if name in taken else name)


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def help_text(definition: Field[Any]) -> str:
    default = option_default(definition)
    text, choices = definition.metadata["help"], definition.metadata["choices"]
    if choices:
        text += f": {', '.join(choices)}"
    if default is None or default is False:
        return text
    return f"{text} (default {'on' if default is True else default})"


def parse_environment_options(
    arguments: Sequence[str], environment: str | None, parameters: Mapping[str, inspect.Parameter]
) -> dict[str, Any]:
    """What the command line holds beside the options of training: `--name value`, `--flag`, `--no-flag`.

    Args:
        arguments: the words that no option of training took.
        environment: its name, for messages.
        parameters: of the environment's `rlvr_environment` hook.

    Raises:
        ConfigError: unknown options and values that cannot be read; all problems at once.
    """
    free = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    options: dict[str, Any] = {}
    problems: list[str] = []
    waiting = list(arguments)
    while waiting:
        word = waiting.pop(0)
        if not word.startswith("--"):
            problems.append(f"unexpected argument {word!r}; options are written --name value.")
            continue
        flag, _, value = word.partition("=")
        name = flag[2:].replace("-", "_")
        if name not in parameters and name.removeprefix("env_") in parameters:
            name = name.removeprefix("env_")  # --env-seed, where the command has a --seed of its own
        negated = name.removeprefix("no_")
        has_value = bool(value) or "=" in word
        if name not in parameters and negated in parameters and value_type(parameters[negated]) is bool:
            options[negated] = False
        elif name not in parameters and not free:
            problems.append(_unknown(flag, environment, parameters))
            if waiting and not waiting[0].startswith("--"):
                waiting.pop(0)  # its value
        elif not has_value and name in parameters and value_type(parameters[name]) is bool:
            options[name] = True
        elif not has_value and (not waiting or waiting[0].startswith("--")):
            problems.append(f"option {flag} needs a value.")
        else:
            text = value if has_value else waiting.pop(0)
            try:
                options[name] = convert(text, parameters.get(name))
            except ValueError as error:
                problems.append(f"option {flag} is {text!r}; {error}.")
    if problems:
        raise ConfigError(problems)
    return options


def _unknown(flag: str, environment: str | None, parameters: Mapping[str, inspect.Parameter]) -> str:
    flags = [flag_of(definition.name) for definition in settings_fields()]
    own = [environment_flag(name) for name in parameters]
    if environment is None:
        return f"unknown option {flag}.{closest(flag, flags)}"
    takes = (
        f"environment {environment!r} takes: {', '.join(own)}" if own else f"environment {environment!r} takes none"
    )
    return f"unknown option {flag}; {takes}.{closest(flag, [*own, *flags])}"


def value_type(parameter: inspect.Parameter) -> Any:
    """The type that an option's text is read as: its hint without None, or the type of its default."""
    hint = parameter.annotation
    if get_origin(hint) in (Union, UnionType):
        hint = next((part for part in get_args(hint) if part is not type(None)), str)
    if hint is inspect.Parameter.empty:
        default = parameter.default
        return str if default is inspect.Parameter.empty or default is None else type(default)
    return hint


def convert(text: str, parameter: inspect.Parameter | None) -> Any:
    """The text as the option's type.

    Raises:
        ValueError: says what is allowed.
    """
    if parameter is None or value_type(parameter) in (Any, object):  # an environment that takes any option
        import yaml

        return yaml.safe_load(text)
    return _as_type(text, value_type(parameter))


def _as_type(text: str, kind: Any) -> Any:
    origin = get_origin(kind) or kind
    if origin is Literal:
        by_text = {str(choice): choice for choice in get_args(kind)}
        if text not in by_text:
            raise ValueError(f"allowed: {', '.join(by_text)}")
        return by_text[text]
    if origin is bool:
        words = {
            "true": True,
            "yes": True,
            "on": True,
            "1": True,
            "false": False,
            "no": False,
            "off": False,
            "0": False,
        }
        if text.lower() not in words:
            raise ValueError("it must be true or false")
        return words[text.lower()]
    if origin in (int, float):
        try:
            return origin(text)
        except ValueError:
            raise ValueError("it must be a whole number" if origin is int else "it must be a number") from None
    if isinstance(origin, type) and issubclass(origin, Sequence) and not issubclass(origin, str):
        item = next((part for part in get_args(kind) if part is not Ellipsis), str)
        items = [_as_type(part.strip(), item) for part in text.split(",") if part.strip()]
        return tuple(items) if origin is tuple else items
    return text
