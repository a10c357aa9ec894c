"""Finds plugins by the metadata of installed distributions, loads one when asked, and reports on all of them.

Names come from entry points, so that nothing is imported to know what is there. Only the plugin asked for
is loaded, into a pluggy manager of its own: a broken plugin is a row in a listing and an error when asked
for, and never stands in another's way.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

import pluggy

from rlvr.errors import (
    BackendUnavailableError,
    ConfigError,
    DuplicatePluginError,
    PluginError,
    PluginLoadError,
    RlvrError,
    UnknownPluginError,
)
from rlvr.plugins.hookspecs import BACKENDS, ENVIRONMENTS, PROJECT, BackendHooks, EnvironmentHooks
from rlvr.wording import closest

if TYPE_CHECKING:
    from rlvr.backends.protocol import ModelBackend
    from rlvr.environments.base import Environment

DEFAULT_BACKEND = "hf"
BACKEND_VARIABLE = "RLVR_BACKEND"

_PLUGIN_FAULTS = (Exception, SystemExit)  # what a stranger's code may raise; Ctrl-C is not among them


@dataclass(frozen=True)
class PluginStatus:
    """A row of `rlvr backends` and `rlvr environments`; `reason`: why it is not available, and the fix."""

    name: str
    distribution: str
    version: str
    available: bool
    reason: str | None


@dataclass(frozen=True)
class _Kind:
    """One of the two seams: where its plugins are announced, and what they implement."""

    noun: str
    group: str
    hooks: type
    factory: str
    availability: str

    @property
    def listing(self) -> str:
        return f"See 'rlvr {self.noun}s'."


_BACKEND = _Kind("backend", BACKENDS, BackendHooks, "rlvr_backend", "rlvr_backend_availability")
_ENVIRONMENT = _Kind(
    "environment", ENVIRONMENTS, EnvironmentHooks, "rlvr_environment", "rlvr_environment_availability"
)


@dataclass(frozen=True)
class _Plugin:
    """A plugin module that was imported and found well formed."""

    label: str  # "backend 'mine' (my-package 1.0)", as messages name it
    make: Callable[..., Any]
    unavailable: str | None


def list_backends() -> list[PluginStatus]:
    """Every installed backend, sorted by name. Imports the light plugin modules and nothing else."""
    return _list(_BACKEND)


def list_environments() -> list[PluginStatus]:
    """Every installed environment, sorted by name. Imports the light plugin modules and nothing else."""
    return _list(_ENVIRONMENT)


def load_backend(name: str | ModelBackend | None = None) -> ModelBackend:
    """The backend of that name. Asked for again, the same object is returned.

    Args:
        name: as `rlvr backends` lists it; None for the environment variable RLVR_BACKEND, else
            "hf". A backend object is returned as it is, once it was found to be one.

    Raises:
        UnknownPluginError: no installed distribution offers it.
        DuplicatePluginError: two do.
        PluginLoadError: it is broken, or written for another version of the protocol.
        BackendUnavailableError: a package or a device that it needs is missing.
    """
    if name is None:
        name = os.environ.get(BACKEND_VARIABLE) or DEFAULT_BACKEND
    if isinstance(name, str):
        return _load_backend_named(name)
    problem = _backend_problem(name)
    if problem:
        raise PluginLoadError(f"the backend passed as an object {problem}")
    return name


def require_backend(name: str) -> None:
    """Raises what `load_backend` would for a name that cannot be used, and loads nothing where it can."""
    if not any(row.name == name and row.available for row in list_backends()):
        load_backend(name)


def load_environment(name: str | Environment, **options: Any) -> Environment:
    """The environment of that name, made with these options.

    Args:
        name: as `rlvr environments` lists it. In `reasoning-gym:leg_counting`, what follows the
            colon is passed as the option `variant`. An `Environment` is returned as it is.
        options: what the environment takes; see `environment_options`.

    Raises:
        UnknownPluginError, DuplicatePluginError, PluginLoadError: as for `load_backend`.
        ConfigError: it has no such option, or needs one that was not given; all problems at once.
    """
    from rlvr.environments.base import Environment

    if isinstance(name, Environment):
        if options:
            raise ConfigError(f"options were given for an environment that exists already: {', '.join(options)}.")
        return name
    plugin_name, _, variant = name.partition(":")
    plugin = _load(_ENVIRONMENT, plugin_name)
    if plugin.unavailable:
        raise PluginLoadError(f"{plugin.label} cannot be used here: {plugin.unavailable}")
    parameters = _options(plugin)
    if variant:
        options = _with_variant(plugin_name, variant, parameters, options)
    problems = _option_problems(plugin_name, parameters, options)
    if problems:
        raise ConfigError(problems)
    environment = _make(plugin, **options)
    if not isinstance(environment, Environment):
        raise PluginLoadError(
            f"{plugin.label} is broken: its rlvr_environment returned {_describe(environment)}; it must "
            "return an rlvr.Environment."
        )
    return environment


def environment_options(name: str) -> Mapping[str, inspect.Parameter]:
    """The options that an environment takes: name → parameter with its default and type hint.

    A parameter of kind `VAR_KEYWORD` among them means that it takes any option. Options without a default
    must be given.

    Raises:
        UnknownPluginError, DuplicatePluginError, PluginLoadError: as for `load_backend`.
    """
    return _options(_load(_ENVIRONMENT, name.partition(":")[0]))


def environment_description(name: str) -> str:
    """What an environment's hook says of it and, under `Args:`, of its options; empty where it says nothing.

    Raises:
        UnknownPluginError, DuplicatePluginError, PluginLoadError: as for `load_backend`.
    """
    return inspect.getdoc(_load(_ENVIRONMENT, name.partition(":")[0]).make) or ""


def announced_by(backend: str, environment: str) -> dict[str, str]:
    """Distribution → version of what announces a backend and an environment. Reads metadata and imports nothing."""
    named = [(_BACKEND, backend), (_ENVIRONMENT, environment.partition(":")[0])]
    return dict(_distribution(claim) for kind, name in named for claim in _discover(kind).get(name, []))


@functools.cache
def _load_backend_named(name: str) -> ModelBackend:
    plugin = _load(_BACKEND, name)
    if plugin.unavailable:
        raise BackendUnavailableError(f"{plugin.label} cannot be used here: {plugin.unavailable}")
    backend = _make(plugin)
    problem = _backend_problem(backend)
    if problem:
        raise PluginLoadError(f"{plugin.label} is broken: its rlvr_backend returned an object that {problem}")
    return backend


# Discovery


def _discover(kind: _Kind) -> dict[str, list[EntryPoint]]:
    """Name → entry points that claim it, usually one. Reads metadata and imports nothing."""
    found: dict[str, list[EntryPoint]] = defaultdict(list)
    for entry_point in entry_points(group=kind.group):
        found[entry_point.name].append(entry_point)
    return dict(sorted(found.items()))


def _distribution(entry_point: EntryPoint) -> tuple[str, str]:
    """Name and version of the distribution that announces it."""
    distribution = entry_point.dist
    return (distribution.name, distribution.version) if distribution else ("unknown", "unknown")


def _list(kind: _Kind) -> list[PluginStatus]:
    return [
        _status(kind, name, entry_point, claims) for name, claims in _discover(kind).items() for entry_point in claims
    ]


def _status(kind: _Kind, name: str, entry_point: EntryPoint, claims: list[EntryPoint]) -> PluginStatus:
    reason: str | None
    if len(claims) > 1:
        reason = str(_duplicate(kind, name, claims))
    else:
        try:
            reason = _import(kind, name, entry_point).unavailable
        except PluginError as error:
            reason = str(error)
    distribution, version = _distribution(entry_point)
    return PluginStatus(name, distribution, version, available=reason is None, reason=reason)


def _load(kind: _Kind, name: str) -> _Plugin:
    found = _discover(kind)
    claims = found.get(name, [])
    if not claims:
        installed = f"{', '.join(found) or 'none'}.{closest(name, found)}"
        raise UnknownPluginError(f"unknown {kind.noun} {name!r}; installed: {installed} {kind.listing}")
    if len(claims) > 1:
        raise _duplicate(kind, name, claims)
    return _import(kind, name, claims[0])


def _duplicate(kind: _Kind, name: str, claims: list[EntryPoint]) -> DuplicatePluginError:
    claimants = " and ".join(" ".join(_distribution(claim)) for claim in claims)
    return DuplicatePluginError(f"the {kind.noun} name {name!r} is claimed by {claimants}; uninstall one of them.")


# Loading


def _import(kind: _Kind, name: str, entry_point: EntryPoint) -> _Plugin:
    """Imports one plugin module and checks its hooks.

    Raises:
        PluginLoadError: names the distribution, its version and the cause.
    """
    label = f"{kind.noun} {name!r} ({' '.join(_distribution(entry_point))})"

    def broken(cause: str) -> PluginLoadError:
        return PluginLoadError(f"{label} is broken: {cause}")

    try:
        module = entry_point.load()
    except _PLUGIN_FAULTS as error:
        raise broken(f"importing {entry_point.value!r} raised {_cause(error)}") from error

    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(kind.hooks)
    try:
        manager.register(module, name)
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise broken(
            f"{error}. Allowed hooks: {kind.factory}, {kind.availability}; every option needs a default."
        ) from error
    except _PLUGIN_FAULTS as error:
        raise broken(f"registering its hooks raised {_cause(error)}") from error

    factories = getattr(manager.hook, kind.factory).get_hookimpls()
    if not factories:
        raise broken(f"{entry_point.value!r} has no function {kind.factory} marked with @rlvr.hookimpl.")
    checks = getattr(manager.hook, kind.availability).get_hookimpls()
    unavailable = None
    if checks:
        try:
            unavailable = checks[0].function()
        except _PLUGIN_FAULTS as error:
            raise broken(f"{kind.availability} raised {_cause(error)}") from error
        if not (unavailable is None or isinstance(unavailable, str)):
            raise broken(
                f"{kind.availability} returned {unavailable!r}; it must return None, or the reason as a string."
            )
    # pluggy would not pass **options on, so that the function is called directly
    return _Plugin(label, factories[0].function, unavailable)


def _make(plugin: _Plugin, **options: Any) -> Any:
    try:
        return plugin.make(**options)
    except RlvrError:
        raise
    except _PLUGIN_FAULTS as error:
        raise PluginLoadError(f"{plugin.label} could not be made: {_cause(error)}") from error


def _backend_problem(backend: object) -> str | None:
    """Why an object is no backend, as the end of a sentence; None if it is one."""
    from rlvr.backends.protocol import OLDEST_PROTOCOL_VERSION, PROTOCOL_VERSION, ModelBackend

    if inspect.isclass(backend):
        return f"is the class {backend.__name__}; return an instance of it."
    # The version comes first: another one may have other methods.
    version = getattr(backend, "protocol_version", None)
    fits = type(version) is int and OLDEST_PROTOCOL_VERSION <= version <= PROTOCOL_VERSION  # True is no version
    if version is not None and not fits:
        return (
            f"was written for version {version} of the backend protocol; this rlvr takes versions "
            f"{OLDEST_PROTOCOL_VERSION} to {PROTOCOL_VERSION}. Install releases of the two that fit."
        )
    methods = [name for name in vars(ModelBackend) if not name.startswith("_")]
    missing = [name for name in methods if not callable(getattr(backend, name, None))]
    if missing:
        return f"is {_describe(backend)} without the method(s) {', '.join(missing)} of ModelBackend."
    if version is None:
        return f"is {_describe(backend)} without protocol_version; state which it was written for: {PROTOCOL_VERSION}."
    return None


# Options of environments


def _options(plugin: _Plugin) -> dict[str, inspect.Parameter]:
    try:
        signature = inspect.signature(plugin.make, eval_str=True)
    except Exception:  # hints that name something imported for type checkers only
        signature = inspect.signature(plugin.make)
    return dict(signature.parameters)


def _with_variant(
    name: str, variant: str, parameters: Mapping[str, inspect.Parameter], options: dict[str, Any]
) -> dict[str, Any]:
    if "variant" not in parameters and not _takes_anything(parameters):
        raise ConfigError(f"environment {name!r} has no variants; got {name}:{variant}. Use {name!r} alone.")
    if options.get("variant", variant) != variant:
        raise ConfigError(
            f"two variants of environment {name!r} were asked for: {variant!r} and {options['variant']!r}; give one."
        )
    return {**options, "variant": variant}


def _option_problems(name: str, parameters: Mapping[str, inspect.Parameter], options: Mapping[str, Any]) -> list[str]:
    named = [key for key, parameter in parameters.items() if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
    problems = []
    for option in options:
        if option not in named and not _takes_anything(parameters):
            allowed = f"{', '.join(named) or 'none'}.{closest(option, named)}"
            problems.append(f"environment {name!r} has no option {option!r}; it takes: {allowed}")
    for option in named:
        if parameters[option].default is inspect.Parameter.empty and option not in options:
            problems.append(f"environment {name!r} needs the option {option!r}.")
    return problems


def _takes_anything(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())


def _cause(error: BaseException) -> str:
    fix = ""
    if isinstance(error, ModuleNotFoundError) and error.name:
        fix = f" Install the distribution that has {error.name!r}."
    return f"{type(error).__name__}: {error}.{fix}"


def _describe(value: object) -> str:
    return "None" if value is None else f"an object of type {type(value).__name__}"
