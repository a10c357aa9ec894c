"""The Hugging Face hub: only where it is asked for."""

from __future__ import annotations

from rlvr.errors import ConfigError


def require_token() -> None:
    """
    Raises:
        ConfigError: the user is not logged in.
    """
    from huggingface_hub import get_token

    if get_token() is None:
        raise ConfigError("push_to_hub is on, and no Hugging Face token was found. Log in with 'hf auth login'.")
