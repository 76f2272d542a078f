"""What serving experts from a cache did: requests, hits, misses, bytes."""

from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass
class Counts:
    """Of requests: one (pass, layer, expert) that some token chose; the kinds of hit and miss add up to `requests`.

    `hits_*` by the precision of the copy that served, of which `ahead` were fetched for this use and `late` were still
    on their way; `in_place` were computed where they lie. `scratch` misses found every slot pinned. Bytes: `demanded`
    and `fetched_ahead`, of which `wasted` were evicted or given up unused.
    """

    requests: int = 0
    asked_high: int = 0
    asked_low: int = 0
    asked_skip: int = 0
    hits_high: int = 0
    hits_low: int = 0
    misses_high: int = 0
    misses_low: int = 0
    skips: int = 0
    ahead: int = 0
    late: int = 0
    in_place: int = 0
    scratch: int = 0
    cancelled: int = 0
    refused: int = 0
    demanded: int = 0
    fetched_ahead: int = 0
    wasted: int = 0
    passes: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __sub__(self, other: "Counts") -> "Counts":
        return Counts(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))

    @property
    def hits(self) -> int:
        """Requests served by a copy that was there or on its way."""
        return self.hits_high + self.hits_low

    @property
    def moved(self) -> int:
        """Bytes asked of the slow tier."""
        return self.demanded + self.fetched_ahead

    def penalty(self, ratio: float) -> float:
        """Cost of the misses in HIGH copies: a LOW one costs `ratio`, its bits over those of HIGH (arXiv:2411.01433,
        3.4)."""
        return self.misses_high + ratio * self.misses_low

    def rates(self) -> dict[str, float | None]:
        """Hit rates and shares, None where nothing was asked."""

        def share(part: int, whole: int) -> float | None:
            return part / whole if whole else None

        return {
            "hit_rate": share(self.hits, self.requests - self.skips),
            "hit_rate_high": share(self.hits_high, self.hits_high + self.misses_high),
            "hit_rate_low": share(self.hits_low, self.hits_low + self.misses_low),
            "low_share": share(self.hits_low + self.misses_low, self.requests),
            "skip_share": share(self.skips, self.requests),
            "bytes_per_pass": share(self.moved, self.passes),
        }

    def as_json(self) -> dict[str, Any]:
        """Everything, for reports."""
        return {**asdict(self), **self.rates()}
