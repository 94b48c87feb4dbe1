"""A small server of the OpenAI protocol, without a model, which fails on demand."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SLOW = 0.5  # seconds


class CompletionServer(ThreadingHTTPServer):
    """Serves `/v1/completions`, `/v1/chat/completions` and `/v1/models`; the response is a hash of prompt and seed.

    Each request uses up one of `failures`: a status, `"cut"` (the connection breaks during the body), `"half"` (half a
    body without a length), `"slow"` (`SLOW` seconds), or `""` (none).
    """

    daemon_threads = True

    def __init__(self, port: int = 0, model: str = "a-model") -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.model = model
        self.lock = threading.Lock()
        self.reset()

    def reset(self) -> CompletionServer:
        """Returns the server as if it were new."""
        self.failures: list[str] = []
        self.refused_text = ""  # status 400 for prompts that hold it
        self.whole_body: bytes | None = None  # instead of every body
        self.hostile: Callable[[Any], None] | None = None  # writes all bytes of every response to the file it gets
        self.requests: list[dict[str, Any]] = []  # path, headers, body, failure
        return self

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def completed(self) -> list[dict[str, Any]]:
        """The bodies of the requests that got a complete response."""
        return [request["body"] for request in self.requests if not request["failure"]]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignores clients that have closed the connection."""

    def complete(self, body: dict[str, Any]) -> str:
        key = json.dumps([body.get("prompt") or body["messages"], body.get("seed")])
        return hashlib.sha256(key.encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: CompletionServer

    def log_message(self, *args: Any) -> None:
        """Nothing on stderr."""

    def do_GET(self) -> None:
        self._send(200, {"object": "list", "data": [{"id": self.server.model, "object": "model"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            failure = self.server.failures.pop(0) if self.server.failures else ""
            if self.server.refused_text and self.server.refused_text in json.dumps(body):
                failure = "400"
            self.server.requests.append({"path": self.path, "headers": self.headers, "body": body, "failure": failure})
        if self.server.hostile:
            self.close_connection = True
            self.server.hostile(self.wfile)
            return
        if failure[:1].isdigit():
            echo = f"refused; you are {self.headers['Authorization']}"  # as careless servers do
            self._send(int(failure), {"error": {"message": echo}})
            return
        if failure == "slow":
            time.sleep(SLOW)
        text = self.server.complete(body)
        choice = {"message": {"role": "assistant", "content": text}} if "messages" in body else {"text": text}
        response = {
            "choices": [{**choice, "finish_reason": "length"}],
            "usage": {"prompt_tokens": 7, "completion_tokens": 3},
        }
        self._send(200, response, failure)

    def _send(self, status: int, response: dict[str, Any], failure: str = "") -> None:
        data = json.dumps(response).encode() if self.server.whole_body is None else self.server.whole_body
        sent = data[: len(data) // 2] if failure in ("cut", "half") else data
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        if failure != "half":
            self.send_header("Content-Length", str(len(data)))
        self.close_connection = failure in ("cut", "half")
        self.end_headers()
        self.wfile.write(sent)


@contextmanager
def running() -> Iterator[CompletionServer]:
    """Runs a server in its own thread."""
    server = CompletionServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
