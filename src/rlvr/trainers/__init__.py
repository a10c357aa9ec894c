"""The trainer. Importing this package imports neither torch nor trl: both wait for the first trainer."""

from rlvr.trainers.enhanced_grpo import EnhancedGRPOTrainer

__all__ = ["EnhancedGRPOTrainer"]
