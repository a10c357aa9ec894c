"""Whether what samples is the policy that is trained: rollout log-probabilities against the training forward's.

A sampler that does not follow the policy (weights that were not synchronised, an adapter that was not merged, another
dtype, another chat template) trains without a complaint, on the wrong distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rlvr.errors import SamplerDriftError

if TYPE_CHECKING:
    from rlvr.trainers.rollouts import RolloutMixin

BOUNDS = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Mean absolute difference of log-probabilities, in nats, above which a run stops, by the dtype that they are computed
in. Rounding alone stays an order of magnitude below."""


def computed_in(trainer: Any) -> torch.dtype:
    """The coarsest dtype of the training forward, that of its autocast, where there is one, or of the weights, and of
    the sampler: vLLM, unless told otherwise, computes with float32 weights in bfloat16.

    Unsloth's trainer switches autocast on for float32 weights, in its arguments.
    """
    dtypes = [trainer.model.dtype] + [torch.bfloat16] * trainer.args.bf16 + [torch.float16] * trainer.args.fp16
    if trainer.use_vllm and trainer.model.dtype == torch.float32:
        dtypes.append(torch.bfloat16)
    return max(dtypes, key=_bound)


def bound_of(trainer: Any) -> float:
    """In nats, see `BOUNDS`."""
    return _bound(computed_in(trainer))


def _bound(dtype: torch.dtype) -> float:
    return BOUNDS.get(dtype, BOUNDS[torch.bfloat16])


@dataclass(frozen=True)
class Drift:
    """Of the sampled tokens looked at. `mean_difference` and `max_difference` in nats."""

    rollout_mean: float  # mean log-probability as the rollout gave it
    training_mean: float  # and as the training forward gives it
    mean_difference: float
    max_difference: float
    tokens: int


def check_sampler(
    trainer: RolloutMixin,
    prompt_ids: list[list[int]],
    completion_ids: list[list[int]],
    sampled_mask: list[list[int]],
    logprobs: list[list[float]],
) -> Drift:
    """Recomputes the log-probabilities of a few rollouts.

    Args:
        trainer: its policy must not have been trained since the rollout.
        sampled_mask: 1 for sampled tokens; the others are not compared.
        logprobs: as the rollout gave them, at the sampling temperature, in nats.

    Raises:
        SamplerDriftError: they differ by more than rounding explains; names both numbers.
    """
    from trl.trainer.utils import pad

    device = trainer.accelerator.device
    padding = trainer.processing_class.pad_token_id

    def padded(rows: list[list[Any]], value: int, side: str) -> torch.Tensor:
        return pad([torch.tensor(row) for row in rows], padding_value=value, padding_side=side).to(device)

    ones = [[1] * len(ids) for ids in prompt_ids]
    completion_ones = [[1] * len(ids) for ids in completion_ids]
    ids = torch.cat([padded(prompt_ids, padding, "left"), padded(completion_ids, padding, "right")], dim=1)
    mask = torch.cat([padded(ones, 0, "left"), padded(completion_ones, 0, "right")], dim=1)
    width = max(map(len, completion_ids))
    with torch.no_grad():
        trained, *_ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, width)
    trained = _completions_of(trained, mask, width)
    counts = padded(sampled_mask, 0, "right").bool()
    sampled = padded(logprobs, 0, "right").float()[counts]
    trained = trained.float()[counts]
    difference = (sampled - trained).abs()
    drift = Drift(
        rollout_mean=sampled.mean().item(),
        training_mean=trained.mean().item(),
        mean_difference=difference.mean().item(),
        max_difference=difference.max().item(),
        tokens=int(counts.sum()),
    )
    bound = bound_of(trainer)
    if not drift.mean_difference <= bound:  # also when it is not a number
        raise SamplerDriftError(
            f"the rollout engine {trainer.engine.name!r} does not sample from the policy that is trained: over "
            f"{drift.tokens} sampled tokens its mean log-probability is {drift.rollout_mean:.4f}, the training "
            f"forward's is {drift.training_mean:.4f}, and they differ by {drift.mean_difference:.4f} nats on average "
            f"(at most {drift.max_difference:.4f}); allowed: {bound:g} in {computed_in(trainer)}. "
            "Try rollout_engine='generate'; if that agrees, please report the model and the versions."
        )
    return drift


def _completions_of(logps: torch.Tensor, mask: torch.Tensor, width: int) -> torch.Tensor:
    """The completions' columns (B, `width`) of a training forward's log-probabilities.

    Unsloth's trainer moves the rows to the left, over their padding, and gives the end of what it has then: rows that
    were padded by less than the most begin that much later.
    """
    if logps.shape[1] == width:
        return logps
    padding = (mask[:, :-width] == 0).sum(dim=1)
    columns = torch.arange(width, device=logps.device) + (logps.shape[1] - width - padding)[:, None]
    return logps.gather(1, columns)


def shortest(
    prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]], count: int = 4
) -> list[int]:
    """The rows of the shortest few rollouts: a canary should cost little."""
    lengths = [len(prompt) + len(ids) for prompt, ids in zip(prompt_ids, completion_ids, strict=True)]
    return sorted(range(len(lengths)), key=lengths.__getitem__)[:count]


def probe(trainer: RolloutMixin, prompt_ids: list[list[int]], tokens: int = 8) -> tuple[Any, Any]:
    """A few tokens through transformers' `generate` with their log-probabilities, for engines that give none.

    Returns:
        (sampled ids, log-probabilities at the sampling temperature), a list for each prompt.
    """
    from trl.models import unwrap_model_for_generation

    longest = max(map(len, prompt_ids))
    padding, device = trainer.processing_class.pad_token_id, trainer.accelerator.device
    ids = torch.tensor([[padding] * (longest - len(row)) + row for row in prompt_ids], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompt_ids], device=device)
    with unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator) as model, torch.no_grad():
        output = model.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens,
            temperature=None, top_p=None, top_k=None, pad_token_id=padding, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    sampled = output.sequences[:, longest:]
    logits = torch.stack(output.logits, dim=1).float() / trainer.temperature
    logprobs = logits.log_softmax(-1).gather(-1, sampled.unsqueeze(-1)).squeeze(-1)
    return sampled.tolist(), logprobs.tolist()
