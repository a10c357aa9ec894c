"""What the checks found. Standard library only."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """One check. `message` says what was measured, or what is wrong."""

    name: str
    group: str
    proves: str
    passed: bool
    message: str
    seconds: float

    def __str__(self) -> str:
        return f"{'passed' if self.passed else 'FAILED'}  {self.name}: {self.message}"


@dataclass(frozen=True, kw_only=True)
class Report:
    """All results for one backend, in the order of the catalogue."""

    backend: str
    model: str
    device: str
    results: tuple[CheckResult, ...]

    @property
    def ok(self) -> bool:
        return bool(self.results) and not self.failures

    @property
    def failures(self) -> tuple[CheckResult, ...]:
        return tuple(result for result in self.results if not result.passed)

    def as_json(self) -> dict[str, Any]:
        return {
            "backend": self.backend,
            "model": self.model,
            "device": self.device,
            "ok": self.ok,
            "results": [asdict(result) for result in self.results],
        }

    def __str__(self) -> str:
        head = f"backend {self.backend!r}, {self.model} on {self.device}: {len(self.failures)} failed"
        return "\n".join([f"{head} of {len(self.results)} checks", *map(str, self.failures or self.results)])
