"""A server between a client and its answers that goes wrong on demand, as real ones do.

Faults of a plan are used up one a request. What is not faulty is passed on to a real server (`upstream`),
or answered here: enough of the protocol for tests of retrying, where it does not matter what is said.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import struct
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[dict[str, Any]], dict[str, Any]]


def completion(texts: Iterable[str], **fields: Any) -> dict[str, Any]:
    """A chat completion with one choice a text."""
    choices = [
        {"index": i, "message": {"role": "assistant", "content": text}, "finish_reason": "stop", **fields}
        for i, text in enumerate(texts)
    ]
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    return {"id": "1", "object": "chat.completion", "created": 0, "choices": choices, "usage": usage}


def echo(body: dict[str, Any]) -> dict[str, Any]:
    """Says what the last message says, `n` times."""
    content = body["messages"][-1]["content"]
    text = content if isinstance(content, str) else content[-1]["text"]
    return completion([f"re: {text}"] * body.get("n", 1))


class FaultServer:
    """`url` is what clients use. `bodies` are the requests that were answered well, `seen` counts all.

    Faults: `500`, `429` (with Retry-After 0), `400`, `detail` (400 as FastAPI words it), `half` (a cut JSON),
    `empty` ({}), `page` (HTML), `cut` (the connection ends in the middle), `reset` (it breaks), `mute`
    (nothing for `mute_seconds`), `slow`, `dead` (reset, from now on).
    """

    def __init__(self, answer: Answer = echo, upstream: int | None = None, mute_seconds: float = 3.0) -> None:
        self.answer, self.upstream, self.mute_seconds = answer, upstream, mute_seconds
        self.plan: deque[str] = deque()
        self.bodies: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.running = self.most_running = 0
        self.lock = threading.Lock()
        self.ended = threading.Event()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None: ...

            def do_GET(self) -> None:
                owner.reply(self, 200, json.dumps({"object": "list", "data": [{"id": "m"}]}).encode())

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                with owner.counted():
                    owner.serve(self, body)

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: Any) -> None:
                """Broken connections are what this server is for; other errors are a test's fault."""
                if not isinstance(sys.exc_info()[1], ConnectionError):
                    traceback.print_exc()

        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    @property
    def seen(self) -> int:
        return len(self.times)

    def __enter__(self) -> FaultServer:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.http.shutdown()
        self.http.server_close()

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        with self.lock:
            self.times.append(time.monotonic())
            self.running += 1
            self.most_running = max(self.most_running, self.running)
        try:
            yield
        finally:
            with self.lock:
                self.running -= 1

    def serve(self, handler: BaseHTTPRequestHandler, body: bytes) -> None:
        with self.lock:
            fault = self.plan.popleft() if self.plan else ""
            if fault == "dead":
                self.plan.appendleft("dead")
        if fault in ("reset", "dead"):
            linger = struct.pack("ii", 1, 0)
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            handler.close_connection = True
            handler.connection.close()
        elif fault == "mute":
            self.ended.wait(self.mute_seconds)
            handler.close_connection = True
        elif fault.isdigit():
            headers = {"retry-after": "0"} if fault == "429" else {}
            self.reply(handler, int(fault), b'{"error": {"message": "no luck"}}', **headers)
        elif fault == "detail":
            self.reply(handler, 400, b'{"detail": "pinned to another"}')
        elif fault == "page":
            self.reply(handler, 200, b"<html>gateway</html>")
        elif fault == "empty":
            self.reply(handler, 200, b"{}")
        else:
            if fault == "slow":
                time.sleep(0.3)
            status, good = self.good(body)
            if fault == "half":
                good = good[: len(good) // 2]
            if status == 200 and fault in ("", "slow"):
                with self.lock:
                    self.bodies.append(json.loads(body))
            self.reply(handler, status, good, cut=fault == "cut")

    def good(self, body: bytes) -> tuple[int, bytes]:
        if self.upstream is None:
            return 200, json.dumps(self.answer(json.loads(body))).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.upstream, timeout=60)
        connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()

    def reply(
        self,
        handler: BaseHTTPRequestHandler,
        status: int,
        body: bytes,
        cut: bool = False,
        **headers: str,
    ) -> None:
        handler.send_response(status)
        handler.send_header("content-type", "application/json")
        handler.send_header("content-length", str(len(body)))
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            handler.close_connection = True
