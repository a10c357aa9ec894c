"""What a preflight says, against cases worked out by hand."""

import pytest

from rlvr.trainers.findings import (
    completions_finding,
    difficulty_finding,
    groups_finding,
    infrastructure_finding,
    prompts_finding,
    reward_findings,
    template_finding,
    time_finding,
    tools_finding,
    varies,
)


def check(finding, level, *words):
    assert finding.level == level, finding
    for text in words:
        assert text in finding.text
    assert "\n" not in finding.text


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        ([1, 0], True),
        ([1, 1, 1], False),
        ([0.1 + 0.2, 0.3], False),
        ([1, None], False),
        ([None, None], False),
        ([1, None, 0.5], True),
        ([], False),
    ],
)
def test_what_gives_an_advantage(group, expected):
    assert varies(group) is expected


def test_groups():
    alive, dead = [1, 0], [1, 1]
    check(groups_finding([alive, dead]), "ok", "1 of 2 groups")
    check(groups_finding([alive, dead, dead]), "warning", "2 of 3 groups", "--num-generations")
    check(groups_finding([dead, dead]), "problem", "2 of 2 groups", "nothing would be learned")


@pytest.mark.parametrize(
    ("passed", "tries", "learnable", "level", "words"),
    [
        (0, 9, False, "warning", "too few to tell"),
        (0, 10, False, "problem", "hopeless: none of 10"),
        (0, 10, True, "warning", "rewards differ"),
        (1, 10, True, "ok", "10% of 10 attempts pass, with a mean reward of 0.250"),
        (8, 10, True, "ok", "80%"),
        (9, 10, True, "warning", "too easy: 90%"),
        (0, 0, False, "warning", "none of 0"),
    ],
)
def test_difficulty(passed, tries, learnable, level, words):
    outcomes = [True] * passed + [False] * (tries - passed)
    check(difficulty_finding(outcomes, mean_reward=0.25, learnable=learnable), level, words)


def test_completions():
    lengths = [10, 20, 30, 40]
    check(completions_finding(lengths, cut=0, max_tokens=40), "ok", "25 tokens in the mean, 40 at most", "0% are cut")
    check(completions_finding(lengths, cut=0, max_tokens=161), "ok", "lower --max-tokens")
    assert "lower" not in completions_finding(lengths, cut=0, max_tokens=160).text
    check(completions_finding(lengths, cut=1, max_tokens=40), "warning", "25% are cut at --max-tokens 40", "Raise")
    check(completions_finding(lengths, cut=2, max_tokens=40), "warning", "50%")
    check(completions_finding(lengths, cut=3, max_tokens=40), "problem", "75%")
    check(completions_finding([5] * 10, cut=1, max_tokens=9), "ok", "10%")


def test_prompts():
    check(prompts_finding([5, 9], limit=9), "ok", "9 tokens at most")
    check(prompts_finding([5, 9], limit=8), "warning", "1 of 2 prompts", "longest: 9")
    check(prompts_finding([5, 9], limit=4), "problem", "none is left")


def test_tools():
    counts = {"turns": 20, "with_calls": 10}
    check(tools_finding(**counts, calls=10, failed=1), "ok", "50% of 20 turns", "10% of 10 calls fail")
    check(tools_finding(**counts, calls=10, failed=2), "warning", "20%")
    check(tools_finding(**counts, calls=10, failed=6), "problem", "60%")
    check(tools_finding(turns=20, with_calls=0, calls=0, failed=0), "problem", "no tool was called in 20 turns")


def test_template():
    check(template_finding(differing=0, compared=3, difference=None), "ok", "3 conversations")
    check(
        template_finding(differing=1, compared=3, difference="'a' became 'b'"), "warning", "1 of 3", "'a' became 'b'"
    )
    check(template_finding(differing=0, compared=0, difference=None), "warning", "every completion was cut")


def test_rewards():
    values = {
        "right": [1.0, 0.0],
        "format": [1.0, 1.0],
        "turns": [1.0, 1.0],
        "length": [None, None],
        "bad": [None, 1.0],
    }
    weights = {"right": 1.0, "format": 0.2, "turns": 0.0, "length": 0.1, "bad": 1.0}
    found = reward_findings(values, weights=weights, errors={"bad": "raised KeyError: 'x'"})
    assert [finding.level for finding in found] == ["warning", "warning", "problem"]
    for finding, words in zip(
        found, ["format is 1 for all 2", "length never applies", "raised KeyError"], strict=True
    ):
        assert words in finding.text
    (fine,) = reward_findings({"right": [1.0, 0.0], "turns": [1.0, 1.0]}, weights=weights, errors={})
    check(fine, "ok", "right")
    assert "turns" not in fine.text


def test_infrastructure_and_time():
    check(infrastructure_finding(failed=0, attempts=8, failure=None), "ok")
    check(infrastructure_finding(failed=4, attempts=8, failure="down"), "warning", "4 of 8", "down")
    check(infrastructure_finding(failed=5, attempts=8, failure="down\nfor long"), "problem", "down for long")
    check(time_finding(seconds=4.0, completions=80, per_step=64), "ok", "3.2 s a step of 64")
