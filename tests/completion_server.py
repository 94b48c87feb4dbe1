"""A small server that speaks the OpenAI protocol, with a tiny LLaMA behind it, and fails on demand."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

MAX_TOKENS = 6  # of an answer
CHAT_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


class CompletionServer(ThreadingHTTPServer):
    """Answers `/v1/completions` and `/v1/chat/completions`; the same seed gives the same answer.

    `failures` are used up one a request: a status (`"429 1"`: try again after a second), `"cut"` (the connection
    breaks in mid-answer), `"half"` (half an answer, and no length to notice it by), `"no choices"`, `"slow"` (2 s).
    """

    daemon_threads = True

    def __init__(self, model_path: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.model = AutoModelForCausalLM.from_pretrained(model_path).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(model_path)
        self.lock = threading.Lock()
        self.reset()

    def reset(self) -> CompletionServer:
        """A server without a past."""
        self.failures: list[str] = []
        self.refused_text = ""  # status 400 for prompts that hold it
        self.whole_body: bytes | None = None  # instead of every answer
        self.requests: list[dict[str, Any]] = []  # path, time, headers, body, failure
        return self

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def answered(self) -> list[dict[str, Any]]:
        """The bodies of the requests that got a whole answer."""
        return [request["body"] for request in self.requests if not request["failure"]]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone away is no news."""

    def complete(self, body: dict[str, Any]) -> str:
        prompt = body.get("prompt")
        if prompt is None:
            prompt = self.tokenizer.apply_chat_template(body["messages"], chat_template=CHAT_TEMPLATE, tokenize=False)
        ids = self.tokenizer(prompt, return_tensors="pt").input_ids
        num_tokens = min(MAX_TOKENS, body.get("max_tokens") or body.get("max_completion_tokens"))
        with self.lock, torch.random.fork_rng(devices=[]):
            torch.manual_seed(body.get("seed", 0))
            output = self.model.generate(ids, do_sample=True, max_new_tokens=num_tokens, pad_token_id=0)
        return self.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: CompletionServer

    def log_message(self, *args: Any) -> None:
        """Nothing on stderr."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            failure = self.server.failures.pop(0) if self.server.failures else ""
            if self.server.refused_text and self.server.refused_text in json.dumps(body):
                failure = "400"
            self.server.requests.append(
                {
                    "path": self.path,
                    "time": time.monotonic(),
                    "headers": self.headers,
                    "body": body,
                    "failure": failure,
                }
            )
        if failure[:1].isdigit():
            status, *after = failure.split()
            echo = f"refused; you are {self.headers['Authorization']}"  # as careless servers do
            self._send(int(status), {"error": {"message": echo}}, {"Retry-After": after[0]} if after else {})
            return
        if failure == "slow":
            time.sleep(2)
        text = self.server.complete(body)
        choice = {"message": {"role": "assistant", "content": text}} if "messages" in body else {"text": text}
        answer = {
            "choices": [] if failure == "no choices" else [{**choice, "finish_reason": "length"}],
            "usage": {"prompt_tokens": 7, "completion_tokens": 3},
        }
        self._send(200, answer, {}, failure)

    def _send(self, status: int, answer: dict[str, Any], headers: dict[str, str], failure: str = "") -> None:
        data = json.dumps(answer).encode() if self.server.whole_body is None else self.server.whole_body
        sent = data[: len(data) // 2] if failure in ("cut", "half") else data
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        if failure != "half":
            self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.close_connection = failure in ("cut", "half")
        self.end_headers()
        self.wfile.write(sent)


@contextmanager
def running(model_path: Path) -> Iterator[CompletionServer]:
    """A server in a thread of its own."""
    server = CompletionServer(model_path)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
