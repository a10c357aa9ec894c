"""What a preflight looks for. Pure functions from counts to findings; each has its thresholds beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

Level = Literal["ok", "warning", "problem"]

SAME_REWARD = 1e-6  # rewards closer than this are equal: GRPO divides by a group's deviation + 1e-4
MOST_SILENT_GROUPS = 0.5  # more groups without an advantage than this: most of a step's work is for nothing
TOO_EASY = 0.8  # of the attempts pass before any training
HOPELESS_TRIES = 10  # without one that passes
MUCH_CUT, SOME_CUT = 0.5, 0.1  # completions that the token budget cuts
MANY_FAILED_CALLS, SOME_FAILED_CALLS = 0.5, 0.1
ROOMY = 4  # times the longest completion: so much room is reserved for nothing


@dataclass(frozen=True)
class Finding:
    """One line: what was seen, and what to do about it."""

    level: Level
    topic: str
    text: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", " ".join(self.text.split()))  # errors that are quoted may have several lines

    def as_json(self) -> dict[str, str]:
        return asdict(self)


def groups_finding(rewards: Sequence[Sequence[float | None]]) -> Finding:
    """Rewards of each group; None where none applies or the attempt does not count."""
    silent = sum(not varies(group) for group in rewards)
    text = f"{silent} of {len(rewards)} groups have no reward variance"
    if silent == len(rewards):
        advice = (
            "nothing would be learned. Choose prompts that the policy solves sometimes, or rewards with more grades"
        )
        return Finding("problem", "groups", f"{text}: {advice}.")
    if silent > MOST_SILENT_GROUPS * len(rewards):
        advice = "Their rollouts teach nothing. Leave out what is too easy or too hard, or raise --num-generations"
        return Finding("warning", "groups", f"{text}. {advice}.")
    return Finding("ok", "groups", f"{text}.")


def varies(group: Sequence[float | None]) -> bool:
    """Whether a group's rewards give any advantage."""
    there = [reward for reward in group if reward is not None]
    return len(there) >= 2 and max(there) - min(there) > SAME_REWARD


def difficulty_finding(passed: Sequence[bool], *, mean_reward: float | None, learnable: bool) -> Finding:
    """
    Args:
        passed: of each attempt that counts.
        mean_reward: over the attempts that a reward applies to; None if there is none.
        learnable: some group's rewards differ.
    """
    tries, share = len(passed), sum(passed) / len(passed) if passed else 0.0
    if sum(passed) == 0 and tries < HOPELESS_TRIES:
        return Finding("warning", "difficulty", f"none of {tries} attempts passes: too few to tell. Raise --prompts.")
    if sum(passed) == 0 and learnable:
        text = f"none of {tries} attempts passes, but their rewards differ: what earns part of them may lead there."
        return Finding("warning", "difficulty", text)
    if sum(passed) == 0:
        advice = "Take easier examples, a better model, or a warm start on solved ones"
        return Finding("problem", "difficulty", f"hopeless: none of {tries} attempts passes. {advice}.")
    if share > TOO_EASY:
        advice = "There is little left to learn: take harder examples"
        return Finding("warning", "difficulty", f"too easy: {share:.0%} of {tries} attempts pass already. {advice}.")
    reward = "" if mean_reward is None else f", with a mean reward of {mean_reward:.3f}"
    return Finding("ok", "difficulty", f"{share:.0%} of {tries} attempts pass{reward}.")


def completions_finding(lengths: Sequence[int], *, cut: int, max_tokens: int) -> Finding:
    """
    Args:
        lengths: tokens of each completion, tool text included.
        cut: completions that the token budget ended.
    """
    share = cut / len(lengths)
    sizes = f"{sum(lengths) / len(lengths):.0f} tokens in the mean, {max(lengths)} at most"
    if share > SOME_CUT:
        text = f"{share:.0%} are cut at --max-tokens {max_tokens} ({sizes}). Raise it, or ask for shorter answers."
        return Finding("problem" if share > MUCH_CUT else "warning", "completions", text)
    hint = " A lower --max-tokens would save memory." if ROOMY * max(lengths) < max_tokens else ""
    return Finding("ok", "completions", f"{sizes}, and {share:.0%} are cut at --max-tokens {max_tokens}.{hint}")


def prompts_finding(lengths: Sequence[int], *, limit: int) -> Finding:
    """Tokens of the prompts that were looked at; training leaves out those above the limit."""
    over = sum(length > limit for length in lengths)
    text = f"{over} of {len(lengths)} prompts are longer than --max-prompt-length {limit} (longest: {max(lengths)})"
    if over == len(lengths):
        return Finding("problem", "prompts", f"{text}: none is left to train on. Raise it.")
    if over:
        return Finding("warning", "prompts", f"{text}. They are left out; raise it to keep them.")
    return Finding("ok", "prompts", f"{max(lengths)} tokens at most, of --max-prompt-length {limit}.")


def tools_finding(*, turns: int, with_calls: int, calls: int, failed: int) -> Finding:
    """
    Args:
        with_calls: turns that call a tool.
        failed: calls that could not be parsed, were refused, raised or timed out.
    """
    if calls == 0:
        advice = "Say in the system prompt when and how to call, or take a model made for tool calls"
        return Finding("problem", "tools", f"no tool was called in {turns} turns. {advice}.")
    share = failed / calls
    text = f"{with_calls / turns:.0%} of {turns} turns call a tool, and {share:.0%} of {calls} calls fail"
    if share > SOME_FAILED_CALLS:
        advice = "Look at what the tools answer; name the parameters and give an example in the tools' docstrings"
        level: Level = "problem" if share > MANY_FAILED_CALLS else "warning"
        return Finding(level, "tools", f"{text}. {advice}.")
    return Finding("ok", "tools", f"{text}.")


def template_finding(*, differing: int, compared: int, difference: str | None) -> Finding:
    """
    Args:
        differing: conversations whose rendering does not begin with the ids that were sampled.
        difference: one of them, shortened.
    """
    if not compared:
        return Finding("warning", "template", "every completion was cut, so no conversation could be rendered again.")
    if not differing:
        return Finding("ok", "template", f"{compared} conversations, rendered again, give the ids that were sampled.")
    text = (
        f"{differing} of {compared} conversations, rendered again, do not give the ids that were sampled: {difference}"
    )
    advice = "Training is right, it keeps the sampled ids; a server that renders the history anew sees other ones"
    return Finding("warning", "template", f"{text}. {advice}.")


def reward_findings(
    values: Mapping[str, Sequence[float | None]], *, weights: Mapping[str, float], errors: Mapping[str, str]
) -> list[Finding]:
    """
    Args:
        values: of each reward function for each attempt that counts; None where it did not apply, or raised.
        weights: 0: a metric, which may be constant.
        errors: what functions raised, or returned that is no reward.
    """
    found = []
    for name, column in values.items():
        there = [value for value in column if value is not None]
        if name in errors:
            text = f"{name} fails, which would stop the run: {errors[name]}"
            found.append(Finding("problem", "rewards", text))
        elif not there:
            text = (
                f"{name} never applies: it gave None for all {len(column)} attempts. Does it read the right columns?"
            )
            found.append(Finding("warning", "rewards", text))
        elif weights[name] and len(there) > 1 and max(there) - min(there) <= SAME_REWARD:
            text = f"{name} is {there[0]:g} for all {len(there)} attempts, so it teaches nothing."
            found.append(Finding("warning", "rewards", text))
    if found:
        return found
    return [Finding("ok", "rewards", f"all with a weight differ between attempts: {_names(values, weights)}.")]


def _names(values: Mapping[str, Sequence[float | None]], weights: Mapping[str, float]) -> str:
    return ", ".join(name for name in values if weights[name])


def infrastructure_finding(*, failed: int, attempts: int, failure: str | None) -> Finding:
    if not failed:
        return Finding("ok", "infrastructure", "no attempt failed for reasons outside the model.")
    text = f"{failed} of {attempts} attempts failed for reasons outside the model: {failure}"
    return Finding("problem" if 2 * failed > attempts else "warning", "infrastructure", text)


def time_finding(*, seconds: float, completions: int, per_step: int) -> Finding:
    """From the time that some completions took to that of a step's; what it takes to train on them comes on top."""
    step = seconds * per_step / completions
    text = f"sampling {completions} completions took {seconds:.1f} s: {step:.1f} s a step of {per_step}, and training."
    return Finding("ok", "time", text)
