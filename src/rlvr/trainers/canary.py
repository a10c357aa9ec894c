"""Whether what samples is the policy that is trained.

A sampler that does not follow the policy (weights that were not synchronised, an adapter that was not merged, another
dtype, another chat template) trains without a complaint, on the wrong distribution. Two checks:

- `check_sampler`, where the engine gives log-probabilities: they are compared with the training forward's.
- `check_samples`, where it gives none, or of another distribution: from the sampled tokens alone.

They see what exceeds `BOUNDS`, the second what exceeds chance too. A lost adapter is seen once it has moved
log-probabilities by more: by 0.001 nats in float32, which takes a few steps, and by 0.1 nats in bfloat16, which takes
many at a small learning rate; a fresh adapter does nothing and cannot be missed. Whether a sampler is nearer to the
policy without its adapter is no test in bfloat16 either, where rounding moves more than a small adapter does.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rlvr.errors import SamplerDriftError

if TYPE_CHECKING:
    from rlvr.trainers.rollouts import RolloutMixin

BOUNDS = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Mean absolute difference of log-probabilities, in nats, above which a run stops, by the dtype that they are computed
in. Rounding alone stays an order of magnitude below."""

FALSE_ALARMS = 1e-6
"""Of the checks of sound samples at most this share stops a run: about as many as are 5 standard errors off."""

_ROWS, _TOKENS_OF_A_ROW = 16, 64  # what `check_samples` looks at

_TILTS = tuple(sign * 2.0**-power for sign in (-1, 1) for power in range(1, 7))


def computed_in(trainer: Any) -> torch.dtype:
    """The coarsest dtype of the training forward, that of its autocast, where there is one, or of the weights, and of
    the sampler: vLLM, unless told otherwise, computes with float32 weights in bfloat16. What 8-bit layers make of one
    row depends a little on the others, whatever the other layers are in.

    Unsloth's trainer switches autocast on for float32 weights, in its arguments.
    """
    dtypes = [trainer.model.dtype] + [torch.bfloat16] * trainer.args.bf16 + [torch.float16] * trainer.args.fp16
    if getattr(trainer.model, "is_loaded_in_8bit", False):
        dtypes.append(torch.bfloat16)
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
    *,
    sampler: str | None = None,
) -> Drift | None:
    """Recomputes the log-probabilities of the few shortest rollouts; None where Unsloth's trainer would misread all.

    Args:
        trainer: its policy must not have been trained since the rollout.
        sampled_mask: 1 for sampled tokens, of which there are some; the others are not compared.
        logprobs: as the rollout gave them, at the sampling temperature, in nats.
        sampler: what gave them; by default the trainer's engine.

    Raises:
        SamplerDriftError: they differ by more than rounding explains; names both numbers.
    """
    from trl.trainer.utils import pad

    padding = trainer._tokenizer.pad_token_id
    rows = [row for row, mask in enumerate(sampled_mask) if any(mask)]
    if trainer._on_unsloth_trainer:  # takes every token of this id for padding, which does no harm at the end
        rows = [row for row in rows if padding not in (*prompt_ids[row], *completion_ids[row][:-1])]
        if not rows:
            return None
    rows = sorted(rows, key=lambda row: len(prompt_ids[row]) + len(completion_ids[row]))[:4]  # it should cost little
    prompt_ids, completion_ids = [prompt_ids[row] for row in rows], [completion_ids[row] for row in rows]
    sampled_mask, logprobs = [sampled_mask[row] for row in rows], [logprobs[row] for row in rows]
    device = trainer.accelerator.device

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
            f"{sampler or _engine_of(trainer)} does not sample from the policy that is trained: over "
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


def check_samples(
    trainer: RolloutMixin,
    prompt_ids: list[list[int]],
    completion_ids: list[list[int]],
    sampled_mask: list[list[int]],
    *,
    truncated: bool = False,
    sampler: str | None = None,
) -> Drift | None:
    """Whether tokens are samples of the policy, where their log-probabilities are not known.

    transformers' `generate` is made to write them again. Its log-probabilities are compared with the training
    forward's, and their mean with that of the policy's own samples. Looks at the first turn of the rollouts with the
    shortest prompts, its first tokens: never at what was chosen by what was sampled, since short completions, for
    example, are those in which an unlikely end was drawn.

    Args:
        trainer: its policy must not have been trained since the rollout.
        sampled_mask: 1 for sampled tokens, of which there are some.
        truncated: sampled with top-k (1: greedy), top-p or min-p, which leave likely tokens only: the mean may then
            be above that of the policy's own samples.
        sampler: what sampled; by default the trainer's engine.

    Returns:
        `generate` against the training forward, as from `check_sampler`.

    Raises:
        SamplerDriftError: the tokens are not the policy's, or `generate` is not the training forward.
    """
    rollouts = zip(prompt_ids, completion_ids, sampled_mask, strict=True)
    turns = [_first_turn(*rollout, trainer.eos_token_ids) for rollout in rollouts if any(rollout[-1])]
    turns = sorted(turns, key=lambda turn: len(turn[0]))[:_ROWS]
    prompts, tokens = [prompt for prompt, _ in turns], [turn for _, turn in turns]
    written = _write_again(trainer, prompts, tokens)
    masks = [[1] * len(turn) for turn in tokens]
    logprobs = [row.logprobs.tolist() for row in written]
    drift = check_sampler(trainer, prompts, tokens, masks, logprobs, sampler="transformers' generate")

    mean = torch.cat([row.drawn for row in written]).mean().item()
    expected = -torch.cat([row.entropies for row in written]).mean().item()
    below, above = chance(torch.cat([row.cumulants for row in written]))
    bound = bound_of(trainer)
    lowest, highest = expected - below - bound, 0.0 if truncated else min(0.0, expected + above + bound)
    penalty = trainer.repetition_penalty
    penalized = "" if penalty == 1 else f" with its repetition penalty of {penalty:g}"
    if not lowest <= mean <= highest:
        raise SamplerDriftError(
            f"{sampler or _engine_of(trainer)} does not sample from the policy that is trained: the "
            f"{sum(map(len, tokens))} tokens looked at have a mean log-probability of {mean:.4f} by the policy"
            f"{penalized}, and its own samples would have {expected:.4f}; allowed, by chance and for {bound:g} of "
            f"rounding in {computed_in(trainer)}: {lowest:.4f} to {highest:.4f}. Let it sample with the weights of "
            f"the step, at temperature {trainer.temperature:g}."
        )
    return drift


def _first_turn(
    prompt_ids: list[int], completion_ids: list[int], sampled_mask: list[int], ends: Collection[int]
) -> tuple[list[int], list[int]]:
    """(the ids before the first sampled token, the first sampled ones, to the end of the turn at most)."""
    start = sampled_mask.index(1)
    turn: list[int] = []
    for token, sampled in zip(completion_ids[start:], sampled_mask[start:], strict=True):
        if not sampled or len(turn) == _TOKENS_OF_A_ROW:
            break
        turn.append(token)
        if token in ends:
            break
    return [*prompt_ids, *completion_ids[:start]], turn


@dataclass(frozen=True)
class Written:
    """Of T tokens as `generate` writes them, at the sampling temperature, in nats."""

    logprobs: torch.Tensor  # (T,), by the policy
    drawn: torch.Tensor  # (T,), by the distributions that they are drawn from, after the repetition penalty
    entropies: torch.Tensor  # (T,), of these
    cumulants: torch.Tensor  # (T, tilts)


def _write_again(trainer: RolloutMixin, prompt_ids: list[list[int]], token_ids: list[list[int]]) -> list[Written]:
    from transformers import RepetitionPenaltyLogitsProcessor
    from trl.models import unwrap_model_for_generation

    padding, device = trainer._tokenizer.pad_token_id, trainer.accelerator.device
    before, after = max(map(len, prompt_ids)), max(map(len, token_ids))
    ids = torch.tensor([[padding] * (before - len(row)) + row for row in prompt_ids], device=device)
    mask = torch.tensor([[0] * (before - len(row)) + [1] * len(row) for row in prompt_ids], device=device)
    forced = [row + [padding] * (after - len(row)) for row in token_ids]
    with unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator) as model, torch.no_grad():
        output = model.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, num_beams=1, max_new_tokens=after,
            temperature=None, top_p=None, top_k=None, pad_token_id=padding, output_logits=True,
            return_dict_in_generate=True,
            prefix_allowed_tokens_fn=lambda row, so_far: [forced[row][len(so_far) - before]],
        )  # fmt: skip
    penalize = RepetitionPenaltyLogitsProcessor(trainer.repetition_penalty)
    seen = torch.where(mask.bool(), ids, ids[:, -1:])  # a row's own tokens, not its padding
    chosen, steps = torch.tensor(forced, device=device), []
    for step, logits in enumerate(output.logits):  # one at a time, of (B, vocabulary)
        penalized = penalize(torch.cat([seen, chosen[:, :step]], dim=1), logits.float())
        by_policy, drawn = ((scores / trainer.temperature).log_softmax(-1) for scores in (logits.float(), penalized))
        of_chosen = (values.gather(-1, chosen[:, step, None]).squeeze(-1) for values in (by_policy, drawn))
        steps.append((*of_chosen, entropy(drawn), cumulants(drawn)))
    columns = [torch.stack(column, dim=1) for column in zip(*steps, strict=True)]
    return [Written(*(column[row, : len(turn)] for column in columns)) for row, turn in enumerate(token_ids)]


def entropy(logprobs: torch.Tensor) -> torch.Tensor:
    """(..., V) log-probabilities of a distribution → (...), in nats."""
    return torch.special.entr(logprobs.exp()).sum(-1)


def cumulants(logprobs: torch.Tensor) -> torch.Tensor:
    """(..., V) log-probabilities of a distribution p → (..., tilts): log E exp(t (log p + H)) for each tilt t, where H
    is the entropy, so that log p + H has the mean 0."""
    shift = entropy(logprobs)
    return torch.stack([((1 + t) * logprobs).logsumexp(-1) + t * shift for t in _TILTS], dim=-1)


def chance(cumulants: torch.Tensor) -> tuple[float, float]:
    """How far below and above its expectation the mean log-probability of N samples may be, in nats.

    For each tilt t the product of exp(t (log p + H)) / E exp(t (log p + H)) over tokens has the mean 1, whatever
    earlier tokens were (a martingale). It is so often above 1/a as a at most (Markov), which bounds the mean of
    log p + H by (mean cumulant - log(a) / N) / t: Chernoff's bound, without the assumption that the mean is normal.

    Args:
        cumulants: (N, tilts), of the distributions that the samples were drawn from.
    """
    tilts = torch.tensor(_TILTS, device=cumulants.device)
    by_tilt = (cumulants.mean(0) + math.log(len(_TILTS) / FALSE_ALARMS) / len(cumulants)) / tilts.abs()
    return by_tilt[tilts < 0].min().item(), by_tilt[tilts > 0].min().item()


def _engine_of(trainer: RolloutMixin) -> str:
    return f"the rollout engine {trainer.engine.name!r}"
