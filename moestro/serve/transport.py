"""Between the routes and the wire: bodies of bounded size, clients that leave, and answers that are counted."""

import asyncio
from typing import Any
from urllib.parse import urlsplit

from fastapi import Request
from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moestro.serve.answers import Answer
from moestro.serve.errors import ApiError
from moestro.serve.metrics import Metrics
from moestro.serve.ticket import Ticket

# A client that sends its whole body before it reads needs the rest taken off its hands to see the error; this much.
DRAINED = 16
LEFT = 499


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body.

    Raises: ApiError 413 where it has more than `limit` bytes; starlette's ClientDisconnect.
    """
    content, size = bytearray(), 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= limit:
            content += chunk
        elif size > DRAINED * limit:
            break
    if size > limit:
        raise ApiError(413, f"the body has more than {limit:,} bytes, which is the most", code="body_too_large")
    return bytes(content)


class EventStream(StreamingResponse):
    """An answer as server-sent events; a client that leaves ends its generation."""

    media_type = "text/event-stream"

    def __init__(self, ticket: Ticket, answer: Answer, include_usage: bool) -> None:
        super().__init__(answer.stream(include_usage), headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._ticket = ticket

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ticket.leave()


async def whole_answer(request: Request, ticket: Ticket, answer: Answer) -> Response:
    """The answer as JSON, unless the client leaves before it is written.

    Raises: ApiError where generation failed or was ended.
    """
    writing = asyncio.ensure_future(answer.whole())
    leaving = asyncio.ensure_future(_left(request.receive))
    try:
        await asyncio.wait({writing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return JSONResponse(writing.result()) if writing.done() else Response(status_code=LEFT)
    finally:
        writing.cancel()
        leaving.cancel()
        ticket.leave()


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class KnownHost:
    """Answers only what is sent to one of `names`, and no page of another site. What is served to this machine alone
    would otherwise be open to every page that a browser on it shows: a page may let its own name stand for 127.0.0.1
    (DNS rebinding), or send a form."""

    def __init__(self, app: ASGIApp, names: frozenset[str]) -> None:
        self._app, self._names = app, names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            for name in ("host", "origin"):
                given = headers.get(name)
                if given is not None and self._host(given) not in self._names:
                    message = f"{name} {given[:100]!r} is not this machine; allowed: {', '.join(sorted(self._names))}"
                    return await ApiError(403, message, None, "foreign_host").response()(scope, receive, send)
        return await self._app(scope, receive, send)

    @staticmethod
    def _host(given: str) -> str | None:
        """The name in `http://name:port` or `name:port`; None where there is none."""
        try:
            return urlsplit(given if "://" in given else f"//{given}").hostname
        except ValueError:
            return None


class Counted:
    """Counts every answer by endpoint and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics, endpoints: frozenset[str]) -> None:
        self._app, self._metrics, self._endpoints = app, metrics, endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                # what clients make up must not become a label
                endpoint: Any = scope["path"] if scope["path"] in self._endpoints else "other"
                self._metrics.answers[endpoint, message["status"]] += 1
            await send(message)

        await self._app(scope, receive, counting if scope["type"] == "http" else send)
