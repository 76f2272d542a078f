"""muMoE: factored experts against dense and top-2 layers with as many parameters, at equal compute."""

from dataclasses import replace
from typing import Any

from bench.effects import figures as f
from bench.effects.effect import Run
from bench.effects.expert_probes import without
from bench.effects.study import Arm
from bench.effects.systems.smola import dense
from bench.effects.systems.system import EACH, LOSS, SAME, System, dense_of, expect, fixed, parameters, token_cost


def mumoe() -> System:
    """64 or 8 experts in CP format in both linear maps, of the rank that gives a block the dense one's 98 thousand
    parameters. dense-535 has the parameters of mumoe-64 and its FLOPs a token as nearly as can be, top-2-533 (units of
    all experts) its parameters, top-2-2132 its FLOPs a token."""

    def arm(n_experts: int) -> Arm:
        rank = round(3 * 64 * 512 / (2 * n_experts + 65 + 512 + 513 + 64))
        bank: dict[str, Any] = {"kind": "cp", "modes": [n_experts], "rank": rank, "d_out": 512}
        return Arm("mumoe.yaml", {"model.ffn.branches": [bank]})

    arms = {
        "mumoe-64": arm(64),
        "mumoe-8": replace(arm(8), probes={"without": without}),
        **dense(),
        "dense-535": dense_of(535),
        **fixed(2),
        **fixed(2, 533),
        **fixed(2, 2132),
    }
    paper, share = "2402.12550", "share of experts with weight"
    more = "mumoe-64 mumoe-8"
    sized, costs = "ratio of parameters", "ratio of FLOPs a token"
    return System(
        arms,
        (
            expect("U1", "at equal size: near dense", paper, LOSS, "mumoe-64 dense", f.excess, low=-0.05, high=0.05),
            expect("U2", "at equal size: better than dense", paper, LOSS, "mumoe-64 dense", f.excess, high=0),
            expect("U3", "at equal compute: top-2 is better", paper, LOSS, "mumoe-64 top-2", f.excess, low=0),
            expect("U4", "few experts have weight", paper, share, "mumoe-64", used, high=0.5),
            expect("U5", "more experts: purer", paper, "purity for words, difference", more, purer, low=0),
            expect("U6", "purer in time", paper, "purity for words, rise", "mumoe-64", purer_in_time, low=0),
            expect("U7", "fewer experts in time", paper, EACH, "mumoe-64", fewer_in_time, high=0),
            expect("U8", "without one its own tokens suffer", paper, "nats more than others", "mumoe-8", missed, low=0),
            expect("U9", "dense-535: as many parameters", paper, sized, "mumoe-64 dense-535", parameters, **SAME),
            expect("U10", "and FLOPs a token", paper, costs, "mumoe-64 dense-535", token_cost, **SAME),
            expect("U11", "near it", paper, LOSS, "mumoe-64 dense-535", f.excess, low=-0.05, high=0.05),
            expect("U12", "top-2-533: as many parameters", paper, sized, "mumoe-64 top-2-533", parameters, **SAME),
            expect("U13", "it is better", paper, LOSS, "mumoe-64 top-2-533", f.excess, low=0),
            expect("U14", "top-2-2132: as many FLOPs a token", paper, costs, "mumoe-64 top-2-2132", token_cost, **SAME),
            expect("U15", "it is better", paper, LOSS, "mumoe-64 top-2-2132", f.excess, low=0),
        ),
    )


def used(run: Run) -> float:
    """Mean share of 64 experts to which a token gives weight."""
    return run["purity"]["active_end"] / 64


def purer(run: Run, other: Run) -> float:
    """Mean purity of the first run's experts, less that of the second's."""
    return run["purity"]["mean_purity_end"] - other["purity"]["mean_purity_end"]


def purer_in_time(run: Run) -> float:
    """Mean purity at the end, less that at the start."""
    return run["purity"]["mean_purity_end"] - run["purity"]["mean_purity_start"]


def fewer_in_time(run: Run) -> float:
    """Experts to which a token gives weight at the end, less those at the start."""
    return run["purity"]["active_end"] - run["purity"]["active_start"]


def missed(run: Run) -> float:
    """How much more the loss of tokens rises that gave an expert their greatest weight than that of others, when it
    counts for nothing."""
    return run["without"]["own"] - run["without"]["others"]
