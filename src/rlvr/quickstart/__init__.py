"""The quickstart: a model made on the spot, and a run that makes it better, in a few minutes on a CPU.

    rlvr train                                # this, from the command line

A tiny transformer is taught addition by a teacher who knows how to carry and forgets to, six times in ten (see
`warm_start.py`). So it can carry and usually does not: held-out exact match lies between 0.2 and 0.6. Reinforcement
learning then finds the habit that is rewarded, as it does with the skills that a real model brings from pretraining.
Nothing is downloaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlvr.quickstart.demonstration import Demonstration

ENV_OPTIONS: dict[str, Any] = {"levels": "2", "train_size": 5000, "eval_size": 400}
"""Two-digit additions. One problem in five is held out, and neither the teacher nor the run shows it to the model."""

SETTINGS: dict[str, Any] = {
    "num_generations": 8,
    "prompts_per_step": 16,
    "batch_size": 128,
    "max_steps": 80,
    "max_tokens": 6,
    "max_prompt_length": 32,
    "learning_rate": 3e-3,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_alpha_multiplier": 1.0,  # the same adapter on every backend
    "dtype": "float32",
    "gradient_checkpointing": False,
    "eval_samples": 400,
}

ARITHMETIC = Demonstration(
    task="arithmetic", env_options=ENV_OPTIONS, options=SETTINGS, models=Path("outputs") / "quickstart"
)
settings, prepare = ARITHMETIC.settings, ARITHMETIC.prepare
