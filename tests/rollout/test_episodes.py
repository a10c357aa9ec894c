from __future__ import annotations

import json
import threading

import pytest
from scripted import ScriptedEngine

from rlvr.environments.base import Environment
from rlvr.errors import DataError, EnvironmentDefinitionError, InfrastructureError
from rlvr.rewards.rubric import Rubric
from rlvr.rollout.chat import ChatRenderer
from rlvr.rollout.episodes import play
from rlvr.testing.tiny import tiny_tokenizer
from rlvr.types import StopReason


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def reward(trajectory) -> float:
    return 1.0


def look_up(word: str, state: dict) -> str:
    """Looks a word up.

    Args:
        word: the word.
    """
    state.setdefault("seen", []).append(word)
    return f"{word}!"


def finish(answer: str, state: dict) -> str:
    """Gives the answer.

    Args:
        answer: the answer.
    """
    state.update(done=True, answer=answer)
    return "thanks"


def environment(**settings) -> Environment:
    return Environment(name="test", train_dataset=[{"question": "q"}], rubric=Rubric(reward), **settings)


def call(name: str, **arguments) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def run(tokenizer, env, *scripts, examples=None, budget=2000, logprobs=True, **options):
    """Plays a script for each rollout: its turns as texts. A text that ends in … was cut by the budget."""
    end = tokenizer.eos_token_id

    def ids(text):
        return tokenizer.encode(text.rstrip("…")) + ([] if text.endswith("…") else [end])

    engine = ScriptedEngine([[ids(turn) for turn in turns] for turns in scripts], end_id=end, with_logprobs=logprobs)
    rollouts = play(
        env,
        examples or [{"question": "q"}] * len(scripts),
        engine=engine,
        renderer=ChatRenderer(tokenizer, tools=env.tools),
        max_completion_tokens=budget,
        **options,
    )
    for index, rollout in enumerate(rollouts):
        assert rollout.prompt_ids + rollout.completion_ids == engine.sequences[index]
        assert len(rollout.completion_ids) == len(rollout.sampled_mask) >= 1
    return rollouts


def sampled_text(tokenizer, rollout, value):
    pairs = zip(rollout.completion_ids, rollout.sampled_mask, strict=True)
    return tokenizer.decode([token for token, mask in pairs if mask == value])


def test_single_turn_is_the_sampled_ids_alone(tokenizer):
    (rollout,) = run(tokenizer, environment(), ["hello"])
    assert tokenizer.decode(rollout.prompt_ids) == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert rollout.completion_ids == [*tokenizer.encode("hello"), tokenizer.eos_token_id]
    assert rollout.sampled_mask == [1] * 6
    assert rollout.logprobs == [-(token + 1) / 100 for token in rollout.completion_ids]
    assert rollout.ended
    assert rollout.trajectory.stop_reason is StopReason.END_OF_TURN
    assert rollout.trajectory.completion == [{"role": "assistant", "content": "hello"}]


def test_tool_text_is_appended_and_masked_out(tokenizer):
    env = environment(tools=[look_up, finish])
    turn = "hm " + call("look_up", word="b")
    (rollout,) = run(tokenizer, env, [turn, call("finish", answer="c")])
    between = "\n<|im_start|>user\n<tool_response>\nb!\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    text = f"{turn}<|im_end|>{between}{call('finish', answer='c')}<|im_end|>"
    assert tokenizer.decode(rollout.completion_ids) == text
    first, last = len(turn) + 1, len(call("finish", answer="c")) + 1
    middle = len(rollout.completion_ids) - first - last
    assert rollout.sampled_mask == [1] * first + [0] * middle + [1] * last
    assert [p == 0.0 for p in rollout.logprobs] == [mask == 0 for mask in rollout.sampled_mask]
    trajectory = rollout.trajectory
    assert trajectory.stop_reason is StopReason.COMPLETED
    assert trajectory.state == {"seen": ["b"], "done": True, "answer": "c"}
    assert [message["role"] for message in trajectory.completion] == ["assistant", "tool", "assistant"]
    assert trajectory.completion[0]["content"] == "hm"
    assert trajectory.completion[1] == {"role": "tool", "name": "look_up", "content": "b!"}


def test_rollouts_stay_in_the_order_of_their_examples_and_have_their_own_state(tokenizer):
    env = environment(tools=[look_up])
    scripts = [[call("look_up", word=str(i)), f"done {i}"] for i in range(5)]
    progress = []
    rollouts = run(tokenizer, env, *scripts, on_progress=lambda *counts: progress.append(counts))
    assert [r.trajectory.text for r in rollouts] == [f"done {i}" for i in range(5)]
    assert [r.trajectory.state for r in rollouts] == [{"seen": [str(i)]} for i in range(5)]
    assert progress[-1] == (5, 5)


def test_a_slow_tool_holds_up_its_own_conversation_only(tokenizer):
    others_are_done = threading.Event()

    def tool(pace: str) -> str:
        """Waits if told to.

        Args:
            pace: slow or fast.
        """
        if pace == "slow":
            assert others_are_done.wait(60)
        return pace

    env = environment(tools=[tool], max_turns=4)
    fast = [*[call("tool", pace="fast")] * 3, "end"]

    def watch(finished, total):
        if finished == total - 1:
            others_are_done.set()

    rollouts = run(tokenizer, env, [call("tool", pace="slow"), "end"], fast, fast, on_progress=watch)
    assert [r.trajectory.stop_reason for r in rollouts] == [StopReason.NO_TOOL_CALL] * 3
    assert rollouts[0].trajectory.failed_calls == 0
    assert rollouts[0].trajectory.completion[1]["content"] == "slow"


@pytest.mark.parametrize(
    ("turns", "settings", "reason"),
    [
        (["no call"], {}, StopReason.NO_TOOL_CALL),
        ([call("look_up", word="a")], {"max_turns": 1}, StopReason.MAX_TURNS),
        ([call("look_up", word="a"), call("look_up", word="a")], {"max_turns": 2}, StopReason.MAX_TURNS),
        ([call("finish", answer="x")], {"max_turns": 1}, StopReason.COMPLETED),
        (["cut…"], {}, StopReason.TOKEN_BUDGET),
        ([call("no_such_tool"), call("look_up")], {"max_tool_failures": 1}, StopReason.TOOL_FAILURES),
        ([call("no_such_tool"), "fine"], {"max_tool_failures": 1}, StopReason.NO_TOOL_CALL),
        ([call("no_such_tool")], {"max_tool_failures": 0}, StopReason.TOOL_FAILURES),
    ],
)
def test_stop_reasons(tokenizer, turns, settings, reason):
    (rollout,) = run(tokenizer, environment(tools=[look_up, finish], **settings), turns)
    assert rollout.trajectory.stop_reason is reason
    assert rollout.sampled_mask[-1] == 1
    assert rollout.trajectory.turns[-1].replies == ()
    assert rollout.ended is (reason is not StopReason.TOKEN_BUDGET)


def test_bad_calls_are_answered_and_counted(tokenizer):
    env = environment(tools=[look_up])
    turns = ["<tool_call>{broken</tool_call>", call("look_up", word=3) + call("nothing"), "end"]
    (rollout,) = run(tokenizer, env, turns)
    first, second, _ = rollout.trajectory.turns
    assert (first.failed_calls, second.failed_calls) == (1, 2)
    contents = [reply["content"] for turn in (first, second) for reply in turn.replies]
    assert contents[0].startswith("error: the tool call is not valid JSON")
    assert contents[1:] == [
        "error: look_up: word must be string, got 3",
        "error: there is no tool 'nothing'; there are: look_up",
    ]
    assert first.message == {"role": "assistant", "content": "<tool_call>{broken</tool_call>"}
    text = sampled_text(tokenizer, rollout, 0)
    assert all(content in text for content in contents)


def test_a_result_that_does_not_fit_is_left_out_of_ids_and_trajectory(tokenizer):
    env = environment(tools=[look_up])
    turn = call("look_up", word="x")
    reply = "\n<|im_start|>user\n<tool_response>\nx!\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    needed = len(turn) + 1 + len(tokenizer.encode(reply))
    (rollout,) = run(tokenizer, env, [turn, "y"], budget=needed)
    assert rollout.trajectory.stop_reason is StopReason.TOKEN_BUDGET
    assert rollout.completion_ids == [*tokenizer.encode(turn), tokenizer.eos_token_id]
    assert rollout.trajectory.turns[-1].replies == ()
    assert len(rollout.trajectory.turns) == 1
    (rollout,) = run(tokenizer, env, [turn, "y"], budget=needed + 1)
    assert rollout.trajectory.stop_reason is StopReason.TOKEN_BUDGET
    assert len(rollout.completion_ids) == needed + 1
    assert not rollout.ended
    assert len(rollout.trajectory.turns) == 2


class Guessing(Environment):
    """The environment answers until the number is found."""

    main_thread = False

    def respond(self, trajectory):
        Guessing.main_thread |= threading.current_thread() is threading.main_thread()
        guess = trajectory.text
        if guess == "7":
            trajectory.state["done"] = True
            return []
        return [{"role": "user", "content": "higher" if int(guess) < 7 else "lower"}]


def test_an_environment_that_answers(tokenizer):
    env = Guessing(name="guess", train_dataset=[{"question": "q"}], rubric=Rubric(reward), max_turns=3)
    found, lost = run(tokenizer, env, ["9", "7"], ["1", "2", "3"])
    assert [m["content"] for m in found.trajectory.completion] == ["9", "lower", "7"]
    assert found.trajectory.stop_reason is StopReason.COMPLETED
    assert lost.trajectory.stop_reason is StopReason.MAX_TURNS
    between = "\n<|im_start|>user\nhigher<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(lost.completion_ids) == f"1<|im_end|>{between}2<|im_end|>{between}3<|im_end|>"
    assert not Guessing.main_thread


class Switchboard(Environment):
    """Its tool is a schema; `respond` answers the calls."""

    def respond(self, trajectory):
        calls = trajectory.turns[-1].tool_calls
        if not calls:
            return []
        return [
            {"role": "tool", "name": call.name, "content": str(call.error or dict(call.arguments))} for call in calls
        ]


def test_tools_that_are_schemas_are_answered_by_respond(tokenizer):
    schema = {
        "type": "function",
        "function": {"name": "dial", "description": "Dials.", "parameters": {"type": "object", "properties": {}}},
    }
    env = Switchboard(name="test", train_dataset=[{"question": "q"}], rubric=Rubric(reward), tools=[schema])
    turns = [call("dial", number=7) + call("other"), "<tool_call>{</tool_call>", "bye"]
    (rollout,) = run(tokenizer, env, turns)
    replies = [reply["content"] for turn in rollout.trajectory.turns for reply in turn.replies]
    assert replies[:2] == ["{'number': 7}", "{}"]
    assert replies[2].startswith("the tool call is not valid JSON")
    assert [turn.failed_calls for turn in rollout.trajectory.turns] == [0, 1, 0]
    assert rollout.trajectory.stop_reason is StopReason.NO_TOOL_CALL


def test_infrastructure_errors_end_their_own_rollout_only(tokenizer):
    def fetch(page: str) -> str:
        """Fetches a page.

        Args:
            page: its name.
        """
        if page == "down":
            raise InfrastructureError("the server is down")
        return page

    down, fine = run(
        tokenizer, environment(tools=[fetch]), [call("fetch", page="down")], [call("fetch", page="a"), "b"]
    )
    assert down.trajectory.stop_reason is StopReason.INFRASTRUCTURE
    assert down.trajectory.failed_calls == 0
    assert down.completion_ids[-1] == tokenizer.eos_token_id
    assert fine.trajectory.stop_reason is StopReason.NO_TOOL_CALL


@pytest.mark.parametrize("method", ["respond", "stop_reason", "new_state", "messages"])
def test_a_bug_of_the_environment_stops_the_run_with_its_name(tokenizer, method):
    env = environment()

    def broken(argument):
        raise KeyError("oops")

    setattr(env, method, broken)
    with pytest.raises(EnvironmentDefinitionError, match=rf"'test' raised KeyError in {method}\(\): 'oops'"):
        run(tokenizer, env, ["a"])


def test_a_prompt_that_is_too_long(tokenizer):
    with pytest.raises(DataError, match=r"has 35 tokens, and max_prompt_tokens is 20"):
        run(tokenizer, environment(), ["a"], examples=[{"question": "0123456789abcdef"}], max_prompt_tokens=20)


def test_an_engine_without_logprobs(tokenizer):
    (rollout,) = run(tokenizer, environment(tools=[look_up]), [call("look_up", word="a"), "b"], logprobs=False)
    assert rollout.logprobs is None


def test_no_examples(tokenizer):
    env = environment()
    renderer = ChatRenderer(tokenizer)
    assert play(env, [], engine=ScriptedEngine([], end_id=2), renderer=renderer, max_completion_tokens=5) == []
