"""A stand-in for an OpenAI-compatible endpoint, on loopback: what it answers, and its faults."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Fault = Callable[["Handler"], None]


@dataclass
class Standin:
    """`answer` gets a request's messages; `faults` is by the number of the request, from 1 on: a
    function that replies in place of an answer."""

    answer: Callable[[list[dict]], str]
    faults: dict[int, Fault] = field(default_factory=dict)
    every: Fault | None = None  # replaces all answers
    bodies: list[dict] = field(default_factory=list)
    headers: list[dict] = field(default_factory=list)
    paid: Counter = field(default_factory=Counter)  # answers by what was asked
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def n_paid(self) -> int:
        return self.paid.total()


class Handler(BaseHTTPRequestHandler):
    standin: Standin

    def log_message(self, *_):
        pass

    def do_GET(self):  # a client that follows a redirect comes back with GET
        self.do_POST()

    def do_POST(self):
        standin = self.server.standin
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
        with standin.lock:
            standin.bodies.append(body)
            standin.headers.append(dict(self.headers))
            fault = standin.every or standin.faults.get(len(standin.bodies))
        if fault:
            return fault(self)
        with standin.lock:
            standin.paid[json.dumps(body, sort_keys=True)] += 1
        self.reply(reply_of(standin.answer(body["messages"])))

    def reply(self, content: dict | bytes, status: int = 200, headers: dict | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


def reply_of(text: str | None, finish: str = "stop", usage: tuple[int, int] = (100, 10)) -> dict:
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": finish}
    tokens = dict(zip(("prompt_tokens", "completion_tokens"), usage, strict=True))
    return {"model": "stand-in-1", "choices": [choice], "usage": tokens}


def status(code: int, **headers: str) -> Fault:
    error = {"error": {"message": f"stand-in says {code}"}}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler: handler.reply(error, code, named)


def replies(content: dict | bytes, **headers: str) -> Fault:
    return lambda handler: handler.reply(content, 200, headers)


def hangs_up(handler: Handler) -> None:
    """In the middle of the body."""
    whole = json.dumps(reply_of("cut off")).encode()
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(whole)))
    handler.end_headers()
    handler.wfile.write(whole[: len(whole) // 2])
    handler.wfile.flush()
    handler.connection.close()


def drips(handler: Handler) -> None:
    """A proxy that keeps a connection alive with spaces, each in time."""
    handler.send_response(200)
    handler.end_headers()
    with suppress(OSError):  # the client has hung up
        for _ in range(100):
            handler.wfile.write(b" ")
            time.sleep(0.05)
        handler.server.standin.every = status(500)  # it has not


@contextmanager
def serving(answer: Callable[[list[dict]], str], **settings):
    """A Standin with its url."""
    standin = Standin(answer, **settings)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.standin, server.daemon_threads = standin, True
    standin.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield standin
    finally:
        server.shutdown()
        server.server_close()
