"""The picture of a comparison, where matplotlib is installed."""

from __future__ import annotations

import itertools
from importlib.util import find_spec
from pathlib import Path

from rlvr.comparison import Comparison

INSTALL = 'pip install "rlvr[docs]"'


def can_plot() -> bool:
    return find_spec("matplotlib") is not None


def plot(comparison: Comparison, path: Path) -> None:
    """Reward over steps, what a step's time goes into, tokens a second and peak memory."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.5), layout="constrained")
    FigureCanvasAgg(figure)  # no display is needed
    (reward, times), (speed, memory) = figure.subplots(2, 2, height_ratios=(3, 2))
    for run, style in zip(comparison.runs, itertools.cycle(("-", "--", ":", "-."))):  # equal runs lie on each other
        reward.plot(*zip(*run.batch_rewards, strict=True), style, marker=".", label=run.backend)
    reward.set(xlabel="step", ylabel="mean reward", title=f"{comparison.env}, {Path(comparison.model).name}")
    reward.locator_params(axis="x", integer=True, min_n_ticks=1)  # no ticks between steps
    reward.legend(frameon=False)
    names = [run.backend for run in comparison.runs]
    left = [0.0] * len(names)
    for part in ("rollout", "scoring", "update"):
        widths = [run.steady(getattr(run, f"{part}_seconds")) for run in comparison.runs]
        times.barh(names, widths, left=left, label=part)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    times.set(xlabel="seconds a step (median)")
    times.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    speed.barh(names, [run.tokens_per_second for run in comparison.runs], color="tab:gray")
    speed.set(xlabel="tokens a second")
    memory.barh(names, [(run.peak_bytes or 0) / 2**20 for run in comparison.runs], color="tab:gray")
    memory.set(xlabel="peak memory, MiB")
    for bars in (times, speed, memory):
        bars.invert_yaxis()  # in the order of the table
    figure.savefig(path, dpi=150)
