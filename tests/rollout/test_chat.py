from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import ScriptedEngine

from rlvr.environments.base import Environment
from rlvr.errors import EnvironmentDefinitionError, ModelError
from rlvr.rewards.rubric import Rubric
from rlvr.rollout.chat import ChatRenderer
from rlvr.rollout.episodes import play
from rlvr.testing.tiny import CHAT_TEMPLATE, tiny_tokenizer

# Each in the manner of its model family: where the turn's end and the newline stand, how calls and results
# are written.
QWEN3_LIKE = """\
{%- if tools %}{{- '<|im_start|>system\\n' }}{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}
{{- 'Answer with <tool_call>.<|im_end|>\\n' }}{%- endif %}
{%- set ns = namespace(last=0) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' }}
{%- if loop.last and loop.index0 > ns.last %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{{- m.content }}
{%- for c in m.tool_calls or [] %}
{{- '\\n<tool_call>\\n' + ({'name': c.function.name, 'arguments': c.function.arguments} | tojson)
   + '\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- else %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
LLAMA3_LIKE = """\
{{- '<|begin|>' }}
{%- for m in messages %}
{%- if m.role == 'user' and loop.first and tools %}
{{- '<|start|>user<|end|>\\n\\nAnswer {"name": name, "parameters": ...}\\n' }}
{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}{{- m.content + '<|im_end|>' }}
{%- elif m.tool_calls %}
{%- if m.tool_calls | length != 1 %}{{- raise_exception('only single tool-calls at once!') }}{%- endif %}
{%- set c = m.tool_calls[0].function %}
{{- '<|start|>assistant<|end|>\\n\\n{"name": "' + c.name + '", "parameters": ' + (c.arguments | tojson)
   + '}<|im_end|>' }}
{%- elif m.role == 'tool' %}{{- '<|start|>ipython<|end|>\\n\\n' + (m.content | tojson) + '<|im_end|>' }}
{%- else %}{{- '<|start|>' + m.role + '<|end|>\\n\\n' + m.content + '<|im_end|>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant<|end|>\\n\\n' }}{%- endif %}
"""
MISTRAL_LIKE = """\
{{- '<s>' }}
{%- if tools %}{{- '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{%- endif %}
{%- for m in messages %}
{%- if m.role == 'user' %}{{- '[INST] ' + m.content + '[/INST]' }}
{%- elif m.tool_calls %}
{{- '[TOOL_CALLS] [' }}
{%- for c in m.tool_calls %}
{%- if c.id is not defined or c.id | length != 9 %}{{- raise_exception('not 9 characters') }}{%- endif %}
{{- ({'name': c.function.name, 'arguments': c.function.arguments, 'id': c.id} | tojson) }}
{%- if not loop.last %}{{- ', ' }}{%- endif %}
{%- endfor %}
{{- ']<|im_end|>' }}
{%- elif m.role == 'tool' %}
{{- '[TOOL_RESULTS] ' + ({'content': m.content, 'call_id': m.tool_call_id} | tojson) + '[/TOOL_RESULTS]' }}
{%- else %}{{- ' ' + (m.content | trim) + '<|im_end|>' }}{%- endif %}
{%- endfor %}
"""
TEMPLATES = {"chatml": CHAT_TEMPLATE, "qwen3": QWEN3_LIKE, "llama3": LLAMA3_LIKE, "mistral": MISTRAL_LIKE}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def echo(word: str) -> str:
    """Gives a word back.

    Args:
        word: the word.
    """
    return word


def written_call(template: str, arguments: dict) -> str:
    """A call as the template itself would write it, so that its rendering of the record is the oracle."""
    payload = json.dumps(arguments, ensure_ascii=False)
    if template == "llama3":
        return f'{{"name": "echo", "parameters": {payload}}}'
    if template == "mistral":
        return f'[TOOL_CALLS] [{{"name": "echo", "arguments": {payload}, "id": "abc123456"}}]'
    return f'\n<tool_call>\n{{"name": "echo", "arguments": {payload}}}\n</tool_call>'


letters = st.characters(codec="utf-8", exclude_characters="<>[]{}&'", exclude_categories=["Cc", "Cs"])
words = st.text(letters, max_size=8)
sayings = words.map(str.strip).filter(bool)


class Talking(Environment):
    def respond(self, trajectory):
        remarks = trajectory.example["remarks"]
        spoken = len(trajectory.turns) - 1
        return [{"role": "user", "content": remarks[spoken]}] if spoken < len(remarks) else []


def conversation(template: str, data) -> tuple[Environment, dict, list[str]]:
    """An environment, a row, and what the policy will say in it."""
    common = {"name": "t", "train_dataset": [{"question": "q"}], "rubric": Rubric(lambda t: 1.0)}
    space = " " if template == "mistral" else ""
    last = space + data.draw(sayings)
    if data.draw(st.booleans()):
        said = [written_call(template, {"word": word}) for word in data.draw(st.lists(words, max_size=3))]
        return Environment(**common, tools=[echo]), {"question": "q"}, [*said, last]
    remarks = data.draw(st.lists(sayings, max_size=3))
    said = [space + data.draw(sayings) for _ in remarks]
    return Talking(**common), {"question": "q", "remarks": remarks}, [*said, last]


@pytest.mark.parametrize("template", TEMPLATES)
@settings(max_examples=30, deadline=None, database=None)
@given(data=st.data())
def test_ids_are_what_the_template_renders_and_the_mask_marks_what_was_sampled(template, data, tokenizer):
    """The oracle is the template's own rendering of the recorded conversation, tokenized at once."""
    env, row, said = conversation(template, data)
    end = tokenizer.eos_token_id
    script = [[*tokenizer.encode(text), end] for text in said]
    renderer = ChatRenderer(tokenizer, tools=env.tools, chat_template=TEMPLATES[template])
    (rollout,) = play(
        env, [row], engine=ScriptedEngine([script], end_id=end), renderer=renderer, max_completion_tokens=5000
    )

    # One more message, since Qwen 3 renders a conversation's last turn in another way.
    record = [*rollout.trajectory.prompt, *rollout.trajectory.completion, {"role": "user", "content": "more"}]
    played = rollout.prompt_ids + rollout.completion_ids
    whole = renderer.prompt_ids(record)
    assert whole[: len(played)] == played
    assert whole[len(played) :] == renderer.reply_ids(record[-1:])
    sampled = [token for token, mask in zip(rollout.completion_ids, rollout.sampled_mask, strict=True) if mask]
    assert sampled == [token for turn in script for token in turn]
    starts = [i for i, mask in enumerate(rollout.sampled_mask) if mask and (i == 0 or not rollout.sampled_mask[i - 1])]
    assert len(starts) == len(said)


def test_what_was_sampled_is_never_tokenized_again():
    """With a tokenizer that merges, a word sampled letter by letter has other ids, and keeps them."""
    from tokenizers import trainers

    tokenizer = tiny_tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=list(tokenizer.backend_tokenizer.pre_tokenizer.alphabet()),
        show_progress=False,
    )
    tokenizer.backend_tokenizer.train_from_iterator([CHAT_TEMPLATE, "banana " * 50], trainer)
    assert len(tokenizer.encode("banana")) < 6
    letter_by_letter = [tokenizer.encode(letter)[0] for letter in "banana"]
    end = tokenizer.eos_token_id
    env = Talking(name="t", train_dataset=[{"question": "q"}], rubric=Rubric(lambda t: 1.0))
    (rollout,) = play(
        env,
        [{"question": "banana", "remarks": ["banana"]}],
        engine=ScriptedEngine([[[*letter_by_letter, end], [*letter_by_letter, end]]], end_id=end),
        renderer=ChatRenderer(tokenizer),
        max_completion_tokens=500,
    )
    between = tokenizer.encode("\n<|im_start|>user\nbanana<|im_end|>\n<|im_start|>assistant\n")
    assert rollout.completion_ids == [*letter_by_letter, end, *between, *letter_by_letter, end]
    assert [turn.message["content"] for turn in rollout.trajectory.turns] == ["banana", "banana"]


def test_prompt_ids_are_those_of_apply_chat_template(tokenizer):
    renderer = ChatRenderer(tokenizer, tools=[echo])
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert renderer.prompt_ids(messages) == tokenizer.apply_chat_template(
        messages, tools=renderer.tools, add_generation_prompt=True, return_dict=False
    )


def test_several_results_of_one_turn(tokenizer):
    results = [{"role": "tool", "name": "echo", "content": text} for text in "ab"]
    for name, template in TEMPLATES.items():
        ids = ChatRenderer(tokenizer, tools=[echo], chat_template=template).reply_ids(results)
        text = tokenizer.decode(ids)
        assert '"a"' in text or "\na" in text, name
        assert '"b"' in text or "\nb" in text, name
    assert text.count("[TOOL_RESULTS]") == 2
    assert text.count("call01000") == 1
    assert text.count("call01001") == 1


def test_more_variables_for_the_template(tokenizer):
    template = CHAT_TEMPLATE + "{%- if quiet %}{{- '<think></think>' }}{%- endif %}"
    renderer = ChatRenderer(tokenizer, chat_template=template, chat_template_kwargs={"quiet": True})
    assert tokenizer.decode(renderer.prompt_ids([{"role": "user", "content": "x"}])).endswith("<think></think>")


def test_no_chat_template():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="has no chat template"):
        ChatRenderer(tokenizer)


def test_templates_that_cannot_serve_tools(tokenizer):
    without_tools = CHAT_TEMPLATE.replace("tool | tojson", "''")
    with pytest.raises(EnvironmentDefinitionError, match="leaves out the tools echo"):
        ChatRenderer(tokenizer, tools=[echo], chat_template=without_tools)
    without_results = CHAT_TEMPLATE.replace("message['content'] + '\\n</tool_response>'", "'</tool_response>'")
    with pytest.raises(EnvironmentDefinitionError, match="leaves out tool results"):
        ChatRenderer(tokenizer, tools=[echo], chat_template=without_results)
    refusing = "{%- for m in messages %}{%- if m.role == 'tool' %}{{- raise_exception('no tools') }}{%- endif %}"
    with pytest.raises(EnvironmentDefinitionError, match="refuses a conversation of the roles user, assistant, tool"):
        ChatRenderer(tokenizer, tools=[echo], chat_template=refusing + "{{- m.content }}{%- endfor %}{{- tools }}")


def test_a_template_that_moves_the_tools_to_the_last_user_message_is_refused(tokenizer):
    """Mistral's v0.3 template: fine after tool results, not prefix-preserving after a user's message."""
    moving = MISTRAL_LIKE.replace("{%- if tools %}{{- '[AVAILABLE_TOOLS] '", "{%- if false %}{{- ''").replace(
        "{{- '[INST] '",
        "{%- if tools and (messages | selectattr('role', 'equalto', 'user') | list)[-1] == m %}"
        "{{- '[AVAILABLE_TOOLS]' + (tools | tojson) }}{%- endif %}{{- '[INST] '",
    )
    renderer = ChatRenderer(tokenizer, tools=[echo], chat_template=moving)
    assert "[TOOL_RESULTS]" in tokenizer.decode(renderer.reply_ids([{"role": "tool", "name": "echo", "content": "a"}]))
    with pytest.raises(EnvironmentDefinitionError, match="not prefix-preserving: after a 'user' message"):
        renderer.reply_ids([{"role": "user", "content": "y"}])


def test_a_template_without_an_end_of_turn_token(tokenizer):
    renderer = ChatRenderer(tokenizer, chat_template="{%- for m in messages %}{{- m.content + '\n' }}{%- endfor %}")
    with pytest.raises(EnvironmentDefinitionError, match="ends an assistant turn without a special token"):
        renderer.reply_ids([{"role": "user", "content": "y"}])
