"""The process that serves: one socket, signals, and an end that loses nothing."""

import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from moestro.generation import TextModel
from moestro.serve.app import build_app
from moestro.serve.settings import ServeSettings
from moestro.serve.worker import Worker

# what connections get beyond the worker's own time to write the end of their answers
CLOSING_SECONDS = 5.0


class Server(uvicorn.Server):
    """Ends by letting the worker finish first: on SIGTERM and Ctrl-C new requests are refused, running ones go on for
    the time they are given, then they end with an error that says why. A second Ctrl-C does not wait."""

    def __init__(self, config: uvicorn.Config, worker: Worker, grace: float) -> None:
        super().__init__(config)
        self._worker, self._grace = worker, grace

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Called once by uvicorn, when it is to end."""
        self._worker.drain(self._grace)
        await super().shutdown(sockets)


def run_server(text_model: TextModel, settings: ServeSettings, ready: Callable[[str], None]) -> None:
    """Serve until a signal says stop; `ready` is told the address once requests are taken.

    Raises: OSError where the address cannot be had.
    """
    with listening(settings.host, settings.port) as bound:
        app = build_app(text_model, settings)
        server = make_server(app, settings)
        with stopped_by_signals(server):
            ready(address(bound))
            server.run(sockets=[bound])


def make_server(app: FastAPI, settings: ServeSettings) -> Server:
    """A uvicorn server that says nothing but errors and warnings."""
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(settings.grace + CLOSING_SECONDS),
    )
    return Server(config, app.state.service.worker, settings.grace)


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket at an address; port 0 takes any that is free.

    Raises: OSError, which names the address.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        bound = socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        raise OSError(f"cannot listen on {host}, port {port}: {error}") from error
    with bound:
        yield bound


def address(bound: socket.socket) -> str:
    """The URL of a socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextmanager
def stopped_by_signals(server: uvicorn.Server) -> Iterator[None]:
    """Signals end the server, also those that come before uvicorn listens to them. It raises the ones that ended it
    once more when it has ended: they have done their work then."""
    before = {each: signal.signal(each, server.handle_exit) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
        sys.stdout.flush()
