"""How many experts each layer gives up (MoE-I2, arXiv:2411.01016, stage 1)."""

import math
from collections.abc import Sequence

# Added to an importance before it divides, so that a layer of none is possible.
TINY = 1e-12


def share_of(ratio: float, count: int) -> int:
    """So many of `count`, halves up: what a ratio means everywhere (`round` takes 2.5 to 2 and 3.5 to 4)."""
    return int(ratio * count + 0.5)


def removed_counts(importance: Sequence[float], most: Sequence[int], total: int, temperature: float = 1.0) -> list[int]:
    """Experts to remove from every layer, `total` together and at most `most[l]` from layer l, fewer where a layer is
    more important.

    Shares in proportion to (I_l + 1e-12)^(-1 / temperature); what a layer cannot give is shared among the others;
    whole numbers by the largest remainder, ties to the lower layer. The paper's own map is not known: this is that of
    a public re-implementation of its first stage but for the sharing of what caps leave, which there goes by
    remainders.

    Raises: ValueError where the layers have not so many experts to give, or an importance is negative.
    """
    if len(importance) != len(most) or not importance or min(importance) < 0 or not temperature > 0:
        raise ValueError(
            f"importance={list(importance)}, temperature={temperature}, allowed: for each of {len(most)} layers a "
            "number of at least 0, and a temperature above 0"
        )
    if not 0 <= total <= sum(most):
        raise ValueError(f"{total} experts to remove, allowed: 0 to {sum(most)}, at most {list(most)} a layer")
    logs = [-math.log(value + TINY) for value in importance]
    return rounded(filled(logs, temperature, most, total), most, total)


def filled(logs: Sequence[float], temperature: float, most: Sequence[int], total: int) -> list[float]:
    """Shares of `total` in proportion to exp(log / temperature), none above its `most`."""
    shares = [0.0] * len(logs)
    free = [place for place in range(len(logs)) if most[place] > 0]
    left = float(total)
    while free and left > 0:
        # relative to the largest that is left: no power overflows, and not all of them vanish
        top = max(logs[place] for place in free)
        weights = {place: math.exp((logs[place] - top) / temperature) for place in free}
        scale = left / sum(weights.values())
        full = [place for place in free if weights[place] * scale >= most[place]]
        for place in full or free:
            shares[place] = float(most[place]) if full else weights[place] * scale
        if not full:
            break
        left -= sum(most[place] for place in full)
        free = [place for place in free if place not in full]
    return shares


def rounded(shares: Sequence[float], most: Sequence[int], total: int) -> list[int]:
    """Whole numbers that sum to `total`, by the largest remainder."""
    counts = [min(cap, math.floor(share + 1e-9)) for share, cap in zip(shares, most, strict=True)]
    while sum(counts) < total:
        open_places = [place for place in range(len(counts)) if counts[place] < most[place]]
        chosen = max(open_places, key=lambda place: (shares[place] - counts[place], -place))
        counts[chosen] += 1
    return counts


def uniform_counts(most: Sequence[int], each: int) -> list[int]:
    """The same number from every layer.

    Raises: ValueError where a layer has not so many to give.
    """
    if each < 0 or any(each > cap for cap in most):
        raise ValueError(f"{each} experts to remove from every layer, allowed: 0 to {min(most)}")
    return [each] * len(most)
