"""Tokens to text as they come: whole characters only, and nothing of a stop sequence."""

from collections.abc import Callable, Sequence

BROKEN = "\ufffd"
# A character has up to four bytes; decoders that fall back to bytes take those of two characters for one broken run.
HELD = 8
# tokens that give no whole character in a row, after which they are shown as they are
MOST_PENDING = 64


class TextStream:
    """The text of a growing list of tokens, given out in pieces that no later token changes.

    `decode` turns tokens into text and marks incomplete bytes with U+FFFD, as tokenizers do. `context` are tokens that
    come before and are not given out: some tokenizers drop a space at the start of a text. Only the tokens of the last
    piece are decoded again, so that a step costs the same however long the text.
    """

    def __init__(self, decode: Callable[[list[int]], str], context: Sequence[int] = ()) -> None:
        self._decode = decode
        self._tokens = list(context)
        self._read = len(self._tokens)
        self._given = len(decode(self._tokens).rstrip(BROKEN))

    def push(self, token: int) -> str:
        """The text that is certain now, often empty."""
        self._tokens.append(token)
        text = self._decode(self._tokens)
        broken = len(text) - len(text.rstrip(BROKEN))
        if broken and len(self._tokens) - self._read < MOST_PENDING:
            return self._give(text, len(text) - min(broken, HELD))
        fresh = self._give(text, len(text))
        if fresh:
            self._forget()
        return fresh

    def rest(self) -> str:
        """What was held back, when no more tokens come."""
        text = self._decode(self._tokens)
        return self._give(text, len(text))

    def _give(self, text: str, end: int) -> str:
        fresh = text[self._given : end]
        self._given = max(self._given, end)
        return fresh

    def _forget(self) -> None:
        """Keep the tokens of the last piece only, as context of the next."""
        self._tokens = self._tokens[self._read :]
        self._read = len(self._tokens)
        self._given = len(self._decode(self._tokens))


class StopFilter:
    """Passes text on up to the first stop sequence; what may be the start of one is held back.

    Raises: ValueError for an empty stop sequence.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if "" in stops:
            raise ValueError("a stop sequence is empty; allowed: text of at least one character")
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """(text that is certain, whether a stop sequence came right after it)."""
        text = self._held + text
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def rest(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
