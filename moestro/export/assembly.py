"""A model from its construction: which constructors were called with which keywords, as plain values."""

from collections.abc import Callable, Mapping
from typing import Any


def assembled(node: Any, constructors: Mapping[str, Callable[..., Any]], named: dict[str, Any] | None = None) -> Any:
    """What a node of a construction stands for.

    {"make": name, keyword: node, ...} calls a constructor; {"id": name, ...} besides names what it returned, and
    {"same": name} is that object once more. {"makes": [node, ...]} is a function that returns these, one a call,
    whatever it is told. Lists hold nodes and stand for tuples; everything else stands for itself.

    Raises: ValueError for a constructor that is not known here.
    """
    named = {} if named is None else named
    if isinstance(node, list):
        return tuple(assembled(item, constructors, named) for item in node)
    if not isinstance(node, dict):
        return node
    if "same" in node:
        return named[node["same"]]
    if "makes" in node:
        made = iter([assembled(item, constructors, named) for item in node["makes"]])
        return lambda **told: next(made)
    if node["make"] not in constructors:
        raise ValueError(f"unknown part {node['make']!r}: the folder was written by another version of moestro")
    # in the order in which JSON files keep keys: what has a name is made before it is asked for again
    keywords = {key: assembled(node[key], constructors, named) for key in sorted(node) if key not in ("make", "id")}
    value = constructors[node["make"]](**keywords)
    if "id" in node:
        named[node["id"]] = value
    return value
