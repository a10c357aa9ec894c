"""`GroupedEngine`: rollouts in which a group computes its prompt once and a token step is one CUDA graph."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from shutil import which
from typing import Any, Literal

import torch

from rlvr.errors import ConfigError, UnsupportedSettingError
from rlvr.rollout.engine import SamplingSettings
from rlvr.rollout.grouped.cache import CacheShape
from rlvr.rollout.grouped.runner import Runner
from rlvr.rollout.grouped.session import GroupedSession, distinct
from rlvr.rollout.grouped.support import unsupported
from rlvr.rollout.grouped.weights import causal_lm, fingerprint, rollout_mode

Execution = Literal["auto", "graphs", "kernels", "eager"]

SPARE_BYTES = 2**30  # of a cache that is kept for the graphs that were made for it, whatever the rollout needs

COMPILATION_PAYS = 8_000
"""Token steps for which layers are compiled: 5.7 s once, and 1.1 ms less for each (Qwen2.5-1.5B's shape on an H200;
docs/performance.md). That pays from 5,100; the rest is for completions that end before their tokens are used up."""

logger = logging.getLogger(__name__)


class GroupedEngine:
    """A `RolloutEngine` for transformers models.

    Args:
        model: a causal language model of transformers, with or without PEFT around it.
        sampling: how tokens are drawn; every option has the semantics of transformers' `generate`.
        eos_token_ids: tokens that end a turn; none: every turn uses up its tokens.
        seed: of the engine's own random numbers, which go on from one rollout to the next; or a function, asked for
            the seed of each rollout when it is opened.
        merge_lora: run with adapters merged into the weights, which are restored afterwards bit for bit. In a dtype
            below float32 the merged weight is rounded, so log-probabilities differ a little from the training
            forward's; False applies adapters layer by layer, as training does, and is slower.
        execution: "graphs": attention by Triton kernels, the token step in CUDA graphs; "kernels": the same without
            graphs; "eager": plain torch. "auto": graphs on CUDA where Triton and a C compiler, which it needs, are
            installed, else eager.
        compile_layers: `torch.compile` the layers that a graph records. The model's own layers, which training uses,
            are not touched. None: with graphs, if `rollouts` times the tokens of each are `COMPILATION_PAYS` or more.
        rollouts: how many rollouts the engine is going to run; or a function, asked when graphs are to be made.
        keep_memory: keep caches, graphs and packed projections (6% of the weights of Qwen2.5-7B) for the next rollout
            (on CUDA); else they are freed when one closes.
        check_every: token steps between two looks of the host for turns that ended; None: 16 on CUDA, else 4.
        max_rows: sequences that run at the same time; others wait for their turn.

    Raises:
        UnsupportedSettingError: `unsupported` gives a reason.
    """

    name = "grouped"

    def __init__(
        self,
        model: Any,
        *,
        sampling: SamplingSettings,
        eos_token_ids: Sequence[int],
        seed: int | Callable[[], int] = 0,
        merge_lora: bool = True,
        execution: Execution = "auto",
        compile_layers: bool | None = None,
        rollouts: int | Callable[[], int] = 1,
        keep_memory: bool = True,
        check_every: int | None = None,
        max_rows: int = 512,
    ):
        if (problem := unsupported(model, sampling)) is not None:
            raise UnsupportedSettingError(f"the grouped rollout engine cannot run this model: {problem}.")
        self._model = causal_lm(model)
        self._sampling, self._eos = sampling, tuple(eos_token_ids)
        self._merge_lora, self._max_rows = merge_lora, max_rows
        device = self._model.get_input_embeddings().weight.device
        cuda = device.type == "cuda"
        if execution == "auto":
            execution = "graphs" if cuda and _triton_works() else "eager"
        if execution != "eager" and not cuda:
            raise UnsupportedSettingError(f"execution={execution!r} needs a CUDA device; the model is on {device}.")
        self.execution: Execution = execution
        self._compile_layers, self._rollouts = compile_layers, rollouts
        self._keep_memory = keep_memory and cuda
        self._check_every = check_every or (16 if cuda else 4)
        self._generator = torch.Generator(device)
        self._seed_of_rollout = seed if callable(seed) else None
        if not callable(seed):
            self.reseed(seed)
        self._runner: Runner | None = None
        self._fingerprint: tuple[Any, ...] = ()

    @staticmethod
    def unsupported(model: Any, sampling: SamplingSettings) -> str | None:
        """Why the engine cannot take this model, in one line; None if it can."""
        return unsupported(model, sampling)

    def reseed(self, seed: int) -> None:
        """Sets the random numbers to where an engine with this seed begins."""
        self._generator.manual_seed(seed)

    @contextmanager
    def open(self, prompt_ids: Sequence[Sequence[int]], *, max_completion_tokens: int) -> Iterator[GroupedSession]:
        """As `RolloutEngine.open`. While it is open, the model must not be used otherwise.

        Raises:
            ConfigError: there is no prompt, one is empty, or `max_completion_tokens` is below 1.
        """
        _check(prompt_ids, max_completion_tokens)
        if self._seed_of_rollout is not None:
            self.reseed(self._seed_of_rollout())
        prompts, group_of = distinct(prompt_ids)
        shape = CacheShape.of(
            self._model.config,
            groups=len(prompts),
            prompt_tokens=max(len(ids) for ids in prompts),
            slots=len(prompt_ids) + 1,
            suffix_tokens=max_completion_tokens + 1,
        )
        finished = False
        try:
            with rollout_mode(self._model, merge=self._merge_lora):
                yield GroupedSession(
                    self._runner_for(shape, max_completion_tokens),
                    prompts,
                    group_of,
                    max_completion_tokens=max_completion_tokens,
                    eos_token_ids=self._eos,
                    max_rows=self._max_rows,
                )
            finished = True
        finally:
            if not (finished and self._keep_memory):
                self._runner = None

    def _runner_for(self, shape: CacheShape, max_completion_tokens: int) -> Runner:
        """The last rollout's runner, with its graphs, where it is large enough and not wasteful; else a new one.

        A new one is large enough for both rollouts, so that batches that differ a little do not replace each other.
        """
        current, kept = fingerprint(self._model), self._runner
        if kept is not None and current == self._fingerprint:
            joined = shape.joined(kept.cache.shape)
            if not self._wastes(joined, shape):
                if joined == kept.cache.shape:
                    return kept
                shape = joined
        kept = self._runner = None  # its memory goes before the new one's comes
        self._runner, self._fingerprint = self._new_runner(shape, max_completion_tokens), current
        return self._runner

    def _wastes(self, shape: CacheShape, needed: CacheShape) -> bool:
        spare = shape.bytes(self._model.dtype) - needed.bytes(self._model.dtype)
        return shape.tokens > 2 * needed.tokens and spare > SPARE_BYTES

    def _new_runner(self, shape: CacheShape, max_completion_tokens: int) -> Runner:
        settings: dict[str, Any] = {
            "sampling": self._sampling,
            "eos_token_ids": self._eos,
            "generator": self._generator,
            "check_every": self._check_every,
        }
        if self.execution == "eager":
            return Runner(self._model, shape, **settings)
        from rlvr.rollout.grouped.graphs import GraphRunner  # needs Triton

        return GraphRunner(
            self._model,
            shape,
            capture=self.execution == "graphs",
            compile_layers=self._compiles(max_completion_tokens),
            **settings,
        )

    def _compiles(self, max_completion_tokens: int) -> bool:
        if self._compile_layers is not None:
            return self._compile_layers
        rollouts = self._rollouts() if callable(self._rollouts) else self._rollouts
        return self.execution == "graphs" and rollouts * max_completion_tokens >= COMPILATION_PAYS


def _triton_works() -> bool:
    missing = None
    if find_spec("triton") is None:
        missing = "Triton is not installed"
    elif not (os.environ.get("CC") or which("cc") or which("gcc") or which("clang")):
        missing = "there is no C compiler, which Triton needs (install gcc, or set CC)"
    if missing is not None:
        logger.warning("The grouped rollout engine runs without CUDA graphs, several times slower: %s.", missing)
    return missing is None


def _check(prompt_ids: Sequence[Sequence[int]], max_completion_tokens: int) -> None:
    problems = [f"prompt {index} has no token." for index, ids in enumerate(prompt_ids) if not ids]
    if not prompt_ids:
        problems.append("a rollout needs at least one prompt; none was given.")
    if max_completion_tokens < 1:
        problems.append(f"max_completion_tokens is {max_completion_tokens}; it must be at least 1.")
    if problems:
        raise ConfigError(problems)
