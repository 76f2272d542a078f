"""The directions that papers on experts' parameters report, on real text at equal useful FLOPs: see `systems`.

    python -m bench.effects.experts [--quick] [--json PATH] [--data FOLDER] [--out FOLDER] [--workers N]

HyperMoE (Y), MoDE (E), Omni-SMoLA (A), muMoE (U) and MPOE (P).
"""

from bench.effects.command import main
from bench.effects.expert_probes import alike, foreign, old_text, purity
from bench.effects.study import SMALL, Study
from bench.effects.systems.hypermoe import hypermoe
from bench.effects.systems.mode import mode
from bench.effects.systems.mpoe import mpoe
from bench.effects.systems.mumoe import mumoe
from bench.effects.systems.smola import smola

SYSTEMS = (hypermoe(), mode(), smola(), mumoe(), mpoe())
EFFECTS = tuple(effect for system in SYSTEMS for effect in system.effects)
STUDY = Study(
    name="experts",
    budget=2e11,
    common=SMALL,
    arms={name: arm for system in SYSTEMS for name, arm in system.arms.items()},
    probes={"alike": alike, "purity": purity, "foreign": foreign, "old_text": old_text},
    corpora=("wikitext-2",),
    checkpoints=1,
    final_tokens=32_768,
)

if __name__ == "__main__":
    main(STUDY, EFFECTS, __doc__)
