"""Requests of OpenAI's completions and chat completions, read strictly.

What would change the answer and is not supported is refused, unless its value is the one that changes nothing. What
never changes an answer is ignored; a field that is null counts as absent, as in OpenAI's own client.
"""

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moestro.generation import Options, Sampling
from moestro.serve.errors import ApiError

IGNORED = {
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}
# fields that are not supported, and their values that ask for nothing
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (),
    "verbosity": (),
    "web_search_options": (),
}
MOST_STOPS = 16

Text = Annotated[str, Field(max_length=1000)]
Ids = Annotated[list[int], Field(min_length=1)]


class Strict(BaseModel):
    """Refuses unknown fields and values of another type."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Strict):
    """`include_usage`: one more chunk, with the counts."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Asked(Strict):
    """What both kinds of requests have. `top_k` is no field of OpenAI's; other servers have it too."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=MOST_STOPS)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    def options(self, max_new_tokens: int, stops: tuple[str, ...] = ()) -> Options:
        """How its text is generated; `stops` besides its own.

        Raises: ValueError for an empty stop sequence.
        """
        own = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return Options(max_new_tokens, (*own, *stops), Sampling(self.temperature, self.top_p, self.top_k, self.seed))


class CompletionRequest(Asked):
    """POST /v1/completions: one prompt or several, as text or as tokens."""

    prompt: str | Annotated[list[str], Field(min_length=1)] | Ids | Annotated[list[Ids], Field(min_length=1)]

    def prompts(self) -> list[str | list[int]]:
        """Each of them."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


class TextPart(Strict):
    """A part of a message; only text."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]

    def plain(self) -> dict[str, str]:
        """What templates are given; "developer" is the newer name of "system"."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(Asked):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None


Kind = TypeVar("Kind", bound=Asked)


def parse(kind: type[Kind], content: bytes) -> Kind:
    """A request from the bytes of its body.

    Raises: ApiError 400, with the field that is at fault.
    """
    try:
        fields = _without_nulls(json.loads(content))
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from error
    if not isinstance(fields, dict):
        raise ApiError(400, "the body is not a JSON object", code="invalid_json")
    for name in sorted(fields.keys() & NEUTRAL.keys()):
        if not any(type(fields[name]) is type(value) and fields[name] == value for value in _neutral(name)):
            raise ApiError(400, f"{name} is not supported here; leave it out", name, "unsupported_parameter")
    known = {name: value for name, value in fields.items() if name not in IGNORED | NEUTRAL.keys()}
    try:
        return kind.model_validate(known)
    except ValidationError as error:
        raise _explained(error, kind, known) from error


def _neutral(name: str) -> list[Any]:
    """Values that ask for nothing; numbers as whole ones and as floats."""
    values = list(NEUTRAL[name])
    return values + [float(value) for value in values if type(value) is int]


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _explained(error: ValidationError, kind: type[Asked], fields: dict[str, Any]) -> ApiError:
    """What is wrong with the innermost value that is; where it may be of several types, with each of them."""
    errors = error.errors(include_url=False, include_context=False)
    found = [(_place(each["loc"], fields, each["type"] == "missing"), each) for each in errors]
    place = max((place for place, _ in found), key=len)
    messages = dict.fromkeys(each["msg"] for at, each in found if at == place)
    param = ".".join(map(str, place))
    if any(at == place and each["type"] == "extra_forbidden" for at, each in found):
        allowed = f"; allowed: {', '.join(sorted(kind.model_fields))}" if len(place) == 1 else ""
        return ApiError(400, f"unknown field {param}{allowed}", param, "unknown_parameter")
    return ApiError(400, f"{param}: {'; or '.join(messages)}", param, "invalid_value")


def _place(location: tuple[int | str, ...], fields: Any, missing: bool) -> tuple[int | str, ...]:
    """A place among the fields, without the names of alternatives in between, which no client sent."""
    place: list[int | str] = []
    for number, part in enumerate(location):
        if isinstance(fields, dict) and (part in fields or missing and number == len(location) - 1):
            place.append(part)
            fields = fields.get(part)
        elif isinstance(fields, list) and isinstance(part, int):
            place.append(part)
            fields = fields[part]
    return tuple(place)
