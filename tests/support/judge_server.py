"""A judge for tests: a small HTTP server on loopback that follows a script and records its requests."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Does:
    """The server's reaction to one request. `cut`: close the connection without a reply."""

    content: str | None = "Rating: [[5]]"
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None  # in place of a chat completion
    usage: dict[str, int] | None = field(default_factory=lambda: {"prompt_tokens": 100, "completion_tokens": 10})
    seconds: float = 0.0
    cut: bool = False


Script = Callable[[dict[str, Any], int], Does]


class JudgeServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, script: Script) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script, self.lock = script, threading.Lock()
        self.bodies: list[dict[str, Any]] = []  # as they came in
        self.headers: list[dict[str, str]] = []
        self.done: list[tuple[str, int]] = []  # (the user's message, status), as replies went out
        self.at_once = self.most_at_once = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def asked(self) -> list[str]:
        """Return the last message of each request."""
        return [body["messages"][-1]["content"] for body in self.bodies]

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # connections that tests break


class _Handler(BaseHTTPRequestHandler):
    server: JudgeServer
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet: separately, the second waits for an acknowledgement

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            number = len(server.bodies)
            server.bodies.append(body)
            server.headers.append(dict(self.headers))
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        does = server.script(body, number)
        time.sleep(does.seconds)
        with server.lock:
            server.at_once -= 1
        if does.cut:
            self.close_connection = True
            return
        document = {"choices": [{"message": {"role": "assistant", "content": does.content}, "finish_reason": "stop"}]}
        if does.usage is not None:
            document["usage"] = does.usage  # type: ignore[assignment]
        raw = does.body if does.body is not None else json.dumps(document).encode()
        self.send_response(does.status)
        for name, value in does.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)
        with server.lock:
            server.done.append((body["messages"][-1]["content"], does.status))

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def judge_server(script: Script) -> Iterator[JudgeServer]:
    server = JudgeServer(script)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
