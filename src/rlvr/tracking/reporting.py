"""Where metrics are reported beside the run folder. Never asks for a key."""

from __future__ import annotations

import logging
import netrc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlparse

from rlvr.errors import ConfigError

MODULES = {"tensorboard": ("tensorboard", "tensorboardX")}  # tracker → modules, any of which will do

logger = logging.getLogger(__name__)


@contextmanager
def reporting(report_to: str, *, folder: Path, run_name: str | None = None) -> Iterator[list[str]]:
    """The trackers of a run, in the trainer's names, with a W&B run open where W&B is one of them.

    `auto` is W&B for a user who is logged in or has set WANDB_MODE, else nothing. W&B that is asked for without a key
    is kept offline. Its files are in the run folder. A W&B run that is open already is used, and left open.
    """
    trackers = chosen_trackers(report_to)
    if "wandb" not in trackers or os.environ.get("RANK", "0") != "0":
        yield trackers
        return
    import wandb

    if wandb.run is not None:
        yield trackers
        return
    offline = not wandb_key_is_known()
    if offline and "WANDB_MODE" not in os.environ:
        logger.info("no W&B key was found: the W&B run is kept offline in %s; upload it with 'wandb sync'.", folder)
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "rlvr"),
        name=run_name,
        dir=str(folder.resolve()),
        mode=os.environ.get("WANDB_MODE") or ("offline" if offline else "online"),  # type: ignore[arg-type]
    )
    try:
        yield trackers
    finally:
        run.finish()


def chosen_trackers(report_to: str) -> list[str]:
    """The trackers that `report_to` means.

    Raises:
        ConfigError: one of them is not installed.
    """
    names = [name.strip() for name in report_to.split(",") if name.strip()]
    if names == ["auto"]:
        mode = os.environ.get("WANDB_MODE")
        wanted = mode in ("online", "offline", "shared") or (mode is None and wandb_key_is_known())
        return ["wandb"] if wanted else []
    if names == ["none"]:
        return []
    missing = [name for name in names if not any(map(find_spec, MODULES.get(name, (name,))))]
    if missing:
        raise ConfigError(
            f"report_to asks for {', '.join(missing)}, which is not installed. "
            f"Install it with 'pip install {' '.join(missing)}', or use --report-to none."
        )
    return names


def wandb_key_is_known() -> bool:
    """Whether the user is logged in to W&B: a key in the environment, or an entry of its host in the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    files = [os.environ["NETRC"]] if "NETRC" in os.environ else ["~/.netrc", "~/_netrc"]
    for name in files:
        try:
            if netrc.netrc(os.path.expanduser(name)).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False
