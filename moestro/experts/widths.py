"""Lists of expert widths with a fixed sum (Wang 2024, arXiv:2408.10681, section 3.2 and appendix)."""

from collections.abc import Sequence


def equal(n_experts: int, total: int, multiple_of: int = 1) -> list[int]:
    """Equal widths: the homogeneous mixture."""
    return from_ratios([1] * n_experts, total, multiple_of)


def arithmetic(n_experts: int, total: int, multiple_of: int = 1, first: int = 9, step: int = 2) -> list[int]:
    """Widths in proportion to first, first + step, ...; the defaults give the paper's 9, 11, ..., 23 for 8 experts."""
    return from_ratios([first + step * i for i in range(n_experts)], total, multiple_of)


def geometric(n_experts: int, total: int, multiple_of: int = 1, ratio: float = 2.0) -> list[int]:
    """Widths in proportion to 1, ratio, ratio^2, ..."""
    return from_ratios([ratio**i for i in range(n_experts)], total, multiple_of)


def hybrid(n_experts: int, total: int, multiple_of: int = 1) -> list[int]:
    """Half of the experts in proportion to 1, a quarter to 2, a quarter to 4 (8 experts: 1 1 1 1 2 2 4 4)."""
    if n_experts % 4:
        raise ValueError(f"n_experts={n_experts}, allowed for hybrid widths: a multiple of 4")
    quarter = n_experts // 4
    return from_ratios([1] * (2 * quarter) + [2] * quarter + [4] * quarter, total, multiple_of)


def from_ratios(ratios: Sequence[float], total: int, multiple_of: int = 1) -> list[int]:
    """Multiples of `multiple_of` in proportion to `ratios` that sum to `total` exactly (largest remainder).

    Raises: ValueError for empty or non-positive ratios, or a total that is no multiple of `multiple_of`.
    """
    if not ratios or min(ratios) <= 0:
        raise ValueError(f"ratios={list(ratios)}, allowed: at least one, all above 0")
    if multiple_of < 1 or total < 1 or total % multiple_of:
        raise ValueError(f"total={total} is not a positive multiple of multiple_of={multiple_of}")
    units = total // multiple_of
    shares = [units * ratio / sum(ratios) for ratio in ratios]
    widths = [int(share) for share in shares]
    by_remainder = sorted(range(len(ratios)), key=lambda i: (widths[i] - shares[i], i))
    for i in by_remainder[: units - sum(widths)]:
        widths[i] += 1
    return [width * multiple_of for width in widths]
