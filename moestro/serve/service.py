"""From a request's fields to continuations that the worker runs."""

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

from moestro.generation import Continuation, PromptTooLong, TextModel
from moestro.serve.answers import Answer, ChatShape, CompletionShape
from moestro.serve.chat import render
from moestro.serve.errors import ApiError
from moestro.serve.metrics import Metrics
from moestro.serve.protocol import Asked, ChatRequest, CompletionRequest
from moestro.serve.settings import ServeSettings
from moestro.serve.ticket import Ticket
from moestro.serve.worker import Worker

# OpenAI's own default for completions; chats take what the context leaves, or so much where it has no end
COMPLETION_TOKENS, CHAT_TOKENS = 16, 1024


class Service:
    """One model, its worker and what is counted."""

    def __init__(self, text_model: TextModel, settings: ServeSettings) -> None:
        self.text_model, self.settings = text_model, settings
        self.worker, self.metrics = Worker(settings.active, settings.waiting), Metrics()
        self.created, self._encoding = int(time.time()), threading.Lock()
        # the first text sets a tokenizer up, which must not happen while another thread decodes
        text_model.encode("a")

    def card(self, name: str) -> dict[str, Any]:
        """The model as `/v1/models` lists it.

        Raises: ApiError 404 for the name of another.
        """
        if name != self.settings.name:
            raise ApiError(
                404, f"model {name!r} is not served here; allowed: {self.settings.name}", "model", "model_not_found"
            )
        about = {"id": name, "object": "model", "created": self.created, "owned_by": "moestro"}
        return about | {"max_model_len": self.text_model.context}

    def gauges(self) -> dict[str, int]:
        """What goes on now."""
        return {
            "moestro_requests_active": self.worker.n_active,
            "moestro_requests_waiting": self.worker.n_waiting,
        }

    async def complete(self, request: CompletionRequest) -> tuple[Ticket, Answer]:
        """Begin to answer; raises ApiError."""
        return await self._begin(request, CompletionShape(), lambda: self._completions(request))

    async def chat(self, request: ChatRequest) -> tuple[Ticket, Answer]:
        """Begin to answer; raises ApiError."""
        return await self._begin(request, ChatShape(), lambda: [self._reply(request)])

    async def _begin(
        self, request: Asked, shape: CompletionShape | ChatShape, continuations: Callable[[], list[Continuation]]
    ) -> tuple[Ticket, Answer]:
        self.card(request.model)
        ticket = Ticket(self.worker, self.metrics, await asyncio.to_thread(self._prepared, continuations))
        return ticket, Answer(shape, request.model, ticket)

    def _prepared(self, continuations: Callable[[], list[Continuation]]) -> list[Continuation]:
        """Tokenizers are not made for several threads at once."""
        try:
            with self._encoding:
                return continuations()
        except PromptTooLong as error:
            raise ApiError(400, str(error), "prompt", "context_length_exceeded") from error
        except ValueError as error:
            raise ApiError(400, str(error), None, "invalid_value") from error

    def _completions(self, request: CompletionRequest) -> list[Continuation]:
        prompts = request.prompts()
        if len(prompts) > self.worker.places:
            raise ApiError(400, f"{len(prompts)} prompts; allowed: {self.worker.places}", "prompt", "invalid_value")
        encoded = [self.text_model.encode(text) if isinstance(text, str) else text for text in prompts]
        return [self._continuation(ids, request, request.max_tokens, COMPLETION_TOKENS) for ids in encoded]

    def _reply(self, request: ChatRequest) -> Continuation:
        if request.max_tokens is not None and request.max_completion_tokens is not None:
            raise ApiError(400, "max_tokens and max_completion_tokens are one thing; give one", "max_tokens")
        prompt, stops, rendered = render(self.text_model.tokenizer, [each.plain() for each in request.messages])
        encode = self.text_model.encode_rendered if rendered else self.text_model.encode
        wanted = request.max_tokens or request.max_completion_tokens
        default = CHAT_TOKENS if self.text_model.context is None else None
        return self._continuation(encode(prompt), request, wanted, default, stops)

    def _continuation(
        self, ids: list[int], request: Asked, wanted: int | None, default: int | None, stops: tuple[str, ...] = ()
    ) -> Continuation:
        room = self.text_model.room(ids, wanted, default)
        return self.text_model.begin(ids, request.options(room, stops))
