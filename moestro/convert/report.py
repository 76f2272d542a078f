"""What a conversion did, for a terminal."""

from collections.abc import Mapping
from typing import Any

from rich.console import Group
from rich.table import Table

from moestro.recipe.evaluation import plain_table

WHOLE = {
    "all": "difference of all experts from the dense layer",
    "routed": "difference from the dense layer, whatever the router says",
    "no": "difference from the dense layer, which this method changes",
}


def report_table(report: Mapping[str, Any]) -> Group:
    """The layers, and the model's loss before and after."""
    parts: list[Any] = [_layers(report), _losses(report["loss"])] if "loss" in report else [_layers(report)]
    return Group(*parts, *([f"warning: {report['warning']}"] if report.get("warning") else []))


def _layers(report: Mapping[str, Any]) -> Table:
    titles = ("layer", "experts", "width", "shared", "k", "scale", "error", "routed", "labels")
    title = (
        f"{report['source']}, {report['checkpoint']}\nerror: {WHOLE[report['layers'][0]['exact']]}\n"
        "routed: difference with k experts (both rms, relative)\nlabels: share of the best experts that routers choose"
    )
    table = plain_table(title, titles)
    for layer in report["layers"]:
        widths = layer["widths"]
        equal = len(set(widths)) == 1
        table.add_row(
            f"{layer['layer']}",
            f"{len(widths)}",
            f"{widths[0]}" if equal else f"{min(widths)} to {max(widths)}",
            f"{layer['shared']}",
            f"{layer['top_k']}",
            f"{layer['scale']:.3f}",
            f"{layer['difference']['relative']:.1e}",
            f"{layer['as_routed']:.3f}",
            f"{layer['agreement']:.1%}" if "agreement" in layer else "-",
        )
    return table


def _losses(loss: Mapping[str, float]) -> Table:
    table = plain_table("held-out loss (nats a token)", ("dense", "all experts", "converted"))
    table.add_row(*(f"{loss[name]:.4f}" if name in loss else "-" for name in ("dense", "all_experts", "converted")))
    return table
