"""Answers in the shapes of OpenAI's completions and chat completions, whole and as streams."""

import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from moestro.generation import Piece
from moestro.serve.errors import ApiError
from moestro.serve.ticket import Ticket


class CompletionShape:
    """`text_completion`: choices hold text."""

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def choice(self, index: int, text: str, reason: str) -> dict[str, Any]:
        """A whole choice."""
        return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}

    def opening(self) -> dict[str, Any] | None:
        """What a choice's stream begins with."""
        return None

    def delta(self, index: int, piece: Piece) -> dict[str, Any]:
        """A choice's next piece."""
        return {"index": index, "text": piece.text, "logprobs": None, "finish_reason": piece.reason}


class ChatShape:
    """`chat.completion`: choices hold messages."""

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, index: int, text: str, reason: str) -> dict[str, Any]:
        """A whole choice."""
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": None, "finish_reason": reason}

    def opening(self) -> dict[str, Any] | None:
        """What a choice's stream begins with."""
        return {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def delta(self, index: int, piece: Piece) -> dict[str, Any]:
        """A choice's next piece."""
        content = {"content": piece.text} if piece.text else {}
        return {"index": index, "delta": content, "logprobs": None, "finish_reason": piece.reason}


class Answer:
    """What one request is answered with: its id and time are the same in every chunk."""

    def __init__(self, shape: CompletionShape | ChatShape, model: str, ticket: Ticket) -> None:
        self._shape, self._model, self._ticket = shape, model, ticket
        self._id, self._created = f"{shape.prefix}-{uuid.uuid4().hex}", int(time.time())

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece.

        Raises: ApiError where generation failed or was ended.
        """
        texts, reasons = [""] * self._ticket.n_choices, [""] * self._ticket.n_choices
        async for index, piece in self._ticket.pieces():
            texts[index] += piece.text
            reasons[index] = piece.reason or ""
        choices = [self._shape.choice(i, *told) for i, told in enumerate(zip(texts, reasons, strict=True))]
        return {**self._head(self._shape.whole_object), "choices": choices, "usage": self._ticket.usage()}

    async def stream(self, include_usage: bool) -> AsyncIterator[str]:
        """Server-sent events: a chunk for every piece that has text or an end, then `[DONE]`."""
        head = self._head(self._shape.chunk_object) | ({"usage": None} if include_usage else {})
        if opening := self._shape.opening():
            yield _event({**head, "choices": [opening]})
        try:
            async for index, piece in self._ticket.pieces():
                if piece.text or piece.reason:
                    yield _event({**head, "choices": [self._shape.delta(index, piece)]})
        except ApiError as error:
            yield _event(error.body())
        else:
            if include_usage:
                yield _event({**head, "choices": [], "usage": self._ticket.usage()})
        yield "data: [DONE]\n\n"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
