"""Whether the experts of a folder are what config.json and the routers say: all there, numbered without gaps, alike."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moestro.formats.families import Family
from moestro.formats.shards import FormatError, Shards
from moestro.formats.storage import Fused, PerExpert

# states a number for every layer that has experts; written where they differ, which no stock model can load
COUNTS_BY_LAYER = "num_experts_by_layer"


def stated(config: Mapping[str, Any], key: str, folder: Path) -> int:
    """A whole number of config.json.

    Raises: FormatError where it is missing or something else.
    """
    found = config.get(key)
    if not isinstance(found, int) or isinstance(found, bool):
        raise FormatError(f"{folder / 'config.json'}: {key} is {found!r}, expected a whole number")
    return found


def layers_of(family: Family, config: Mapping[str, Any], folder: Path) -> tuple[int, ...]:
    """The layers that have experts, by config.json.

    Raises: FormatError where a key it depends on is missing, no number, or a step of 0.
    """
    stated(config, "num_hidden_layers", folder)
    try:
        return family.layers(config)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise FormatError(f"{folder / 'config.json'} does not say which layers have experts: {error}") from error


def n_experts(family: Family, layer: int, shards: Shards) -> int:
    """Experts that a layer's router knows."""
    return shards[family.router.format(layer=layer)].shape[0]


def stated_experts(family: Family, config: Mapping[str, Any], folder: Path) -> dict[int, int]:
    """{layer: number of experts by config.json}; empty where it says nothing.

    Raises: FormatError where two keys of it disagree, or a list has not one number for each layer with experts.
    """
    layers = layers_of(family, config, folder)
    by_layer = config.get(COUNTS_BY_LAYER)
    if by_layer is not None:
        if not isinstance(by_layer, list) or len(by_layer) != len(layers):
            raise FormatError(f"{folder / 'config.json'}: {COUNTS_BY_LAYER} is not a list of {len(layers)} numbers")
        return dict(zip(layers, by_layer, strict=True))
    numbers = {key: stated(config, key, folder) for key in family.count_keys if config.get(key) is not None}
    if len(set(numbers.values())) > 1:
        raise FormatError(f"{folder / 'config.json'} contradicts itself: {numbers}")
    return {layer: number for number in numbers.values() for layer in layers}


def require_complete(family: Family, config: Mapping[str, Any], shards: Shards) -> None:
    """Raises: FormatError where experts are missing, too many, misnumbered or of different shapes within a layer."""
    counts = stated_experts(family, config, shards.folder)
    for layer in layers_of(family, config, shards.folder):
        count = n_experts(family, layer, shards)
        if counts.get(layer, count) != count:
            raise FormatError(
                f"{shards.folder}: layer {layer} routes to {count} experts, config.json states {counts[layer]} "
                f"({' or '.join(family.count_keys)})"
            )
        if isinstance(family.experts, Fused):
            _require_entries(family.experts, layer, count, shards)
        else:
            _require_alike(family.experts, layer, count, shards)
    if isinstance(family.experts, PerExpert):
        _require_no_others(family, family.experts, shards)


def _require_entries(experts: Fused, layer: int, count: int, shards: Shards) -> None:
    for name in experts.tensors(layer):
        if shards[name].shape[0] != count:
            raise FormatError(
                f"{shards.folder}: {name} holds {shards[name].shape[0]} experts, its router knows {count}"
            )


def _require_alike(experts: PerExpert, layer: int, count: int, shards: Shards) -> None:
    for part in ("gate", "up", "down"):
        named = [getattr(experts, part).format(layer=layer, expert=expert) for expert in range(count)]
        names = [shards.matrix(name) for name in named]
        if missing := [name for name in names if name not in shards]:
            raise FormatError(f"{shards.folder} has no tensor {missing[0]} (layer {layer} routes to {count} experts)")
        if len(shapes := {shards[name].shape for name in names}) > 1:
            raise FormatError(f"{shards.folder}: {part} matrices of layer {layer} differ in shape: {sorted(shapes)}")


def _require_no_others(family: Family, experts: PerExpert, shards: Shards) -> None:
    """An expert that no router knows; transformers would stack it without a word."""
    for name in shards:
        found = experts.member.match(name)
        if found and (router := family.router.format(layer=found["layer"])) in shards:
            if int(found["expert"]) >= shards[router].shape[0]:
                raise FormatError(f"{shards.folder}: {name}, but {router} knows {shards[router].shape[0]} experts")
