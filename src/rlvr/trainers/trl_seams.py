"""Every internal of TRL that rlvr relies on, and nothing else does.

`EnhancedGRPOTrainer` overrides or reads what is listed here. A test goes through the list with the installed TRL, so
that a new release which moves one of them fails by its name.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from rlvr.errors import BackendError

CHECKED_VERSIONS = ("1.15.0", "1.16.0")


@dataclass(frozen=True)
class Seam:
    """A method or constructor argument of `GRPOTrainer`, the parameters relied on, and what for."""

    method: str
    parameters: tuple[str, ...]
    purpose: str


SEAMS = (
    Seam(
        "__init__",
        (
            "model", "reward_funcs", "args", "train_dataset", "eval_dataset", "processing_class",
            "reward_processing_classes", "callbacks", "optimizers", "quantization_config", "peft_config", "tools",
            "rollout_func", "environment_factory",
        ),
        "EnhancedGRPOTrainer takes the same arguments in the same order",
    ),
    Seam(
        "_generate_and_score_completions",
        ("inputs",),
        "the batch's rows are kept for the environment; records; gradient checkpointing is off meanwhile",
    ),
    Seam(
        "_generate",
        ("prompts",),
        "calls rollout_func(prompts, trainer), whose extra fields reach the rewards; prompts are given as arrays",
    ),
    Seam("_tokenize_prompts", ("prompts",), "a prompt is tokenized once for its group"),
    Seam(
        "_generate_single_turn",
        ("prompt_ids", "images", "multimodal_fields", "num_generations"),
        "plain sampling for environments; replaced by the grouped engine",
    ),
    Seam("_calculate_rewards", ("inputs", "prompts", "completions", "completion_ids_list"), "rewards by function"),
    Seam(
        "_get_per_token_logps_and_entropies",
        ("model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "compute_entropy"),
        "the reference model; the shared-prefix forward",
    ),
    Seam("_prepare_inputs", ("generation_batch",), "groups stay together inside a micro-batch"),
    Seam("training_step", ("model", "inputs"), "fused layers are taken out after the backward pass"),
    Seam("compute_loss", ("model", "inputs"), "the check that training trains sees each micro-batch's advantages"),
    Seam("prediction_step", ("model", "inputs", "prediction_loss_only"), "evaluation generates and scores only"),
)  # fmt: skip
"""And these attributes: `_metrics[mode]` (name → list of values, averaged by `log`), `_step`, `_buffered_inputs`,
`environment_factories`, `beta` and `ref_model` (read when a batch is scored), `generation_config`,
`num_generations_eval`, `eos_token_ids`, `vllm_importance_sampling_correction` (off where an evaluation has no loss);
with vLLM `vllm_generation`, whose `_iter_named_params` gives the weights by name, between calls of the model's
`merge_adapter` and `unmerge_adapter`; `is_fsdp_enabled` of transformers' trainer."""


def missing_seams(trainer_class: type) -> list[str]:
    """What the class lacks of the list above, a sentence each."""
    problems = []
    for seam in SEAMS:
        method = getattr(trainer_class, seam.method, None)
        if method is None:
            problems.append(f"{trainer_class.__name__}.{seam.method} is gone ({seam.purpose}).")
            continue
        parameters = inspect.signature(method).parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        gone = [name for name in seam.parameters if name not in parameters and not takes_any]
        if gone:
            problems.append(
                f"{trainer_class.__name__}.{seam.method} no longer takes {', '.join(gone)} ({seam.purpose})."
            )
    return problems


def require_seams(trainer_class: type) -> None:
    """
    Raises:
        BackendError: the installed TRL has moved something that rlvr needs.
    """
    problems = missing_seams(trainer_class)
    if problems:
        import trl

        raise BackendError(
            f"TRL {trl.__version__} has moved internals that rlvr needs (checked on {', '.join(CHECKED_VERSIONS)}): "
            + " ".join(problems)
        )
