"""Invented but realistic results.json contents: four arms, sizes, budgets, seeds, routing, a coloured text."""

import math
import random

import pytest

from moestro.compare.isoflop import fit_isoflop
from moestro.compare.verdict import winner

TEXT = '''def urlsplit(url, scheme='', allow_fragments=True):
    """Parse a URL into 5 components:
    <scheme>://<netloc>/<path>?<query>#<fragment>

    The result is a named 5-tuple with fields corresponding to the
    above. It is either a SplitResult or SplitResultBytes object,
    depending on the type of the url parameter.
    """
    url, scheme, _coerce_result = _coerce_args(url, scheme)
    for b in _UNSAFE_URL_BYTES_TO_REMOVE:
        url = url.replace(b, "")
        scheme = scheme.replace(b, "")
    netloc = query = fragment = ''
    i = url.find(':')
    if i > 0 and url[0].isascii() and url[0].isalpha():
        for c in url[:i]:
            if c not in scheme_chars:
                break
'''

ARMS = {
    "dense": ("Dense", "one SwiGLU feed-forward in every block", {"model.ffn.width": 344}, 0.0),
    "moe": (
        "Homogeneous MoE",
        "eight equal experts, top-2, load balance",
        {"model.ffn.branches.0.total": 1376},
        -0.050,
    ),
    "hmoe": ("HMoE", "eight experts of arithmetic widths, top-2", {"model.ffn.branches.0.widths.total": 1400}, -0.078),
    "peer": ("PEER", "product keys over 65 536 singleton experts", {"model.layers.2.router.top_k": 24}, -0.021),
}


def _about(arm):
    """Title, description, solved keys and effect on the loss; other names than the four are made-up variants."""
    return ARMS.get(arm, (f"{arm} with a rather long title", "a variant", {}, -0.003 * (len(arm) + ord(arm[-1]) % 7)))


HMOE_WIDTHS = [76, 104, 136, 160, 188, 216, 244, 276]


def _loss(active, flops, effect):
    tokens = flops / (6 * active)
    return 0.62 + 22.0 / active**0.255 + 55.0 / tokens**0.36 + effect


def _curve(active, budget, effect, noise, rng, n_points):
    tokens = budget / (6 * active)
    records = []
    for i in range(1, n_points + 1):
        share = i / n_points
        bpb = _loss(active, budget * share, effect) + noise + rng.gauss(0, 0.002) + 1.5 * math.exp(-9 * share)
        record = {"flops": budget * share, "tokens": int(tokens * share), "step": round(600 * share), "bpb": bpb}
        records.append(record)
    return records


def _spread_of_use(n_tokens, n_experts, skew, rng):
    weights = [math.exp(skew * rng.gauss(0, 1)) for _ in range(n_experts)]
    return [round(2 * n_tokens * w / sum(weights)) for w in weights]


def _heterogeneous_use(n_tokens, rng):
    weights = [(w / 76) ** -0.45 * math.exp(0.15 * rng.gauss(0, 1)) for w in HMOE_WIDTHS]
    return [round(2 * n_tokens * w / sum(weights)) for w in weights]


def _statistics(mean, spread):
    return {"mean": mean, "p50": mean - 0.1 * spread, "p99": mean + 2.2 * spread}


def _layer(widths, load, experts, width, unevenness):
    used = sum(1 for n in load if n) / len(load)
    return {
        "n_experts": len(load),
        "tokens": 65_536,
        "widths": widths,
        "load": load,
        "load_histogram": None,
        "experts_per_token": _statistics(experts, 0.0),
        "active_width": _statistics(*width),
        "unevenness": unevenness,
        "usage": used,
        "dead": 1 - used,
    }


def _routing(arm, rng, n_layers=4, n_tokens=65_536):
    if arm == "dense":
        return {}
    if arm == "peer":
        counts = [812, 1630, 3950, 8120, 13_300, 16_100, 12_400, 6400, 2100, 560, 130, 34]
        edges = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048]
        figures = {"unevenness": 0.71, "usage": 0.988, "dead": 0.012}
        used = {"experts_per_token": _statistics(96.0, 0.0), "active_width": _statistics(96.0, 0.0)}
        histogram = {"edges": edges, "experts": counts}
        return {"blocks.2.ffn": {"widths": None, "load": None, "load_histogram": histogram, **used, **figures}}
    if arm == "hmoe" or arm not in ARMS:
        return {
            f"blocks.{i}.ffn": _layer(HMOE_WIDTHS, _heterogeneous_use(n_tokens, rng), 2.0, (322 - 6 * i, 60), 0.031)
            for i in range(n_layers)
        }
    return {
        f"blocks.{i}.ffn": _layer([172] * 8, _spread_of_use(n_tokens, 8, 0.12, rng), 2.0, (344, 0), 0.008)
        for i in range(n_layers)
    }


def _run(arm, effect, size, budget, seed):
    name, base = size
    rng = random.Random(f"{arm} {name} {budget} {seed}")
    active = base * {"dense": 1.0, "moe": 1.02, "hmoe": 0.99, "peer": 1.05}.get(arm, 1.0)
    noise = rng.gauss(0, 0.005)
    curve = _curve(active, budget, effect, noise, rng, 12)
    train = [
        {"flops": p["flops"], "loss": p["bpb"] * 2.05 + rng.gauss(0, 0.05)}
        for p in _curve(active, budget, effect, noise, rng, 300)
    ]
    bpb, tokens = curve[-1]["bpb"], budget / (6 * active)
    speed = {"dense": 21_000, "moe": 15_500, "hmoe": 14_200, "peer": 9_800}.get(arm, 12_000) * 1.2e6 / base
    return {
        "arm": arm,
        "size": name,
        "budget": budget,
        "seed": seed,
        "run_dir": f"runs/first_look/{arm}-{name}-{budget:.0e}-s{seed}",
        "params_total": active * {"dense": 1.0, "moe": 2.4, "hmoe": 2.4, "peer": 7.1}.get(arm, 1.5),
        "params_active": active,
        "tokens": int(tokens),
        "flops": budget * (1 + 0.002 * rng.random()),
        "flops_computed": budget * {"dense": 1.0, "moe": 1.0, "hmoe": 1.013, "peer": 1.0}.get(arm, 1.0),
        "seconds": tokens / speed,
        "tokens_per_s": speed * (1 + 0.02 * rng.gauss(0, 1)),
        "expected_flops_per_token": 6 * active,
        "used_flops_per_token": 6 * active * {"hmoe": 0.985}.get(arm, 1.0),
        "final": {
            "loss": bpb * 2.05,
            "bpb": bpb,
            "perplexity": math.exp(bpb * 2.05),
            "tokens": 65_536,
            "bytes": 193_000,
        },
        "curve": curve,
        "train_curve": train,
        "routing": _routing(arm, rng),
    }


def _pieces(text):
    piece = ""
    for character in text:
        if piece and not (character.isalnum() and piece[-1].isalnum() and len(piece) < 7):
            if not (piece == " " and character.isalnum()):
                yield piece
                piece = ""
        piece += character
    yield piece


def _used(arm, piece, i, rng):
    if arm == "dense":
        return {}
    if arm == "peer":
        return {"blocks.2.ffn": {"width": 96.0, "experts": 96}}
    if arm == "moe":
        return {f"blocks.{layer}.ffn": {"width": 344.0, "experts": 2} for layer in range(4)}
    hard = 1.0 if piece.strip().isalnum() else 0.35
    widths = (sum(rng.sample(HMOE_WIDTHS[: 3 + round(5 * hard)], 2)) for _ in range(4))
    return {f"blocks.{layer}.ffn": {"width": float(width), "experts": 2} for layer, width in enumerate(widths)}


def _sample(arm, effect):
    rng = random.Random(f"sample {arm}")
    return [
        {
            "text": piece,
            "loss": None if i == 0 else max(0.02, rng.expovariate(0.45 if piece.strip().isalnum() else 1.4) + effect),
            "layers": _used(arm, piece, i, rng),
        }
        for i, piece in enumerate(_pieces(TEXT))
    ]


def add_summaries(results):
    """Fills in `winner` and `isoflop` from the runs, as the comparison does."""
    results["winner"] = winner(results)
    results["isoflop"] = {}
    for budget in results["budgets"]:
        entry = results["isoflop"][str(budget)] = {}
        for arm in results["arms"]:
            points = []
            for size in results["sizes"]:
                runs = [r for r in results["runs"] if (r["arm"], r["size"], r["budget"]) == (arm, size["name"], budget)]
                values = [r["final"]["bpb"] for r in runs if r.get("final")]
                if values:
                    mean = sum(values) / len(values)
                    std = (
                        math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else None
                    )
                    points.append([sum(r["params_active"] for r in runs) / len(runs), mean, std])
            entry[arm] = {"points": points, "fit": fit_isoflop(points)}
    return results


def build_results(n_sizes=1, budgets=(3.2e12,), n_seeds=3, arms=tuple(ARMS)):
    """A finished comparison, as results.json holds it."""
    sizes = [("d96", 1.2e6), ("d64", 0.55e6), ("d128", 2.3e6), ("d160", 4.1e6)][:n_sizes]
    sizes.sort(key=lambda size: size[1])
    chosen = {arm: _about(arm) for arm in arms}
    results = {
        "format": 1,
        "title": "First look: four ways to spend the same compute",
        "commit": "4c1f0e2a9b7d",
        "command": "moestro compare recipes/compare/first_look.yaml",
        "machine": {"cpu": "AMD EPYC 7763, 2 cores", "memory": "8 GB", "python": "3.11.2", "torch": "2.11.0+cpu"},
        "corpus": {
            "name": "Python standard library",
            "fingerprint": "9f2c" * 16,
            "zlib_bpb": 2.03,
            "bytes": 11_480_233,
        },
        "created": "2025-11-22T03:10:00+00:00",
        "seeds": list(range(n_seeds)),
        "budgets": list(budgets),
        "sizes": [{"name": name, "flops_per_token": 6 * base} for name, base in sizes],
        "reference": "dense",
        "arms": {
            arm: {"title": title, "description": about, "recipe": f"recipes/{arm}.yaml", "solved": solved}
            for arm, (title, about, solved, _) in chosen.items()
        },
        "runs": [
            _run(arm, about[3], size, budget, seed)
            for budget in budgets
            for size in sizes
            for arm, about in chosen.items()
            for seed in range(n_seeds)
        ],
        "sample": {arm: _sample(arm, about[3]) for arm, about in chosen.items()},
    }
    return add_summaries(results)


@pytest.fixture(scope="session")
def make_results():
    """The builder: make_results(n_sizes=1, budgets=(3.2e12,), n_seeds=3, arms=(...)) -> results."""
    return build_results


@pytest.fixture(scope="session")
def summarise():
    """Recomputes the summaries of results whose runs a test has changed."""
    return add_summaries
