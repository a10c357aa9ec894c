"""A chat-completions endpoint, as OpenAI defines it and vLLM and others serve it: one request, tried until it holds.

What may pass is tried again: no connection, no answer in time, an answer cut short, and the statuses 408, 409, 429 and
from 500 on. Waiting times grow twofold, with jitter, so that clients do not come back all at once; a Retry-After of
the server's wins. Any other refusal is a mistake that trying again cannot mend, and an error at once.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from rlvr.errors import EndpointError, InfrastructureError
from rlvr.rollout.tool_calls import structured_call
from rlvr.types import ToolCall
from rlvr.wording import counted

if TYPE_CHECKING:
    import httpx

TRIED_AGAIN = frozenset({408, 409, 429})  # and all from 500 on
FIRST_WAIT_S = 1.0
LONGEST_WAIT_S = 60.0
CONNECT_TIMEOUT_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where a model is served, and how patiently it is asked.

    Args:
        base_url: for example http://localhost:8000/v1; /chat/completions is put after it.
        model: the name that the server knows the model by.
        key: sent as a bearer token; it is in no message, log or file. None sends none.
        retries: times that a request is sent again.
        timeout_s: seconds that one request may take, and that a server may ask to wait for.
    """

    base_url: str
    model: str
    key: str | None = field(default=None, repr=False)
    retries: int = 5
    timeout_s: float = 600.0

    @property
    def url(self) -> str:
        return self.base_url.rstrip("/") + "/chat/completions"


def url_problem(base_url: str) -> str | None:
    """What keeps a text from being the address of an endpoint, without repeating a secret in it."""
    try:
        parts = urlsplit(base_url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        return f"api_base_url cannot be read: {error}."
    if parts.username or parts.password or parts.query:
        return (
            "api_base_url holds a name, a password or a query; give the key in the variable that --api-key-env names."
        )
    if parts.scheme not in ("http", "https") or not host or parts.fragment:
        return f"api_base_url is {base_url!r}; it looks like http://localhost:8000/v1 or https://api.openai.com/v1."
    if parts.path.rstrip("/").endswith("/chat/completions"):
        return f"api_base_url is {base_url!r}; leave /chat/completions out, it is put after it."
    return None


@dataclass(frozen=True)
class ChatReply:
    """What the server said. Tokens are as it counts them."""

    text: str
    calls: tuple[ToolCall, ...]
    cut: bool  # by max_tokens
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class _Trouble:
    """Why a request has to be sent again, and the seconds that the server asks to wait."""

    text: str
    wait_s: float | None = None


class ChatClient:
    """Asks an endpoint. It belongs to the event loop that it is first used in.

    Args:
        connections: at most so many at the same time.
    """

    def __init__(self, endpoint: Endpoint, *, connections: int):
        import httpx

        self.endpoint = endpoint
        self._http = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {endpoint.key}"} if endpoint.key else {},
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),  # the whole request has a limit of its own
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
        )

    async def complete(self, body: Mapping[str, Any]) -> ChatReply:
        """One turn.

        Raises:
            InfrastructureError: no answer, in as many trials as are allowed.
            EndpointError: the server refuses the request.
        """
        for trial in range(self.endpoint.retries + 1):
            outcome = await self._send(body)
            if isinstance(outcome, ChatReply):
                return outcome
            wait_s = backoff_s(trial) if outcome.wait_s is None else outcome.wait_s
            if trial == self.endpoint.retries or wait_s > self.endpoint.timeout_s:
                break
            await asyncio.sleep(wait_s)
        raise InfrastructureError(
            f"{self.endpoint.url} gave no answer in {counted(trial + 1, 'trial')}; the last: {outcome.text}"
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def _send(self, body: Mapping[str, Any]) -> ChatReply | _Trouble:
        import httpx

        content, headers = json_bytes(body), {"Content-Type": "application/json"}
        sent = self._http.post(self.endpoint.url, content=content, headers=headers)
        try:
            response = await asyncio.wait_for(sent, self.endpoint.timeout_s)
        except asyncio.TimeoutError:
            return _Trouble(f"it took longer than {self.endpoint.timeout_s:g} seconds")
        except httpx.RequestError as error:
            return _Trouble(f"{type(error).__name__} {error}".rstrip())
        if response.status_code in TRIED_AGAIN or response.status_code >= 500:
            text = f"status {response.status_code}: {self._message(response)}"
            return _Trouble(text, retry_after_s(response.headers.get("Retry-After")))
        if not response.is_success:
            raise EndpointError(
                f"{self.endpoint.url} refused a request with status {response.status_code}: "
                f"{self._message(response)}\n{_advice(response.status_code, self.endpoint)}"
            )
        try:
            return read_reply(response.json())
        except ValueError as error:
            return _Trouble(f"what it answered is no chat completion ({error}): {self._message(response)}")

    def _message(self, response: httpx.Response, limit: int = 500) -> str:
        """The server's own words, or what it sent instead; never the key."""
        try:
            value = response.json()
            error = value.get("error", value) if isinstance(value, dict) else value
            text = error.get("message") if isinstance(error, dict) else None
        except ValueError:
            text = None
        text = str(text or response.text or response.reason_phrase)
        if self.endpoint.key:
            text = text.replace(self.endpoint.key, "***")
        return text if len(text) <= limit else text[:limit] + "…"


def read_reply(value: Any) -> ChatReply:
    """The first choice of a chat completion.

    Raises:
        ValueError: it is none, or says nothing about tokens.
    """
    try:
        choice, usage = value["choices"][0], value["usage"]
        message = choice["message"]
        text, parts = message.get("content"), message.get("tool_calls") or ()
        counts = int(usage["prompt_tokens"]), int(usage["completion_tokens"])
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__} {error}") from error
    if not (text is None or isinstance(text, str)) or not isinstance(parts, (list, tuple)):
        raise ValueError(f"content of type {type(text).__name__}")
    cut = choice.get("finish_reason") == "length"
    return ChatReply(text or "", tuple(map(structured_call, parts)), cut, *counts)


def backoff_s(trial: int, *, draw: Callable[[], float] = random.random) -> float:
    """Seconds before the next trial: 1, 2, 4, … up to 60, of which a random half or more."""
    return min(FIRST_WAIT_S * 2**trial, LONGEST_WAIT_S) * (0.5 + draw() / 2)


def retry_after_s(header: str | None, *, now: Callable[[], float] = time.time) -> float | None:
    """Seconds that a Retry-After header asks for, in either of its forms; None where it says nothing."""
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - now())
    except ValueError:
        return None


def json_bytes(value: Any) -> bytes:
    """UTF-8. Half a surrogate pair, which a model may write and JSON may hold, becomes a question mark."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")


def _advice(status: int, endpoint: Endpoint) -> str:
    if status in (401, 403):
        given = "The key was refused" if endpoint.key else "No key was sent"
        return f"{given}; put one that is valid in the environment variable that --api-key-env names."
    if status == 404:
        return f"Is a model called {endpoint.model!r} (--model) served there, and does --api-base-url end in /v1?"
    if status == 400:
        return (
            "If it is about length, lower --max-tokens; if about an option, leave it out; if about tools, start the "
            "server with a tool-call parser."
        )
    return "Check --api-base-url and the server. What was written to --output is kept; --resume goes on with it."
