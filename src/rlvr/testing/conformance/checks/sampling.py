"""Whether rollouts are drawn from the policy that is trained.

They are sampled as in training: the trainer calls `for_training` before the first step, and `for_inference` never.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from rlvr.backends.protocol import LoadedPolicy
from rlvr.errors import SamplerDriftError
from rlvr.testing.conformance.context import CheckFailed, Context, expect, logits, quantized
from rlvr.testing.conformance.trainer import LEARNING_RATES, trainer_for

_MOVED = 3  # times the sampler's allowed drift: by so much a step has to move the policy, for staleness to show

_CALM: dict[str, Any] = {"initializer_range": 0.1}
"""Of a model that 8-bit arithmetic, a little other for other rows beside it, moves by a tenth of the allowed drift."""

_LONG = 200  # tokens
_COMPLETIONS = 64  # of 16 tokens at most: enough to tell a temperature of 0.7 from one of 0.8
_STANDARD_ERRORS = 5  # a right sampler is beyond once in a million


def sampler(context: Context) -> str:
    """Sampled log-probabilities against the training forward's, with transformers' generate and the engine chosen;
    with that also on each quantization that is claimed, of a tiny model."""
    from rlvr.testing.tiny import save_tiny

    measured = [
        follows(context, context.adapted, engine="generate", temperature=0.7),
        follows(context, context.adapted, engine="auto", temperature=1.0),
    ]
    for name in quantized(context.capabilities):
        calm = save_tiny(context.folder(), **_CALM)
        load = partial(context.adapted, model=calm, dtype="auto", quantization=name)
        said = follows(context, load, engine="auto", temperature=1.0, way=f"{name}: ")
        measured.append(f"{said}, of a tiny model")
    return f"mean difference in nats before and after: {'; '.join(measured)}"


def follows(
    context: Context, load: Callable[[], LoadedPolicy], *, engine: str, temperature: float, way: str = ""
) -> str:
    """The engine draws from the policy that is loaded, and from what a step makes of it. `way` begins what is said."""
    from rlvr.trainers.canary import bound_of

    for learning_rate in LEARNING_RATES:
        policy = load()
        options: dict[str, Any] = {"temperature": temperature, "max_steps": 1, "learning_rate": learning_rate}
        trainer = trainer_for(context, policy, rollout_engine=engine, **options)
        off = _expect_drawn(context, policy, trainer, temperature, way)
        before, probe = _drift(context, policy, trainer, f"{way}before a step"), _training_logprobs(trainer)
        trainer.train()
        moved = (_training_logprobs(trainer) - probe).abs().mean().item()
        if moved > _MOVED * bound_of(trainer):
            break
    else:
        raise CheckFailed(
            f"{way}a step moved the policy by {moved:.2g} nats, too little to tell a stale sampler from it"
        )
    after = _drift(context, policy, trainer, f"{way}after a step that moved the policy by {moved:.2g} nats")
    return f"{way}{trainer.engine.name} {before:.1g} and {after:.1g}, drawn within {abs(off):.1f} errors"


def _expect_drawn(context: Context, policy: LoadedPolicy, trainer: Any, temperature: float, way: str) -> float:
    """Tokens are drawn from the policy at this temperature: they have the log-probabilities that it gives them.

    With p the policy's own distribution at a place, and x the token drawn there, log p(x) + H(p) has mean 0 and
    variance Σ p log² p − H², whatever was drawn before. The sum over places is nearly normal.

    Returns:
        By how many standard errors the sum is off.
    """
    from rlvr.rollout.engine import sample_all

    prompt = _prompt_ids(policy)[0]
    turns = sample_all(trainer.engine, [prompt] * _COMPLETIONS, max_completion_tokens=16)
    drawn, meant, variances = [], [], []
    for turn in turns:
        row = torch.tensor([prompt + turn.token_ids], device=policy.model.device)
        values = (logits(context, policy, row)[0, len(prompt) - 1 : -1] / temperature).log_softmax(-1)
        mean = (values.exp() * values).sum(-1)
        drawn.append(values.gather(-1, torch.tensor(turn.token_ids)[:, None]).squeeze(-1))
        meant.append(mean)
        variances.append((values.exp() * values**2).sum(-1) - mean**2)
    context.backend.for_training(policy)
    found, expected = torch.cat(drawn), torch.cat(meant)
    off = ((found - expected).sum() / torch.cat(variances).sum() ** 0.5).item()
    expect(
        abs(off) <= _STANDARD_ERRORS,
        f"{way}{trainer.engine.name} does not draw from the policy at temperature {temperature:g}: {len(found)} "
        f"tokens have a mean log-probability of {found.mean():.3f}, and should have {expected.mean():.3f}: "
        f"{abs(off):.0f} standard errors off; allowed: {_STANDARD_ERRORS}. Is the temperature, top_k or top_p "
        "another one?",
    )
    return off


def _drift(context: Context, policy: LoadedPolicy, trainer: Any, when: str) -> float:
    from rlvr.rollout.engine import sample_all
    from rlvr.trainers.canary import check_sampler, check_samples
    from rlvr.trainers.reference import dropout_off

    prompts = _prompt_ids(policy)
    turns = sample_all(trainer.engine, prompts, max_completion_tokens=8)
    ids = [turn.token_ids for turn in turns]
    samples = (prompts, ids, [[1] * len(row) for row in ids])
    logprobs = [turn.logprobs for turn in turns if turn.logprobs is not None]
    try:
        with dropout_off(policy.model):  # as the trainer does
            found = [check_samples(trainer, *samples)]
            if logprobs:
                found.append(check_sampler(trainer, *samples, logprobs))
    except SamplerDriftError as error:
        raise CheckFailed(f"{when}: {error}") from error
    return max(drift.mean_difference for drift in found if drift is not None)


def _training_logprobs(trainer: Any) -> torch.Tensor:
    """What the training forward gives for fixed tokens."""
    from rlvr.trainers.reference import dropout_off

    prompts = [ids[:8] for ids in _prompt_ids_of(trainer.processing_class)]
    ids = torch.tensor(prompts, device=trainer.accelerator.device)
    with torch.no_grad(), dropout_off(trainer.model):
        values, *_ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, torch.ones_like(ids), 7)
    return values.float().cpu()


def _prompt_ids(policy: LoadedPolicy) -> list[list[int]]:
    return _prompt_ids_of(policy.tokenizer)


def _prompt_ids_of(tokenizer: Any) -> list[list[int]]:
    """Two short prompts, and one that leaves little of `max_seq_length`."""
    short = tokenizer(["What is two plus three?", "Say something about the number seven, then stop."])["input_ids"]
    return [*short, (short[1] * _LONG)[:_LONG]]
