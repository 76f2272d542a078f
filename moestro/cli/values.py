"""What verbs take as numbers and paths: the values of their options, checked as they are read."""

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path

# digits of a whole number of 64 bits; bytes of one name in a path on the usual file systems
LONGEST_NUMBER, LONGEST_NAME = 19, 255


def whole(text: str) -> int:
    """A whole number of 64 bits.

    Raises: argparse.ArgumentTypeError.
    """
    digits = text.strip().removeprefix("-")
    if not (digits.isascii() and digits.isdecimal()) or len(digits) > LONGEST_NUMBER or abs(int(digits)) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number (of 64 bits)")
    return int(text)


def number(text: str) -> float:
    """A finite number.

    Raises: argparse.ArgumentTypeError.
    """
    return _fitting(text, math.isfinite, "a finite number")


def positive(text: str) -> int:
    """A whole number above 0.

    Raises: argparse.ArgumentTypeError.
    """
    if not text.isascii() or not text.isdecimal() or not 0 < whole(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def share(text: str) -> float:
    """A number above 0 and at most 1.

    Raises: argparse.ArgumentTypeError.
    """
    return _fitting(text, lambda value: 0 < value <= 1, "a number above 0 and at most 1")


def not_negative(text: str) -> float:
    """A number of at least 0.

    Raises: argparse.ArgumentTypeError.
    """
    return _fitting(text, lambda value: 0 <= value < math.inf, "a number of at least 0")


def _fitting(text: str, fits: Callable[[float], bool], what: str) -> float:
    """The number that the text says, where it fits; what is no number must not."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not fits(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return value


def file_path(text: str) -> Path:
    """A path that a file system may have.

    Raises: argparse.ArgumentTypeError.
    """
    longest = max((len(os.fsencode(name)) for name in text.split("/")), default=0)
    if not text.strip() or "\0" in text or longest > LONGEST_NAME:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no path; allowed: names of 1 to {LONGEST_NAME} bytes, none of them 0"
        )
    return Path(text)
