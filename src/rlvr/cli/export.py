"""`rlvr export RUN --format FORMAT`: a trained policy in another format, compared with what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rlvr.cli.output import write_result

if TYPE_CHECKING:
    from rlvr.exporting.export import Export


def register(app: typer.Typer) -> None:
    app.command("export", short_help="Export a trained policy: adapter, merged model, GGUF.")(export)


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="folder of a run")],
    format: Annotated[str, typer.Option("--format", help="adapter, merged-16bit, merged-4bit or gguf")] = "adapter",
    checkpoint: Annotated[
        str | None, typer.Option("--checkpoint", help="step of a checkpoint, or 'last'; by default the trained policy")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="folder to make; by default exports/FORMAT in the run's")
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option("--push-to-hub", metavar="REPOSITORY", help="upload it, for example to me/my-model")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="make the repository a private one")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print what was written and measured as JSON")] = False,
) -> None:
    """Export a trained policy, and make sure that it is the policy that was trained.

    The export is loaded back, and its log-probabilities and greedy tokens are compared. One that differs is not kept.
    """
    import json

    from rlvr.cli.options import set_up_output
    from rlvr.exporting.export import export as run_export

    set_up_output()
    made = run_export(
        run,
        format,  # type: ignore[arg-type]
        checkpoint=checkpoint,
        output=output,
        push_to_hub=push_to_hub,
        private=private,
    )
    if as_json:
        write_result(json.dumps(made.as_json(), indent=2))
    else:
        print_export(made)


def print_export(made: Export) -> None:
    from rich.console import Console

    parity = made.parity
    kept = "" if parity.kept is None else f" · {parity.kept:.0%} of the training shows"
    console = Console(markup=False)
    console.print(
        f"{made.format}: {parity.error:.2g} nats from the trained policy (allowed: {parity.allowed:g}), which is "
        f"{parity.trained:.2g} from its base{kept} · {parity.same_greedy} of {parity.greedy_tokens} greedy tokens the "
        "same",
        soft_wrap=True,
    )
    console.print(f"Everything is in {made.folder}" + (f", and at {made.url}" if made.url else ""), soft_wrap=True)
