"""The effects that PEER (He 2024, arXiv:2407.04153) reports, on real text at equal useful FLOPs, routing counted.

    python -m bench.effects.peer [--quick] [--json PATH] [--data FOLDER] [--out FOLDER] [--workers N]

A: query batch norm makes use more even at no loss. B: loss falls with the number of experts N at a fixed h k, while
use becomes less even. C: more experts a token help, less and less. D: PEER beats product-key memories that read as many
rows. E: PEER beats dense layers. G: keys that heads share against keys of their own (not in the paper). H: experts of
several widths with the parameter penalty (ours).
"""

from typing import Any

from bench.effects import figures as f
from bench.effects.command import main
from bench.effects.effect import Effect, Figure
from bench.effects.routing_probes import final_routing
from bench.effects.study import Arm, Study

LAYER = "model.layers.2"
# A loss is called no worse where it is less than this much above, as a share of the other.
MARGIN = 0.01


def memory(recipe: str = "peer.yaml", experts: Any = None, **router: Any) -> Arm:
    """A tiny recipe with keys of 32, and with other keys of its router or another number of experts."""
    settings = {f"{LAYER}.router.{key}": value for key, value in {"d_key": 32, **router}.items()}
    return Arm(recipe, settings if experts is None else {**settings, f"{LAYER}.branches.0.n_experts": experts})


# 4 heads of 8 among 4096 experts but for what an arm is called after; dense layers are the paper's, 4 d wide.
STUDY = Study(
    name="peer",
    budget=4e11,
    common={
        "data.tokenizer": {"kind": "bpe", "vocab_size": 512},
        "model.d_model": 64,
        "model.ffn": {"kind": "dense", "width": 256, "activation": "gelu", "glu": False},
        "train.batch_size": 8,
        # the best of three that were tried (0.003, 0.01) on the arm `peer`, one seed
        "optim.lr": 0.02,
    },
    arms={
        "dense": Arm("dense.yaml"),
        "pkm": memory("pkm.yaml"),
        "peer": memory(),
        "no-norm": memory(query_norm="none"),
        "own-keys": memory(shared_keys=False),
        "n-256": memory(experts=256),
        "n-1024": memory(experts=1024),
        "n-16384": memory(experts=16_384),
        "k-2": memory(top_k=2),
        "k-32": memory(top_k=32),
        "uneven": memory("peer_uneven.yaml"),
    },
    probes={"routing": final_routing},
    seeds=(0, 1, 2),
    corpora=("wikitext-2",),
    checkpoints=1,
)


def expect(number: str, claim: str, where: str, quantity: str, arms: str, value: Figure, **bounds: float) -> Effect:
    """An effect of the paper, or ours; `arms` are separated by blanks."""
    source = where if where == "ours" else f"arXiv:2407.04153, {where}"
    return Effect(number, claim, source, quantity, tuple(arms.split()), value, **bounds)


LOSS, KL, LESS = "relative difference of bits per byte", "difference of KL, nats", "share of the KL that goes"
EFFECTS = (
    expect("A1", "query batch norm: more even", "Table 2", LESS, "peer no-norm", f.more_even, low=0),
    expect("A2", "query batch norm: by 20-40 %", "Table 2", LESS, "peer no-norm", f.more_even, low=0.2, high=0.4),
    expect("A3", "query batch norm: no worse", "Table 2", LOSS, "peer no-norm", f.excess, high=MARGIN),
    expect("B1", "1,024 experts better than 256", "Fig. 3a", LOSS, "n-1024 n-256", f.excess, high=0),
    expect("B2", "4,096 better than 1,024", "Fig. 3a", LOSS, "peer n-1024", f.excess, high=0),
    expect("B3", "16,384 better than 4,096", "Fig. 3a", LOSS, "n-16384 peer", f.excess, high=0),
    expect("B4", "16,384 less even than 256", "Table 2", KL, "n-16384 n-256", f.less_even, low=0),
    expect("C1", "32 experts a token better than 8", "Fig. 3b", LOSS, "peer k-2", f.excess, high=0),
    expect("C2", "128 better than 32", "Fig. 3b", LOSS, "k-32 peer", f.excess, high=0),
    expect(
        "C3", "the second step gains less", "Fig. 3b", "first gain less second", "k-2 peer k-32", f.diminishing, low=0
    ),
    expect("D1", "better than a memory at equal reads", "Table 1", LOSS, "peer pkm", f.excess, high=0),
    expect("E1", "better than dense", "Table 1", LOSS, "peer dense", f.excess, high=0),
    expect("E2", "16,384 experts better than dense", "Table 1", LOSS, "n-16384 dense", f.excess, high=0),
    expect("G1", "shared keys against own: open", "section 2", LOSS, "peer own-keys", f.excess),
    expect(
        "H1", "penalty: neurons a token under even use's", "ours", "active over even", "uneven", f.leanness, high=0.95
    ),
    expect("H2", "several widths: no worse", "ours", LOSS, "uneven peer", f.excess, high=MARGIN),
)

if __name__ == "__main__":
    main(STUDY, EFFECTS, __doc__)
