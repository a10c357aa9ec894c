"""What a policy should compute: asked of `oracle.py`, in a process of its own.

A backend may have patched transformers in this process, and the oracle is transformers alone.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from rlvr.backends.protocol import LoadedPolicy, LoraSettings
from rlvr.testing.conformance.context import factors, lora_layers

Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Reference:
    """The checkpoint `model`, rounded to `weights_dtype`, with LoRA. `adapters`: name of a layer → (A, B)."""

    model: str
    weights_dtype: torch.dtype
    adapters: Pairs
    scale: float

    @classmethod
    def of(cls, policy: LoadedPolicy, *, model: str, weights_dtype: torch.dtype) -> Reference:
        """
        Args:
            model: what was asked for, whatever the backend says that it loaded.
            weights_dtype: the policy's; the checkpoint is rounded to it first, so that only the arithmetic differs.
        """
        adapters = {name: factors(layer) for name, layer in lora_layers(policy.model).items()}
        return cls(model, weights_dtype, adapters, stated_scale(policy.lora) if policy.lora else 0.0)

    def logprobs(self, ids: torch.Tensor) -> torch.Tensor:
        """Of the tokens after the first, in nats: (B, T-1), on the CPU."""
        return self._ask("logprobs", ids)["logprobs"]

    def loss_and_gradients(self, ids: torch.Tensor) -> tuple[float, Pairs]:
        """Mean negative log-probability of the tokens after the first, in nats, and its gradients by A and by B."""
        found = self._ask("gradients", ids)
        return found["loss"].item(), {name: (found[f"{name}.A"], found[f"{name}.B"]) for name in self.adapters}

    def _ask(self, what: str, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        tensors = {"ids": ids.cpu().contiguous()}
        for name, (a, b) in self.adapters.items():
            tensors |= {f"{name}.A": a.contiguous(), f"{name}.B": b.contiguous()}
        dtype = str(self.weights_dtype).removeprefix("torch.")
        job = {"what": what, "model": self.model, "weights_dtype": dtype, "scale": self.scale}
        return _oracle().ask({**job, "adapters": list(self.adapters)}, tensors)


def own_tokenizer(model: str) -> dict[str, list[int]]:
    """What the tokenizer that comes with the model makes of `spoken`'s texts."""
    return {name: ids.tolist() for name, ids in _oracle().ask({"what": "spoken", "model": model}, {}).items()}


def is_readable(model: str) -> bool:
    """Whether transformers alone can load it with its tokenizer; a GGUF file, for one, it cannot."""
    try:
        _oracle().ask({"what": "readable", "model": model}, {})
    except ReferenceFailed:
        return False
    return True


def stated_scale(lora: LoraSettings) -> float:
    return lora.alpha / (lora.r**0.5 if lora.rslora else lora.r)


class ReferenceFailed(RuntimeError):
    """The oracle could not compute what it was asked for."""


@functools.cache
def _oracle() -> _Oracle:
    """One for all references of this process: most of its time goes into importing."""
    return _Oracle()


class _Oracle:
    """The process. A question is a line of JSON and a file of tensors, and so is the answer."""

    def __init__(self) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="rlvr-oracle-")
        self._folder = Path(self._temporary.name)
        with open(self._folder / "errors.txt", "w", encoding="utf-8") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "rlvr.testing.conformance.oracle", str(self._folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        atexit.register(self._process.kill)

    def ask(self, job: dict[str, Any], tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """
        Raises:
            ReferenceFailed: the oracle could not compute it, with its reason.
            RuntimeError: the oracle has ended.
        """
        save_file(tensors, self._folder / "question.safetensors")
        answer = self._exchange(json.dumps(job) + "\n")
        if not answer:
            _oracle.cache_clear()  # the next question gets a new one
            last = (self._folder / "errors.txt").read_text(encoding="utf-8").strip().splitlines()[-1:]
            raise RuntimeError(f"the process that computes references has ended: {''.join(last) or 'it said nothing'}")
        if error := json.loads(answer)["error"]:
            raise ReferenceFailed(f"the reference could not be computed: {error}")
        return load_file(self._folder / "answer.safetensors")

    def _exchange(self, line: str) -> str:
        """The line that it answers, empty if it has ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
        except BrokenPipeError:
            return ""
        return self._process.stdout.readline()
