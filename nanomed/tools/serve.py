"""A model behind an OpenAI-compatible endpoint on this machine, and a page to chat with it.

    python -m nanomed.tools.serve --model DIR [--port 8000]

http://127.0.0.1:8000/ is the page, http://127.0.0.1:8000/v1 what `evaluate.py judge --judge`,
`build_corpus.py --labeller` and OpenAI's own client take. Only this machine can reach it. It
answers to any model's name and says its own; a field that it does not know, or whose value it
cannot follow, is an error, never left unread. Needs `pip install starlette uvicorn`.
"""

import asyncio
import contextlib
import itertools
import json
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import Any

from nanomed.arguments import command_line
from nanomed.config import InputError
from nanomed.distributed import launch
from nanomed.model.generation import CHAT, Sampling, limits_of
from nanomed.model.packed import pack_linears
from nanomed.tools.chat import SAFETY
from nanomed.tools.generate import add_arguments, chat_of, open_model, positive_int
from nanomed.tools.serve_jobs import Job, Piece, Worker

LOOPBACK = "127.0.0.1"
SAMPLING = {"temperature": float, "top_p": float, "top_k": int, "repetition_penalty": float}
OURS = {"messages", "stream", "stream_options", "stop", "seed", "logprobs", "top_logprobs", "model"}
LENGTHS = ("max_completion_tokens", "max_tokens")
# Fields that we cannot follow may have the one value that asks for nothing.
NEUTRAL = {"n": 1, "presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {}, "tools": [],
           "tool_choice": "none", "response_format": {"type": "text"}}  # fmt: skip
NO_PART = {"user", "metadata", "store", "service_tier"}  # of the answer, whatever they say
MOST_TOP = 20


@dataclass
class Server:
    """What the handlers share."""

    worker: Worker
    defaults: Sampling
    name: str
    numbers: Iterator[int] = field(default_factory=itertools.count)  # of requests

    def job(self, body: Any, put: Callable[[Piece], None]) -> Job:
        """Raises InputError naming the field that is wrong."""
        if not isinstance(body, dict):
            raise InputError("the request must be a JSON object")
        given = {name: value for name, value in body.items() if value is not None}
        for name, value in given.items():
            known = name in OURS | NO_PART or name in (*SAMPLING, *LENGTHS)
            if not known and (name not in NEUTRAL or value != NEUTRAL[name]):
                raise InputError(f"{name}: {value!r:.80} cannot be followed here; leave it out")
        sampling, number = self._sampling(given), next(self.numbers)
        if "seed" in given:
            sampling, number = replace(sampling, seed=_typed(given, "seed", int)), 0
        top = _typed(given, "top_logprobs", int)
        if not 0 <= top <= MOST_TOP or (top and not given.get("logprobs")):
            raise InputError(f"top_logprobs: 0 to {MOST_TOP}, with logprobs: true; it is {top}")
        for name, kind in (("stream", bool), ("logprobs", bool), ("stream_options", dict)):
            if not isinstance(given.get(name, kind()), kind):
                raise InputError(f"{name}: {given[name]!r:.80} is no {kind.__name__}")
        chat = chat_of({"messages": given.get("messages")}, "the request")
        prompt = self.worker.encoder.prompt(chat)
        limits_of(self.worker.model, [prompt], sampling)
        return Job(
            prompt,
            sampling,
            put,
            number,
            _stops(given.get("stop")),
            top if given.get("logprobs") else None,
        )

    def _sampling(self, given: dict[str, Any]) -> Sampling:
        values = {
            name: _typed(given, name, kind) for name, kind in SAMPLING.items() if name in given
        }
        for name in LENGTHS:
            if name in given:
                values.setdefault("max_new", _typed(given, name, int))
        return replace(self.defaults, **values)


def _typed(given: dict[str, Any], name: str, kind: type) -> Any:
    value = given.get(name, 0)
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
        raise InputError(f"{name}: {value!r:.80} is no {'whole ' * (kind is int)}number")
    return kind(value)


def _stops(value: str | list[str] | None) -> list[str]:
    stops = [value] if isinstance(value, str) else value or []
    if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops):
        raise InputError(f"stop: {value!r:.80} is neither a text nor a list of texts")
    return stops


# ---------------------------------------------------------------- HTTP


def application(server: Server) -> Any:
    """The Starlette application. Its worker must be started."""
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
    from starlette.routing import Route

    started = int(time.time())
    model = {"id": server.name, "object": "model", "created": started, "owned_by": "nanomed"}

    async def page(request: Request) -> Response:
        text = Path(__file__).with_name("serve.html").read_text(encoding="utf-8")
        text = text.replace("{model}", escape(server.name)).replace("{safety}", escape(SAFETY))
        # Nothing on the page can load or send anything elsewhere.
        policy = "default-src 'none'; connect-src 'self'; script-src 'unsafe-inline'; "
        policy += "style-src 'unsafe-inline'"
        return HTMLResponse(text, headers={"Content-Security-Policy": policy})

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [model]})

    async def completions(request: Request) -> Response:
        pieces: asyncio.Queue[Piece] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        try:
            body = await request.json()
            job = server.job(
                body, lambda piece: loop.call_soon_threadsafe(pieces.put_nowait, piece)
            )
        except (InputError, ValueError) as error:
            return JSONResponse(_error(str(error), "invalid_request_error"), 400)
        server.worker.ask(job)
        head = {"id": f"chatcmpl-{job.number}", "created": int(time.time()), "model": server.name}
        if body.get("stream"):
            counted = bool((body.get("stream_options") or {}).get("include_usage"))
            lines = _lines(head, job, pieces, counted)
            return StreamingResponse(lines, media_type="text/event-stream")
        found = await _whole(request, job, pieces)
        if found is None or found[-1].finish == "error":
            return JSONResponse(
                _error("the model failed; see the server's screen", "server_error"), 500
            )
        return JSONResponse(head | _completion(job, found))

    routes = [
        Route("/", page),
        Route("/v1/models", models),
        Route("/v1/chat/completions", completions, methods=["POST"]),
    ]
    # A page of another site whose name was made to lead here is turned away.
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=[LOOPBACK, "localhost"])
    return Starlette(routes=routes, middleware=[hosts])


def _error(message: str, kind: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


async def _whole(request: Any, job: Job, pieces: asyncio.Queue[Piece]) -> list[Piece] | None:
    """All pieces; None if who asked is gone, for whom nothing more is computed."""
    found: list[Piece] = []
    while not found or not found[-1].finish:
        with contextlib.suppress(TimeoutError):
            found.append(await asyncio.wait_for(pieces.get(), timeout=1.0))
        if await request.is_disconnected():
            job.cancelled.set()
            return None
    return found


def _completion(job: Job, pieces: list[Piece]) -> dict[str, Any]:
    tokens = [token for piece in pieces for token in piece.tokens]
    message = {"role": "assistant", "content": "".join(piece.text for piece in pieces)}
    choice = {"index": 0, "message": message, "finish_reason": pieces[-1].finish}
    choice["logprobs"] = None if job.top is None else {"content": tokens}
    return {"object": "chat.completion", "choices": [choice], "usage": _usage(job, pieces[-1])}


def _usage(job: Job, last: Piece) -> dict[str, int]:
    n_in, n_out = len(job.prompt), last.n_tokens
    return {"prompt_tokens": n_in, "completion_tokens": n_out, "total_tokens": n_in + n_out}


async def _lines(
    head: dict[str, Any], job: Job, pieces: asyncio.Queue[Piece], counted: bool
) -> AsyncIterator[str]:
    """Server-sent events: the role, each piece, the reason of the end, the usage if asked for."""

    def line(choices: list[dict], **more: Any) -> str:
        chunk = head | {"object": "chat.completion.chunk", "choices": choices} | more
        return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"

    def choice(delta: dict, tokens: Any = (), finish: str | None = None) -> list[dict]:
        shown = {"content": list(tokens)} if tokens else None
        return [{"index": 0, "delta": delta, "logprobs": shown, "finish_reason": finish}]

    try:
        yield line(choice({"role": "assistant", "content": ""}))
        while not (piece := await pieces.get()).finish:
            yield line(choice({"content": piece.text}, piece.tokens))
        if piece.finish == "error":
            yield f"data: {json.dumps(_error('the model failed', 'server_error'))}\n\n"
            return
        yield line(choice({}, finish=piece.finish))
        if counted:
            yield line([], usage=_usage(job, piece))
        yield "data: [DONE]\n\n"
    finally:
        job.cancelled.set()  # who asked may be gone


def listen(port: int) -> socket.socket:
    """Raises InputError if the port is taken."""
    place = socket.socket()
    place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        place.bind((LOOPBACK, port))
        place.listen()  # who comes while the model is being read waits
    except OSError as error:
        raise InputError(f"--port {port}: {error.strerror}; choose another one") from None
    return place


def main() -> None:
    parser = command_line("python -m nanomed.tools.serve", __doc__)
    parser.add_argument("--port", type=int, default=8000, help="default 8000; 0: a free one")
    parser.add_argument(
        "--batch_size", type=positive_int, default=8, help="greedy answers at a time; default 8"
    )
    # What is asked for with temperature 0 is the likeliest answer, with no penalty unasked for.
    add_arguments(parser, replace(CHAT, repetition_penalty=1.0))
    c = parser.parse_args()
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ImportError:
        raise InputError("nanomed.tools.serve needs pip install starlette uvicorn") from None
    place = listen(c.port)
    model, encoder, sampling = open_model(c)
    pack_linears(model)
    worker = Worker(model, encoder, c.batch_size)
    worker.start()
    server = Server(worker, sampling, Path(c.model).resolve().name)
    address = f"http://{LOOPBACK}:{place.getsockname()[1]}"
    print(f"{server.name}: the page is {address}/, the endpoint {address}/v1; Ctrl-C ends it")
    settings = uvicorn.Config(application(server), log_level="warning", timeout_graceful_shutdown=1)
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(settings).run(sockets=[place])


if __name__ == "__main__":
    launch(main)
