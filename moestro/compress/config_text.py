"""Edits of config.json as text: what is not meant to change keeps every byte.

Saving through a configuration class would rewrite keys that other loaders read (rope_theta, torch_dtype, num_experts).
"""

import json
from collections.abc import Mapping
from typing import Any

from moestro.compress.plan import PlanError

SPACE = " \t\r\n"


def edited(text: str, changes: Mapping[str, Any]) -> str:
    """The JSON object `text` with these top-level keys set: values are replaced where a key is there, other keys are
    added at the end.

    Raises: PlanError where the text is no JSON object, or has a key twice.
    """
    spans = values_of(text)
    new = {key: value for key, value in changes.items() if key not in spans}
    for key in sorted(changes.keys() & spans.keys(), key=lambda key: -spans[key][0]):
        start, stop = spans[key]
        if json.loads(text[start:stop]) != changes[key]:
            text = text[:start] + json.dumps(changes[key], ensure_ascii=False) + text[stop:]
    return _with(text, new) if new else text


def values_of(text: str) -> dict[str, tuple[int, int]]:
    """Where the value of every top-level key begins and ends.

    Raises: PlanError as `edited`.
    """
    decode = json.JSONDecoder()
    spans: dict[str, tuple[int, int]] = {}
    try:
        at = _skip(text, _skip(text, 0) + 1) if text.lstrip(SPACE).startswith("{") else -1
        if at < 0:
            raise PlanError(f"config.json is no JSON object: it begins with {text[:20]!r}")
        while text[at] != "}":
            key, at = decode.raw_decode(text, at)
            start = _skip(text, _skip(text, at) + 1)
            _, stop = decode.raw_decode(text, start)
            if key in spans:
                raise PlanError(f"config.json has the key {key!r} twice")
            spans[key] = (start, stop)
            at = _skip(text, stop, SPACE + ",")
    except (ValueError, IndexError) as error:
        if isinstance(error, PlanError):
            raise
        raise PlanError(f"config.json is no JSON object: {error}") from error
    return spans


def _skip(text: str, at: int, what: str = SPACE) -> int:
    while at < len(text) and text[at] in what:
        at += 1
    return at


def _with(text: str, new: Mapping[str, Any]) -> str:
    """`new` keys behind the last one, laid out as the first one is."""
    spans = values_of(text)
    last = max((stop for _, stop in spans.values()), default=text.index("{") + 1)
    first = text.index("{") + 1
    layout = text[first : _skip(text, first)] or (" " if spans else "")
    lines = [f"{layout}{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in new.items()]
    return text[:last] + ("," if spans else "") + ",".join(lines) + text[last:]
