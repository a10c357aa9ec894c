"""From the settings of a run to TRL's training arguments."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from rlvr.backends.protocol import LoadedPolicy, ModelBackend
from rlvr.config import TrainSettings
from rlvr.tracking.run_folder import RunFolder

if TYPE_CHECKING:
    from trl import GRPOConfig

logger = logging.getLogger(__name__)

CLIP = 0.2  # of the probability ratio, to both sides
CISPO_CAP = 5.0  # of its importance weights, which are capped at the value itself (ScaleRL, arXiv:2510.13786)
VLLM_MEMORY = 0.3  # of the GPU's, beside a policy with weights of its own; TRL's default
_ABSENT = object()


def training_arguments(
    settings: TrainSettings, policy: LoadedPolicy, backend: ModelBackend, folder: RunFolder
) -> tuple[dict[str, Any], list[Any]]:
    """The keywords for `trl.GRPOConfig`, and the changes to them that the backend asked for.

    Every value that matters is stated: Unsloth replaces the defaults, and some of them by the loss.
    """
    in_half = {str(parameter.dtype).removeprefix("torch.") for parameter in policy.model.parameters()}
    on_gpu = policy.model.device.type == "cuda"
    arguments = {
        "output_dir": str(folder.checkpoints),
        "run_name": settings.run_name,
        "seed": settings.seed,
        "data_seed": settings.seed,
        "per_device_train_batch_size": settings.batch_size,
        "per_device_eval_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "num_generations": settings.num_generations,
        "num_iterations": settings.num_iterations,
        "max_completion_length": settings.max_tokens,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "top_k": settings.top_k,
        "min_p": settings.min_p,
        "repetition_penalty": settings.repetition_penalty,
        "max_steps": settings.max_steps if settings.max_steps is not None else -1,
        "num_train_epochs": settings.num_epochs,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.lr_scheduler_type,
        "warmup_steps": settings.warmup_steps,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "optim": "adamw_torch",
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "loss_type": settings.loss_type,
        "epsilon": CLIP,
        "epsilon_high": CISPO_CAP if settings.loss_type == "cispo" else CLIP,
        "mask_truncated_completions": False,
        "vllm_importance_sampling_correction": True,
        "scale_rewards": settings.scale_rewards,
        "beta": settings.kl_beta,
        "bf16": on_gpu and "bfloat16" in in_half,
        "fp16": on_gpu and "float16" in in_half,
        "gradient_checkpointing": settings.gradient_checkpointing is not False,
        "logging_strategy": "steps",
        "logging_steps": settings.logging_steps,
        "save_strategy": "steps",
        "save_steps": settings.save_steps,
        "eval_strategy": "no",  # evaluation is ours: see evaluate.py
        "disable_tqdm": True,
        "use_cpu": not on_gpu,
        "use_vllm": settings.rollout_engine == "vllm",
    }
    if settings.vllm_server is not None:
        arguments["vllm_mode"] = "server"
        arguments["vllm_server_base_url"] = settings.vllm_server
    elif settings.rollout_engine == "vllm":
        arguments["vllm_mode"] = "colocate"
        arguments["vllm_enable_sleep_mode"] = on_gpu  # its memory is given back while the policy trains
        arguments["vllm_gpu_memory_utilization"] = settings.gpu_memory_utilization or VLLM_MEMORY
    changes = [
        change for change in backend.training_arguments(policy) if arguments.get(change.name, _ABSENT) != change.value
    ]
    for change in changes:
        logger.info("backend %s sets %s=%r: %s", settings.backend, change.name, change.value, change.reason)
        arguments[change.name] = change.value
    return arguments, changes


def grpo_config(arguments: dict[str, Any]) -> GRPOConfig:
    """`trl.GRPOConfig(**arguments)` with the scaling of rewards that was asked for.

    With the loss dr_grpo, Unsloth's class switches it off whatever is asked, and prints that it did.
    """
    from trl import GRPOConfig

    config = GRPOConfig(**arguments)
    config.scale_rewards = arguments["scale_rewards"]
    return config
