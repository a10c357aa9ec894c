"""From logits to one token a row: what transformers' logits processors do, in their order, without leaving the device.

Every option has the semantics of the processor of its name in `transformers.generation.logits_process`: repetition
penalty on the raw logits, then temperature, top-k, top-p, min-p. Nothing here synchronises, so it can be captured in a
CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlvr.rollout.engine import SamplingSettings


def process(logits: Tensor, settings: SamplingSettings, seen: Tensor | None = None) -> Tensor:
    """The scores that a token is drawn from, as `generate` computes them; excluded tokens have -inf.

    Args:
        logits: [B, V], float32.
        seen: [B, V], true for the tokens of the prompt and of what follows; read with a repetition penalty only.
    """
    scores = logits
    if settings.repetition_penalty != 1.0 and seen is not None:
        penalty = settings.repetition_penalty
        scores = torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)
    if settings.temperature == 0:
        return scores
    if settings.temperature != 1.0:
        scores = scores / settings.temperature
    if settings.top_k > 0:
        least = scores.topk(min(settings.top_k, scores.shape[-1])).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if settings.top_p < 1.0:
        ascending, order = scores.sort(dim=-1)
        excluded = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - settings.top_p
        excluded[:, -1].fill_(False)
        scores = scores.masked_fill(excluded.scatter(1, order, excluded), -torch.inf)
    if settings.min_p is not None:
        probabilities = scores.softmax(dim=-1)
        # the likeliest token can never fall below a share of its own probability
        scores = scores.masked_fill(probabilities < settings.min_p * probabilities.amax(-1, keepdim=True), -torch.inf)
    return scores


def draw(
    logits: Tensor, settings: SamplingSettings, *, generator: torch.Generator, seen: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One token a row and its log-probability.

    Drawn by the Gumbel-max trick in its exponential form: argmax of p / e with e ~ Exp(1) follows p.

    Args:
        logits: [B, V], any floating dtype; the arithmetic is float32.
        generator: on the logits' device.

    Returns:
        Tokens [B], int64, and log-probabilities [B], float32, in nats: of the whole distribution at the sampling
        temperature, before any token is excluded, which is what training recomputes. Greedy: at temperature 1.
    """
    plain = settings == SamplingSettings(temperature=settings.temperature)  # then logprobs do as scores
    if plain and settings.temperature > 0 and logits.is_cuda:
        from rlvr.rollout.grouped.draw_kernels import draw_plain

        noise = torch.empty(logits.shape, dtype=torch.float32, device=logits.device).exponential_(generator=generator)
        return draw_plain(logits, noise, settings.temperature)
    logprobs = _log_softmax(logits, settings.temperature or 1.0)
    scores = logprobs if plain else process(logits.float(), settings, seen)
    if settings.temperature == 0:
        tokens = scores.argmax(dim=-1)
    else:
        noise = torch.empty_like(scores).exponential_(generator=generator)
        tokens = torch.sub(scores, noise.log_(), out=noise).argmax(dim=-1)
    return tokens, logprobs.gather(1, tokens[:, None]).squeeze(1)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """Of logits / temperature, in float32; at temperature 1 the logits are read in their own dtype, in one pass."""
    scaled = logits if temperature == 1.0 else logits.float() / temperature
    return scaled.log_softmax(dim=-1, dtype=torch.float32)
