"""What our layer costs over a script of Unsloth's own: both in one process, in turn.

    python benchmarks/unsloth_overhead.py --shape 1.5b --completion-tokens 64     # on a GPU
    python benchmarks/unsloth_overhead.py --shape 1.5b --prompt-tokens 64 --completion-tokens 8 --steps 3 --turns 12

The peers `unsloth` and `rlvr-unsloth` of step.py, each with a model of its own and with the rollouts and the forward
of Unsloth, take `--steps` optimizer steps, then the other does, `--turns` times; in every second turn the other one is
first, and before that each warms up by a step. Ours makes the records of its rollouts, with the hash of the weights,
as a run does, and does not write them. A step is all from its first micro-batch to the end of its optimizer update.

Prints a JSON line: seconds of each step, the medians, and by how much ours is longer; and the medians of each turn,
whose spread says what the difference is worth. `difference_s` is the mean over the turns of ours minus the other's,
with its standard error: what our layer does in a step depends on the rows, hardly on their tokens, so many short steps
tell what a long one is too noisy to tell.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import step as benchmark

PEERS = ("unsloth", "rlvr-unsloth")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=benchmark.SHAPES, default="small")
    parser.add_argument("--prompt-tokens", type=int, default=2_048)
    parser.add_argument("--completion-tokens", type=int, default=256)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--models", help="keep the models that are made in this folder, and take those in it")
    parser.add_argument("--out", help="append the JSON line to this file")
    return parser.parse_args()


def main() -> None:
    options = parse()
    os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="disabled", UNSLOTH_AUTO_INSTALL="0")
    import unsloth  # noqa: F401 - before trl, transformers and peft

    with tempfile.TemporaryDirectory() as made:
        folder = str(Path(options.models or made, options.shape))
        if not Path(folder).exists():
            benchmark.build(options.shape, folder)
        trainers = {peer: trainer_of(peer, folder, options) for peer in PEERS}
        for trainer in trainers.values():  # compiles, allocates
            seconds_of_steps(trainer, 1)
        turns = {peer: [] for peer in PEERS}
        for turn in range(options.turns):
            for peer in PEERS if turn % 2 == 0 else reversed(PEERS):
                turns[peer].append(seconds_of_steps(trainers[peer], options.steps))
    medians = {peer: statistics.median(itertools.chain(*seconds)) for peer, seconds in turns.items()}
    of_turns = {peer: [statistics.median(turn) for turn in seconds] for peer, seconds in turns.items()}
    differences = [ours - theirs for theirs, ours in zip(*(of_turns[peer] for peer in PEERS), strict=True)]
    error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else None
    line = json.dumps(
        {
            **{name: value for name, value in vars(options).items() if name not in ("models", "out")},
            "each_step_s": {
                peer: [[round(s, 3) for s in turn] for turn in seconds] for peer, seconds in turns.items()
            },
            "turn_medians_s": of_turns,
            "step_s": medians,
            "difference_s": statistics.mean(differences),
            "difference_standard_error_s": error,
            "overhead": medians["rlvr-unsloth"] / medians["unsloth"] - 1,
            "date": time.strftime("%Y-%m-%d"),
        }
    )
    print(line, flush=True)
    if options.out:
        with open(options.out, "a") as file:
            file.write(line + "\n")


def trainer_of(peer: str, folder: str, options: argparse.Namespace):
    import torch

    return benchmark.trainer_of(
        peer,
        argparse.Namespace(
            model=folder, prompt_tokens=[options.prompt_tokens], completion_tokens=[options.completion_tokens],
            group_size=[options.group_size], groups=options.groups, steps=options.steps, micro_batch_groups=None,
            gradient_checkpointing="on", rollout_engine="generate", shared_prefix="off",
        ),
        torch.cuda.is_available(),
    )  # fmt: skip


def seconds_of_steps(trainer, steps: int) -> list[float]:
    """Trains for so many steps, and says how long each took."""
    import torch
    from transformers import TrainerCallback

    seconds, clock = [], benchmark.Clock(torch.cuda.is_available())

    class Stopwatch(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.began = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            seconds.append(clock.now() - self.began)

    trainer.args.max_steps = steps
    trainer.add_callback(Stopwatch)
    trainer.train()
    trainer.remove_callback(Stopwatch)
    return seconds


if __name__ == "__main__":
    main()
