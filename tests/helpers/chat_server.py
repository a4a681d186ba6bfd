"""A local server that speaks enough of the OpenAI protocol to be asked, and to misbehave."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[dict[str, Any]], Any]
"""From a request's body to a text, given as often as it asks for, or to (status, headers, body)."""


class ChatServer:
    """Serves ``/v1/chat/completions`` on a free port of this machine while it is entered."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append(body)
                outer.keys.append(self.headers.get("Authorization"))
                status, headers, told = outer.reply(self.path, body)
                data = told.encode()
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                with contextlib.suppress(BrokenPipeError):  # a client that has read enough
                    self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def reply(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, str], str]:
        if path != "/v1/chat/completions":
            return 404, {}, json.dumps({"error": {"message": "no such path"}})
        said = self.answer(body)
        if not isinstance(said, str):
            return said
        return 200, {}, completion(said, body.get("n", 1))

    def __enter__(self) -> ChatServer:
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def completion(said: str | None, count: int = 1, reason: str = "stop") -> str:
    """A completion's JSON, with a text so many times."""
    choice = {"message": {"role": "assistant", "content": said}, "finish_reason": reason}
    return json.dumps({"choices": [choice] * count})


def last(body: dict[str, Any]) -> str:
    """The user's words in a request."""
    return str(body["messages"][-1]["content"])
