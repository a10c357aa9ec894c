"""The plain rollout engine: batches through `model.generate`. Slow, simple, the twin of faster engines."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from rlvr.rollout.engine import SampledTurn, SamplingSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Generate = Callable[[list[list[int]], list[int]], tuple[list[list[int]], "list[list[float]] | None"]]
"""(N lists of token ids, N token budgets) → (N lists of sampled ids, their log-probabilities or None).

A list of sampled ids ends with the first end token. It may be longer than its budget: the engine cuts it.
"""


class GenerateEngine:
    """Samples all sequences that wait, to the end of their turns, in one call of `generate`.

    Args:
        generate: does the sampling: `model_generate`, or a call to a server.
        end_token_ids: tokens that end a turn.
        name: what a run's summary calls the engine.
    """

    def __init__(self, generate: Generate, *, end_token_ids: Collection[int], name: str = "generate"):
        self.generate = generate
        self.end_token_ids = frozenset(end_token_ids)
        self.name = name

    @contextmanager
    def open(self, prompt_ids: Sequence[Sequence[int]], *, max_completion_tokens: int) -> Iterator[_Session]:
        yield _Session(self, prompt_ids)


class _Session:
    def __init__(self, engine: GenerateEngine, prompt_ids: Sequence[Sequence[int]]):
        self._engine = engine
        self._ids = [list(ids) for ids in prompt_ids]
        self._budgets: dict[int, int] = {}

    @property
    def pending(self) -> int:
        return len(self._budgets)

    def submit(self, index: int, new_ids: Sequence[int], max_new_tokens: int) -> None:
        self._ids[index] += new_ids
        self._budgets[index] = max_new_tokens

    def step(self) -> list[SampledTurn]:
        indices = sorted(self._budgets)
        budgets = [self._budgets[index] for index in indices]
        self._budgets = {}
        if not indices:
            return []
        sampled, logprobs = self._engine.generate([self._ids[index] for index in indices], budgets)
        turns = []
        for row, (index, budget) in enumerate(zip(indices, budgets, strict=True)):
            ids = sampled[row][:budget]
            self._ids[index] += ids
            ended = bool(ids) and ids[-1] in self._engine.end_token_ids
            turns.append(SampledTurn(index, ids, ended, logprobs[row][:budget] if logprobs is not None else None))
        return turns


def end_token_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Every token that ends a turn: the tokenizer's, and the generation config's (Llama 3 has three)."""
    found: set[int] = set()
    for holder in (tokenizer, getattr(model, "generation_config", None)):
        ids = getattr(holder, "eos_token_id", None)
        found |= {ids} if isinstance(ids, int) else set(ids or ())
    return frozenset(found)


def model_generate(
    model: PreTrainedModel,
    tokenizer: Any,
    sampling: SamplingSettings,
    *,
    batch_size: int = 64,
    seed: int | None = None,
) -> Generate:
    """Sampling through transformers' `generate`, `batch_size` sequences at a time, padded on the left.

    Only `sampling` decides how tokens are drawn: what a model's own generation config adds (Qwen's top-k, a
    repetition penalty, suppressed tokens) is left out, since the policy that is trained does not have it.
    Log-probabilities are not given.

    Args:
        model: a causal language model, PEFT-wrapped or not. Its training mode is restored.
        tokenizer: gives the padding token; the end token where there is none.
        seed: draws from random numbers of its own, others at each call; None draws from the process's.
    """
    ends = end_token_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends)
    seeds = itertools.count(seed or 0)  # equal seeds would draw the turns of a conversation from equal numbers

    def generate(ids: list[list[int]], budgets: list[int]) -> tuple[list[list[int]], None]:
        import torch

        sampled: list[list[int]] = []
        devices = [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(devices) if seed is not None else nullcontext():
            if seed is not None:
                torch.manual_seed(next(seeds))
            for start in range(0, len(ids), batch_size):
                rows, most = ids[start : start + batch_size], max(budgets[start : start + batch_size])
                sampled += _generate_batch(model, rows, sampling, max_new_tokens=most, ends=ends, pad=pad)
        return sampled, None

    return generate


def _generate_batch(
    model: Any,
    rows: list[list[int]],
    sampling: SamplingSettings,
    *,
    max_new_tokens: int,
    ends: frozenset[int],
    pad: int,
) -> list[list[int]]:
    import torch
    from transformers import GenerationConfig

    width = max(map(len, rows))
    input_ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    drawn = {
        "do_sample": True,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
    }
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        repetition_penalty=sampling.repetition_penalty,
        eos_token_id=sorted(ends),
        pad_token_id=pad,
        use_cache=True,
        **(drawn if sampling.temperature > 0 else {"do_sample": False}),
    )
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), _generation_config(model, config):
            output = model.generate(input_ids=input_ids, attention_mask=mask, generation_config=config)
    finally:
        model.train(training)
    return [_up_to_end(row, ends) for row in output[:, width:].tolist()]


@contextmanager
def _generation_config(model: Any, config: Any) -> Iterator[None]:
    """`generate` fills what its config leaves open from the model's own; here that is the same config."""
    holders = [model, *([model.get_base_model()] if hasattr(model, "get_base_model") else [])]
    own = [holder.generation_config for holder in holders]
    try:
        for holder in holders:
            holder.generation_config = config
        yield
    finally:
        for holder, before in zip(holders, own, strict=True):
            holder.generation_config = before


def _up_to_end(ids: list[int], ends: frozenset[int]) -> list[int]:
    for position, token in enumerate(ids):
        if token in ends:
            return ids[: position + 1]
    return ids
