"""The vocabulary of conversions: methods, groupings and widths under their names in a recipe."""

from collections.abc import Callable
from typing import Any

from moestro.convert.grouping import (
    BalancedKMeans,
    CoActivation,
    Contiguous,
    Importance,
    Shuffled,
    equal_importance,
)
from moestro.convert.split import Split
from moestro.convert.upcycle import Upcycle
from moestro.experts import widths

PARTS: dict[str, dict[str, Callable[..., Any]]] = {
    "method": {"split": Split, "upcycle": Upcycle},
    "grouping": {
        "contiguous": Contiguous,
        "random": Shuffled,
        "importance": Importance,
        "kmeans": BalancedKMeans,
        "co_activation": CoActivation,
    },
    "widths": {
        "equal": widths.equal,
        "arithmetic": widths.arithmetic,
        "geometric": widths.geometric,
        "hybrid": widths.hybrid,
        "pairs": widths.pairs,
        "ratios": widths.from_ratios,
        "equal_importance": equal_importance,
    },
}
