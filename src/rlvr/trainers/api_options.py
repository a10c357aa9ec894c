"""The options of an evaluation with a model behind an API."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from rlvr.config import EVALUATION_SETTINGS, TrainSettings
from rlvr.errors import ConfigError
from rlvr.rollout.evaluation import Player
from rlvr.trainers.players import sampling_settings

KEY_VARIABLE = "OPENAI_API_KEY"
# of `TrainSettings`: what a request can say
API_SETTINGS = ("model", "max_tokens", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
LOCAL_OPTIONS = {"backend", "adapter", "batch_size", "a loaded policy", *EVALUATION_SETTINGS} - {*API_SETTINGS}


@dataclass(frozen=True, kw_only=True)
class ApiOptions:
    """How a model behind an API is reached. None: by default; without `base_url` nothing else may be given."""

    base_url: str | None = None
    key_env: str | None = None
    retries: int | None = None
    timeout_s: float | None = None
    concurrency: int | None = None

    def problems(self, given: Iterable[str]) -> list[str]:
        """What cannot be. `given`: the names of other options that were given."""
        from rlvr.rollout.api import url_problem

        if self.base_url is None:
            return [
                f"{_option(item.name)} was given without api_base_url, which says where the model is served."
                for item in fields(self)
                if getattr(self, item.name) is not None
            ]
        problems = [
            f"{name} was given with api_base_url: it is for a model that is loaded here. Leave it out."
            for name in given
            if name in LOCAL_OPTIONS
        ]
        if problem := url_problem(self.base_url):
            problems.append(problem)
        for name, least in (("retries", 0), ("concurrency", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                problems.append(f"{_option(name)} is {value}; it must be at least {least}.")
        if self.timeout_s is not None and not 0 < self.timeout_s < float("inf"):
            problems.append(f"api_timeout_s is {self.timeout_s}; it must be above 0 and finite.")
        return problems

    def player(self, settings: TrainSettings, temperature: float, *, seed: int | None) -> Player:
        """
        Raises:
            ConfigError: the variable that was named holds no key.
        """
        from rlvr.rollout.api import Endpoint
        from rlvr.rollout.remote import RemotePlayer

        assert self.base_url is not None
        endpoint: dict[str, Any] = {"retries": self.retries, "timeout_s": self.timeout_s}
        return RemotePlayer(
            endpoint=Endpoint(
                base_url=self.base_url,
                model=settings.model or "",
                key=self._key(),
                **{name: value for name, value in endpoint.items() if value is not None},
            ),
            sampling=sampling_settings(settings, temperature),
            max_completion_tokens=settings.max_tokens,
            **({"concurrency": self.concurrency} if self.concurrency is not None else {}),
            seed=seed,
        )

    def _key(self) -> str | None:
        """None where there is none: a server of one's own may need none."""
        name = self.key_env or KEY_VARIABLE
        key = os.environ.get(name, "").strip()
        if not key and self.key_env is not None:
            raise ConfigError(f"the environment variable {name}, which api_key_env names, is not set or empty.")
        if not (key.isascii() and key.isprintable()):
            raise ConfigError(f"the environment variable {name} holds characters that no key has; set it anew.")
        return key or None


def _option(name: str) -> str:
    return name if name == "concurrency" else f"api_{name}"
