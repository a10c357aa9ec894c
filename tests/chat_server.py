"""An OpenAI-compatible server on this machine that answers from a script, for tests."""

from __future__ import annotations

import json
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def completion(text="", *, calls=(), finish="stop", prompt_tokens=10, completion_tokens=5):
    """A chat completion. `calls`: (name, arguments as text)."""
    message = {"role": "assistant", "content": text}
    if calls:
        message["tool_calls"] = [
            {"id": f"id-{name}", "type": "function", "function": {"name": name, "arguments": arguments}}
            for name, arguments in calls
        ]
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    return {"choices": [{"index": 0, "message": message, "finish_reason": finish}], "usage": usage}


HANG_UP = "hang up"  # closes the connection without a word
CUT_SHORT = "cut short"  # promises more than it sends


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], ConnectionError):  # clients may give up
            super().handle_error(request, client_address)


class ChatServer:
    """Answers POSTs with what `answer(body)` gives: a completion, (status, body[, headers]), or one of the above.

    A body that is a text is sent as it is. `requests` has path, headers and body of each; `most` is the largest number
    of requests that were under way at the same time.
    """

    def __init__(self, answer):
        self.answer, self.requests, self.most, self._now = answer, [], 0, 0
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), self._handler())

    @property
    def url(self):
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    @property
    def bodies(self):
        return [body for _, _, body in self.requests]

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    @contextmanager
    def _counted(self):
        with self._lock:
            self._now += 1
            self.most = max(self.most, self._now)
        try:
            yield
        finally:
            with self._lock:
                self._now -= 1

    def _handler(server):
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server._lock:
                    server.requests.append((self.path, dict(self.headers), body))
                with server._counted():
                    answer = server.answer(body)
                self.send(answer)

            def send(self, answer):
                if answer == HANG_UP:
                    self.close_connection = True
                    return
                status, content, *headers = answer if isinstance(answer, tuple) else (200, answer)
                cut = content == CUT_SHORT
                data = (content if isinstance(content, str) else json.dumps(content)).encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(data) + 10 * cut), **dict(*headers)}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)
                self.close_connection = cut

            def log_message(self, *_):
                pass

        return Handler


def script(*answers):
    """One answer after the other, whoever asks."""
    waiting, lock = list(answers), threading.Lock()

    def answer(body):
        with lock:
            return waiting.pop(0)

    return answer
