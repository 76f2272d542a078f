"""`moestro inspect --probe`: every expert of a run on every expert's tokens."""

from collections.abc import Mapping
from typing import Any

from rich.console import Group
from rich.table import Table

from moestro.evaluate import evaluate, expert_probe
from moestro.recipe.evaluation import Run, about, figures_head, plain_table, short
from moestro.recipe.syntax import RecipeError

# Held-out tokens where the user does not say: every expert of every layer sees them all.
TOKENS = 8_192
SERVING = "by expert 0, 1, 2, ..."


def probe_of_run(run: Run, max_tokens: int | None = TOKENS) -> dict[str, Any]:
    """What `expert_probe` finds for a run on `max_tokens` of its text, as JSON values.

    Raises: RecipeError where its layers cannot be probed.
    """

    def held_out():
        return run.held_out(max_tokens)

    try:
        layers = expert_probe(run.model, held_out, precision=run.precision)
    except ValueError as error:
        raise RecipeError(f"{run.folder}: {error}") from error
    return {**about(run), **evaluate(run.model, held_out(), precision=run.precision), "layers": layers}


def probe_table(found: Mapping[str, Any]) -> Group:
    """What `probe_of_run` returned, for a terminal."""
    return Group(figures_head(found), *(_layer_table(name, layer) for name, layer in found["layers"].items()))


def _layer_table(name: str, layer: Mapping[str, Any]) -> Table:
    title = (
        f"{short(name)}: nats a token when one expert alone serves the layer; rows are the tokens that prefer each "
        f"(own {layer['own']:.3f}, foreign {layer['foreign']:.3f})"
    )
    # one column of text, which a terminal wraps where it would cut columns off
    table = plain_table(title, ("tokens of", "count", "as routed", SERVING))
    for group, (count, row) in enumerate(zip(layer["tokens"], layer["loss"], strict=True)):
        if row is not None:
            each = " ".join(f"{loss:.3f}" for loss in row)
            table.add_row(f"{group}", f"{count:,}", f"{layer['as_routed'][group]:.3f}", each)
    return table
