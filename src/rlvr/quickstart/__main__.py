"""Builds a warm-started model: `python -m rlvr.quickstart FOLDER --task arithmetic --seed SEED`."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from importlib import import_module
from pathlib import Path

from rlvr.errors import RlvrError

TASKS = {"arithmetic": "rlvr.quickstart.build", "musique": "rlvr.quickstart.musique_build"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m rlvr.quickstart", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--task", choices=TASKS, default="arithmetic")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        build = import_module(TASKS[arguments.task]).build
        build(arguments.folder, seed=arguments.seed, report=partial(print, flush=True))
    except RlvrError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
