"""Reward functions, and the rubric that weighs them."""

from rlvr.rewards.rubric import RewardFunction, Rubric, WeightedReward

__all__ = ["RewardFunction", "Rubric", "WeightedReward"]
