"""Messages → token ids, without ever tokenizing again what the policy sampled.

A rollout's ids are the prompt's, then turn after turn the sampled ids and after them what the chat template
writes between two assistant turns: the rest of the turn's end, the replies, the next generation prompt. That
text does not depend on what was sampled, so it is read off a rendering of a made-up conversation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from rlvr.environments.tools import schema_of
from rlvr.errors import EnvironmentDefinitionError, ModelError
from rlvr.types import Message

_SAID = "what~the~assistant~said"  # stands for a sampled turn; no template or tokenizer gives it a meaning
_RESULT = "what~the~tool~said"


class ChatRenderer:
    """Renders one environment's conversations with one tokenizer.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        tools: the environment's functions, or their JSON schemas.
        chat_template: a Jinja template instead of the tokenizer's own.
        chat_template_kwargs: more variables for the template, for example `{"enable_thinking": False}`.
        content_parts: whether the template is given contents as lists of parts, as those of processors read them.

    Raises:
        ModelError: there is no chat template.
        EnvironmentDefinitionError: there are tools, and the template leaves them or their results out.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        tools: Sequence[Callable[..., Any] | Mapping[str, Any]] = (),
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        content_parts: bool = False,
    ):
        if not (chat_template or getattr(tokenizer, "chat_template", None)):
            raise ModelError(
                f"the tokenizer {_name(tokenizer)!r} has no chat template, so messages cannot become a "
                "prompt. Use an instruction-tuned model, or set a Jinja template as tokenizer.chat_template."
            )
        self.tokenizer = tokenizer
        self.tools = [schema_of(tool) for tool in tools]
        self.chat_template = chat_template
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self.content_parts = content_parts
        if self.tools:
            self._check_tools()

    def prompt_text(self, messages: Sequence[Message]) -> str:
        return self._render(with_call_ids(messages), add_generation_prompt=True)

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """The ids of a conversation up to where the policy goes on; the generation prompt is included."""
        return self.encode(self.prompt_text(messages))

    def conversation_ids(self, messages: Sequence[Message]) -> list[int]:
        """The ids of a conversation that is over, as one who was not there would render it."""
        return self.encode(self._render(with_call_ids(messages)))

    def reply_ids(self, replies: Sequence[Message]) -> list[int]:
        """The ids between an assistant turn's end-of-turn token and the next turn's first sampled token.

        Args:
            replies: what the turn caused: tool messages, or messages of the environment. At least one.

        Raises:
            EnvironmentDefinitionError: the template refuses the replies, or renders anew what was before.
        """
        text, cut = self._render_after_turn(replies)
        # All is tokenized and then cut: some tokenizers treat a text's first word in a special way.
        ids = self.encode(text)
        end_id = self.tokenizer.convert_tokens_to_ids(self.end_of_turn)
        positions = [i for i, token in enumerate(ids) if token == end_id]
        return ids[positions[text.count(self.end_of_turn, 0, cut) - 1] + 1 :]

    @cached_property
    def end_of_turn(self) -> str:
        """The special token that the template closes an assistant turn with, where the conversation goes on."""
        conversation: list[Message] = [_user(), {"role": "assistant", "content": _SAID}, _user()]
        text = self._render(conversation, add_generation_prompt=True)
        after = text[text.rindex(_SAID) + len(_SAID) :] if _SAID in text else ""
        positions = {t: after.find(t) for t in _special_tokens(self.tokenizer) if t in after}
        if not positions:
            raise EnvironmentDefinitionError(
                f"{self._template_name} ends an assistant turn without a special token ({after!r}), so the "
                "policy cannot end a turn and go on after the reply. Use a template that writes such a token."
            )
        if self.tokenizer.eos_token in positions:
            return self.tokenizer.eos_token
        return min(positions, key=lambda token: (positions[token], -len(token)))

    def encode(self, text: str) -> list[int]:
        tokenizer = getattr(self.tokenizer, "tokenizer", self.tokenizer)  # a processor holds its tokenizer
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    def _render_after_turn(self, replies: Sequence[Message]) -> tuple[str, int]:
        """A made-up conversation with these replies, and where in it the assistant's turn has ended."""
        calls = [reply for reply in replies if reply["role"] == "tool"]
        try:
            text = self._render(_conversation(replies, calls), add_generation_prompt=True)
        except EnvironmentDefinitionError:
            if len(calls) < 2:
                raise
            text = self._render(_conversation(replies, calls[:1]), add_generation_prompt=True)  # Llama 3: one call
        # Some templates end what is no prompt with one more token (Phi 3), and some begin the turn for the policy.
        before = [self._render([_user()], add_generation_prompt=prompt) for prompt in (False, True)]
        if not text.startswith(tuple(before)) or _SAID not in text:
            raise EnvironmentDefinitionError(
                f"{self._template_name} is not prefix-preserving: after a {replies[0]['role']!r} message it "
                "renders what came before differently, so the policy would be trained on ids that it has not "
                f"seen.\n  before: {_tail(before[0])}\n  after: {_tail(text)}\n"
                "Set a template that only appends as tokenizer.chat_template, or use an environment of a single turn."
            )
        end = text.find(self.end_of_turn, text.rindex(_SAID))
        if end < 0:
            raise EnvironmentDefinitionError(
                f"{self._template_name} closes a turn with {self.end_of_turn!r}, but not a turn that is "
                f"followed by a {replies[0]['role']!r} message. "
                "Set a template that closes every turn as tokenizer.chat_template."
            )
        return text, end + len(self.end_of_turn)

    def _check_tools(self) -> None:
        names = [tool["function"]["name"] for tool in self.tools]
        prompt = self._render([_user()], add_generation_prompt=True)
        missing = [name for name in names if name not in prompt]
        if missing:
            problem = f"leaves out the tools {', '.join(missing)}"
        else:
            text, cut = self._render_after_turn([{"role": "tool", "name": names[0], "content": _RESULT}])
            if _RESULT in text[cut:]:
                return
            problem = "puts tool results inside the assistant's turn" if _RESULT in text else "leaves out tool results"
        raise EnvironmentDefinitionError(
            f"{self._template_name} {problem}, so the policy could not use them. "
            "Use a model made for tool calls, or set a template that renders tools as tokenizer.chat_template."
        )

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(
                [_in_parts(message) for message in messages] if self.content_parts else list(messages),
                tools=self.tools or None,
                chat_template=self.chat_template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **self.chat_template_kwargs,
            )
        except (TemplateError, TypeError, KeyError, IndexError) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise EnvironmentDefinitionError(
                f"{self._template_name} refuses a conversation of the roles {roles}: {error}. "
                "Use messages that it knows, or set another template as tokenizer.chat_template."
            ) from error

    @property
    def _template_name(self) -> str:
        return "the chat_template" if self.chat_template else f"the chat template of {_name(self.tokenizer)!r}"


def _in_parts(message: Message) -> dict[str, Any]:
    text = message.get("content")
    return {**message, "content": [{"type": "text", "text": text}] if text else []}


def _user() -> Message:
    return {"role": "user", "content": "x"}


def _conversation(replies: Sequence[Message], calls: Sequence[Message]) -> list[Message]:
    said: Message = {"role": "assistant", "content": _SAID}
    if calls:
        # Some templates drop the text of a turn with calls, so the marker is an argument too.
        arguments = {"x": _SAID}
        said["tool_calls"] = [
            {
                "type": "function",
                "function": {"name": call.get("name") or "tool", "arguments": arguments},
                **({"id": call["tool_call_id"]} if "tool_call_id" in call else {}),
            }
            for call in calls
        ]
    return with_call_ids([_user(), said, *replies])


def with_call_ids(messages: Sequence[Message]) -> list[Message]:
    """Numbers tool calls and their results: Mistral's templates insist on ids of nine letters and digits."""
    numbered: list[Message] = []
    waiting: list[str] = []
    for message in messages:
        if message.get("tool_calls"):
            calls = [
                {"id": f"call{len(numbered) % 100:02d}{i % 1000:03d}", **call}
                for i, call in enumerate(message["tool_calls"])
            ]
            waiting = [call["id"] for call in calls]
            message = {**message, "tool_calls": calls}
        elif message["role"] == "tool" and waiting:
            call_id = waiting.pop(0)
            message = {**message, "tool_call_id": message.get("tool_call_id", call_id)}
        numbered.append(message)
    return numbered


def _special_tokens(tokenizer: Any) -> list[str]:
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    return [*tokenizer.all_special_tokens, *(token.content for token in added if token.special)]


def _name(tokenizer: Any) -> str:
    return getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__


def _tail(text: str, length: int = 200) -> str:
    return repr(text if len(text) <= length else "…" + text[-length:])
