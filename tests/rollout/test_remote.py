"""Environments played by a server on this machine: the same rules as with token ids."""

import json
import threading

import pytest
from chat_server import HANG_UP, ChatServer, completion, script

from rlvr.environments.base import Environment
from rlvr.errors import EndpointError, InfrastructureError
from rlvr.rewards.rubric import Rubric
from rlvr.rollout import api, remote
from rlvr.rollout.api import Endpoint
from rlvr.rollout.engine import SamplingSettings
from rlvr.rollout.evaluation import evaluate_policy
from rlvr.rollout.remote import RemotePlayer
from rlvr.types import StopReason

pytestmark = pytest.mark.both


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(api, "FIRST_WAIT_S", 0.0)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def reward(trajectory) -> float:
    return float(trajectory.text == trajectory.example.get("answer", "yes"))


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


def environment(rows=None, **settings):
    return Environment(name="test", train_dataset=rows or [{"question": "q"}], rubric=Rubric(reward), **settings)


def player(server, *, budget=100, retries=0, sampling=None, **settings):
    return RemotePlayer(
        endpoint=Endpoint(base_url=server.url, model="served", retries=retries),
        sampling=sampling or SamplingSettings(temperature=0.0),
        max_completion_tokens=budget,
        **settings,
    )


def play(env, *answers, **settings):
    """One rollout against a script: what was played, and the bodies of the requests."""
    with ChatServer(script(*answers)) as server:
        (played,) = player(server, **settings).play(env, [env.train_dataset[0]], [0])
    return played, server.bodies


def test_a_single_turn_and_what_is_sent():
    played, (body,) = play(environment(system_prompt="Be short."), completion("yes", completion_tokens=4), budget=50)
    assert body == {
        "model": "served",
        "messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "q"}],
        "temperature": 0.0,
        "max_tokens": 50,
    }
    assert played.trajectory.completion == [{"role": "assistant", "content": "yes"}]
    assert played.trajectory.stop_reason is StopReason.END_OF_TURN
    assert played.tokens == 4


def test_sampling_options_are_sent_where_they_are_not_the_default():
    sampling = SamplingSettings(temperature=0.7, top_p=0.9, top_k=20, min_p=0.1, repetition_penalty=1.1)
    _, (body,) = play(environment(), completion("a"), sampling=sampling, seed=40)
    sent = {name: body[name] for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")}
    assert sent == {
        "temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.1, "seed": 40,
    }  # fmt: skip


def test_tools_are_called_and_the_conversation_grows():
    env = environment(tools=[look_up, finish])
    played, (first, second) = play(
        env,
        completion("hm", calls=[("look_up", '{"word": "b"}')], prompt_tokens=30, completion_tokens=8),
        completion(None, calls=[("finish", '{"answer": "c"}')], prompt_tokens=50, completion_tokens=6),
    )
    names = [tool["function"]["name"] for tool in first["tools"]]
    assert names == ["look_up", "finish"]
    assert all(set(tool["function"]) == {"name", "description", "parameters"} for tool in first["tools"])
    assert first["tools"][0]["function"]["parameters"]["properties"].keys() == {"word"}
    call = {"id": "id-look_up", "type": "function", "function": {"name": "look_up", "arguments": '{"word": "b"}'}}
    assert second["messages"] == [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "hm", "tool_calls": [call]},
        {"role": "tool", "content": "b!", "tool_call_id": "id-look_up"},
    ]
    # 50 - 30 tokens of a first turn and its reply, 6 of the second: 26
    assert (first["max_tokens"], second["max_tokens"], played.tokens) == (100, 100 - 8, 26)
    assert played.trajectory.stop_reason is StopReason.COMPLETED
    assert played.trajectory.state == {"seen": ["b"], "done": True, "answer": "c"}
    assert played.trajectory.completion[1] == {
        "role": "tool", "name": "look_up", "content": "b!", "tool_call_id": "id-look_up",
    }  # fmt: skip


def test_a_call_that_cannot_be_read_is_answered_and_sent_back_without_arguments():
    env = environment(tools=[look_up])
    calls = [("look_up", '{"word": '), ("look_up", '{"word": "a"}')]
    played, (_, second) = play(env, completion("x", calls=calls), completion("end"))
    _, assistant, refused, answered = second["messages"]
    assert [call["function"]["arguments"] for call in assistant["tool_calls"]] == ["{}", '{"word": "a"}']
    assert refused["content"].startswith('error: "arguments" must be a JSON object')
    assert answered["content"] == "a!"
    assert played.trajectory.failed_calls == 1
    assert [call.error is None for call in played.trajectory.tool_calls] == [False, True]
    assert played.trajectory.stop_reason is StopReason.NO_TOOL_CALL


def look(word="a"):
    return completion(calls=[("look_up", json.dumps({"word": word}))])


@pytest.mark.parametrize(
    ("answers", "settings", "reason"),
    [
        ([completion("plain")], {}, StopReason.NO_TOOL_CALL),
        ([look()], {"max_turns": 1}, StopReason.MAX_TURNS),
        ([look(), look()], {"max_turns": 2}, StopReason.MAX_TURNS),
        ([completion("cut", finish="length")], {}, StopReason.TOKEN_BUDGET),
        (
            [completion(calls=[("nothing", "{}")]), completion(calls=[("look_up", "{")])],
            {"max_tool_failures": 1},
            StopReason.TOOL_FAILURES,
        ),
    ],
)
def test_stop_reasons_are_those_of_local_rollouts(answers, settings, reason):
    played, _ = play(environment(tools=[look_up], **settings), *answers)
    assert played.trajectory.stop_reason is reason
    assert played.trajectory.turns[-1].replies == ()


def test_the_token_budget_counts_replies_once_the_server_has():
    env = environment(tools=[look_up])
    turn = [("look_up", '{"word": "a"}')]
    over, bodies = play(
        env,
        completion(calls=turn, prompt_tokens=10, completion_tokens=30),
        completion(calls=turn, prompt_tokens=60, completion_tokens=11),  # 50 + 11 of 60
        budget=60,
    )
    assert [body["max_tokens"] for body in bodies] == [60, 30]
    assert (over.trajectory.stop_reason, over.tokens) == (StopReason.TOKEN_BUDGET, 61)
    assert over.trajectory.state["seen"] == ["a"]  # the second call was not made
    full, bodies = play(env, completion(calls=turn, prompt_tokens=10, completion_tokens=60), budget=60)
    assert (full.trajectory.stop_reason, len(bodies)) == (StopReason.TOKEN_BUDGET, 1)


class Guessing(Environment):
    def respond(self, trajectory):
        if trajectory.text == "7":
            trajectory.state["done"] = True
            return []
        return [{"role": "user", "content": "higher" if int(trajectory.text) < 7 else "lower"}]


def test_an_environment_that_answers():
    env = Guessing(name="guess", train_dataset=[{"question": "q"}], rubric=Rubric(reward))
    played, bodies = play(env, completion("3"), completion("9"), completion("7"))
    assert [message["content"] for message in bodies[-1]["messages"]] == ["q", "3", "higher", "9", "lower"]
    assert played.trajectory.stop_reason is StopReason.COMPLETED


def test_calls_in_a_prompt_are_written_as_the_api_wants_them():
    call = {"type": "function", "function": {"name": "look_up", "arguments": {"word": "é"}}}
    prompt = [
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "look_up", "content": "é!"},
        {"role": "user", "content": "second"},
    ]
    _, (body,) = play(environment([{"prompt": prompt}], tools=[look_up]), completion("a"))
    _, assistant, tool, _ = body["messages"]
    (sent,) = assistant["tool_calls"]
    assert sent["function"] == {"name": "look_up", "arguments": '{"word": "é"}'}
    assert tool == {"role": "tool", "content": "é!", "tool_call_id": sent["id"]}


def rows(count):
    return [{"question": str(number), "answer": str(number)} for number in range(count)]


def echo(body):
    return completion(body["messages"][0]["content"])


@pytest.mark.parametrize("concurrency", [1, 3])
def test_so_many_requests_at_the_same_time_and_no_more(concurrency):
    together = threading.Barrier(concurrency)

    def answer(body):
        together.wait(30)  # passes only if so many are there at once
        return echo(body)

    env = environment(rows(4 * concurrency))
    with ChatServer(answer) as server:
        found = evaluate_policy(env, player(server, concurrency=concurrency))
    assert server.most == concurrency
    assert found.metrics["pass@1"] == 1.0


def test_failed_attempts_are_excluded_and_counted_never_reward_zero():
    def answer(body):
        return HANG_UP if body["messages"][0]["content"] in ("1", "3") else echo(body)

    with ChatServer(answer) as server:
        found = evaluate_policy(environment(rows(5)), player(server, retries=1, concurrency=2), samples=2)
    assert found.excluded == 4
    assert found.metrics["reward"] == found.metrics["pass@1"] == 1.0
    assert found.stop_reasons == {"end_of_turn": 0.6, "infrastructure": 0.4}
    assert len(server.requests) == 6 + 4 * 2
    failures = [item.trajectory.failure for item in found.trajectories if item.passed is None]
    assert all("gave no answer in 2 trials" in failure for failure in failures)
    assert [item.example for item in found.trajectories] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_an_outage_in_the_middle_of_a_conversation():
    played, _ = play(environment(tools=[look_up]), look(), (500, "down"))
    assert played.trajectory.stop_reason is StopReason.INFRASTRUCTURE
    assert "status 500: down" in played.trajectory.failure
    assert len(played.trajectory.turns) == 1


def test_a_tool_whose_service_is_down():
    def fetch(page: str) -> str:
        """Fetches a page.

        Args:
            page: its name.
        """
        raise InfrastructureError("the index is down")

    played, _ = play(environment(tools=[fetch]), completion(calls=[("fetch", '{"page": "a"}')]))
    assert played.trajectory.stop_reason is StopReason.INFRASTRUCTURE
    assert played.trajectory.failure == "the index is down"


def test_a_server_that_is_gone_is_not_asked_for_every_example(monkeypatch):
    monkeypatch.setattr(remote, "HOPELESS", 4)
    says = "4 rollouts in a row have failed.*status 503: gone"
    with ChatServer(lambda body: (503, "gone")) as server, pytest.raises(EndpointError, match=says):
        evaluate_policy(environment(rows(100)), player(server, concurrency=1))
    assert len(server.requests) < 10


def test_a_refusal_stops_the_evaluation():
    answer = (401, {"error": {"message": "who are you?"}})
    with ChatServer(lambda body: answer) as server, pytest.raises(EndpointError, match="who are you"):
        evaluate_policy(environment(rows(20)), player(server, concurrency=2))
    assert len(server.requests) <= 4


def test_only_what_is_wanted_is_played_and_each_attempt_has_its_seed():
    env = environment(rows(4))
    with ChatServer(echo) as server:
        played = list(player(server, seed=100, concurrency=1).play(env, env.train_dataset, [1, 3]))
    assert [item.index for item in played] == [1, 3]
    assert [body["seed"] for body in server.bodies] == [101, 103]
