"""A server on a free port of this machine, in a thread of the test process."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from moestro.generation import TextModel
from moestro.serve import ServeSettings, build_app
from moestro.serve.server import Server, address, listening, make_server
from tests.stock_models import byte_tokenizer, tiny_llama


@dataclass
class Served:
    """A running server: its address, its parts, and how to end it."""

    url: str
    server: Server
    text_model: TextModel
    thread: threading.Thread

    def client(self, key: str = "none", retries: int = 0) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=retries, timeout=60)

    @property
    def worker(self) -> Any:
        return self.server._worker

    @property
    def jobs(self) -> list[Any]:
        """Those that take turns."""
        with self.worker._changed:
            return [job for job in (*self.worker._active, self.worker._stepping) if job is not None]

    def stop(self) -> None:
        """What a signal does."""
        self.server.should_exit = True

    def idle(self) -> bool:
        """Wait until nobody is served; whether that came."""
        return until(lambda: self.worker.n_active + self.worker.n_waiting == 0)


def until(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    """Wait for a condition; whether it came."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


@pytest.fixture(scope="session")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    folder: Path = tmp_path_factory.mktemp("bytes")
    return TextModel(tiny_llama(context=512), byte_tokenizer(folder))


@contextmanager
def serving(text_model: TextModel, **settings: Any) -> Iterator[Served]:
    told = ServeSettings(**{"name": "tiny", "port": 0, "grace": 20.0, **settings})
    with listening(told.host, told.port) as bound:
        server = make_server(build_app(text_model, told), told)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        served = Served(address(bound), server, text_model, thread)
        try:
            assert until(lambda: server.started)
            yield served
        finally:
            served.stop()
            thread.join(30)
    assert not thread.is_alive()


@pytest.fixture(scope="session")
def served(text_model: TextModel) -> Iterator[Served]:
    with serving(text_model) as running:
        yield running


@pytest.fixture(scope="session")
def client(served: Served) -> openai.OpenAI:
    return served.client()


@pytest.fixture(scope="session")
def http(served: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url, timeout=60) as plain:
        yield plain
