"""The arithmetic of a step: prompts × G completions = batch size × accumulation × processes."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

USUAL_PROMPTS = 8  # of a step, where nothing says otherwise
USUAL_BATCH_SIZE = 8
MOST_ROWS = 32  # completions in a micro-batch, where prompts are shared and nothing says otherwise


@dataclass(frozen=True)
class BatchPlan:
    batch_size: int  # completions in a micro-batch on each device
    gradient_accumulation_steps: int
    prompts_per_step: int


def batch_plan(
    *,
    num_generations: int,
    batch_size: int | None = None,
    gradient_accumulation_steps: int | None = None,
    prompts_per_step: int | None = None,
    processes: int = 1,
    usual_batch_size: int = USUAL_BATCH_SIZE,
) -> BatchPlan | str:
    """Completes the sizes that were not given; a sentence that says why where they cannot be completed.

    Groups are never cut by the end of a step, so the completions of a step are a multiple of `num_generations`.
    A batch size that follows from the prompts is at most `usual_batch_size`, in whole groups where that can be.
    """
    group, batch, accumulation, prompts = (
        num_generations,
        batch_size,
        gradient_accumulation_steps,
        prompts_per_step,
    )
    if prompts is None and batch is None and accumulation is None:
        prompts = USUAL_PROMPTS * processes // gcd(USUAL_PROMPTS * group, processes)
    if prompts is not None:
        return _from_prompts(prompts, group, batch, accumulation, processes, usual_batch_size)
    if batch is None:
        assert accumulation is not None
        unit = group // gcd(group, accumulation * processes)
        batch = max(unit, USUAL_BATCH_SIZE // unit * unit)
    elif accumulation is None:
        unit = group // gcd(group, batch * processes)
        accumulation = max(unit, USUAL_PROMPTS * group // (batch * processes) // unit * unit)
    completions = batch * accumulation * processes
    if completions % group:
        return (
            f"batch_size {batch} × gradient_accumulation_steps {accumulation}{_times(processes)} = {completions} "
            f"completions a step, which num_generations {group} does not divide. Leave gradient_accumulation_steps "
            f"out, or make it a multiple of {group // gcd(group, batch * processes)}."
        )
    return BatchPlan(batch, accumulation, completions // group)


def shared_batch_size(*, num_generations: int, prompt_tokens: int, completion_tokens: int) -> int:
    """How many completions share prompts in a micro-batch of no more tokens than `USUAL_BATCH_SIZE` padded rows have.

    Whole groups, or what fits of one; between `USUAL_BATCH_SIZE` and `MOST_ROWS`.
    """
    tokens = USUAL_BATCH_SIZE * (prompt_tokens + completion_tokens)
    rows = tokens // (prompt_tokens + num_generations * completion_tokens) * num_generations
    rows = rows or (tokens - prompt_tokens) // completion_tokens
    return min(max(rows, USUAL_BATCH_SIZE), MOST_ROWS)


def _from_prompts(
    prompts: int, group: int, batch: int | None, accumulation: int | None, processes: int, usual_batch_size: int
) -> BatchPlan | str:
    completions = prompts * group
    step = f"prompts_per_step {prompts} × num_generations {group} = {completions} completions a step"
    if completions % processes:
        return f"{step}, which cannot be spread over {processes} processes evenly."
    share = completions // processes
    if batch is None:
        if accumulation is None:
            sizes = [size for size in range(group, usual_batch_size + 1, group) if share % size == 0]
            batch = sizes[-1] if sizes else _largest_divisor(share, usual_batch_size)
        elif share % accumulation:
            return f"{step}, which gradient_accumulation_steps {accumulation}{_times(processes)} does not divide."
        else:
            batch = share // accumulation
    if accumulation is None:
        if share % batch:
            return (
                f"{step}, which batch_size {batch}{_times(processes)} does not divide. "
                f"Use --batch-size {_largest_divisor(share, batch)}, or another number of prompts."
            )
        accumulation = share // batch
    if batch * accumulation != share:
        return (
            f"{step}, but batch_size {batch} × gradient_accumulation_steps {accumulation}{_times(processes)} = "
            f"{batch * accumulation * processes}. Leave one of the three out: it follows from the others."
        )
    return BatchPlan(batch, accumulation, prompts)


def _largest_divisor(number: int, limit: int) -> int:
    return next(divisor for divisor in range(min(number, limit), 0, -1) if number % divisor == 0)


def _times(processes: int) -> str:
    return f" × {processes} processes" if processes > 1 else ""
