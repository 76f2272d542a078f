"""The routes of the server."""

import hmac
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, PlainTextResponse, Response

from moestro.generation import TextModel
from moestro.serve.answers import Answer
from moestro.serve.errors import ApiError, Busy
from moestro.serve.protocol import Asked, ChatRequest, CompletionRequest, parse
from moestro.serve.service import Service
from moestro.serve.settings import LOOPBACK, ServeSettings
from moestro.serve.ticket import Ticket
from moestro.serve.transport import LEFT, Counted, EventStream, KnownHost, read_body, whole_answer

ENDPOINTS = frozenset({"/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions"})


def build_app(text_model: TextModel, settings: ServeSettings) -> FastAPI:
    """The server's application; its worker lives from startup to shutdown and is `app.state.service.worker`."""
    service = Service(text_model, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        service.worker.close()

    # its pages of documentation would be fetched from elsewhere
    app = FastAPI(title="moestro", lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)
    app.state.service = service
    if settings.host in LOOPBACK:
        app.add_middleware(KnownHost, names=frozenset(LOOPBACK))
    app.add_middleware(Counted, metrics=service.metrics, endpoints=ENDPOINTS)
    app.add_exception_handler(ApiError, _told)
    app.add_exception_handler(HTTPException, _not_found)
    app.add_exception_handler(ClientDisconnect, _left)
    app.add_exception_handler(Exception, _failed)
    app.include_router(_open_routes(service))
    app.include_router(_routes(service), dependencies=[Depends(_key_check(settings.api_key))])
    return app


def _open_routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/health")
    async def health() -> Response:
        closing = service.worker.closing
        return JSONResponse({"status": "closing" if closing else "ok"}, 503 if closing else 200)

    return router


def _routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(service.metrics.text(service.gauges()), media_type="text/plain; version=0.0.4")

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [service.card(service.settings.name)]}

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        return service.card(name)

    @router.post("/v1/completions")
    async def completions(request: Request) -> Response:
        asked = parse(CompletionRequest, await read_body(request, service.settings.max_body))
        return await _answered(request, asked, *await service.complete(asked))

    @router.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        asked = parse(ChatRequest, await read_body(request, service.settings.max_body))
        return await _answered(request, asked, *await service.chat(asked))

    return router


async def _answered(request: Request, asked: Asked, ticket: Ticket, answer: Answer) -> Response:
    if asked.stream:
        return EventStream(ticket, answer, bool(asked.stream_options and asked.stream_options.include_usage))
    return await whole_answer(request, ticket, answer)


def _key_check(api_key: str | None) -> Any:
    """A dependency that lets only clients through that send the key."""

    async def check(request: Request) -> None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if api_key is None:
            return
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), api_key.encode()):
            raise ApiError(401, "a valid API key is needed: Authorization: Bearer KEY", None, "invalid_api_key")

    return check


def _told(request: Request, error: Exception) -> Response:
    if not isinstance(error, ApiError):
        raise error
    headers = {"Retry-After": str(error.retry_after)} if isinstance(error, Busy) else {}
    return error.response(headers | ({"WWW-Authenticate": "Bearer"} if error.status == 401 else {}))


def _not_found(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    message = f"{request.method} {request.url.path}: {error.detail}; there are {', '.join(sorted(ENDPOINTS))}"
    return ApiError(error.status_code, message, code="unknown_url").response(error.headers)


def _left(request: Request, error: Exception) -> Response:
    return Response(status_code=LEFT)


def _failed(request: Request, error: Exception) -> Response:
    return ApiError(500, "the server failed on this request; its log says why", code="internal_error").response()
