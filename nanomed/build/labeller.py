"""Asks an OpenAI-compatible endpoint, and pays for no answer twice.

    endpoint = Endpoint("http://127.0.0.1:8000/v1", "some-model", Path("answers.jsonl"))
    values = endpoint.ask_parsed([Request(messages, max_tokens=16), ...], parse)

Every answer is appended to the file the moment it comes. Asking the same again, after a kill or in
another run, finds it there. What an answer means is the caller's business: an answer that cannot be
read is None, never a default.
"""

import hashlib
import ipaddress
import json
import os
import random
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tqdm import tqdm

from nanomed.build.files import line_of, make_private, whole_lines
from nanomed.config import InputError
from nanomed.locks import take

TRIES = 6  # of one request, before the run stops
AGAIN = (408, 409, 429)  # and all from 500 on: the endpoint may answer later
LONGEST_WAIT = 120.0  # seconds between two tries, whatever Retry-After asks for
_FENCED = re.compile(r"```(?:json)?\s*(.*?)\s*```", re.DOTALL)
_CHINESE = re.compile("[\u3400-\u9fff]")
KEY = "LABELLER_API_KEY"  # the environment variable that holds the endpoint's key


class EndpointError(InputError):
    """The endpoint refuses, fails or would cost too much. What it has answered is kept."""


@dataclass(frozen=True)
class Request:
    messages: list[dict[str, str]]  # [{"role": "user", "content": ...}, ...]
    max_tokens: int  # of the answer
    temperature: float = 0.0
    round: int = 0  # the same question in another round is asked anew

    def body(self, model: str) -> dict[str, Any]:
        """What is sent, as JSON."""
        return {"model": model} | {k: v for k, v in asdict(self).items() if k != "round"}

    def key(self, model: str) -> str:
        """Under which its answer is kept: a hash of all that is sent, and of the round."""
        whole = json.dumps([self.body(model), self.round], sort_keys=True)
        return hashlib.sha256(whole.encode()).hexdigest()[:32]

    @property
    def tokens_in(self) -> int:
        """About how many: 1.6 Chinese characters or 4 others each, and 4 for every message."""
        text = "".join(message["content"] for message in self.messages)
        chinese = len(_CHINESE.findall(text))
        return round(chinese / 1.6 + (len(text) - chinese) / 4) + 4 * len(self.messages)


@dataclass(frozen=True)
class Answer:
    key: str
    text: str  # "" where the endpoint refused
    served: str  # the model that the endpoint says it used
    finish: str  # "stop" where the text is whole
    usage: dict[str, int] = field(default_factory=dict)  # prompt_tokens, completion_tokens

    @classmethod
    def of(cls, key: str, request: Request, reply: dict) -> "Answer":
        """Raises ValueError, KeyError, IndexError or TypeError if the reply is not OpenAI's."""
        if isinstance(reply, dict) and reply.get("error"):
            raise ValueError(f"{reply['error']!s:.200}")
        choice = reply["choices"][0]
        text = choice["message"]["content"] or ""
        if not isinstance(text, str):
            raise TypeError("the content is no text")
        # An endpoint that does not count is taken at its dearest.
        most = {"prompt_tokens": request.tokens_in, "completion_tokens": request.max_tokens}
        told = usage if isinstance(usage := reply.get("usage"), dict) else {}
        usage = {name: n if isinstance(n := told.get(name), int) else most[name] for name in most}
        served, finish = str(reply.get("model", "")), str(choice.get("finish_reason") or "stop")
        return cls(key, text, served, finish, usage)


class Cache:
    """A file of answers, one JSON line each, which one process at a time has open."""

    def __init__(self, path: Path):
        self.path = path
        make_private(path.parent)
        path.touch(mode=0o600)  # answers may quote texts
        self.file = take(path, patience=0.0)
        try:
            kept = [Answer(**json.loads(line)) for line in whole_lines(path)]
        except (ValueError, TypeError) as error:
            raise EndpointError(f"{path} holds what is no answer: {error}; remove it") from None
        self.answers = {answer.key: answer for answer in kept}

    def add(self, answer: Answer) -> None:
        self.file.write(line_of(asdict(answer)).decode())
        self.file.flush()
        os.fsync(self.file.fileno())
        self.answers[answer.key] = answer


class Endpoint:
    """url: up to and with `/v1`. Prices are per million tokens, in whatever currency max_cost is,
    which counts all that the file's answers have cost. Texts leave this machine only for a host
    that send_texts_to repeats. Raises EndpointError before anything is sent."""

    def __init__(
        self,
        url: str,
        model: str,
        cache: Path,
        *,
        price_in: float | None = None,
        price_out: float | None = None,
        max_cost: float | None = None,
        send_texts_to: str = "",
        threads: int = 8,
        timeout: float = 120.0,
        first_wait: float = 1.0,  # seconds before the second try; each further one twice that
    ):
        self.url, self.model, self.threads, self.timeout = url.rstrip("/"), model, threads, timeout
        self.first_wait, self.max_cost = first_wait, max_cost
        self.host = _allowed_host(url, send_texts_to)
        if (price_in is None or price_out is None) and not is_loopback(self.host):
            raise EndpointError(
                f"give --price_in and --price_out, what {self.host} takes per million tokens (0 if "
                "it takes nothing)"
            )
        self.price_in, self.price_out = price_in or 0.0, price_out or 0.0
        # No proxy either: it would be another host that reads the texts.
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect())
        self.cache = Cache(cache)
        self.spent = sum(map(self._cost, self.cache.answers.values()))
        self._lock, self._stopped, self._under_way = threading.Lock(), threading.Event(), 0.0

    def _price(self, n_in: int, n_out: int) -> float:
        return (n_in * self.price_in + n_out * self.price_out) / 1e6

    def _cost(self, answer: Answer) -> float:
        return self._price(answer.usage["prompt_tokens"], answer.usage["completion_tokens"])

    def _most(self, request: Request) -> float:
        """What a request costs if its answer is as long as it may be."""
        return self._price(request.tokens_in, request.max_tokens)

    def unasked(self, requests: Sequence[Request]) -> dict[str, Request]:
        """Those without an answer, each key once."""
        keyed = {request.key(self.model): request for request in requests}
        return {key: r for key, r in keyed.items() if key not in self.cache.answers}

    def estimate(self, requests: Sequence[Request]) -> str:
        """What asking would take, in a sentence. Nothing is sent."""
        todo = self.unasked(requests).values()
        n_in, n_out = sum(r.tokens_in for r in todo), sum(r.max_tokens for r in todo)
        cap = "no --max_cost" if self.max_cost is None else f"--max_cost {self.max_cost:g}"
        return (
            f"{len(todo):,} requests to {self.model} at {self.host} ({len(requests):,} wanted): "
            f"about {n_in:,} tokens in, at most {n_out:,} out, which cost at most about "
            f"{sum(map(self._most, todo)):.2f}; {self.spent:.2f} is spent already ({cap})"
        )

    def ask(self, requests: Sequence[Request]) -> list[Answer]:
        """One answer for each request, in their order. Raises EndpointError if all of it would cost
        more than max_cost, if the endpoint refuses, or if one request has failed TRIES times; what
        is under way then is waited for and kept."""
        if todo := self.unasked(requests):
            print(self.estimate(requests), flush=True)
            self._check_cost(sum(map(self._most, todo.values())))
        self._stopped.clear()
        with (
            ThreadPoolExecutor(self.threads) as pool,
            tqdm(total=len(todo), unit="answer", disable=None) as bar,
        ):
            asked = [pool.submit(self._one, key, request) for key, request in todo.items()]
            try:
                for done in as_completed(asked):
                    done.result()
                    bar.update()
            except BaseException:  # Ctrl-C among them
                self._stopped.set()  # those that have not been sent will not be
                raise
        return [self.cache.answers[request.key(self.model)] for request in requests]

    def ask_parsed(
        self, requests: Sequence[Request], parse: Callable[[str], Any], retry_failed: bool = False
    ) -> list[Any]:
        """The answers as `parse` reads them; None where it cannot, and where an answer was cut off.
        Such answers are kept too, and asked for again only with retry_failed."""

        def value(answer: Answer) -> Any:
            return parse(answer.text) if answer.finish == "stop" else None

        if retry_failed:  # the file keeps the old answer: it was paid for
            for key in {request.key(self.model) for request in requests}:
                if key in self.cache.answers and value(self.cache.answers[key]) is None:
                    del self.cache.answers[key]
        return [value(answer) for answer in self.ask(requests)]

    def _check_cost(self, more: float) -> None:
        if self.max_cost is not None and self.spent + self._under_way + more > self.max_cost:
            raise EndpointError(
                f"--max_cost {self.max_cost:g} would be passed: {self.spent:.4f} is spent, "
                f"{self._under_way:.4f} under way, at most about {more:.4f} next; {self._kept}"
            )

    @property
    def _kept(self) -> str:
        return f"{len(self.cache.answers):,} answers are kept in {self.cache.path}"

    def _one(self, key: str, request: Request) -> None:
        most, answer = self._most(request), None
        with self._lock:
            if self._stopped.is_set():
                return
            self._check_cost(most)
            self._under_way += most  # so that those under way do not pass the limit together
        try:
            answer = self._answer(key, request)
        except BaseException:
            self._stopped.set()  # before this thread takes the next one
            raise
        finally:
            with self._lock:
                self._under_way -= most
                if answer:
                    self.cache.add(answer)
                    self.spent += self._cost(answer)

    def _answer(self, key: str, request: Request) -> Answer | None:
        """None if the run is stopped before an answer came."""
        for i in range(TRIES):
            if self._stopped.is_set():
                return None
            wait = self.first_wait * 2**i
            try:
                return Answer.of(key, request, self._post(request.body(self.model)))
            except urllib.error.HTTPError as error:
                problem = f"{error.code} {_message(error, self.timeout)}"
                if error.code < 500 and error.code not in AGAIN:
                    raise EndpointError(f"{self.host} refuses: {problem}; {self._kept}") from None
                asked = error.headers.get("Retry-After", "")  # seconds; a date is not read
                wait = max(wait, float(asked) if asked.isdecimal() else 0.0)
            except (OSError, HTTPException) as error:  # no connection, timeout, cut off
                problem = f"{type(error).__name__} {error}"
            except (ValueError, KeyError, IndexError, TypeError) as error:
                problem = f"a reply that is not OpenAI's ({type(error).__name__} {error})"
            if i + 1 < TRIES:
                self._stopped.wait(min(wait, LONGEST_WAIT) * random.uniform(0.5, 1.0))
        raise EndpointError(
            f"{self.host} failed {TRIES} times, at last with {problem}; {self._kept}, and the same "
            "command goes on"
        )

    def _post(self, body: dict) -> dict:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        data = json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/chat/completions", data, headers)
        with self.opener.open(request, timeout=self.timeout) as reply:
            return json.loads(_whole(reply, self.timeout))


def _whole(reply: Any, seconds: float) -> bytes:
    """A reply's body. A connection's own limit is for one piece of it, and many may drip in."""
    until, body = time.monotonic() + seconds, b""
    while piece := reply.read1():
        body += piece
        if time.monotonic() > until:
            raise TimeoutError(f"after {seconds:g} s the reply was not whole")
    return body


def _message(error: urllib.error.HTTPError, seconds: float) -> str:
    try:
        return str(json.loads(_whole(error, seconds))["error"]["message"])[:200]
    except (ValueError, KeyError, TypeError, OSError, HTTPException):
        return str(error.reason)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Neither texts nor the key follow to another host: a redirect is an error."""

    def redirect_request(self, *_):
        return None


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _allowed_host(url: str, send_texts_to: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise EndpointError(f"{url!r} is no address; one looks like http://127.0.0.1:8000/v1")
    if parts.username or parts.password:
        raise EndpointError(f"no key in the address; give it in the environment as {KEY}")
    if not is_loopback(parts.hostname) and send_texts_to != parts.hostname:
        raise EndpointError(
            f"texts would leave this machine for {parts.hostname}; if they may, say so with "
            f"--send_texts_to {parts.hostname}"
        )
    return parts.hostname


# ---------------------------------------------------------------- prompts and strict parsing


def quoted(text: str) -> str:
    """A text between marks that it cannot know beforehand: what stands there is data, whatever it
    says. The same text has the same marks, so that its answer is found again."""
    mark = hashlib.sha256(text.encode()).hexdigest()[:12]
    return f"<text {mark}>\n{text}\n</text {mark}>"


def parse_object(text: str, allowed: dict[str, Sequence[Any]]) -> dict[str, Any] | None:
    """The answer's one JSON object, with exactly these names and for each one of its allowed
    values. A ``` fence around it is accepted, nothing else is."""
    fenced = _FENCED.fullmatch(text.strip())
    try:
        found = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or set(found) != set(allowed):
        return None
    fits = all(is_one_of(found[name], values) for name, values in allowed.items())
    return found if fits else None


def is_one_of(value: Any, allowed: Sequence[Any]) -> bool:
    """Of the same type, too: 1 is neither 1.0 nor true."""
    return any(type(other) is type(value) and other == value for other in allowed)
