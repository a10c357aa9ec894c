"""A tiny model that learns multi-hop questions by GRPO, through real tool calls, on a CPU, without a download.

    run = rlvr.train(**rlvr.quickstart.musique.prepare())

The model is made on the spot and taught by a careless teacher (see `musique_teacher.py`). It can search hop by hop,
and where a person is asked for it mostly takes the first person that it finds. Reinforcement learning finds the habit
that is rewarded: to go on until the question is answered.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlvr.quickstart.demonstration import Demonstration

ENV_OPTIONS: dict[str, Any] = {
    "datasets": "sample",
    "retriever": "lexical",
    "sample_size": 2000,
    "sample_eval_size": 200,
    "sample_hops": "2",
    "sample_paragraphs": 6,
    "sample_words": 200,
    "max_turns": 5,
}
"""Which questions are held out is decided by the work that they start from: no seed puts one into both splits."""

SETTINGS: dict[str, Any] = {
    "num_generations": 8,
    "prompts_per_step": 16,
    "batch_size": 128,
    "max_steps": 30,
    "max_tokens": 160,
    "max_prompt_length": 32,
    "learning_rate": 3e-3,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_alpha_multiplier": 1.0,  # the same adapter on every backend
    "dtype": "float32",
    "gradient_checkpointing": False,
    "eval_samples": 200,
}

MUSIQUE = Demonstration(task="musique", env_options=ENV_OPTIONS, options=SETTINGS, models=Path("outputs") / "musique")
settings, prepare = MUSIQUE.settings, MUSIQUE.prepare
