"""One request to a real server on this machine: what is tried again, what is not, and what is said about it."""

import asyncio
import time

import pytest
from chat_server import CUT_SHORT, HANG_UP, ChatServer, completion, script

from rlvr.errors import EndpointError, InfrastructureError
from rlvr.rollout import api
from rlvr.rollout.api import ChatClient, Endpoint, backoff_s, json_bytes, read_reply, retry_after_s, url_problem
from rlvr.types import ToolCall

pytestmark = pytest.mark.both

KEY = "sk-very-secret"
BODY = {"model": "m", "messages": [{"role": "user", "content": "né"}]}


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(api, "FIRST_WAIT_S", 0.0)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def ask(server, **settings):
    async def once():
        client = ChatClient(Endpoint(base_url=server.url, model="m", key=KEY, **settings), connections=2)
        try:
            return await client.complete(BODY)
        finally:
            await client.close()

    return asyncio.run(once())


def test_a_request_and_its_reply():
    calls = [("add", '{"a": 1}'), ("stop", "")]
    with ChatServer(script(completion("hm", calls=calls, prompt_tokens=7, completion_tokens=3))) as server:
        reply = ask(server)
    ((path, headers, body),) = server.requests
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert body == BODY
    assert reply.text == "hm"
    assert reply.calls == (ToolCall("add", {"a": 1}, call_id="id-add"), ToolCall("stop", {}, call_id="id-stop"))
    assert (reply.cut, reply.prompt_tokens, reply.completion_tokens) == (False, 7, 3)


PASSING = {
    "too many requests": (429, {"error": {"message": "slow down"}}),
    "conflict": (409, "conflict"),
    "time-out": (408, ""),
    "server error": (500, "<html>oops</html>"),
    "overloaded": (529, {"error": "overloaded"}),
    "hang-up": HANG_UP,
    "cut short": (200, CUT_SHORT),
    "broken JSON": (200, '{"choices": ['),
    "no choice": (200, {"choices": []}),
    "no usage": (200, {"choices": [{"message": {"content": "a"}}]}),
}


@pytest.mark.parametrize("trouble", PASSING.values(), ids=PASSING)
def test_what_may_pass_is_tried_again(trouble):
    with ChatServer(script(trouble, trouble, completion("at last"))) as server:
        assert ask(server, retries=2).text == "at last"
    assert len(server.requests) == 3


@pytest.mark.parametrize("trouble", PASSING.values(), ids=PASSING)
def test_trials_are_numbered_and_then_infrastructure_has_failed(trouble):
    with ChatServer(script(*[trouble] * 3)) as server, pytest.raises(InfrastructureError, match="in 3 trials"):
        ask(server, retries=2)
    assert len(server.requests) == 3


def test_the_last_trouble_is_in_the_message():
    answers = script(HANG_UP, (503, {"error": {"message": f"no room for {KEY}"}}))
    with ChatServer(answers) as server, pytest.raises(InfrastructureError) as caught:
        ask(server, retries=1)
    assert "status 503: no room for ***" in str(caught.value)
    assert server.url in str(caught.value)
    assert KEY not in str(caught.value)


def test_nobody_listens():
    with ChatServer(script()) as server:
        url = server.url
    client = ChatClient(Endpoint(base_url=url, model="m", retries=1), connections=1)
    with pytest.raises(InfrastructureError, match="in 2 trials; the last: ConnectError"):
        asyncio.run(client.complete(BODY))


def test_a_server_that_does_not_answer_in_time():
    def slow(body):
        time.sleep(0.5)
        return completion("late")

    with ChatServer(slow) as server, pytest.raises(InfrastructureError, match=r"longer than 0\.05 seconds"):
        ask(server, retries=1, timeout_s=0.05)
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (400, "lower --max-tokens"),
        (401, "--api-key-env"),
        (403, "The key was refused"),
        (404, "'m' (--model)"),
        (422, "--resume"),
        (307, "--api-base-url"),
    ],
)
def test_other_refusals_are_errors_at_once_with_the_servers_words(status, says):
    answer = (status, {"error": {"message": f"not so: Bearer {KEY}"}})
    with ChatServer(script(answer)) as server, pytest.raises(EndpointError) as caught:
        ask(server)
    text = str(caught.value)
    for words in (server.url, str(status), "not so: Bearer ***", says):
        assert words in text
    assert KEY not in text
    assert len(server.requests) == 1


def test_the_servers_waiting_time_is_kept(monkeypatch):
    waits = []

    async def sleep(seconds):
        waits.append(seconds)

    monkeypatch.setattr(api.asyncio, "sleep", sleep)
    answers = [(429, "", {"Retry-After": "7"}), (503, "", {"Retry-After": "soon"}), completion("a")]
    with ChatServer(script(*answers)) as server:
        ask(server)
    assert waits == [7.0, 0.0]


def test_a_waiting_time_beyond_the_limit_is_not_waited_for():
    says = "in 1 trial; the last: status 429"
    answers = script((429, "", {"Retry-After": "86400"}))
    with ChatServer(answers) as server, pytest.raises(InfrastructureError, match=says):
        ask(server, timeout_s=600)


def test_waiting_times_by_hand(monkeypatch):
    monkeypatch.setattr(api, "FIRST_WAIT_S", 1.0)
    assert [backoff_s(trial, draw=lambda: 1.0) for trial in range(8)] == [1, 2, 4, 8, 16, 32, 60, 60]
    assert backoff_s(3, draw=lambda: 0.0) == 4.0


def test_both_forms_of_retry_after():
    assert retry_after_s(None) is None
    assert retry_after_s("2.5") == 2.5
    assert retry_after_s("-1") == 0.0
    assert retry_after_s("whenever") is None
    # RFC 9110's example date is 784111777 seconds after the epoch
    assert retry_after_s("Sun, 06 Nov 1994 08:49:37 GMT", now=lambda: 784111777 - 30) == 30.0
    assert retry_after_s("Sun, 06 Nov 1994 08:49:37 GMT", now=lambda: 784111777 + 30) == 0.0


def test_calls_that_cannot_be_read_are_the_models_and_keep_their_ids():
    reply = read_reply(completion(calls=[("add", '{"a": 1'), ("add", "[1]")]))
    assert [call.call_id for call in reply.calls] == ["id-add", "id-add"]
    assert all(call.error and call.name == "add" and call.arguments == {} for call in reply.calls)
    value = completion()
    value["choices"][0]["message"] = {"content": None, "tool_calls": ["what"]}
    assert read_reply(value).calls[0].error
    assert read_reply(value).text == ""


def test_length_is_the_token_budget():
    assert read_reply(completion("a", finish="length")).cut


def test_half_a_surrogate_pair_can_be_sent_and_kept():
    assert json_bytes({"a": "é\ud83d"}) == '{"a": "é?"}'.encode()


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("localhost:8000/v1", "looks like http://"),
        ("ftp://host/v1", "looks like"),
        ("http:///v1", "looks like"),
        ("http://host:port/v1", "cannot be read"),
        ("http://host/v1/chat/completions", "leave /chat/completions out"),
        ("http://me:hidden@host/v1", "--api-key-env"),
        ("http://host/v1?api-key=hidden", "--api-key-env"),
    ],
)
def test_addresses_that_are_none(url, says):
    problem = url_problem(url)
    assert says in problem
    assert "hidden" not in problem


def test_the_key_is_in_no_representation():
    endpoint = Endpoint(base_url="http://host/v1/", model="m", key=KEY)
    assert KEY not in repr(endpoint)
    assert endpoint.url == "http://host/v1/chat/completions"
