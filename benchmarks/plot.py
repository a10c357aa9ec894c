"""A picture of what `step.py --out results.jsonl` measured: what a step's time goes into, for each peer.

    python benchmarks/plot.py results.jsonl docs/performance-cpu.svg

Needs matplotlib (`pip install "rlvr[docs]"`).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

PARTS = {"rollout": "#4c72b0", "scoring": "#8c8c8c", "update": "#dd8452"}


def plot(rows: list[dict], path: Path) -> None:
    figure = Figure(figsize=(8, 0.6 + 0.45 * len(rows)), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    names = [
        f"{row['peer']}  {row['prompt_tokens']}+{row['completion_tokens']}, G={row['group_size']}" for row in rows
    ]
    left = [0.0] * len(rows)
    for part, color in PARTS.items():
        widths = [row[f"{part}_s"] for row in rows]
        axes.barh(names, widths, left=left, label=part, color=color)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.bar_label(axes.containers[-1], labels=[f"{total:.1f} s" for total in left], padding=3)
    axes.set(xlabel="seconds an optimizer step (median)")
    axes.set_title(f"{rows[0]['shape']}, {rows[0]['device']}", loc="left", fontsize="medium")
    axes.margins(x=0.12)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    plot([json.loads(line) for line in source.read_text().splitlines()], target)
