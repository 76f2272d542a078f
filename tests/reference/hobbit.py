"""HOBBIT (Tang 2024, arXiv:2411.01433) in loops: scores of choices, and what a mixed-precision cache does with them."""


def scores(weights: list[float]) -> list[float]:
    """Section 3.2: the weights normalised and sorted in descending order, s_i = sum of those before."""
    total = sum(weights)
    out = []
    for i, w in enumerate(weights):
        before = 0.0
        for j, other in enumerate(weights):
            if other > w or (other == w and j < i):
                before += other / total
        out.append(before)
    return out


def asked(weights: list[float], t1: float, t2: float) -> list[str]:
    """HIGH up to T1, LOW up to T2, else nothing."""
    return ["H" if s <= t1 + 1e-12 else "L" if s <= t2 + 1e-12 else "-" for s in scores(weights)]


def priority(policy: str, expert: tuple, seen: dict, token: int, layer: int, n_layers: int) -> float:
    """Equation 3 with one weight 1, or all 1/4."""
    last, uses, high = seen.get(expert, (0, 0, 0))
    # lru, lfu, lhu, fld
    terms = [last / token, uses / token, high / token, 1 - ((expert[0] - layer + n_layers) % n_layers) / n_layers]
    weights = {
        "lru": (1, 0, 0, 0),
        "lfu": (0, 1, 0, 0),
        "lhu": (0, 0, 1, 0),
        "fld": (0, 0, 0, 1),
        "mix": (0.25, 0.25, 0.25, 0.25),
    }[policy]
    return sum(w * t for w, t in zip(weights, terms, strict=True))


def replay(passes: list, slots: dict, policy: str, n_layers: int, cache: dict | None = None) -> dict:
    """One sequence. `passes`: for each token a list of (layer, [(expert, "H" | "L" | "-"), ...]); `slots`: copies that
    fit, {"H": 2, "L": 1}; `cache` carries what an earlier sequence left. No prefetch; experts wanted by the layer being
    computed are not evicted, as long as another can be."""
    cache = {"H": [], "L": []} if cache is None else cache
    seen: dict = {}
    out = {"hits": 0, "high": 0, "low": 0, "skips": 0, "evicted": [], "cache": cache}
    for token, layers in enumerate(passes, 1):
        for layer, wishes in layers:
            lacking, present = [], []
            for expert, wish in sorted(wishes):
                key = (layer, expert)
                found = "H" if key in cache["H"] else "L" if key in cache["L"] and wish != "H" else None
                if found is None and wish == "-":
                    out["skips"] += 1
                    continue
                if found is None:
                    out["high" if wish == "H" else "low"] += 1
                    lacking.append((key, wish))
                else:
                    out["hits"] += 1
                    present.append(key)
                last, uses, high = seen.get(key, (0, 0, 0))
                seen[key] = (token, uses + 1, high + (wish == "H"))
            # each expert computes in turn; those that computed may be evicted for those that wait
            order = sorted(present + [key for key, _ in lacking])
            busy = set(present)
            waiting = list(lacking)
            for key in [None, *order]:
                busy.discard(key)
                waiting = [(k, w) for k, w in waiting if key is None or k > key]
                while waiting:
                    k, wish = waiting[0]
                    pool = cache[wish]
                    if len(pool) >= slots.get(wish, 0):
                        free = [e for e in pool if e not in busy]
                        if not free:
                            break
                        victim = min(free, key=lambda e: (priority(policy, e, seen, token, layer, n_layers), e))
                        pool.remove(victim)
                        out["evicted"].append(victim)
                    pool.append(k)
                    busy.add(k)
                    waiting.pop(0)
    return out
