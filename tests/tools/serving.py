"""A server in this process, on a port of its own, as nanomed.tools.serve makes one."""

import threading
from contextlib import contextmanager

import pytest

from nanomed.model.generation import Sampling
from nanomed.tools.serve import Server, application, listen
from nanomed.tools.serve_jobs import Worker


@contextmanager
def serving(model, encoder):
    """(url, Server) of a model that answers in 24 tokens, and to four at a time."""
    uvicorn = pytest.importorskip("uvicorn")
    pytest.importorskip("starlette")
    worker = Worker(model, encoder, batch_size=4)
    worker.start()
    server = Server(worker, Sampling(max_new=24), "the-model")
    place = listen(0)
    http = uvicorn.Server(uvicorn.Config(application(server), log_level="warning"))
    thread = threading.Thread(target=http.run, args=([place],), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{place.getsockname()[1]}", server
    finally:
        http.should_exit = True
        thread.join(10)
