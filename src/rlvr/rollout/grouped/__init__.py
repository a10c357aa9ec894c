"""Rollouts in which a group shares its prompt: `GroupedEngine`."""

from rlvr.rollout.grouped.engine import GroupedEngine

__all__ = ["GroupedEngine"]
