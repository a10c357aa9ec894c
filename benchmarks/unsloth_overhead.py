"""What our layer costs over a script of Unsloth's own: both in one process, in turn.

    python benchmarks/unsloth_overhead.py --shape 1.5b --prompt-tokens 64 --completion-tokens 8 --turns 30   # on a GPU
    python benchmarks/unsloth_overhead.py --shape 1.5b --turns 3

The peers `unsloth` and `rlvr-unsloth` of step.py, each with a model of its own and with the rollouts and the forward
of Unsloth, take an optimizer step each, `--turns` times; in every second turn the other one is first. Before that each
warms up by two steps. Ours makes the records of its rollouts, with the hash of the weights, as a run does, and does
not write them. A step is all from its first micro-batch to the end of its optimizer update.

Says the seconds of each turn as it goes; ended early (Ctrl-C, SIGTERM), it reports the turns that were made.
Prints a JSON line: the seconds of each step, the medians, and `difference_s`, the median over the turns of ours minus
the other's, with its 95% confidence interval, which supposes nothing about how seconds are spread: a host that is busy
with something else for a moment makes one turn of many. What our layer does in a step depends on its rows and
micro-batches, hardly on their tokens, so many short steps tell what a long one is too noisy to tell.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import statistics
import sys
import tempfile
import time
from contextlib import suppress
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
    parser.add_argument("--turns", type=int, default=12)
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
            seconds_of_a_step(trainer), seconds_of_a_step(trainer)
        seconds: dict[str, list[float]] = {peer: [] for peer in PEERS}
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with suppress(KeyboardInterrupt):  # what there is by then counts
            for turn in range(options.turns):
                for peer in PEERS if turn % 2 == 0 else reversed(PEERS):
                    seconds[peer].append(seconds_of_a_step(trainers[peer]))
                said = ", ".join(f"{peer} {of_peer[-1]:.3f} s" for peer, of_peer in seconds.items())
                print(f"turn {turn + 1} of {options.turns}: {said}", file=sys.stderr, flush=True)
    turns = min(map(len, seconds.values()))
    seconds = {peer: of_peer[:turns] for peer, of_peer in seconds.items()}
    medians = {peer: statistics.median(of_peer) for peer, of_peer in seconds.items()}
    differences = [ours - theirs for theirs, ours in zip(*(seconds[peer] for peer in PEERS), strict=True)]
    line = json.dumps(
        {
            **{name: value for name, value in vars(options).items() if name not in ("models", "out")},
            "turns": turns,
            "each_step_s": {peer: [round(s, 3) for s in of_peer] for peer, of_peer in seconds.items()},
            "step_s": medians,
            "difference_s": statistics.median(differences),
            "difference_95_s": interval(differences),
            "overhead": statistics.median(differences) / medians["unsloth"],
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
            group_size=[options.group_size], groups=options.groups, steps=1, run_steps=1, micro_batch_groups=None,
            gradient_checkpointing="on", rollout_engine="generate", shared_prefix="off",
        ),
        torch.cuda.is_available(),
    )  # fmt: skip


def seconds_of_a_step(trainer) -> float:
    """Trains for one step, and says how long it took."""
    import torch
    from transformers import TrainerCallback

    clock, moments = benchmark.Clock(torch.cuda.is_available()), []

    class Stopwatch(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            moments.append(clock.now())

        def on_step_end(self, *args, **kwargs):
            moments.append(clock.now())

    trainer.args.max_steps = 1
    trainer.add_callback(Stopwatch)
    trainer.train()
    trainer.remove_callback(Stopwatch)
    began, ended = moments
    return ended - began


def interval(values: list[float]) -> tuple[float, float] | None:
    """The 95% confidence interval of the median; None for fewer than six values.

    It ends at the k-th value from either end: that fewer than k lie on one side of the true median is as likely as
    fewer than k heads in as many throws of a coin, and k is the largest for which that is at most 2.5%.
    """
    ordered, count = sorted(values), len(values)
    beyond, probability = 0, 0.5**count
    while probability <= 0.025:
        beyond += 1
        probability += math.comb(count, beyond) * 0.5**count
    return (ordered[beyond - 1], ordered[-beyond]) if beyond else None


if __name__ == "__main__":
    main()
