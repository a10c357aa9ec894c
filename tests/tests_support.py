"""Settings that several test files share. Importable since pytest puts this folder on the path."""

from __future__ import annotations


def grpo_config(folder, **overrides):
    """A `GRPOConfig` for tiny models on a CPU: 4 completions a step in one micro-batch."""
    import trl

    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 6,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        **overrides,
    }
    return trl.GRPOConfig(**settings)
