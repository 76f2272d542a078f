"""The effects that HMoE (Wang 2024, arXiv:2408.10681) reports, on real text at equal useful FLOPs.

    python -m bench.effects.hmoe [--quick] [--json PATH] [--data FOLDER] [--out FOLDER] [--workers N]

A: without a loss large experts are preferred. B: load balance flattens the load. C: the parameter penalty makes load
fall with width and saves active width at no loss. D: small experts' load rises over training. E: top-p needs the
entropy loss, with the right sign. F: which widths are best. G: harder tokens get wider experts.
"""

from typing import Any

from bench.effects import figures as f
from bench.effects.command import main
from bench.effects.effect import Effect, Figure
from bench.effects.routing_probes import difficulty, routing_history
from bench.effects.study import SMALL, Arm, Study

TOTAL, N_EXPERTS = 256, 8
# A loss is called no worse where it is less than this much above, as a share of the other.
MARGIN = 0.01


def unequal(widths: str = "arithmetic", objectives: list[dict[str, Any]] | None = None, top_p: bool = False) -> Arm:
    """HMoE's tiny recipe with other widths, objectives or selection."""
    settings: dict[str, Any] = {
        "model.ffn.branches.0.widths": {"kind": widths, "n_experts": N_EXPERTS, "total": TOTAL},
    }
    if objectives is not None:
        settings["objectives"] = objectives
    if top_p:
        settings["model.ffn.router.select"] = {"kind": "top_p", "threshold": 0.6}
    return Arm("hmoe.yaml", settings)


PENALTY = {"kind": "parameter_penalty", "weight": 0.01}
HEAVIER = PENALTY | {"weight": 0.03}
EQUAL = {"model.ffn.branches.0.widths": {"kind": "equal", "n_experts": N_EXPERTS, "total": TOTAL}}
STUDY = Study(
    name="hmoe",
    budget=4e11,
    common=SMALL,
    arms={
        "equal": Arm("moe.yaml", EQUAL),
        "no-loss": unequal(objectives=[]),
        "balanced": unequal(objectives=[{"kind": "load_balance", "weight": 0.01}]),
        "penalty": unequal(objectives=[PENALTY]),
        "penalty-heavier": unequal(objectives=[HEAVIER]),
        "penalty-geometric": unequal("geometric", [PENALTY]),
        "penalty-hybrid": unequal("hybrid", [PENALTY]),
        "top-p": unequal(objectives=[PENALTY], top_p=True),
        "top-p-entropy": unequal(objectives=[PENALTY, {"kind": "router_entropy", "weight": 0.001}], top_p=True),
        "top-p-printed": unequal(
            objectives=[PENALTY, {"kind": "router_entropy", "weight": 0.03, "literal": True}], top_p=True
        ),
    },
    probes={"history": routing_history, "difficulty": difficulty},
    seeds=(0, 1, 2, 3),
)


def expect(number: str, claim: str, where: str, quantity: str, arms: str, value: Figure, **bounds: float) -> Effect:
    """An effect of the paper; `arms` are separated by blanks."""
    return Effect(number, claim, f"arXiv:2408.10681, {where}", quantity, tuple(arms.split()), value, **bounds)


WIDTH, LOSS, TREND = "active width over k mean(h)", "relative difference of bits per byte", "correlation with width"
SHARE, EACH, HARD = "their share of rows, rise", "experts a token", "correlation of loss and active width"
EFFECTS = (
    expect("A1", "no loss: load grows with width", "Fig. 3", TREND, "no-loss", f.preference, low=0),
    expect("A2", "no loss: active width above the mean's", "Fig. 3", WIDTH, "no-loss", f.saving, low=1),
    expect("B1", "load balance: flat load", "Eq. 3", "deviation over mean", "balanced", f.unevenness, high=0.15),
    expect(
        "B2", "load balance: active width is the mean's", "Fig. 7", WIDTH, "balanced", f.saving, low=0.95, high=1.06
    ),
    expect("C1", "penalty: load falls with width", "Fig. 7", TREND, "penalty", f.preference, high=-0.8),
    expect("C2", "penalty: active width falls", "Table 1", WIDTH, "penalty", f.saving, low=0.85, high=0.93),
    expect("C3", "penalty: no worse than equal widths", "Table 1", LOSS, "penalty equal", f.excess, high=MARGIN),
    expect("C4", "penalty: no worse than balanced", "Fig. 7", LOSS, "penalty balanced", f.excess, high=MARGIN),
    expect("C5", "weight 0.03: active width falls", "Table 1", WIDTH, "penalty-heavier", f.saving, low=0.85, high=0.93),
    expect("C6", "weight 0.03: no worse than equal", "Table 1", LOSS, "penalty-heavier equal", f.excess, high=MARGIN),
    expect(
        "C7", "weight 0.03: no worse than balanced", "Fig. 7", LOSS, "penalty-heavier balanced", f.excess, high=MARGIN
    ),
    expect("D1", "penalty: narrow half rises", "Fig. 6", SHARE, "penalty", f.rise, low=0),
    expect("D2", "penalty: still after a quarter", "Fig. 6", SHARE, "penalty", f.late_rise, low=0),
    expect("D3", "top-p, penalty: narrow half rises", "Fig. 6", SHARE, "top-p", f.rise, low=0),
    expect(
        "E1", "top-p, no entropy loss: more in time", "Eq. 5", f"{EACH}, end less quarter", "top-p", f.growth, low=0
    ),
    expect("E2", "right sign: fewer in time", "Eq. 5", f"{EACH}, end less quarter", "top-p-entropy", f.growth, high=0),
    expect("E3", "right sign: fewer than without", "Eq. 5", EACH, "top-p-entropy top-p", f.fewer, high=0),
    expect("E4", "printed sign: about all of 5", "Eq. 5", EACH, "top-p-printed", f.experts, low=4.5, high=5.1),
    expect("F1", "geometric worse than arithmetic", "Fig. 8", LOSS, "penalty-geometric penalty", f.excess, low=0),
    expect("F2", "hybrid better than arithmetic", "Fig. 8", LOSS, "penalty-hybrid penalty", f.excess, high=0),
    expect("G1", "top-2: wider before a hard token", "Table 3", HARD, "penalty", f.difficulty_of("predicting"), low=0),
    expect("G2", "top-2: wider on a hard token", "Table 3", HARD, "penalty", f.difficulty_of("reading"), low=0),
    expect(
        "G3", "top-p: wider before a hard token", "Table 3", HARD, "top-p-entropy", f.difficulty_of("predicting"), low=0
    ),
    expect("G4", "top-p: wider on a hard token", "Table 3", HARD, "top-p-entropy", f.difficulty_of("reading"), low=0),
)

if __name__ == "__main__":
    main(STUDY, EFFECTS, __doc__)
