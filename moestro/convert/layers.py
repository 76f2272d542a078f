"""Dense layers of a model, one after the other: calibrated, converted, taught, checked."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moestro.convert.mixture import Mixture
from moestro.convert.network import Network
from moestro.convert.plan import Conversion
from moestro.convert.routers import EveryExpert, fitted_scale, set_scale, teach_router
from moestro.convert.seen import PIECE, Seen
from moestro.data import Batch
from moestro.evaluate.perplexity import evaluating
from moestro.evaluate.scoring import score
from moestro.layers import MoELayer

# Greatest relative difference that rounding in another order explains.
ROUNDING = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


class ConversionError(ValueError):
    """A model cannot be converted, or what was made of it is not what it should be."""


@dataclass(frozen=True)
class Site:
    """A dense feed-forward network of a model: its block's number, the module whose input it gets, its weights, and how
    a layer is put in its place."""

    index: int
    module: nn.Module
    network: Network
    replace: Callable[[MoELayer], None]


@dataclass(frozen=True)
class Converted:
    """One converted layer and what is said of it."""

    site: Site
    mixture: Mixture
    figures: dict[str, Any]


class _Reached(Exception):
    """The layer was called; nothing behind it need be computed."""


def inputs_of(model: nn.Module, module: nn.Module, batches: Iterable[Batch], precision: str) -> Float[Tensor, "t d"]:
    """What `module` is called with when the model reads the batches."""
    seen: list[Tensor] = []

    def catch(_module: nn.Module, arguments: tuple) -> None:
        seen.append(arguments[0].detach().flatten(0, -2))
        raise _Reached

    handle = module.register_forward_pre_hook(catch)
    try:
        with evaluating(model):
            for batch in batches:
                try:
                    score(model, batch, precision)
                except _Reached:
                    continue
    finally:
        handle.remove()
    if not seen:
        raise ConversionError("calibration read no text, or the layer was never called")
    return torch.cat(seen)


def convert_layers(
    model: nn.Module,
    sites: Sequence[Site],
    conversion: Conversion,
    batches: Callable[[], Iterable[Batch]],
    precision: str = "fp32",
) -> Iterator[Converted]:
    """Every layer converted and, on the student stream, put in its place at once; else it is left to the caller.

    Raises: ConversionError where a layer is not the network that it was made of.
    """
    for site in sites:
        x = inputs_of(model, site.module, batches(), precision).to(site.network.up.dtype)
        converted = convert_layer(site, Seen(site.network, x, conversion.seed * 1000 + site.index), conversion)
        if conversion.stream == "student":
            site.replace(converted.mixture.layer)
        yield converted


def convert_layer(site: Site, seen: Seen, conversion: Conversion) -> Converted:
    """One network as a mixture: split or copied, its router taught, its scale fitted, its equality checked.

    Raises: ConversionError where it is not the network that it was made of, or its router cannot be taught.
    """
    try:
        mixture = conversion.method(seen)
    except ValueError as error:
        raise ConversionError(f"layer {site.index}: {error}") from error
    if conversion.router.needs_labels and (mixture.parts > 1 or mixture.exact == "routed"):
        raise ConversionError(
            f"router: start={conversion.router.start}, steps={conversion.router.steps}: copies are all alike, so no "
            "label says which to choose; allowed: start: random or zero, steps: 0"
        )
    mixture.layer.to(seen.x.device)
    try:
        figures = teach_router(mixture, seen, conversion.router)
        if conversion.method.fits_scale:
            set_scale(mixture, fitted_scale(mixture, seen))
    except ValueError as error:
        raise ConversionError(f"layer {site.index}: {error}") from error
    equal = difference(mixture, seen, whole=mixture.exact == "all")
    allowed = ROUNDING[seen.network.up.dtype]
    if mixture.exact != "no" and not equal["relative"] <= allowed:
        raise ConversionError(
            f"layer {site.index} is not the network that it was made of: relative difference {equal['relative']:.3g}, "
            f"allowed: {allowed:g}"
        )
    routed = difference(mixture, seen, whole=False)
    select = mixture.node["router"]["select"]
    return Converted(
        site,
        mixture,
        {
            "layer": site.index,
            "widths": list(mixture.node["branches"][0]["widths"]),
            "shared": sum(branch.get("width", 0) for branch in mixture.node["branches"]),
            "top_k": select["top_k"],
            "scale": select["scale"],
            "exact": mixture.exact,
            "difference": equal,
            "as_routed": routed["relative"],
            **figures,
        },
    )


@torch.no_grad()
def difference(mixture: Mixture, seen: Seen, whole: bool) -> dict[str, float]:
    """How far the layer is from the network on the calibration tokens, as it routes or, `whole`, with all experts and
    gates of 1: `greatest` absolute difference, and root mean square of the difference over that of the output."""
    layer, greatest, apart, size = mixture.layer, 0.0, 0.0, 0.0
    with evaluating(layer), every_expert([layer]) if whole else _as_it_is():
        for x in seen.x.split(PIECE):
            wanted = seen.network(x).double()
            off = layer(x)[0].double() - wanted
            greatest = max(greatest, float(off.abs().max()))
            apart, size = apart + float(off.square().sum()), size + float(wanted.square().sum())
    return {"greatest": greatest, "relative": (apart / size) ** 0.5 if size else apart**0.5}


@contextmanager
def _as_it_is() -> Iterator[None]:
    yield


@contextmanager
def every_expert(layers: Iterable[MoELayer]) -> Iterator[None]:
    """The layers with all experts and gates of 1; afterwards they are as they were."""
    routers: list[Any] = [layer.router for layer in layers]
    before = [router.select for router in routers]
    try:
        for router in routers:
            router.select = EveryExpert()
        yield
    finally:
        for router, select in zip(routers, before, strict=True):
            router.select = select


def warning_of(node: Mapping[str, Any], objectives: Sequence[Mapping[str, Any]]) -> str | None:
    """What to say of routers that the loss of the model cannot teach."""
    if node["router"]["select"]["gate"] != "hard" or any(o.get("kind") == "router_target" for o in objectives):
        return None
    return (
        "gate: hard: no gradient of the language-model loss reaches the routers, which stay as they are in training; "
        "gate: straight_through or share lets it through, taught: true with objective router_target teaches them"
    )
