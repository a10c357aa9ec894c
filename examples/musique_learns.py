"""A tiny model learns to answer multi-hop questions, by GRPO and real tool calls, on two CPU cores in ten minutes.

    python examples/musique_learns.py --seed 0 --output-dir outputs/musique/first

Nothing is downloaded. `docs/musique.md` says what to expect.
"""

from __future__ import annotations

import argparse

import rlvr
from rlvr.cli.options import set_up_output
from rlvr.cli.train import print_run
from rlvr.quickstart.musique import prepare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the model, the questions and the run")
    parser.add_argument("--backend", default=None, help="as 'rlvr backends' lists it")
    parser.add_argument("--output-dir", default=None, help="run folder")
    chosen = parser.parse_args()
    set_up_output()
    settings = prepare(seed=chosen.seed)
    run = rlvr.train(**settings, backend=chosen.backend, output_dir=chosen.output_dir, eval_every=10, report_to="none")
    for row in run.metrics():
        if "evaluation" in row:
            print(f"step {row['step']:3d}: held-out exact match {row['evaluation']['exact_match']:.3f}")
    print_run(run)


if __name__ == "__main__":
    main()
