"""Dynamic routing: what threshold and entropy loss do, who gets more experts, against top-2."""

from bench.effects import figures as f
from bench.effects.effect import Run
from bench.effects.study import Arm
from bench.effects.systems.system import EACH, LOSS, MARGIN, System, expect


def dynamic_routing() -> System:
    """16 experts of width 64 under thresholds and weights of the entropy, against top-2."""
    widths = {"kind": "equal", "n_experts": 16, "total": 1024}

    def arm(threshold: float = 0.4, beta: float = 1e-4) -> Arm:
        objectives = [{"kind": "load_balance", "weight": 0.01}]
        if beta:
            objectives.append({"kind": "router_entropy", "weight": beta})
        settings = {"model.ffn.branches.0.widths": widths, "objectives": objectives}
        return Arm("dynamic_routing.yaml", {**settings, "model.ffn.router.select.threshold": threshold})

    arms = {f"top-p-{p}": arm(p) for p in (0.2, 0.4, 0.6)}
    arms |= {"top-p-beta-0": arm(beta=0), "top-p-beta-0.01": arm(beta=0.01)}
    arms["top-p-top-2"] = Arm("moe.yaml", {"model.ffn.branches.0.widths": widths})
    paper, hard = "2403.07652", "correlation of loss and active width"
    return System(
        arms,
        (
            expect("T1", "7 of 16 at the start", paper, EACH, "top-p-0.4", at_start, low=6, high=8),
            expect("T2", "fewer in time", paper, f"{EACH}, end less start", "top-p-0.4", since_start, high=0),
            expect("T3", "entropy loss: fewer", paper, EACH, "top-p-0.4 top-p-beta-0", f.fewer, high=0),
            expect("T4", "heavier: fewer still", paper, EACH, "top-p-beta-0.01 top-p-0.4", f.fewer, high=0),
            expect("T5", "lower threshold: fewer", paper, EACH, "top-p-0.2 top-p-0.4", f.fewer, high=0),
            expect("T6", "higher threshold: more", paper, EACH, "top-p-0.6 top-p-0.4", f.fewer, low=0),
            expect("T7", "harder tokens: more", paper, hard, "top-p-0.4", f.difficulty_of("predicting"), low=0),
            expect("T8", "early layers: more", paper, f"{EACH}, first less last", "top-p-0.4", earlier, low=0),
            expect("T9", "no worse than top-2", paper, LOSS, "top-p-0.4 top-p-top-2", f.excess, high=MARGIN),
        ),
    )


def at_start(run: Run) -> float:
    """Experts a token in the untrained model."""
    return f.experts(run, 0)


def since_start(run: Run) -> float:
    """Experts a token at the end, less those of the untrained model."""
    return f.experts(run) - f.experts(run, 0)


def earlier(run: Run) -> float:
    """Experts a token in the first layer, less those in the last."""
    layers = run["history"][-1]["layers"]
    return layers[0]["experts"] - layers[-1]["experts"]
