"""Objects that users name on the command line as `module:name` or `file.py:name`: rewards, tool-call parsers."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from rlvr.errors import EnvironmentDefinitionError


def import_named(spec: str, *, what: str) -> Any:
    """The object that `module:name` or `file.py:name` names.

    Args:
        spec: modules are looked for in the working directory too.
        what: what the object is to be, for messages.

    Raises:
        EnvironmentDefinitionError: the module cannot be loaded, or has no such name.
    """
    module_name, _, name = spec.rpartition(":")
    if not module_name or not name:
        raise EnvironmentDefinitionError(f"{what} {spec!r} names no object; write module:name or file.py:name.")
    try:
        module = _import_file(module_name) if module_name.endswith(".py") else _import_from_here(module_name)
    except (Exception, SystemExit) as error:
        raise EnvironmentDefinitionError(
            f"the module of {what} {spec!r} cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    if not hasattr(module, name):
        own = [
            known
            for known, value in vars(module).items()
            if not known.startswith("_") and getattr(value, "__module__", None) == module.__name__
        ]
        raise EnvironmentDefinitionError(
            f"{what} {spec!r}: module {module_name!r} has no {name!r}; it has: {', '.join(own) or 'nothing'}."
        )
    return getattr(module, name)


def _import_from_here(name: str) -> Any:
    """Modules in the working directory count, as with `python -m`; the installed command leaves it out."""
    sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


def _import_file(path: str) -> Any:
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
