"""Which cached expert is given up: what a sequence used lately, often, in high precision, or needs soonest."""

from dataclasses import dataclass, field
from typing import Protocol

from moestro.offload.scorer import Precision

# (layer, expert); layers are counted among those with experts
Key = tuple[int, int]


@dataclass
class Use:
    """What is known of an expert in this sequence: the pass of its last use, all uses, those in HIGH and in LOW."""

    last: int = 0
    uses: int = 0
    high: int = 0
    low: int = 0


@dataclass
class Records:
    """Uses of experts, counted in passes of the model (the paper's tokens: one a pass when decoding), from 1.

    Sequence-level records start anew with every sequence; the cached weights stay. With `per_sequence=False` they are
    kept for good (model-level). `ratio`: what a LOW copy costs, in HIGH ones (bits over bits).
    """

    per_sequence: bool = True
    ratio: float = 0.25
    token: int = 0
    previous: frozenset[Key] = frozenset()
    _current: set[Key] = field(default_factory=set)
    _uses: dict[Key, Use] = field(default_factory=dict)

    def start_sequence(self) -> None:
        """Forget, where records are of a sequence."""
        if self.per_sequence:
            self.token, self.previous = 0, frozenset()
            self._current.clear()
            self._uses.clear()

    def start_pass(self) -> None:
        """The next token (or the next pass over several)."""
        self.token += 1
        self.previous = frozenset(self._current)
        self._current.clear()

    def use(self, key: Key, asked: Precision) -> None:
        """Record a use; only one asked for in HIGH is a HIGH use, whichever copy served it."""
        entry = self._uses.setdefault(key, Use())
        entry.last, entry.uses = self.token, entry.uses + 1
        if asked is Precision.HIGH:
            entry.high += 1
        else:
            entry.low += 1
        self._current.add(key)

    def of(self, key: Key) -> Use:
        """The record of one expert."""
        return self._uses.get(key, Use())


class Policy(Protocol):
    """The cached expert with the least priority goes; ties go to the lower (layer, expert)."""

    @property
    def name(self) -> str: ...

    def priority(self, key: Key, records: Records, layer: int, n_layers: int) -> float:
        """How much `key` is worth keeping when an expert of `layer` is put in."""
        ...


def layers_until(key: Key, layer: int, n_layers: int) -> int:
    """Layers until the model reaches the one of `key`, from `layer`; 0 for the same layer, although a pass needs its
    experts last (the paper's own way)."""
    return (key[0] - layer + n_layers) % n_layers


@dataclass(frozen=True)
class Mix:
    """p = lru R/T + lfu F/T + lhu H/T + fld (1 - distance / layers), weights that sum to 1: R the pass of the last use,
    F uses, H uses in HIGH, T the pass. Source: Tang 2024, arXiv:2411.01433, Eq. 3; the weights are to be tuned on a
    trace (`tuning`), the paper prints none."""

    lru: float = 0.25
    lfu: float = 0.25
    lhu: float = 0.25
    fld: float = 0.25
    name: str = "mix"

    def __post_init__(self) -> None:
        weights = self.weights
        if not (min(weights) >= 0 and abs(sum(weights) - 1) <= 1e-6):
            raise ValueError(f"weights of the mix (lru, lfu, lhu, fld) {weights}, allowed: not negative, of sum 1")

    @property
    def weights(self) -> tuple[float, float, float, float]:
        """Of LRU, LFU, LHU and FLD."""
        return self.lru, self.lfu, self.lhu, self.fld

    def priority(self, key: Key, records: Records, layer: int, n_layers: int) -> float:
        entry, now = records.of(key), max(1, records.token)
        used = self.lru * entry.last + self.lfu * entry.uses + self.lhu * entry.high
        return used / now + self.fld * (1 - layers_until(key, layer, n_layers) / n_layers)


@dataclass(frozen=True)
class LCU:
    """p = (H + ratio L) / T + [used in the previous pass] / (distance + 0.1), L the uses in LOW and `ratio` that of the
    records. RECONSTRUCTED from the text of the successor MoE-APEX (ASPLOS 2026), whose equations were not readable:
    take its form as unverified."""

    name: str = "lcu"

    def priority(self, key: Key, records: Records, layer: int, n_layers: int) -> float:
        entry = records.of(key)
        cost = (entry.high + records.ratio * entry.low) / max(1, records.token)
        soon = 1 / (layers_until(key, layer, n_layers) + 0.1) if key in records.previous else 0.0
        return cost + soon


SINGLE = {
    "lru": Mix(1, 0, 0, 0, "lru"),
    "lfu": Mix(0, 1, 0, 0, "lfu"),
    "lhu": Mix(0, 0, 1, 0, "lhu"),
    "fld": Mix(0, 0, 0, 1, "fld"),
}


def policy_named(text: str) -> Policy:
    """`lru`, `lfu`, `lhu`, `fld`, `lcu`, `mix` (equal weights) or `mix:0.4,0.3,0.2,0.1` (lru, lfu, lhu, fld).

    Raises: ValueError for anything else.
    """
    name, _, weights = text.partition(":")
    if name == "mix" and weights:
        try:
            lru, lfu, lhu, fld = (float(part) for part in weights.split(","))
        except ValueError:
            raise ValueError(f"policy {text!r}: mix takes four numbers, mix:LRU,LFU,LHU,FLD of sum 1") from None
        return Mix(lru, lfu, lhu, fld)
    known: dict[str, Policy] = {**SINGLE, "mix": Mix(), "lcu": LCU()}
    if text not in known:
        raise ValueError(f"policy {text!r}, allowed: {', '.join(known)}, mix:LRU,LFU,LHU,FLD")
    return known[text]
