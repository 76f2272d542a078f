"""Errors as OpenAI's clients expect them."""

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that is answered with an error; `param` is the field that is at fault, `code` a word for programs."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """{"error": {message, type, param, code}}"""
        kind = KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self, headers: Mapping[str, str] | None = None) -> JSONResponse:
        """The answer with this error."""
        return JSONResponse(self.body(), self.status, headers={**(headers or {})})


class Busy(ApiError):
    """All places to wait are taken; `retry_after` is in seconds."""

    def __init__(self, places: int, retry_after: int) -> None:
        super().__init__(429, f"all {places} places are taken; try again in {retry_after} s", None, "queue_full")
        self.retry_after = retry_after


class Closing(ApiError):
    """The server takes no requests any more, or could not finish one."""

    def __init__(self) -> None:
        super().__init__(503, "the server is shutting down", None, "shutting_down")
