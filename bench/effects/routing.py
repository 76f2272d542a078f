"""The directions that papers on routing report, on real text at equal useful FLOPs: one file of `systems` for each.

    python -m bench.effects.routing [--quick] [--json PATH] [--data FOLDER] [--out FOLDER] [--workers N]

XMoE (X), MoEC (M), DynMoE (D), dynamic routing (T), stratified mixtures (S) and multi-head mixtures (H).
"""

from bench.effects.cluster_probes import relatives
from bench.effects.command import main
from bench.effects.loss_probes import gap
from bench.effects.pool_probes import pool
from bench.effects.routing_probes import depth, difficulty, routing_history
from bench.effects.study import SMALL, Study
from bench.effects.systems.dynamic_routing import dynamic_routing
from bench.effects.systems.dynmoe import dynmoe
from bench.effects.systems.moec import moec
from bench.effects.systems.multi_head import multi_head
from bench.effects.systems.stratified import stratified
from bench.effects.systems.xmoe import xmoe
from bench.effects.unit_probes import near_zero

SYSTEMS = (xmoe(), moec(), dynmoe(), dynamic_routing(), stratified(), multi_head())
EFFECTS = tuple(effect for system in SYSTEMS for effect in system.effects)
STUDY = Study(
    name="routing",
    budget=4e11,
    common=SMALL,
    arms={name: arm for system in SYSTEMS for name, arm in system.arms.items()},
    probes={
        "history": routing_history,
        "relatives": relatives,
        "difficulty": difficulty,
        "pool": pool,
        "depth": depth,
        "near_zero": near_zero,
        "gap": gap,
    },
    corpora=("wikitext-2",),
    final_tokens=65_536,
)

if __name__ == "__main__":
    main(STUDY, EFFECTS, __doc__)
