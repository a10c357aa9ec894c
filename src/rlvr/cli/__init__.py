"""The command `rlvr`. One file a command; whatever is heavy is imported inside the commands."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer

COMMANDS = ("train", "evaluate", "preflight", "compare", "export", "lineage", "backends", "environments")

EXIT_REFUSED = 2  # an RlvrError, or options that the command line cannot read


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command and exits: 0 if all went well, 2 if it was refused with a message, 1 if it crashed.

    `rlvr preflight` exits with 1 where it found a problem, too, and `rlvr compare` where a backend's run failed.
    """
    from rlvr.cli.output import for_programs
    from rlvr.errors import RlvrError

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    try:
        words = [argument for argument in arguments if argument != "--debug"]
        with for_programs(words):
            build_app(asked_for=words[0] if words else None)(words, prog_name="rlvr")
    except RlvrError as error:
        if debug:
            traceback.print_exception(error)
        else:
            print(f"rlvr: {error}", file=sys.stderr)
        sys.exit(EXIT_REFUSED)


def build_app(asked_for: str | None = None) -> typer.Typer:
    """The command, with the subcommand that is asked for; with all of them where it is none of them (`--help`)."""
    import typer

    app = typer.Typer(
        help="Reinforcement learning from verifiable rewards, on any model backend.",
        epilog="With --debug, anywhere on the line, an error comes with its traceback.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,  # rich's panels cut long option names on a terminal of 80 columns
    )

    @app.callback()
    def root(
        version: bool = typer.Option(
            False, "--version", is_eager=True, callback=_print_version, help="print the version and stop"
        ),
    ) -> None:
        pass

    for name in [asked_for] if asked_for in COMMANDS else COMMANDS:
        import_module(f"rlvr.cli.{name}").register(app)
    return app


def _print_version(asked: bool) -> None:
    import typer

    if asked:
        from rlvr import __version__

        print(__version__)
        raise typer.Exit
