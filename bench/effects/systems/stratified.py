"""Stratified mixtures: against a flat mixture of the same experts, and how deep tokens go."""

from statistics import fmean

from bench.effects import figures as f
from bench.effects.effect import Run
from bench.effects.study import Arm
from bench.effects.systems.system import LOSS, MARGIN, System, expect, fixed


def stratified() -> System:
    """8 experts of width 64 in strata of 2 and 6, a quarter and the rest, against the same experts in one."""
    arms = {
        "stratified": Arm("stratified.yaml", {}),
        "stratified-stacked": Arm("stratified.yaml", {"model.ffn.form": "stacked"}),
        **fixed(2),
    }
    paper, passes = "2305.02176", "passes a token, of 2"
    bands = "passes of the most frequent quarter less the rarest"
    stacked = "stratified-stacked stratified"
    return System(
        arms,
        (
            expect("S1", "no worse than flat", paper, LOSS, "stratified top-2", f.excess, high=MARGIN),
            expect("S2", "neither 1 nor all passes", paper, passes, "stratified", depth_of, low=1.02, high=1.98),
            expect("S3", "frequent tokens: fewer", paper, bands, "stratified", frequent_less_rare, high=0),
            expect("S4", "without norm and residual: worse", paper, LOSS, stacked, f.excess, low=0),
        ),
    )


def depth_of(run: Run) -> float:
    """Passes of a token, mean over layers."""
    return fmean(layer["mean"] for layer in run["depth"])


def frequent_less_rare(run: Run) -> float:
    """Passes of the tokens whose words are the most frequent, less those of the rarest, mean over layers."""
    return fmean(layer["by_frequency"][-1] - layer["by_frequency"][0] for layer in run["depth"])
