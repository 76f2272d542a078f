"""What of a model's experts is in fast memory: a pool of bytes for each precision, and who may be evicted."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from moestro.offload.policies import Key, Policy, Records
from moestro.offload.scorer import Precision

COPIES = (Precision.HIGH, Precision.LOW)


@dataclass
class Pool:
    """Copies of one precision, `capacity` bytes of them at most."""

    capacity: int
    held: dict[Key, int] = field(default_factory=dict)

    @property
    def used(self) -> int:
        """Bytes of all copies."""
        return sum(self.held.values())


class SlotCache:
    """Bookkeeping of the cached copies; the bytes themselves are the loader's.

    HIGH and LOW copies have pools of their own, each global to all layers. Pinned experts are never evicted. Copies may
    be of any sizes (heterogeneous experts).
    """

    def __init__(self, capacity: Mapping[Precision, int], policy: Policy, n_layers: int, records: Records) -> None:
        self.pools = {precision: Pool(capacity.get(precision, 0)) for precision in COPIES}
        self.policy, self.n_layers, self.records = policy, n_layers, records
        self.pinned: set[Key] = set()

    def __contains__(self, copy: tuple[Key, Precision]) -> bool:
        key, precision = copy
        return precision in self.pools and key in self.pools[precision].held

    def serving(self, key: Key, asked: Precision) -> Precision | None:
        """The cached copy that serves a request, None on a miss: HIGH serves any, LOW all but HIGH. An expert
        that would be skipped is computed where a copy lies there anyway."""
        enough = COPIES if asked is not Precision.HIGH else (Precision.HIGH,)
        return next((precision for precision in enough if (key, precision) in self), None)

    def admit(self, key: Key, precision: Precision, size: int, layer: int) -> list[Key] | None:
        """Make room for a copy of an expert of `layer` and enter it; the experts evicted from the pool, or None where
        there is no room without those pinned (then nothing is evicted)."""
        pool = self.pools[precision]
        lacking = pool.used + size - pool.capacity
        evicted: list[Key] = []
        for victim in self._by_priority(pool, layer) if lacking > 0 else ():
            evicted.append(victim)
            lacking -= pool.held[victim]
            if lacking <= 0:
                break
        if lacking > 0:
            return None
        for victim in evicted:
            del pool.held[victim]
        pool.held[key] = size
        return evicted

    def _by_priority(self, pool: Pool, layer: int) -> Iterable[Key]:
        free = [key for key in pool.held if key not in self.pinned]
        scored = [(self.policy.priority(key, self.records, layer, self.n_layers), key) for key in free]
        return [key for _, key in sorted(scored)]

    def discard(self, key: Key, precision: Precision) -> None:
        """Forget a copy."""
        self.pools[precision].held.pop(key, None)

    def clear(self) -> None:
        """Forget all copies."""
        for pool in self.pools.values():
            pool.held.clear()
