"""Environments: what a policy is trained on."""

from rlvr.environments.base import Environment

__all__ = ["Environment"]
