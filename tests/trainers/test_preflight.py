"""Preflights with a scripted engine, whose findings are known, and with a tiny model."""

import json

import pytest
from scripted import ScriptedEngine

import rlvr
from rlvr.config import TrainSettings
from rlvr.environments.base import Environment
from rlvr.errors import ConfigError, InfrastructureError
from rlvr.rewards.rubric import Rubric, WeightedReward
from rlvr.rollout.chat import ChatRenderer
from rlvr.trainers.preflight import look_before

pytestmark = pytest.mark.both


def right(trajectory):
    return float(trajectory.text == trajectory.example["answer"])


def length(trajectory):
    return float(len(trajectory.text))


def never(trajectory):
    return None


def broken(trajectory):
    return trajectory.example["solution"]


def look_up(word: str) -> str:
    """Looks a word up.

    Args:
        word: the word.
    """
    if word == "down":
        raise InfrastructureError("the index is down")
    return f"{word}!"


def call(name, **arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def environment(*rewards, count=2, **settings):
    rows = [{"question": f"q{number}", "answer": "yes"} for number in range(count)]
    return Environment(name="test", train_dataset=rows, rubric=Rubric(*(rewards or (right,))), **settings)


def look(tokenizer, env, *scripts, prompts=2, **settings):
    """A preflight with groups of two. A text that ends in … was cut."""
    end = tokenizer.eos_token_id
    ids = [[tokenizer.encode(text.rstrip("…")) + [end] * (not text.endswith("…")) for text in s] for s in scripts]
    return look_before(
        env,
        ScriptedEngine(ids, end_id=end),
        ChatRenderer(tokenizer, tools=env.tools),
        settings=TrainSettings(**{"num_generations": 2, "max_tokens": 300, **settings}),
        prompts=prompts,
    )


def levels(found):
    return {finding.topic: finding.level for finding in found.findings}


def text(found, topic):
    return next(finding.text for finding in found.findings if finding.topic == topic)


def test_all_is_well(tokenizer):
    found = look(tokenizer, environment(), ["yes"], ["no"], ["no"], ["no"])
    assert set(levels(found).values()) == {"ok"}
    assert found.problems == []
    expected = {
        "completions": 4,
        "share_of_groups_without_variance": 0.5,
        "pass_rate": 0.25,
        "mean_reward": 0.25,
        "share_cut": 0.0,
        "mean_completion": (4 + 3 * 3) / 4,
        "longest_completion": 4,
        "conversations_rendered_otherwise": 0,
        "infrastructure_failures": 0,
    }
    assert {name: found.numbers[name] for name in expected} == expected
    assert json.loads(json.dumps(found.as_json()))["findings"][0]["level"] == "ok"


def test_hopeless_and_cut(tokenizer):
    found = look(tokenizer, environment(count=5), *[["no…"]] * 10, prompts=5)
    assert levels(found) == {
        "groups": "problem",
        "difficulty": "problem",
        "rewards": "warning",
        "completions": "problem",
        "template": "warning",
        "infrastructure": "ok",
        "prompts": "ok",
        "time": "ok",
    }
    assert [finding.topic for finding in found.problems] == ["groups", "difficulty", "completions"]


def test_reward_functions_that_fail_never_apply_or_are_constant(tokenizer):
    env = environment(right, broken, (never, 0.5), WeightedReward(length, 0.0))
    found = look(tokenizer, env, *[["yes"]] * 4)
    texts = [finding.text for finding in found.findings if finding.topic == "rewards"]
    assert len(texts) == 3
    assert "right is 1 for all 4 attempts" in texts[0]
    assert "reward function 'broken' raised KeyError: 'solution'" in texts[1]
    assert "never never applies" in texts[2]
    assert levels(found)["difficulty"] == "warning"  # too easy


def test_tool_calls(tokenizer):
    env = environment(tools=[look_up])
    called, unknown, unreadable = call("look_up", word="a"), call("nothing"), "<tool_call>{</tool_call>"
    found = look(tokenizer, env, [called, "yes"], ["no"], [unknown, "no"], [unreadable, "no"])
    assert "43% of 7 turns call a tool, and 67% of 3 calls fail" in text(found, "tools")
    assert levels(found)["tools"] == "problem"
    assert [found.numbers[f"tools_{name}"] for name in ("turns", "with_calls", "calls", "failed")] == [7, 3, 3, 2]


def test_failed_infrastructure_is_no_reward(tokenizer):
    env = environment(tools=[look_up])
    found = look(tokenizer, env, [call("look_up", word="down")], ["yes"], ["yes"], ["no"])
    assert "1 of 4 attempts failed" in text(found, "infrastructure")
    assert "the index is down" in text(found, "infrastructure")
    assert found.numbers["pass_rate"] == pytest.approx(2 / 3)
    assert found.numbers["share_of_groups_without_variance"] == 0.5  # one attempt alone is compared with nothing


@pytest.mark.parametrize(
    ("turns", "differs"),
    [
        ([call("look_up", word="a"), "end"], False),
        (['<tool_call>{"name":"look_up","arguments":{"word":"a"}}</tool_call>', "end"], True),  # other spaces
        ([" spaces around "], True),
    ],
)
def test_whether_the_template_gives_the_sampled_ids_again(tokenizer, turns, differs):
    env = environment(tools=[look_up], count=1)
    # the template writes a line break before a call, so the first is sampled with one
    sampled = [("\n" if "</tool_call>" in turn else "") + turn for turn in turns]
    found = look(tokenizer, env, sampled, sampled, prompts=1)
    assert levels(found)["template"] == ("warning" if differs else "ok")
    assert found.numbers["conversations_rendered_otherwise"] == (2 if differs else 0)
    if differs:
        assert " became " in text(found, "template")


def test_prompts_that_are_too_long_are_left_out(tokenizer):
    env = environment(count=6)
    env.train_dataset[3]["question"] = "x" * 200
    found = look(tokenizer, env, *[["yes"], ["no"]] * 5, prompts=6, max_prompt_length=100)
    assert "1 of 6 prompts are longer than --max-prompt-length 100" in text(found, "prompts")
    assert found.numbers["completions"] == 10
    none = look(tokenizer, env, max_prompt_length=10)
    assert levels(none) == {"prompts": "problem"}


def test_a_tiny_model_through_the_public_function(model_folder):
    found = rlvr.preflight(
        environment(length), model_folder, "hf", prompts=2, num_generations=3, max_tokens=5, max_prompt_length=64
    )
    assert found.numbers["completions"] == 6
    assert found.numbers["longest_completion"] <= 5
    assert {"groups", "difficulty", "rewards", "completions", "template", "prompts", "time"} <= levels(found).keys()
    again = rlvr.preflight(
        environment(length), model_folder, "hf", prompts=2, num_generations=3, max_tokens=5, max_prompt_length=64
    )
    assert again.numbers["mean_reward"] == found.numbers["mean_reward"]


def test_what_is_refused(model_folder):
    with pytest.raises(ConfigError) as caught:
        rlvr.preflight(environment(), model_folder, prompts=0, temperature=0, max_steps=3)
    for words in ("prompts is 0", "temperature is 0", "preflight has no option 'max_steps'"):
        assert words in str(caught.value)
