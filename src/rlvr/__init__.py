"""Reinforcement learning from verifiable rewards on any model backend.

Importing this package loads the standard library only; what it offers is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {  # name → module that defines it
    "ArgumentChange": "rlvr.backends.protocol",
    "Capabilities": "rlvr.backends.protocol",
    "Environment": "rlvr.environments.base",
    "LoadedPolicy": "rlvr.backends.protocol",
    "LoraSettings": "rlvr.backends.protocol",
    "Message": "rlvr.types",
    "ModelBackend": "rlvr.backends.protocol",
    "ModelSettings": "rlvr.backends.protocol",
    "RlvrError": "rlvr.errors",
    "Rubric": "rlvr.rewards.rubric",
    "StopReason": "rlvr.types",
    "ToolCall": "rlvr.types",
    "Trajectory": "rlvr.types",
    "Turn": "rlvr.types",
    "WeightedReward": "rlvr.rewards.rubric",
    "evaluate": "rlvr.trainers.evaluate",
    "export": "rlvr.exporting.export",
    "hookimpl": "rlvr.plugins.hookspecs",
    "lineage": "rlvr.tracking.lineage",
    "list_backends": "rlvr.plugins.manager",
    "list_environments": "rlvr.plugins.manager",
    "load_backend": "rlvr.plugins.manager",
    "load_environment": "rlvr.plugins.manager",
    "load_policy": "rlvr.backends",
    "preflight": "rlvr.trainers.preflight",
    "train": "rlvr.trainers.run",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'rlvr' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from rlvr.backends import load_policy as load_policy
    from rlvr.backends.protocol import ArgumentChange as ArgumentChange
    from rlvr.backends.protocol import Capabilities as Capabilities
    from rlvr.backends.protocol import LoadedPolicy as LoadedPolicy
    from rlvr.backends.protocol import LoraSettings as LoraSettings
    from rlvr.backends.protocol import ModelBackend as ModelBackend
    from rlvr.backends.protocol import ModelSettings as ModelSettings
    from rlvr.environments.base import Environment as Environment
    from rlvr.errors import RlvrError as RlvrError
    from rlvr.exporting.export import export as export
    from rlvr.plugins.hookspecs import hookimpl as hookimpl
    from rlvr.plugins.manager import list_backends as list_backends
    from rlvr.plugins.manager import list_environments as list_environments
    from rlvr.plugins.manager import load_backend as load_backend
    from rlvr.plugins.manager import load_environment as load_environment
    from rlvr.rewards.rubric import Rubric as Rubric
    from rlvr.rewards.rubric import WeightedReward as WeightedReward
    from rlvr.tracking.lineage import lineage as lineage
    from rlvr.trainers.evaluate import evaluate as evaluate
    from rlvr.trainers.preflight import preflight as preflight
    from rlvr.trainers.run import train as train
    from rlvr.types import Message as Message
    from rlvr.types import StopReason as StopReason
    from rlvr.types import ToolCall as ToolCall
    from rlvr.types import Trajectory as Trajectory
    from rlvr.types import Turn as Turn
