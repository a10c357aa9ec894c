"""Which rollout engine a trainer uses, and why not a faster one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any, Literal

from rlvr.errors import ConfigError, UnsupportedSettingError
from rlvr.rollout.engine import RolloutEngine, SamplingSettings
from rlvr.trainers.sharding import sharding_problem

if TYPE_CHECKING:
    from rlvr.trainers.rollouts import RolloutMixin

RolloutEngineName = Literal["auto", "generate", "grouped", "vllm"]
ENGINES = ("auto", "generate", "grouped", "vllm")

OF_GENERATE: dict[str, Any] = {
    "top_k": 0,
    "min_p": 0.0,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "guidance_scale": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "bad_words_ids": [],
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
    "sequence_bias": {},
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "min_length": 0,
    "min_new_tokens": 0,
    "exponential_decay_length_penalty": None,
    "watermarking_config": None,
    "num_beams": 1,
    "max_time": None,
}
"""Options of transformers' `GenerationConfig` that change what is sampled, each with the value that does nothing, as
None does not either. `generate` takes from the model's own what TRL's leaves open: temperature, top-p and repetition
penalty never, min-p and top-k where they are None."""


@dataclass(frozen=True)
class EngineChoice:
    """`fallback`: why the grouped engine is not used, in one line; None where it is, or was not wanted."""

    engine: RolloutEngine
    fallback: str | None = None


def choose_engine(trainer: RolloutMixin, asked: RolloutEngineName) -> EngineChoice:
    """
    Raises:
        ConfigError: there is no engine of that name, or it contradicts `args.use_vllm`; or several processes would
            play turns on one vLLM server.
        UnsupportedSettingError: "grouped" was asked for and cannot run this model or these options.
    """
    if asked not in ENGINES:
        raise ConfigError(f"rollout_engine is {asked!r}; allowed: {', '.join(ENGINES)}.")
    if asked == "vllm" and not trainer.args.use_vllm:
        raise ConfigError("rollout_engine is 'vllm' and args.use_vllm is False; set GRPOConfig(use_vllm=True).")
    if asked in ("generate", "grouped") and trainer.args.use_vllm:
        raise ConfigError(f"rollout_engine is {asked!r} and args.use_vllm is True; leave one of them out.")
    if trainer.args.use_vllm:
        _refuse_turns_of_several_processes(trainer)
        return EngineChoice(_plain(trainer, name="vllm"))
    if asked == "generate":
        return EngineChoice(_plain(trainer))
    problem = grouped_problem(trainer)
    if problem is None:
        return EngineChoice(_grouped(trainer))
    if asked == "grouped":
        raise UnsupportedSettingError(
            f"the grouped rollout engine cannot be used: {problem}. Use rollout_engine='auto' or 'generate'."
        )
    return EngineChoice(_plain(trainer), fallback=problem)


def _refuse_turns_of_several_processes(trainer: RolloutMixin) -> None:
    """Whenever a process samples, TRL gathers the prompts of all for the server, as many from each. Later turns of an
    environment come when they come, and the processes would wait for each other, or get each other's completions."""
    env, processes = trainer.env, trainer.accelerator.num_processes
    if trainer.args.vllm_mode == "server" and env is not None and env.max_turns > 1 and processes > 1:
        raise ConfigError(
            f"{processes} processes train with one vLLM server, and environment {env.name!r} has up to "
            f"{env.max_turns} turns, which TRL cannot sample there. Train in one process, or use vLLM in each "
            "(vllm_mode='colocate'; leave --vllm-server out)."
        )


def sampling_settings(args: Any) -> SamplingSettings:
    """The sampling options of a `GRPOConfig`."""
    return SamplingSettings(
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k or 0,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
    )


def grouped_problem(trainer: RolloutMixin) -> str | None:
    """Why the grouped engine cannot serve this trainer, in one line; None if it can."""
    from rlvr.rollout.grouped import GroupedEngine

    args = trainer.args
    options = [
        name
        for name in ("generation_kwargs", "cache_implementation", "use_transformers_continuous_batching")
        if getattr(args, name, None)
    ]
    if options:
        return f"{', '.join(options)} of GRPOConfig are for transformers' generate"
    if (problem := sharding_problem(trainer)) is not None:
        return problem
    if not hasattr(trainer.processing_class, "convert_tokens_to_ids"):
        return "the model reads images or sound"
    model = _unwrapped(trainer)
    if (problem := GroupedEngine.unsupported(model, sampling_settings(args))) is not None:
        return problem
    if args.top_k is None:
        return "top_k is None, which leaves it to transformers' generate: the 50 likeliest by default; 0 is off"
    if own := generate_options(model.generation_config, given=trainer.generation_config):
        return f"the model's generation config sets {', '.join(own)}, which only transformers' generate follows"
    return None


def generate_options(own: Any, *, given: Any) -> list[str]:
    """Names of the options that change what `generate` samples, and that it takes from a model's `own` generation
    config because the one it is `given` leaves them open."""
    return [
        name
        for name, idle in OF_GENERATE.items()
        if getattr(given, name, None) is None and getattr(own, name, None) not in (None, idle)
    ]


def _plain(trainer: RolloutMixin, name: str = "generate") -> RolloutEngine:
    from rlvr.rollout.generate import GenerateEngine

    return GenerateEngine(trainer.sample_with_trl, end_token_ids=trainer.eos_token_ids, name=name)


def _grouped(trainer: RolloutMixin) -> RolloutEngine:
    from rlvr.rollout.grouped import GroupedEngine

    return GroupedEngine(
        _unwrapped(trainer),
        sampling=sampling_settings(trainer.args),
        eos_token_ids=trainer.eos_token_ids,
        seed=rollout_seeds(trainer.accelerator.process_index),
        rollouts=lambda: rollouts_of_run(trainer),
    )


def rollouts_of_run(trainer: RolloutMixin) -> int:
    """Of the whole run, also where it is resumed: what is compiled rounds differently, so both have to do the same. 0
    before the first run."""
    args, steps = trainer.args, trainer.state.max_steps
    return ceil(steps * args.gradient_accumulation_steps / (args.steps_per_generation * args.num_iterations))


def rollout_seeds(process_index: int) -> Callable[[], int]:
    """Draws a seed for each rollout from torch's random numbers of the CPU.

    Checkpoints hold those, so that a resumed run samples as one that was never stopped. Processes differ, also where
    their random numbers are the same.
    """
    import torch

    return lambda: int(torch.randint(2**62, (), device="cpu")) + process_index


def _unwrapped(trainer: RolloutMixin) -> Any:
    return trainer.accelerator.unwrap_model(trainer.model)
