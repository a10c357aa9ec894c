"""The Hugging Face hub: only where it is asked for."""

from __future__ import annotations

import logging
from pathlib import Path

from rlvr.errors import ConfigError, ExportError

logger = logging.getLogger(__name__)


def check_push(repository: str, *, option: str) -> None:
    """Finds before hours of work what would keep it from being pushed.

    Args:
        repository: to push to.
        option: what names it, for the message.

    Raises:
        ConfigError: it is no name of a repository, or the user is not logged in.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ConfigError(f"{option} is {repository!r}; it must be a repository such as me/my-model.") from error
    if get_token() is None:
        raise ConfigError("push_to_hub is on, and no Hugging Face token was found. Log in with 'hf auth login'.")


def push(folder: Path, repository: str, *, private: bool | None = None) -> str:
    """Uploads a folder, and gives the address of the repository.

    Args:
        repository: one of the user's own where it names no owner.
        private: whether it is private, if it has to be made; None as the owner's settings have it.

    Raises:
        ExportError: it was not uploaded; the folder is as it was.
    """
    from huggingface_hub import HfApi

    logger.info("uploading to %s", repository)
    api = HfApi()
    try:
        url = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message=f"Upload {folder.name}")
    except Exception as error:  # the network's, the Hub's, the token's: clients raise what they meet
        flag = " --private" if private else ""
        raise ExportError(
            f"{str(folder)!r} is complete, and was not uploaded to {repository!r}: {error}. Upload it with 'hf upload "
            f"{repository} {folder} .{flag}'."
        ) from error
    return str(url)
