"""A folder with its own modeling file, for plans that no stock configuration can say.

transformers loads it with trust_remote_code; what it loads is the stock model with other blocks in some layers.
"""

import string
from importlib import resources
from typing import Any

from moestro.compress.plan import PlanError
from moestro.compress.rewriting import Rewriting
from moestro.formats import Checkpoint
from moestro.formats.complete import COUNTS_BY_LAYER

EXPERTS = "moestro_experts"
# families whose own loop over experts does not know the number that stands for no expert (transformers 5.23)
NO_EXPERT_FAILS = {"gpt_oss"}


def modeling_text(checkpoint: Checkpoint) -> str:
    """The modeling file of a compressed folder.

    Raises: PlanError where the source does not say which class it is of, or has a modeling file of its own.
    """
    text = resources.files("moestro.compress").joinpath("template", "modeling_compressed.txt").read_text("utf-8")
    family, config = checkpoint.family, checkpoint.config
    architectures = config.get("architectures") or []
    if len(architectures) != 1 or "auto_map" in config:
        raise PlanError(
            f"{checkpoint.path / 'config.json'} has architectures={architectures}, auto_map={config.get('auto_map')}: "
            "a custom folder needs one stock architecture to build on"
        )
    return string.Template(text).substitute(
        base=architectures[0],
        count_keys=repr(family.count_keys),
        width_key=family.width_key,
        model_type=family.model_type,
        eager_passes=family.model_type not in NO_EXPERT_FAILS,
    )


def custom_changes(rewriting: Rewriting, file: str) -> dict[str, Any]:
    """What config.json says of the layers of a custom folder, and where its class is.

    The scalar count is that of the largest router; one more where a layer's experts have names of their own, so that
    stock code, which would find no expert and draw random ones, stops at the router's shape.
    """
    said = {str(layer): _layer(rewriting, layer) for layer in rewriting.checkpoint.moe_layers}
    routed = [layer["routed"] for layer in said.values()]
    counts = {COUNTS_BY_LAYER: routed} if len(set(routed)) > 1 else {}
    # of the family, since transformers keeps conversions of weights by the name of the class
    name = f"Compressed{rewriting.checkpoint.config['architectures'][0]}"
    scalar = max(routed) + bool(rewriting.unequal)
    return {
        **dict.fromkeys(rewriting.family.count_keys, scalar),
        **counts,
        EXPERTS: said,
        "architectures": [name],
        "auto_map": {"AutoModelForCausalLM": f"{file.removesuffix('.py')}.{name}"},
    }


def _layer(rewriting: Rewriting, number: int) -> dict[str, Any]:
    layer = rewriting.plan.of(number)
    if layer is None:
        raise PlanError(f"the plan lacks layer {number} (layers)")
    new = range(layer.n_kept)
    routed = layer.n_kept if rewriting.plan.semantics == "slice" else layer.n_experts
    said: dict[str, Any] = {"routed": routed, "stored": layer.n_kept, "width": rewriting.experts.width(layer, 0)}
    if number in rewriting.unequal:
        said["widths"] = [rewriting.experts.width(layer, j) for j in new]
        said["ranks"] = [None if rewriting.experts.densify else rewriting.experts.rank(layer, j) for j in new]
    if rewriting.plan.semantics != "slice":
        said["map"] = list(layer.new_ids)
    if layer.skip_below is not None:
        said["skip_below"] = layer.skip_below
    return said
