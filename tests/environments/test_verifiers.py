"""The oracle is verifiers itself: its own rollout loop, with a client that plays the same script."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import warnings

import pytest
import verifiers as vf
from datasets import Dataset
from scripted import ScriptedEngine
from verifiers.clients import Client
from verifiers.types import Response, ResponseMessage, ToolCall

from rlvr.environments.verifiers.adapter import from_verifiers
from rlvr.environments.verifiers.plugin import rlvr_environment, rlvr_environment_availability
from rlvr.errors import ConfigError, DataError, EnvironmentDefinitionError
from rlvr.rollout.chat import ChatRenderer
from rlvr.rollout.episodes import play
from rlvr.testing.tiny import tiny_tokenizer
from rlvr.types import StopReason

ROWS = Dataset.from_list([{"question": f"Say {i}", "answer": str(i), "info": {"i": i}} for i in range(3)])


def exact(completion, answer, **kwargs) -> float:
    return float(completion[-1]["content"] == answer)


async def length(completion) -> float:
    return float(sum(len(message["content"] or "") for message in completion))


def single_turn():
    return vf.SingleTurnEnv(
        dataset=ROWS,
        eval_dataset=ROWS.select([0]),
        system_prompt="Be short.",
        rubric=vf.Rubric(funcs=[exact, length], weights=[1.0, 0.1]),
    )


class Guessing(vf.MultiTurnEnv):
    async def setup_state(self, state):
        state["secret"] = int(state["answer"])
        return state

    async def env_response(self, messages, state, **kwargs):
        guess = messages[-1]["content"]
        if guess == "crash":
            raise vf.ToolError("the sandbox is gone")
        if guess == "bug":
            raise KeyError("a bug")
        return [{"role": "user", "content": "higher" if int(guess) < state["secret"] else "lower"}]

    @vf.stop
    async def found(self, state):
        steps = state["trajectory"]
        return bool(steps) and steps[-1]["completion"][-1]["content"] == state["answer"]


def guessing():
    return Guessing(dataset=ROWS, max_turns=3, rubric=vf.Rubric(funcs=[exact]))


def add(a: int, b: int) -> int:
    """Adds two numbers.

    Args:
        a: one.
        b: the other.
    """
    return a + b


def tools():
    return vf.ToolEnv(dataset=ROWS, tools=[add], max_turns=4, rubric=vf.Rubric(funcs=[exact]))


class Remembering(vf.StatefulToolEnv):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.add_tool(self.remember, args_to_skip=["memory"])

    async def setup_state(self, state):
        state["memory"] = []
        return state

    def update_tool_args(self, tool_name, tool_args, messages, state, **kwargs):
        return {**tool_args, "memory": state["memory"]}

    async def remember(self, word: str, memory: list) -> str:
        """Remembers a word.

        Args:
            word: the word.
        """
        memory.append(word)
        return f"{len(memory)} remembered"


def remembered(state) -> float:
    return float(len(state["memory"]))


def stateful():
    return Remembering(dataset=ROWS, max_turns=4, rubric=vf.Rubric(funcs=[exact, remembered], weights=[1.0, 0.5]))


def call(name, **arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


SCRIPTS = [
    (single_turn, ["1"], StopReason.END_OF_TURN),
    (single_turn, ["nonsense"], StopReason.END_OF_TURN),
    (guessing, ["0", "2", "1"], StopReason.COMPLETED),
    (guessing, ["5", "4", "3"], StopReason.MAX_TURNS),
    (tools, [call("add", a=1, b=0), "1"], StopReason.NO_TOOL_CALL),
    (tools, [call("add", a=1) + call("no_such"), call("add", a=3, b=4) * 2, "7"], StopReason.NO_TOOL_CALL),
    (tools, [call("add", a=1, b=0)] * 4, StopReason.MAX_TURNS),
    (stateful, [call("remember", word="x"), call("remember", word="y"), "1"], StopReason.NO_TOOL_CALL),
]


class Scripted(Client):
    """What a server's client would give verifiers for the script."""

    def __init__(self, texts):
        super().__init__(list(texts))

    def setup_client(self, config):
        return config

    async def to_native_tool(self, tool):
        return tool

    async def to_native_prompt(self, messages):
        return messages, {}

    async def get_native_response(self, prompt, model, sampling_args, tools=None, **kwargs):
        text, calls = self.client.pop(0), []
        while "<tool_call>" in text:
            before, _, rest = text.partition("<tool_call>")
            body, _, after = rest.partition("</tool_call>")
            parsed = json.loads(body)
            calls.append(
                ToolCall(id=f"call{len(calls):05d}", name=parsed["name"], arguments=json.dumps(parsed["arguments"]))
            )
            text = before + after
        message = ResponseMessage(content=text, tool_calls=calls or None, finish_reason="stop", is_truncated=False)
        return Response(id="", created=0, model="m", message=message)

    async def raise_from_native_response(self, response): ...

    async def from_native_response(self, response):
        return response

    async def close(self): ...


def by_verifiers(environment, row, texts):
    async def go():
        state = await environment.rollout(row, Scripted(texts), "m", {})
        await environment.rubric.score_rollout(state)
        return state

    return asyncio.run(go())


def by_rlvr(environment, row, texts, budget=5000):
    tokenizer = tiny_tokenizer()
    end = tokenizer.eos_token_id
    env = from_verifiers(environment, name="test")
    script = [[*tokenizer.encode(text), end] for text in texts]
    (rollout,) = play(
        env,
        [row],
        engine=ScriptedEngine([script], end_id=end),
        renderer=ChatRenderer(tokenizer, tools=env.tools),
        max_completion_tokens=budget,
    )
    return env, rollout.trajectory, env.rubric.score(rollout.trajectory)


@pytest.mark.parametrize(("make", "texts", "reason"), SCRIPTS)
def test_rollouts_and_scores_are_those_of_verifiers(make, texts, reason):
    row = make().get_dataset()[1]
    state = by_verifiers(make(), row, texts)
    _, trajectory, scores = by_rlvr(make(), row, texts)
    assert trajectory.stop_reason is reason
    assert scores.pop("reward") == pytest.approx(state["reward"])
    assert scores == pytest.approx(state["metrics"])
    ours = [(m["role"], m["content"].strip()) for m in trajectory.completion]
    theirs = [(m["role"], (m["content"] or "").strip()) for m in state["completion"]]
    assert ours == theirs


def test_datasets_prompts_and_tools():
    env = from_verifiers(single_turn(), name="mine")
    assert env.name == "verifiers:mine"
    assert (len(env.train_dataset), len(env.eval_dataset)) == (3, 1)
    assert env.messages(env.train_dataset[2]) == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Say 2"},
    ]
    assert from_verifiers(tools()).eval_dataset is None
    (schema,) = from_verifiers(tools()).tools
    assert schema["function"]["name"] == "add"
    assert set(schema["function"]["parameters"]["properties"]) == {"a", "b"}
    (hidden,) = from_verifiers(stateful()).tools
    assert set(hidden["function"]["parameters"]["properties"]) == {"word"}


def test_a_rollout_that_runs_out_of_tokens_is_scored():
    row = guessing().get_dataset()[1]
    _, trajectory, scores = by_rlvr(guessing(), row, ["0", "2"], budget=20)
    assert trajectory.stop_reason is StopReason.TOKEN_BUDGET
    assert (scores["reward"], scores["num_turns"]) == (0, 1)
    _, trajectory, scores = by_rlvr(single_turn(), row, ["1234567890"], budget=4)
    assert trajectory.stop_reason is StopReason.TOKEN_BUDGET
    assert scores["length"] == 4


def test_malformed_calls_are_answered_by_the_environment():
    row = tools().get_dataset()[1]
    _, trajectory, _ = by_rlvr(tools(), row, ["<tool_call>{oops</tool_call>", "1"])
    assert trajectory.failed_calls == 1
    assert [message["role"] for message in trajectory.completion] == ["assistant", "tool", "assistant"]


def test_errors_of_verifiers_are_infrastructure_and_bugs_stop_the_run():
    row = guessing().get_dataset()[1]
    _, trajectory, _ = by_rlvr(guessing(), row, ["crash"])
    assert trajectory.stop_reason is StopReason.INFRASTRUCTURE
    with pytest.raises(EnvironmentDefinitionError, match="'verifiers:test' raised KeyError in respond"):
        by_rlvr(guessing(), row, ["bug"])


class Rewriting(Guessing):
    async def get_prompt_messages(self, state):
        return state["prompt"]


class MovingPrompt(Guessing):
    async def setup_state(self, state):
        state["prompt"] = [{"role": "user", "content": "another"}]
        return state


class Compacting(Guessing):
    async def add_model_response(self, state, prompt_messages, response):
        await super().add_model_response(state, prompt_messages[-1:], response)


class Asking(Guessing):
    async def get_model_response(self, state, prompt, **kwargs):
        return await super().get_model_response(state, prompt, **kwargs)


class Bare(vf.Environment):
    async def rollout(self, *args, **kwargs): ...


def whole_group(completions, **kwargs) -> list[float]:
    return [0.0] * len(completions)


def completion_model():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # verifiers deprecates them
        return vf.SingleTurnEnv(dataset=ROWS, message_type="completion")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: vf.EnvGroup([single_turn(), guessing()]), "it is an EnvGroup"),
        (lambda: Rewriting(dataset=ROWS), "overrides get_prompt_messages"),
        (lambda: Compacting(dataset=ROWS), "overrides add_model_response"),
        (lambda: Asking(dataset=ROWS), "overrides get_model_response"),
        (lambda: Bare(dataset=ROWS), "Bare is not built on verifiers' MultiTurnEnv"),
        (lambda: completion_model(), "made for completion models"),
        (lambda: object(), "object is not built on verifiers' MultiTurnEnv"),
        (lambda: vf.SingleTurnEnv(dataset=ROWS, rubric=vf.Rubric(funcs=[whole_group])), "scores whole groups"),
        (
            lambda: vf.SingleTurnEnv(
                dataset=Dataset.from_list([{"question": "q", "answer": "", "info": {"tool_defs": [{"name": "x"}]}}])
            ),
            "tools of their own",
        ),
    ],
)
def test_kinds_that_are_refused(make, message):
    with pytest.raises(EnvironmentDefinitionError, match=message):
        from_verifiers(make())


def test_an_environment_without_train_data():
    with pytest.raises(DataError, match="no train dataset"):
        from_verifiers(vf.SingleTurnEnv(eval_dataset=ROWS))


def test_a_prompt_that_changes_is_an_error():
    with pytest.raises(EnvironmentDefinitionError, match="changes its prompt"):
        by_rlvr(MovingPrompt(dataset=ROWS), ROWS[1] | {"prompt": [{"role": "user", "content": "Say 1"}]}, ["1"])


def test_loading_by_id(tmp_path, monkeypatch):
    (tmp_path / "my_vf_env.py").write_text(
        "import verifiers as vf\nfrom datasets import Dataset\n"
        "def reward(completion, **kwargs):\n    return 1.0\n"
        "def load_environment(size=1):\n"
        "    rows = Dataset.from_list([{'question': 'q', 'answer': 'a'}] * size)\n"
        "    return vf.SingleTurnEnv(dataset=rows, rubric=vf.Rubric(funcs=[reward]))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    env = rlvr_environment("my-vf-env", env_args='{"size": 4}')
    assert before == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
    assert (env.name, len(env.train_dataset)) == ("verifiers:my-vf-env", 4)
    assert env.rubric.names[:2] == ["reward", "reward_function"]
    sys.modules.pop("my_vf_env", None)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ConfigError, "needs an id"),
        ({"variant": "x", "env_args": "{"}, ConfigError, "is not JSON"),
        ({"variant": "x", "env_args": "[]"}, ConfigError, "must be a JSON object"),
        ({"variant": "no-such-environment-here"}, EnvironmentDefinitionError, "cannot be loaded"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        rlvr_environment(**options)


def test_availability(monkeypatch):
    from rlvr.environments.verifiers import plugin

    assert rlvr_environment_availability() is None
    monkeypatch.setattr(plugin, "version", lambda name: "0.4.0")
    assert "verifiers 0.4.0 is installed, and 0.2 is needed" in rlvr_environment_availability()
    monkeypatch.setattr(plugin.importlib.util, "find_spec", lambda name: None)
    assert 'pip install "rlvr[verifiers]"' in rlvr_environment_availability()
