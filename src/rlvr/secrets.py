"""Keys and passwords among the options of an environment, and in addresses: used, and neither stored nor shown."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

NOT_KEPT = "(not kept)"

_WORD_STARTS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|[-. ]")  # judgeApiKey, x-api-key
_SECRET = re.compile(
    r"(^|_)((api|access|auth|secret|private)?(key|token)|(api|access|auth|secret|private|bearer|hf)_?(keys|tokens)"
    r"|access_key_id|private_key_pem|secrets?|password|passwords|passwd|passphrase|passcode|pwd|credentials?|auth"
    r"|authorization|bearer|jwt|cookies?)(_?\d+)?$",
    re.IGNORECASE,
)
_LOGIN = re.compile(r"(?<=://)[^/?#\s]+(?=@)")  # http://user:password@host; RFC 3986, 3.2.1


def is_secret(name: str) -> bool:
    """Whether an option is a key or a password by its name.

    What ends in "key" or "token" is taken for one, `answer_key` too: one option more to give again is better than a
    secret in a file. `max_tokens`, `token_budget` and `keyword` are none.
    """
    return _SECRET.search(_WORD_STARTS.sub("_", name)) is not None


def without_secrets(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with `NOT_KEPT` for secrets: options of the environment that are ones by name, however deep
    they are, and the user and password of every address."""
    shown = {name: without_logins(value) for name, value in config.items()}
    return {**shown, "env_options": _hidden(config.get("env_options") or {})}


def options_not_kept(env_options: Mapping[str, Any]) -> list[str]:
    """The options that hold, somewhere, what `without_secrets` has put there."""
    return [name for name, value in env_options.items() if _holds_placeholder(value)]


def _hidden(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            name: NOT_KEPT if item is not None and is_secret(str(name)) else _hidden(item)
            for name, item in value.items()
        }
    return [_hidden(item) for item in value] if isinstance(value, (list, tuple)) else without_logins(value)


def without_logins(value: Any) -> Any:
    """With `NOT_KEPT` for the user and password of every address in a text."""
    return _LOGIN.sub(NOT_KEPT, value) if isinstance(value, str) else value


def _holds_placeholder(value: Any) -> bool:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return any(map(_holds_placeholder, value))
    return isinstance(value, str) and NOT_KEPT in value
