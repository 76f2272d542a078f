"""One prompt being continued, a token a step, with its own cache and its own source of chance."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch

from moestro.generation.sampling import Sampling
from moestro.generation.text_stream import StopFilter, TextStream

# tokens of the prompt that the first piece of text is decoded with
CONTEXT_TOKENS = 6

Reason = Literal["stop", "length"]


@dataclass(frozen=True)
class Options:
    """How far a continuation goes and how its tokens are chosen.

    Raises: ValueError for a number of tokens below 1.
    """

    max_new_tokens: int
    stops: tuple[str, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens}; allowed: at least 1")
        StopFilter(self.stops)


@dataclass(frozen=True)
class Piece:
    """What a step added: whole characters, perhaps none; `reason` on the last one.

    "stop" is a stop sequence, which is no part of the text, or a token that ends texts; "length" is `max_new_tokens`.
    """

    text: str
    reason: Reason | None = None


class Reads(Protocol):
    """What a continuation asks of the model (`TextModel`)."""

    model: Any
    ends: frozenset[int]
    forward_options: Mapping[str, Any]

    def decode(self, tokens: Sequence[int]) -> str: ...


class Continuation:
    """The text after one prompt. Alone in its batch, so that its tokens do not depend on who else is served. What a
    model gives no cache for is read again in every step."""

    def __init__(self, reads: Reads, prompt: Sequence[int], options: Options) -> None:
        self._reads, self._options = reads, options
        self._generator = options.sampling.generator()
        self._text = TextStream(reads.decode, prompt[-CONTEXT_TOKENS:])
        self._stops = StopFilter(options.stops)
        self._tokens, self._cached, self._cache = list(prompt), 0, None
        self.n_prompt = len(prompt)
        self.new_tokens: list[int] = []
        self.reason: Reason | None = None

    def pieces(self) -> Iterator[Piece]:
        """Every step to the end."""
        while self.reason is None:
            yield self.step()

    def step(self) -> Piece:
        """Choose one more token.

        Raises: RuntimeError where the continuation is at its end.
        """
        if self.reason is not None:
            raise RuntimeError(f"this continuation has ended ({self.reason})")
        token = self._options.sampling.choose(self._logits(), self._generator)
        self._tokens.append(token)
        self.new_tokens.append(token)
        if token in self._reads.ends:
            return self._last("stop", self._text.rest())
        text, stopped = self._stops.push(self._text.push(token))
        if stopped:
            self.reason = "stop"
            return Piece(text, "stop")
        if len(self.new_tokens) == self._options.max_new_tokens:
            last = self._last("length", self._text.rest())
            return Piece(text + last.text, self.reason)
        return Piece(text)

    def _last(self, reason: Reason, text: str) -> Piece:
        text, stopped = self._stops.push(text)
        self.reason = "stop" if stopped else reason
        return Piece(text if stopped else text + self._stops.rest(), self.reason)

    def _logits(self) -> torch.Tensor:
        """The logits [v] of the token after all so far. A model that keeps no cache reads everything again."""
        unread, model = self._tokens[self._cached :], self._reads.model
        with torch.inference_mode():
            output = model(
                input_ids=torch.tensor([unread], device=model.device),
                past_key_values=self._cache,
                **self._reads.forward_options,
            )
        self._cache = output.past_key_values
        self._cached = 0 if self._cache is None else len(self._tokens)
        return output.logits[0, -1]
