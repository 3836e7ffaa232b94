"""An OpenAI-compatible server in a thread that answers as told, in the shape of vLLM's and llama.cpp's replies."""

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

Body = dict[str, Any]
Words = Sequence[tuple[str, float]]
"""Tokens with their log-probabilities."""


@dataclass(frozen=True)
class Http:
    """A plain HTTP reply."""

    status: int
    body: object = ""
    headers: Mapping[str, str] = field(default_factory=dict)


RESET, HANG = "reset", "hang"
"""What else may happen to a request: the connection breaks off; nothing ever comes."""

Outcome = Body | Http | str


def entry(text: str, logprob: float) -> Body:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def completion(text: str | None, tokens: Words = (), tops: Sequence[Words] = (), finish: str = "stop") -> Body:
    """A chat completion; `tokens` are its logprobs, `tops` the alternatives in each token's place."""
    content = [
        entry(*token) | {"top_logprobs": [entry(*other) for other in (tops[i] if i < len(tops) else ())]}
        for i, token in enumerate(tokens)
    ]
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text, "reasoning_content": None, "tool_calls": []},
        "logprobs": {"content": content} if content else None,
        "finish_reason": finish,
        "stop_reason": None,
    }
    usage = {"prompt_tokens": 9, "completion_tokens": len(content), "total_tokens": 9 + len(content)}
    return {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]} | {
        "usage": usage
    }


def said(body: Body) -> str:
    """The text of the user's turn."""
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


class OpenAiServer:
    """`with OpenAiServer() as server`: listens on `server.url`; `requests` holds the bodies of all chat requests."""

    def __init__(self) -> None:
        self.answer: Callable[[Body], Outcome] = lambda body: completion("fine")
        self.first: list[Outcome] = []
        """Outcomes of the next chat requests, before `answer` is asked."""
        self.models: Outcome = {"object": "list", "data": [{"id": "m", "object": "model", "root": "org/m"}]}
        self.requests: list[Body] = []
        self.headers: list[dict[str, str]] = []
        self.most_in_flight = 0
        self._in_flight = 0
        self._lock = threading.Lock()
        self._closing = threading.Event()

        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.send(server.models if self.path == "/v1/models" else Http(404, {"error": "no such path"}))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path != "/v1/chat/completions":
                    self.send(Http(404, {"error": "no such path"}))
                    return
                with server._lock:
                    server.requests.append(body)
                    server.headers.append(dict(self.headers))
                    server._in_flight += 1
                    server.most_in_flight = max(server.most_in_flight, server._in_flight)
                    outcome = server.first.pop(0) if server.first else None
                try:
                    outcome = server.answer(body) if outcome is None else outcome
                finally:
                    with server._lock:
                        server._in_flight -= 1
                self.send(outcome)

            def send(self, outcome: Outcome) -> None:
                self.close_connection = isinstance(outcome, str)
                if outcome == HANG:
                    server._closing.wait(30)
                elif outcome == RESET:
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.connection.close()
                else:
                    reply = outcome if isinstance(outcome, Http) else Http(200, outcome)
                    body = reply.body if isinstance(reply.body, str) else json.dumps(reply.body)
                    self.send_response(reply.status)
                    for name, value in {"Content-Length": str(len(body.encode())), **reply.headers}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(body.encode())

            def log_message(self, *_: object) -> None:
                pass

        class Listener(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False
            request_queue_size = 64

            def handle_error(self, *_: object) -> None:
                pass  # a client that has given up waiting

        self._listener = Listener(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._listener.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._listener.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._listener.shutdown()
        self._listener.server_close()


def after(seconds: float, outcome: Outcome) -> Outcome:
    """`outcome`, late."""
    time.sleep(seconds)
    return outcome
