"""Records of JSON lines, Parquet and data sets: the text in them, or what is wrong with them."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from moestro.data.files import too_long


def text_of(record: Mapping[str, Any], field: str, where: str, longest: int = sys.maxsize) -> str:
    """The text in a record's field.

    Raises: MissingField; ValueError where it holds no text, or more than `longest` bytes of it.
    """
    if field not in record:
        raise MissingField(field, list(record), where)
    text = record[field]
    if not isinstance(text, str):
        raise ValueError(f"{where}: field '{field}' holds {type(text).__name__}, not text")
    try:
        size = len(text) if len(text) > longest else len(text.encode())
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: field '{field}': character {error.start} is half of a surrogate pair") from error
    if size > longest:
        raise too_long(where, f"this document (field '{field}')", longest, "Cut it into several")
    return text


class MissingField(ValueError):
    """A record without the text's field; `there` are the fields that it has."""

    def __init__(self, field: str, there: Sequence[str], where: str):
        super().__init__(f"{where}: no field '{field}'; there are: {', '.join(there) or 'none'}. Set text_field")
        self.there = tuple(there)


def json_object(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON: {error.msg} (column {error.colno})") from error
    except RecursionError as error:
        raise ValueError(f"{where}: not valid JSON: nested too deep") from error
    except ValueError as error:
        # a number of thousands of digits
        raise ValueError(f"{where}: cannot be read: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}: a JSON {type(record).__name__}, not an object with a text field")
    return record
