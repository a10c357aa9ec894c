"""Entry point of the environments `verifiers:ID`."""

from __future__ import annotations

import importlib.util
import json
from importlib.metadata import version

from rlvr.environments.base import Environment
from rlvr.errors import ConfigError
from rlvr.plugins.hookspecs import hookimpl


@hookimpl
def rlvr_environment(variant: str = "", env_args: str = "{}") -> Environment:
    """An environment of the verifiers library: verifiers:ID.

    Args:
        variant: the id of an installed environment.
        env_args: arguments of its load_environment, as a JSON object.
    """
    if not variant:
        raise ConfigError("the environment 'verifiers' needs an id: verifiers:ID, of an installed environment.")
    try:
        arguments = json.loads(env_args)
    except json.JSONDecodeError as error:
        raise ConfigError(f"env_args is {env_args!r}, which is not JSON: {error}") from error
    if not isinstance(arguments, dict):
        raise ConfigError(f"env_args is {env_args!r}; it must be a JSON object.")
    from rlvr.environments.verifiers.adapter import load_verifiers

    return load_verifiers(variant, arguments=arguments)


@hookimpl
def rlvr_environment_availability() -> str | None:
    if importlib.util.find_spec("verifiers") is None:
        return 'it needs verifiers, which is not installed. Install it with: pip install "rlvr[verifiers]"'
    installed = version("verifiers")
    if installed.split(".")[:2] != ["0", "2"]:
        return (
            f"verifiers {installed} is installed, and 0.2 is needed: later ones have another kind of environment. "
            'Install it with: pip install "rlvr[verifiers]"'
        )
    return None
