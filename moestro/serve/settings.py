"""What a server is told when it starts."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

KEY_VARIABLE = "MOESTRO_API_KEY"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class ServeSettings:
    """The name clients call the model by, where it is served, and what it takes on.

    `active` requests are generated in turns, `waiting` more may wait; a body may have `max_body` bytes; at the end,
    requests that are running get `grace` seconds. `api_key` is never printed.

    Raises: ValueError for a value that is out of its range.
    """

    name: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)
    active: int = 8
    waiting: int = 64
    max_body: int = 2**20
    grace: float = 30.0

    def __post_init__(self) -> None:
        for name, least, most in (("port", 0, 65535), ("active", 1, 4096), ("waiting", 0, 10**6)):
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"{name}={getattr(self, name)}; allowed: {least} to {most}")
        if self.max_body < 1 or not self.grace >= 0:
            raise ValueError(f"max_body={self.max_body}, grace={self.grace}; allowed: at least 1 byte, 0 seconds")

    @property
    def is_open(self) -> bool:
        """Whether other machines reach it and nobody is asked for a key."""
        return self.host not in LOOPBACK and self.api_key is None


def read_api_key(file: Path | None, environment: Mapping[str, str] = os.environ) -> str | None:
    """The key that clients must send: the text of `file`, else of the variable MOESTRO_API_KEY, else none.

    Raises: ValueError where it is empty or not printable ASCII, which no client could send; OSError.
    """
    found = file.read_text(encoding="utf-8") if file else environment.get(KEY_VARIABLE)
    if found is None:
        return None
    key, where = found.strip(), file or KEY_VARIABLE
    if not key or not key.isascii() or not key.isprintable():
        raise ValueError(f"{where}: an API key is printable ASCII, at least one character")
    return key
