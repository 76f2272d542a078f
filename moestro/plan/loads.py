"""Loads of experts that were measured: rows of every expert on a run's held-out text."""

from pathlib import Path

from moestro.evaluate import routing_report
from moestro.recipe.evaluation import opened_run
from moestro.recipe.syntax import RecipeError

TOKENS = 65_536


def loads_of_run(run: Path, tokens: int = TOKENS) -> dict[str, list[float]]:
    """{layer: rows of each of its experts} on about so many held-out tokens; layers with too many experts to list are
    left out.

    Raises: RecipeError where `run` is no run, or has no mixture with listed loads; CheckpointError.
    """
    opened = opened_run(run)
    layers = routing_report(opened.model, opened.held_out(tokens), precision=opened.precision)
    found = {name: layer["load"] for name, layer in layers.items() if layer["load"] is not None}
    if not found:
        raise RecipeError(f"{run}: none of its layers has experts whose loads could be listed")
    return found
