from __future__ import annotations

import pytest

from rlvr.environments.base import Environment
from rlvr.errors import DataError, EnvironmentDefinitionError
from rlvr.rewards.rubric import Rubric


def make(**settings):
    return Environment(**{"name": "t", "train_dataset": [{"question": "q"}], "rubric": Rubric(len), **settings})


def test_prompts_are_texts_or_messages_with_the_system_prompt_before():
    system, user = {"role": "system", "content": "s"}, {"role": "user", "content": "q"}
    assert make().messages({"question": "q"}) == [user]
    assert make(system_prompt="s").messages({"prompt": "q"}) == [system, user]
    assert make(system_prompt="other").messages({"prompt": [system, user]}) == [system, user]
    from_arrow = {**user, "tool_calls": None}
    assert make().messages({"prompt": [from_arrow]}) == [user]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"train_dataset": []}, DataError, "the train dataset of environment 't' is empty"),
        ({"eval_dataset": []}, DataError, "the eval dataset of environment 't' is empty; leave it out"),
        ({"train_dataset": [{"text": "q"}]}, DataError, "no text in 'prompt' or 'question'; its columns: text"),
        ({"max_turns": 0}, EnvironmentDefinitionError, "max_turns is 0; it must be at least 1"),
        ({"max_tool_failures": -1}, EnvironmentDefinitionError, "max_tool_failures is -1; it must be at least 0"),
        ({"tools": [len, {"function": {"name": "x"}}]}, EnvironmentDefinitionError, "holds functions and schemas"),
        ({"tool_timeout_s": 0}, EnvironmentDefinitionError, "tool_timeout_s is 0; it must be above 0"),
        ({"tool_timeout_s": float("nan")}, EnvironmentDefinitionError, "tool_timeout_s is nan"),
    ],
)
def test_what_makes_no_sense_is_refused(settings, error, message):
    with pytest.raises(error, match=message):
        make(**settings)
