"""Numbers as a reader expects them: 1.23M, 4.5e12, 1.912 ± 0.004."""

import math
from typing import TypeGuard

MISSING = "–"
MINUS = "\N{MINUS SIGN}"
# Keeps a number and what belongs to it on one line.
NO_BREAK = "\N{NO-BREAK SPACE}"
PLUS_MINUS = f"{NO_BREAK}±{NO_BREAK}"
_SI = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def is_number(value: object) -> TypeGuard[float]:
    """Whether `value` is a finite real number (None, NaN, infinity, text and booleans are not)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def significant(value: float, digits: int = 3) -> str:
    """`value` with at most `digits` significant digits, without exponent, without trailing zeros."""
    if value == 0:
        return "0"
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    text = f"{round(value, decimals):.{max(decimals, 0)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def si(value: float | None, digits: int = 3) -> str:
    """A count with its SI letter: 1.23M; billions are B, as the field writes parameters."""
    if not is_number(value):
        return MISSING
    for scale, letter in _SI:
        if abs(value) >= 0.9995 * scale:
            return significant(value / scale, digits) + letter
    return significant(value, digits)


def scientific(value: float | None) -> str:
    """A FLOP count, 4.5e12; values below ten thousand are written out."""
    if not is_number(value):
        return MISSING
    if abs(value) < 1e4:
        return significant(value)
    mantissa, exponent = f"{value:.2e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".")
    return f"{mantissa}e{int(exponent)}"


def decimals_for(spread: float | None) -> int:
    """Decimals that show one significant digit of `spread`, two where the first is a 1; between 3 and 5."""
    if not is_number(spread) or spread <= 0:
        return 3
    return min(max(3, math.ceil(-math.log10(spread / 2))), 5)


def mean_and_spread(mean: float | None, spread: float | None, decimals: int | None = None) -> str:
    """`1.912 ± 0.004`; the spread is left out where it is unknown. By default as many decimals as it deserves."""
    if not is_number(mean):
        return MISSING
    decimals = decimals_for(spread) if decimals is None else decimals
    if not is_number(spread):
        return f"{mean:.{decimals}f}"
    return f"{mean:.{decimals}f}{PLUS_MINUS}{spread:.{decimals}f}"


def signed(value: float | None, decimals: int = 3) -> str:
    """A difference with its sign, the minus being a real minus: −0.031, +0.120, 0.000."""
    if not is_number(value):
        return MISSING
    text = f"{abs(value):.{decimals}f}"
    if float(text) == 0:
        return text
    return (MINUS if value < 0 else "+") + text


def percent(share: float | None, digits: int = 2) -> str:
    """0.0161 -> `1.6 %`."""
    if not is_number(share):
        return MISSING
    return f"{significant(100 * share, digits if abs(share) < 0.995 else 3)}{NO_BREAK}%"


def duration(seconds: float | None) -> str:
    """`48 s`, `3 min 20 s`, `2 h 05 min`."""
    if not is_number(seconds):
        return MISSING
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def byte_size(n_bytes: float | None) -> str:
    """`12.3 MB`, in powers of ten."""
    if not is_number(n_bytes):
        return MISSING
    for scale, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if n_bytes >= scale:
            return f"{significant(n_bytes / scale)} {unit}"
    return f"{significant(n_bytes)} bytes"
