"""Whether an export is the policy that was trained: the same log-probabilities and greedy tokens on fixed texts.

With t, b, e the log-probabilities (nats) that the trained policy, its base and the export give the same N tokens:

    error   mean |e − t|                  rounding, or a wrong model
    kept    (e − b)·(t − b) / |t − b|²    share of the training that the export shows: 1, or 0 where it is the base,
                                          or alpha's share where alpha was dropped. Least squares of e − b on t − b;
                                          its standard error is what rounding makes of it
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from rlvr.backends.protocol import ExportFormat, LoadedPolicy

Ids = list[int]


@dataclass(frozen=True)
class Tolerance:
    """`error` in nats, at most; the same for four times that for greedy tokens. `kept` may be off 1 by `loss`."""

    error: float
    loss: float


TOLERANCES: dict[str, dict[str, Tolerance]] = {
    "adapter": {  # the same numbers in the same arithmetic
        "float32": Tolerance(1e-4, 0.05),
        "bfloat16": Tolerance(2e-2, 0.1),
        "float16": Tolerance(5e-3, 0.1),
        "quantized": Tolerance(2e-2, 0.1),
    },
    "merged-16bit": {  # base and adapter added up and rounded to 16 bits, or to other weights than the quantized ones
        "float32": Tolerance(5e-2, 0.25),
        "bfloat16": Tolerance(5e-2, 0.25),
        "float16": Tolerance(2e-2, 0.25),
        "quantized": Tolerance(0.5, 0.4),
    },
    "merged-4bit": dict.fromkeys(("float32", "bfloat16", "float16", "quantized"), Tolerance(0.5, 0.5)),
    "gguf": dict.fromkeys(("float32", "bfloat16", "float16", "quantized"), Tolerance(0.5, 0.5)),
}
"""Format → how the policy was loaded → what an export may be off by. `rlvr backends check` uses these too.

`gguf` is a backend's own, of however many bits; what llama.cpp's converter makes is compared as merged-16bit.
"""

STANDARD_ERRORS = 3.0  # of `kept`: what is within them is not held against an export
GREEDY_TOKENS = 12
_GREEDY_TEXTS = 4
_GREEDY_PROMPT = 64  # tokens


def tolerance(export_format: ExportFormat, policy: LoadedPolicy) -> Tolerance:
    """What an export of this policy may be off by."""
    if policy.settings.quantization != "none":
        return TOLERANCES[export_format]["quantized"]
    dtype = policy.model.get_input_embeddings().weight.dtype
    return TOLERANCES[export_format][str(dtype).removeprefix("torch.")]


@dataclass(frozen=True)
class Expected:
    """What the trained policy makes of fixed texts. Taken before anything else is loaded.

    `texts` are token ids; `logprobs` of all their tokens after each first, (N,) in nats; `greedy` are (ids, start):
    the beginnings of the first texts, continued from `start` on with the policy's likeliest tokens.
    """

    texts: list[Ids]
    logprobs: torch.Tensor
    greedy: list[tuple[Ids, int]]

    @classmethod
    def of(cls, model: torch.nn.Module, texts: list[Ids]) -> Expected:
        """
        Args:
            model: in inference mode.
        """
        beginnings = [ids[:_GREEDY_PROMPT] for ids in texts[:_GREEDY_TEXTS]]
        greedy = [(continued(model, ids), len(ids)) for ids in beginnings]
        return cls(texts, logprobs(model, texts), greedy)


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How an export compares with the trained policy. All differences in nats."""

    error: float  # mean over tokens
    allowed: float
    from_base: float  # mean difference of the export from the base
    trained: float  # mean difference of the trained policy from the base: what there is to lose
    kept: float | None  # None where the trained policy does not differ from its base
    kept_error: float | None  # standard error
    kept_allowed: tuple[float, float]
    greedy_gap: float  # how far the trained policy's greedy tokens are from the export's likeliest, at most
    greedy_gap_allowed: float
    same_greedy: int  # of `greedy_tokens`
    greedy_tokens: int
    tokens: int

    @property
    def problems(self) -> list[str]:
        """Why the export is not the policy that was trained, a clause each; empty if it is."""
        found = []
        if not self.error <= self.allowed:  # NaN is no parity either
            found.append(
                f"log-probabilities differ from the trained policy's by {self.error:.2g} nats on average (allowed: "
                f"{self.allowed:g})"
            )
        if self._is_lost():
            low, high = self.kept_allowed
            of_base = ": it is the base model" if self.from_base < self.error else ""
            found.append(f"it shows {self.kept:.0%} of what was trained (allowed: {low:.0%} to {high:.0%}){of_base}")
        if not self.greedy_gap <= self.greedy_gap_allowed:
            found.append(
                f"it decodes other tokens greedily: the trained policy's are {self.greedy_gap:.2g} nats from the "
                f"likeliest (allowed: {self.greedy_gap_allowed:g})"
            )
        return found

    @property
    def doubt(self) -> str | None:
        """Why the comparison cannot tell whether the training was kept; None if it can."""
        if self.kept is None or self.kept_error is None:
            return "the trained policy does not differ from its base on these texts, so that nothing can be lost"
        if self.kept - STANDARD_ERRORS * self.kept_error <= 0:
            return (
                f"training changed log-probabilities by {self.trained:.2g} nats, the format by {self.error:.2g}: "
                "rounding hides whether the training was kept"
            )
        return None

    def as_json(self) -> dict[str, Any]:
        return {"ok": not self.problems, "problems": self.problems, "doubt": self.doubt, **asdict(self)}

    def _is_lost(self) -> bool:
        if self.kept is None or self.kept_error is None:
            return False
        low, high = self.kept_allowed
        uncertain = STANDARD_ERRORS * self.kept_error
        return self.kept + uncertain < low or self.kept - uncertain > high


def compare(model: torch.nn.Module, expected: Expected, *, base: torch.Tensor, allowed: Tolerance) -> Parity:
    """
    Args:
        model: the export, loaded back, in inference mode.
        base: (N,), the base model's log-probabilities of `expected.texts`.
    """
    found, wanted = logprobs(model, expected.texts), expected.logprobs
    gaps = [gap for ids, start in expected.greedy for gap in greedy_gaps(model, ids, start)]
    kept, kept_error = _kept(found - base, wanted - base)
    return Parity(
        error=_mean(found - wanted),
        allowed=allowed.error,
        from_base=_mean(found - base),
        trained=_mean(wanted - base),
        kept=kept,
        kept_error=kept_error,
        kept_allowed=(1 - allowed.loss, 1 + allowed.loss),
        greedy_gap=max(gaps),
        greedy_gap_allowed=4 * allowed.error,
        same_greedy=sum(gap == 0 for gap in gaps),
        greedy_tokens=len(gaps),
        tokens=found.numel(),
    )


def logprobs(model: torch.nn.Module, texts: Sequence[Ids]) -> torch.Tensor:
    """Log-probabilities in nats of the tokens after the first of each text, one after the other, float32 on the CPU.

    Each text has a forward pass of its own: padding takes no part.
    """
    import torch

    parts = []
    for ids in texts:
        values = _logits(model, ids)[:-1].log_softmax(-1)
        chosen = torch.tensor(ids[1:], device=values.device)
        parts.append(values.gather(-1, chosen[:, None]).squeeze(-1).cpu())
    return torch.cat(parts)


def continued(model: torch.nn.Module, ids: Ids) -> Ids:
    """`ids` with the likeliest tokens after them, one full forward pass each: no cache, no sampler."""
    ids = list(ids)
    for _ in range(GREEDY_TOKENS):
        ids.append(int(_logits(model, ids)[-1].argmax()))
    return ids


def greedy_gaps(model: torch.nn.Module, ids: Ids, start: int) -> list[float]:
    """How far each token from `start` on is from the likeliest at its place, in nats; 0 if it is that."""
    import torch

    values = _logits(model, ids)[start - 1 : -1]
    chosen = values.gather(-1, torch.tensor(ids[start:], device=values.device)[:, None]).squeeze(-1)
    return (values.max(-1).values - chosen).tolist()


def _logits(model: Any, ids: Ids) -> torch.Tensor:
    """(T, V) in float32."""
    import torch

    with torch.no_grad():
        return model(torch.tensor([ids], device=model.device)).logits[0].float()


def _kept(shown: torch.Tensor, trained: torch.Tensor) -> tuple[float | None, float | None]:
    """The least-squares factor of `shown` on `trained`, and its standard error."""
    shown, trained = shown.double(), trained.double()
    squares = trained @ trained
    if squares == 0:
        return None, None
    factor = (shown @ trained) / squares
    rest = shown - factor * trained
    error = ((rest @ rest) / max(1, rest.numel() - 1) / squares) ** 0.5
    return factor.item(), error.item()


def _mean(differences: torch.Tensor) -> float:
    return differences.abs().mean().item()
