"""Every option of a training run, defined once.

The command line, the keys of `--config run.yaml`, the keywords of `rlvr.train` and the tables in the docs are all read
from the fields of `TrainSettings`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping
from dataclasses import Field, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

from rlvr.backends.protocol import CHOICES, LoraSettings, ModelSettings
from rlvr.batches import USUAL_BATCH_SIZE, BatchPlan, batch_plan, shared_batch_size
from rlvr.errors import ConfigError
from rlvr.options import checked, option, value_type
from rlvr.secrets import without_logins
from rlvr.wording import closest

TASK = "Task and model"
ROLLOUTS = "Rollouts"
TRAINING = "Training"
LORA = "LoRA"
MEMORY = "Memory and precision"
RUN = "Run"

LOSS_TYPES = ("grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo")
SCHEDULERS = (
    *("linear", "cosine", "cosine_with_restarts", "polynomial"),
    *("constant", "constant_with_warmup", "inverse_sqrt"),
)
TOOL_CALL_PARSERS = ("hermes", "llama3_json", "mistral")
TRACKERS = ("wandb", "tensorboard", "mlflow", "comet_ml", "trackio", "swanlab")
EVALUATION_SETTINGS = (  # those of `TrainSettings` that `evaluate` takes too
    *("model", "backend", "revision", "trust_remote_code", "max_prompt_length", "max_tokens"),
    *("top_p", "top_k", "min_p", "repetition_penalty", "rollout_engine", "tool_call_parser"),
    *("dtype", "bf16", "fp16", "load_in_4bit", "load_in_8bit", "attention", "seed"),
)
PREFLIGHT_SETTINGS = (*EVALUATION_SETTINGS, "temperature", "num_generations", "prompts_per_step")


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """What a run is to do. The defaults are TRL's, but for those that a LoRA run on one GPU wants otherwise:
    a learning rate of 1e-5, 8 prompts a step, 1,024 completion tokens, every step logged.

    Raises:
        ConfigError: values of the wrong type or out of range, or that contradict each other; all problems at once.
    """

    env: str | None = option(None, "environment to train on; without it the quickstart runs", TASK, cli=False)
    env_options: dict[str, Any] = option({}, "the environment's own options", TASK, cli=False)  # noqa: RUF009
    model: str | None = option(None, "model id on the Hub, or a local folder", TASK)
    backend: str | None = option(None, "model backend; without it $RLVR_BACKEND, else hf", TASK)
    revision: str | None = option(None, "branch, tag or commit of the model on the Hub", TASK)
    trust_remote_code: bool = option(False, "run Python code that comes with the model", TASK)

    num_generations: int = option(8, "completions of each prompt: the group, G", ROLLOUTS, least=2)
    prompts_per_step: int | None = option(
        None,
        "prompts of an optimizer step; 8 unless batch size and accumulation say otherwise",
        ROLLOUTS,
        least=1,
    )
    max_prompt_length: int = option(2048, "tokens; examples with longer prompts are left out", ROLLOUTS, least=1)
    max_tokens: int = option(1024, "tokens of a completion, tool text included", ROLLOUTS, least=1)
    temperature: float = option(1.0, "sampling temperature", ROLLOUTS, above=0)
    top_p: float = option(1.0, "nucleus sampling; 1: off", ROLLOUTS, above=0, most=1)
    top_k: int = option(0, "sample from the k likeliest tokens; 0: off", ROLLOUTS, least=0)
    min_p: float | None = option(
        None, "least probability relative to the likeliest token's; by default off", ROLLOUTS, least=0, most=1
    )
    repetition_penalty: float = option(1.0, "above 1 makes repeated tokens less likely", ROLLOUTS, above=0)
    rollout_engine: str = option(
        "auto", "what generates tokens", ROLLOUTS, choices=("auto", "generate", "grouped", "vllm")
    )
    vllm_server: str | None = option(
        None,
        "with --rollout-engine vllm, the address of a server that 'trl vllm-serve' started, such as "
        "http://localhost:8000; by default vLLM runs in the process that trains",
        ROLLOUTS,
    )
    tool_call_parser: str | None = option(
        None,
        f"format of tool calls: {', '.join(TOOL_CALL_PARSERS)}, or my_module:my_parser; by default found from the "
        "chat template",
        ROLLOUTS,
    )
    canary_every: int = option(
        0,
        "steps between checks that the sampler follows the policy; 0: after 0, 10, 100, ... steps and at the last "
        "rollout",
        ROLLOUTS,
        least=0,
    )

    batch_size: int | None = option(
        None,
        "completions in a micro-batch on each device, as in TRL; by default 8, or where prompts are shared up to 32 "
        "that compute no more tokens (not with FSDP or DeepSpeed)",
        TRAINING,
        least=1,
    )
    gradient_accumulation_steps: int | None = option(
        None,
        "micro-batches of an optimizer step; by default follows from prompts per step",
        TRAINING,
        least=1,
    )
    max_steps: int | None = option(None, "optimizer steps; wins over --num-epochs", TRAINING, least=1)
    num_epochs: float = option(1.0, "passes over the training examples", TRAINING, above=0)
    learning_rate: float | None = option(None, "by default 1e-5 with LoRA, 1e-6 without", TRAINING, above=0)
    lr_scheduler_type: str = option("linear", "course of the learning rate", TRAINING, choices=SCHEDULERS)
    warmup_steps: int = option(0, "steps over which the learning rate rises from 0", TRAINING, least=0)
    weight_decay: float = option(0.0, "AdamW's weight decay", TRAINING, least=0)
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm", TRAINING, above=0)
    loss_type: str = option("dapo", "loss, in TRL's names", TRAINING, choices=LOSS_TYPES)
    kl_beta: float = option(0.0, "weight of the KL term against the reference model; 0: none", TRAINING, least=0)
    scale_rewards: str = option(
        "group",
        "standard deviation that advantages are divided by",
        TRAINING,
        choices=("group", "batch", "none"),
    )
    num_iterations: int = option(1, "updates made with each batch of rollouts", TRAINING, least=1)
    shared_prefix: str = option(
        "auto", "compute each distinct prompt once in training", TRAINING, choices=("auto", "on", "off")
    )

    peft: bool = option(True, "train a LoRA adapter; --no-peft trains every weight", LORA)
    lora_r: int = option(16, "rank", LORA, least=1)
    lora_alpha: int = option(16, "the adapter is scaled by alpha / r", LORA, least=1)
    lora_alpha_multiplier: float | None = option(
        None,
        "alpha is multiplied by this; by default what the backend recommends (unsloth 2, hf 1)",
        LORA,
        above=0,
    )
    lora_dropout: float = option(0.0, "dropout before the adapter", LORA, least=0, below=1)
    lora_target_modules: str = option("all-linear", "module names with commas between, or all-linear", LORA)
    lora_bias: str = option("none", "bias weights to train", LORA, choices=CHOICES["bias"])
    lora_init: str = option("default", "how the adapter starts", LORA, choices=CHOICES["init"])
    lora_rslora: bool = option(False, "scale by alpha / sqrt(r)", LORA)
    lora_dora: bool = option(False, "weight-decomposed LoRA", LORA)

    dtype: str = option("auto", "type of the weights; auto: the checkpoint's", MEMORY, choices=CHOICES["dtype"])
    bf16: bool = option(False, "short for --dtype bfloat16", MEMORY)
    fp16: bool = option(False, "short for --dtype float16", MEMORY)
    load_in_4bit: bool = option(False, "quantize the frozen weights to 4 bits (QLoRA)", MEMORY)
    load_in_8bit: bool = option(False, "quantize the frozen weights to 8 bits", MEMORY)
    gradient_checkpointing: bool | None = option(
        None, "recompute activations to save memory; by default where they take over a quarter of what is free", MEMORY
    )
    attention: str = option("auto", "attention implementation", MEMORY, choices=CHOICES["attention"])
    fast_inference: str = option(
        "auto",
        "the backend's own inference engine beside the model",
        MEMORY,
        choices=CHOICES["fast_inference"],
    )
    gpu_memory_utilization: float | None = option(
        None,
        "share of GPU memory that an inference engine may take; by default 0.9, or 0.3 with --rollout-engine vllm",
        MEMORY,
        above=0,
        most=1,
    )

    output_dir: str | None = option(None, "run folder; by default outputs/<run name>", RUN)
    run_name: str | None = option(None, "by default made of environment, model, backend and time", RUN)
    report_to: str = option(
        "auto", "auto (wandb if logged in), none, or trackers with commas between: wandb,tensorboard", RUN
    )
    resume_from_checkpoint: str | None = option(
        None, "a checkpoint folder, or 'last' for the run folder's newest", RUN
    )
    save_steps: int = option(100, "steps between checkpoints", RUN, least=1)
    logging_steps: int = option(1, "steps between rows of metrics", RUN, least=1)
    eval_samples: int = option(100, "held-out examples to evaluate on before and after; 0: none", RUN, least=0)
    eval_every: int = option(0, "steps between further evaluations; 0: none", RUN, least=0)
    push_to_hub: bool = option(
        False, "push the trained adapter or model to the Hub at the end, with a model card", RUN
    )
    hub_model_id: str | None = option(None, "repository to push to; by default the run name", RUN)
    seed: int = option(0, "of data order, sampling and new weights", RUN, least=0, most=2**32 - 1)

    def __post_init__(self) -> None:
        problems = []
        for definition in fields(self):
            value, problem = checked(definition, option_type(definition), getattr(self, definition.name))
            object.__setattr__(self, definition.name, value)
            problems += [problem] if problem else []
        if not problems:  # the comparisons below are between values of the right type
            problems = self._contradictions()
        if problems:
            raise ConfigError(problems)

    def _contradictions(self) -> list[str]:
        problems = []
        if self.bf16 and self.fp16:
            problems.append("bf16 and fp16 are both on; choose one.")
        for flag, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
            if getattr(self, flag) and self.dtype not in ("auto", dtype):
                problems.append(f"{flag} is on and dtype is {self.dtype!r}; leave one out.")
        if self.load_in_4bit and self.load_in_8bit:
            problems.append("load_in_4bit and load_in_8bit are both on; choose one.")
        if not self.peft and (self.load_in_4bit or self.load_in_8bit):
            problems.append("quantized weights cannot be trained; use LoRA (--peft), or no quantization.")
        if not self.peft and (self.fp16 or self.dtype == "float16"):
            problems.append(
                "float16 weights cannot be trained in full; use --bf16, --dtype float32, or LoRA (--peft)."
            )
        trackers = self.report_to.split(",")
        if self.report_to not in ("auto", "none") and not set(trackers) <= set(TRACKERS):
            allowed = f"auto, none, or of these, with commas between: {', '.join(TRACKERS)}"
            problems.append(f"report_to is {self.report_to!r}; allowed: {allowed}.")
        problems += self._vllm_server_problems()
        parser = self.tool_call_parser
        if parser is not None and ":" not in parser and parser not in TOOL_CALL_PARSERS:
            allowed = f"{', '.join(TOOL_CALL_PARSERS)}, or my_module:my_parser of your own"
            problems.append(f"tool_call_parser is {parser!r}; allowed: {allowed}.{closest(parser, TOOL_CALL_PARSERS)}")
        plan = self._batch_plan()
        if isinstance(plan, str):
            problems.append(plan)
        return problems

    def _vllm_server_problems(self) -> list[str]:
        if self.vllm_server is None:
            return []
        problems, given = [], f"vllm_server is {without_logins(self.vllm_server)!r}"
        if not self.vllm_server.startswith(("http://", "https://")):
            problems.append(f"{given}; it must be an address such as http://localhost:8000.")
        if without_logins(self.vllm_server) != self.vllm_server:
            problems.append(
                "vllm_server has a user or a password in it, which TRL would store with its arguments and give to "
                "trackers. Use an address without."
            )
        if self.rollout_engine != "vllm":
            problems.append(f"{given} and rollout_engine is {self.rollout_engine!r}; use --rollout-engine vllm.")
        if self.gpu_memory_utilization is not None:
            problems.append(
                f"{given} and gpu_memory_utilization is {self.gpu_memory_utilization}: a server takes its share when "
                "it is started. Give it there."
            )
        if self.fast_inference == "on":
            problems.append(f"{given} and fast_inference is 'on', which is another vLLM; leave one out.")
        return problems

    def _batch_plan(self, *, shares: bool = True) -> BatchPlan | str:
        return batch_plan(
            num_generations=self.num_generations,
            batch_size=self.batch_size,
            gradient_accumulation_steps=self.gradient_accumulation_steps,
            prompts_per_step=self.prompts_per_step,
            processes=processes(),
            usual_batch_size=self._usual_batch_size(shares),
        )

    def _usual_batch_size(self, shares: bool) -> int:
        backend = self.backend or os.environ.get("RLVR_BACKEND")
        if not shares or self.shared_prefix == "off" or backend == "unsloth":
            return USUAL_BATCH_SIZE
        return shared_batch_size(
            num_generations=self.num_generations,
            prompt_tokens=self.max_prompt_length,
            completion_tokens=self.max_tokens,
        )

    def resolved(self) -> TrainSettings:
        """With the values that follow from others filled in: prompts of a step, learning rate, dtype.

        Micro-batches follow from the model too, once it is loaded: see `planned`.
        """
        plan = self._batch_plan()
        assert isinstance(plan, BatchPlan)  # `__post_init__` has checked it
        return replace(
            self,
            prompts_per_step=plan.prompts_per_step,
            learning_rate=self.learning_rate or (1e-5 if self.peft else 1e-6),
            dtype="bfloat16" if self.bf16 else "float16" if self.fp16 else self.dtype,
        )

    def planned(self, *, shares: bool = True) -> TrainSettings:
        """With the size and the number of micro-batches filled in, where they were not given.

        Args:
            shares: whether the model's training forward can compute each prompt once; with padded rows of their own
                completions take more memory.
        """
        plan = self._batch_plan(shares=shares)
        assert isinstance(plan, BatchPlan)
        return replace(self, batch_size=plan.batch_size, gradient_accumulation_steps=plan.gradient_accumulation_steps)

    def model_settings(self) -> ModelSettings:
        return ModelSettings(
            model=self.model or "",
            revision=self.revision,
            max_seq_length=self.max_prompt_length + self.max_tokens,
            dtype="bfloat16" if self.bf16 else "float16" if self.fp16 else self.dtype,  # type: ignore[arg-type]
            quantization="4bit" if self.load_in_4bit else "8bit" if self.load_in_8bit else "none",
            attention=self.attention,  # type: ignore[arg-type]
            trust_remote_code=self.trust_remote_code,
            full_finetuning=not self.peft,
            gradient_checkpointing=self.gradient_checkpointing is not False,
            gpu_memory_utilization=self.gpu_memory_utilization or ModelSettings.gpu_memory_utilization,
            fast_inference="off" if self.vllm_server else self.fast_inference,  # type: ignore[arg-type]
            seed=self.seed,
        )

    def lora_settings(self) -> LoraSettings | None:
        """None for full fine-tuning."""
        if not self.peft:
            return None
        modules = tuple(name.strip() for name in self.lora_target_modules.split(",") if name.strip())
        return LoraSettings(
            r=self.lora_r,
            alpha=self.lora_alpha,
            alpha_multiplier=self.lora_alpha_multiplier,
            dropout=self.lora_dropout,
            target_modules="all-linear" if modules == ("all-linear",) else modules,
            bias=self.lora_bias,  # type: ignore[arg-type]
            rslora=self.lora_rslora,
            dora=self.lora_dora,
            init=self.lora_init,  # type: ignore[arg-type]
            seed=self.seed,
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


LOADING = frozenset(  # settings that a policy is loaded with, and that come too late for one that is loaded
    definition.name
    for definition in fields(TrainSettings)
    if definition.metadata["group"] in (LORA, MEMORY) or definition.name in ("revision", "trust_remote_code")
)


def processes() -> int:
    """Training processes of this run, as torchrun and accelerate state them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def settings_from(*layers: Mapping[str, Any], required: Iterable[str] = ()) -> TrainSettings:
    """The settings that `layers` give, later ones winning; the environment's options one by one.

    Raises:
        ConfigError: unknown names, impossible values, and `required` ones that are missing; all problems at once.
    """
    merged = merge(*layers)
    known = [definition.name for definition in fields(TrainSettings)]
    problems = [
        f"unknown option {name!r}. 'rlvr train --help' lists the options.{closest(name, known)}"
        for name in merged
        if name not in known
    ]
    problems += [_MISSING[name] for name in required if not merged.get(name)]
    try:
        settings = TrainSettings(**{name: value for name, value in merged.items() if name in known})
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from None
    if problems:
        raise ConfigError(problems)
    return settings


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Later layers win. The options of an environment are merged one by one, as long as it is the same one.

    A layer that names a run and no output folder gets the default folder of that name, not an earlier layer's.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        values = {name.replace("-", "_"): value for name, value in layer.items()}
        before, added = merged.get("env_options"), values.get("env_options")
        same = values.get("env", merged.get("env")) == merged.get("env", values.get("env"))
        if not same and added is None:
            values["env_options"] = {}
        elif same and isinstance(before, Mapping) and isinstance(added, Mapping):
            values["env_options"] = {**before, **added}
        if all(
            merged.get(name) for name in _STEP_SIZES
        ):  # a resolved configuration: one has to follow from the others
            if "gradient_accumulation_steps" not in values and values.keys() & {*_STEP_SIZES, "num_generations"}:
                del merged["gradient_accumulation_steps"]
            elif "gradient_accumulation_steps" in values and "prompts_per_step" not in values:
                del merged["prompts_per_step"]
        if values.get("run_name") and "output_dir" not in values:
            merged.pop("output_dir", None)
        merged.update(values)
    return merged


_STEP_SIZES = ("batch_size", "gradient_accumulation_steps", "prompts_per_step")
_MISSING = {
    "env": "no environment was given; 'rlvr environments' lists what there is.",
    "model": "no model was given; use --model with a model id or a folder, for example Qwen/Qwen2.5-0.5B-Instruct.",
}


def read_config(path: str | Path) -> dict[str, Any]:
    """The options in a YAML file.

    Raises:
        ConfigError: the file cannot be read, is not YAML, or is not a mapping of option names.
    """
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration file {str(path)!r}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"the configuration file {str(path)!r} is not valid YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(
            f"the configuration file {str(path)!r} is not a mapping of options; write lines such as 'batch_size: 8'."
        )
    return content


@functools.cache
def _type_hints() -> dict[str, Any]:
    return get_type_hints(TrainSettings)


def option_type(definition: Field[Any]) -> tuple[Any, bool]:
    """The type of a field of `TrainSettings` and whether it may be None."""
    return value_type(_type_hints()[definition.name])
