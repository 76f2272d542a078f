"""Lists of expert widths with a fixed sum (Wang 2024, arXiv:2408.10681, section 3.2 and appendix; MoDSE; MoHGE)."""

from collections.abc import Sequence

# Experts whose widths are listed one by one, where there are fewer hidden units; countless ones lie in tables.
MOST = 65_536


def equal(n_experts: int, total: int, multiple_of: int = 1) -> list[int]:
    """Equal widths: the homogeneous mixture."""
    return from_ratios([1] * _count(n_experts, total), total, multiple_of)


def arithmetic(n_experts: int, total: int, multiple_of: int = 1, first: int = 9, step: int = 2) -> list[int]:
    """Widths in proportion to first, first + step, ...; the defaults give the paper's 9, 11, ..., 23 for 8 experts."""
    return from_ratios([first + step * i for i in range(_count(n_experts, total))], total, multiple_of)


def geometric(n_experts: int, total: int, multiple_of: int = 1, ratio: float = 2.0) -> list[int]:
    """Widths in proportion to 1, ratio, ratio^2, ..."""
    return from_ratios([ratio**i for i in range(_count(n_experts, total))], total, multiple_of)


def hybrid(n_experts: int, total: int, multiple_of: int = 1) -> list[int]:
    """Half of the experts in proportion to 1, a quarter to 2, a quarter to 4 (8 experts: 1 1 1 1 2 2 4 4)."""
    if _count(n_experts, total) % 4:
        raise ValueError(f"n_experts={n_experts}, allowed for hybrid widths: a multiple of 4")
    quarter = n_experts // 4
    return from_ratios([1] * (2 * quarter) + [2] * quarter + [4] * quarter, total, multiple_of)


def _count(n_experts: int, total: int) -> int:
    """Raises: ValueError for no experts, or more than a list of widths is for: some may be of width 0."""
    most = max(MOST, total)
    if not 1 <= n_experts <= most:
        raise ValueError(f"n_experts={n_experts}, allowed: 1 to {most}")
    return n_experts


def pairs(total: int, narrow: Sequence[float] = (0.1, 0.2, 0.4, 0.5), multiple_of: int = 1) -> list[int]:
    """Pairs (wide, narrow) of experts whose widths sum to twice the mean, all pairs alike (Sun 2024, MoDSE,
    arXiv:2409.12210): kept together, a pair's two experts cost every device the same.

    `narrow[i]` is the share of pair i that its narrow expert has; the defaults are the paper's 4 pairs, (4.5, 0.5),
    (4, 1), (3, 2) and (2.5, 2.5) times d_model. Narrow widths are rounded to the nearest multiple of `multiple_of`.

    Raises: ValueError for shares outside (0, 0.5], or a total that does not split into equal pairs.
    """
    if not narrow or not all(0 < share <= 0.5 for share in narrow):
        raise ValueError(f"narrow={list(narrow)}, allowed: at least one share, all above 0 and at most 0.5")
    if multiple_of < 1 or total < 1 or total % (multiple_of * len(narrow)):
        raise ValueError(
            f"total={total} does not split into {len(narrow)} equal pairs of multiples of multiple_of={multiple_of}"
        )
    units = total // multiple_of // len(narrow)
    smaller = [min(round(share * units), units // 2) for share in narrow]
    return [width * multiple_of for low in smaller for width in (units - low, low)]


def groups(groups: Sequence[tuple[int, int | float]], total: int | None = None, multiple_of: int = 1) -> list[int]:
    """Groups of equal experts, (count, width) each, group after group (MoHGE, arXiv:2604.23108).

    With `total`, the second numbers are ratios, and widths are multiples of `multiple_of` that sum to `total` exactly;
    where they do not come out even, experts of one group differ by one multiple.

    Raises: ValueError for empty groups, or widths that are no whole multiples.
    """
    if not groups or any(count < 1 for count, _ in groups):
        raise ValueError(f"groups={[list(group) for group in groups]}, allowed: at least one, each of 1 expert or more")
    each = [width for count, width in groups for _ in range(count)]
    if total is not None:
        return from_ratios(each, total, multiple_of)
    if any(width != int(width) or width < 0 or int(width) % multiple_of for width in each):
        raise ValueError(f"widths {each} without total=, allowed: whole multiples of multiple_of={multiple_of}")
    return [int(width) for width in each]


def from_ratios(ratios: Sequence[float], total: int, multiple_of: int = 1) -> list[int]:
    """Multiples of `multiple_of` in proportion to `ratios` that sum to `total` exactly (largest remainder).

    Raises: ValueError for empty or non-positive ratios, or a total that is no multiple of `multiple_of`.
    """
    if not ratios or min(ratios) <= 0:
        raise ValueError(f"ratios={list(ratios)}, allowed: at least one, all above 0")
    if multiple_of < 1 or total < 1 or total % multiple_of:
        raise ValueError(f"total={total} is not a positive multiple of multiple_of={multiple_of}")
    units = total // multiple_of
    whole = sum(ratios)
    shares = [units * ratio / whole for ratio in ratios]
    widths = [int(share) for share in shares]
    by_remainder = sorted(range(len(ratios)), key=lambda i: (widths[i] - shares[i], i))
    for i in by_remainder[: units - sum(widths)]:
        widths[i] += 1
    return [width * multiple_of for width in widths]
