"""`rlvr train ENV`: one training run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rlvr.cli.options import add_environment_command, environment_arguments, given, set_up_output
from rlvr.cli.output import write_result
from rlvr.config import TrainSettings, processes, read_config
from rlvr.trainers.run import resolve_settings, train_with
from rlvr.wording import counted


def register(app: typer.Typer) -> None:
    add_environment_command(app, train)


def train(
    ctx: typer.Context,
    env: Annotated[
        str | None,
        typer.Argument(metavar="ENV", help="as 'rlvr environments' lists it; without it the quickstart runs"),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", help="YAML file of options; options on the command line win"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the resolved configuration as YAML, and stop")
    ] = False,
    **options: Any,
) -> None:
    """Train a policy on an environment.

    The options of the environment itself are written in the same way: rlvr train arithmetic --levels 2.
    """
    extra = list(ctx.args)
    if env is not None and env.startswith("-"):  # an unknown option came first and was taken for the name
        extra.insert(0, env)
        env = None
    from_file = read_config(config) if config else {}
    environment = env or from_file.get("env")
    here: dict[str, Any] = {"env": environment} if environment else {}
    env_options = environment_arguments(environment, extra)
    if env_options:
        here["env_options"] = env_options
    layers = [from_file, here, given(options)]
    if environment is None and not from_file and not {"model", "resume_from_checkpoint"} & layers[-1].keys():
        _quickstart(layers[-1], dry_run=dry_run)
    else:
        _run(resolve_settings(*layers), dry_run=dry_run)


def _quickstart(flags: dict[str, Any], *, dry_run: bool) -> None:
    """`rlvr train` without an environment: the model is built on the spot, once for each seed."""
    import time

    from rlvr import quickstart
    from rlvr.tracking.run_folder import RunFolder

    # several processes would disagree about the time: theirs is left to `resolve_settings`, which asks for a name
    name = {"run_name": time.strftime("quickstart-%Y%m%d-%H%M%S")} if processes() == 1 else {}
    settings = resolve_settings(quickstart.settings(seed=flags.get("seed", 0)), name, flags)
    if not dry_run:
        assert settings.output_dir is not None
        RunFolder.reserve(settings.output_dir).release_if_unused()
        quickstart.prepare(seed=settings.seed)
    _run(settings, dry_run=dry_run)


def _run(settings: TrainSettings, *, dry_run: bool) -> None:
    if dry_run:
        print_config(settings.as_dict())
        return
    set_up_output()
    print_run(train_with(settings))


def print_config(values: dict[str, Any]) -> None:
    import yaml

    from rlvr.secrets import without_secrets

    write_result(yaml.safe_dump(without_secrets(values), sort_keys=False, allow_unicode=True).rstrip("\n"))


def print_run(run: Any) -> None:
    """Evaluation before and after, and where everything is."""
    from rich.console import Console

    from rlvr.cli.evaluate import metrics_table

    console = Console(markup=False)
    before, after = run.summary["eval_before"], run.summary["eval_after"]
    if after:
        console.print(metrics_table({"before": before, "after": after}))
    shared = f"packed rows with shared prompts saved {run.summary['token_ratio_saved']:.0%} of the padded tokens"
    console.print(
        f"{counted(run.summary['steps'], 'step')} in {run.summary['seconds']:.0f} s · "
        f"backend {run.summary['backend']} · rollouts by {run.summary['rollout_engine']} · "
        f"{shared if run.summary['shared_prefix'] else 'no shared prompts in training'}",
        soft_wrap=True,
    )
    console.print(f"Everything is in {run.folder}", soft_wrap=True)
