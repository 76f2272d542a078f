"""Putting adapters around the linear maps of a model, and taking them off again."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from moestro.layers.adapted import AdaptedLinear, LowRankMixtures, TokenFacts, linear_sizes


@dataclass(frozen=True)
class Adapters:
    """The adapters of one model, by the names of the linear maps that they stand around."""

    model: nn.Module
    layers: Mapping[str, AdaptedLinear]
    told: TokenFacts

    def parameters(self) -> list[nn.Parameter]:
        """Those of adapters alone."""
        return [parameter for layer in self.layers.values() for parameter in layer.mixtures.parameters()]

    def state_dict(self) -> dict[str, Tensor]:
        """The adapters' weights alone, `<linear map>.<mixture>.<weight>`."""
        return {
            f"{name}.{key}": value
            for name, layer in self.layers.items()
            for key, value in layer.mixtures.state_dict().items()
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy the weights of adapters of the same names and sizes.

        Raises: ValueError naming the first that differ.
        """
        own = self.state_dict()
        shapes = [{name: list(value.shape) for name, value in each.items()} for each in (own, state)]
        if differing := [name for name in sorted({*own, *state}) if shapes[0].get(name) != shapes[1].get(name)]:
            sizes = [shape.get(differing[0], "absent") for shape in shapes]
            raise ValueError(f"adapters: {differing[0]} is {sizes[0]} here, {sizes[1]} in what is loaded")
        for name, value in own.items():
            value.copy_(state[name])

    @contextmanager
    def given(
        self, groups: Int[Tensor, "..."] | None = None, keep: Bool[Tensor, "..."] | None = None
    ) -> Iterator[None]:
        """Inside, adapters know the group of every token, and which tokens are no padding: as many, in the same shape,
        as the model is called on. Backward passes that compute forward again belong inside, too."""
        before = vars(self.told).copy()
        self.told.groups, self.told.keep = groups, keep
        try:
            yield
        finally:
            self.told.groups, self.told.keep = before["groups"], before["keep"]

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model is what it was without adapters."""
        before = {layer: layer.enabled for layer in self.layers.values()}
        try:
            for layer in before:
                layer.enabled = False
            yield
        finally:
            for layer, enabled in before.items():
                layer.enabled = enabled

    def unwrap(self) -> nn.Module:
        """Take the adapters off; returns the model, as it was before. What they froze stays frozen."""
        for name, layer in self.layers.items():
            self.model.set_submodule(name, layer.base)
        return self.model

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """Add the adapters to the weights that they stand around, and take them off; returns the model.

        Raises: ValueError, before anything is changed, where a mixture's gates depend on tokens, or a weight is no
        floating-point matrix or another module's, too (tied).
        """
        owners = Counter(id(p) for _, p in self.model.named_parameters(remove_duplicate=False))
        for name, layer in self.layers.items():
            if owners[id(layer.weight)] > 1:
                raise ValueError(f"{name}: its weight is tied to another module's, which would change with it")
        deltas = {name: merged(name, layer) for name, layer in self.layers.items()}
        for name, layer in self.layers.items():
            layer.weight.add_(deltas[name].to(layer.weight))
        return self.unwrap()


def merged(name: str, layer: AdaptedLinear) -> Tensor:
    """What an adapter adds to the weight under it, as that lies."""
    weight = getattr(layer.base, "weight", None)
    d_in, d_out = linear_sizes(layer.base)
    if (
        not isinstance(weight, Tensor)
        or not weight.is_floating_point()
        or sorted(weight.shape) != sorted((d_in, d_out))
    ):
        raise ValueError(f"{name}: the weight of {type(layer.base).__name__} is no matrix to which one could be added")
    delta = layer.scale * torch.stack([mixture.merged() for mixture in layer.each()]).sum(0)
    return delta.T if hasattr(layer.base, "nf") else delta


def adapt(
    model: nn.Module,
    targets: str,
    mixtures: LowRankMixtures,
    freeze: bool = True,
    allow_non_causal: bool = False,
) -> Adapters:
    """Put `mixtures` around every linear map of `model` whose name has the regular expression `targets` in it
    (re.search), in place. With `freeze`, nothing but the adapters learns.

    Raises: ValueError where no linear map matches, `targets` is no regular expression or the model has adapters
    already, and for routers that look at other tokens
    (slots), which would let a causal model see the future, unless `allow_non_causal`.
    """
    found = {name: module for name, module in model.named_modules() if _named(targets, name) and is_linear(module)}
    if not found:
        names = ", ".join(name for name, module in model.named_modules() if is_linear(module)) or "none"
        raise ValueError(f"targets={targets!r} matches no linear map; there are: {names}")
    if any(isinstance(module, AdaptedLinear) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} has adapters already")
    told = TokenFacts()
    layers = {name: mixtures.around(module, told) for name, module in found.items()}
    for name, layer in layers.items():
        for router in (mixture.router for mixture in layer.each()):
            if not (router.causal or allow_non_causal):
                raise ValueError(
                    f"{name}: {type(router).__name__} looks at other tokens, so predictions of a causal model would "
                    "depend on the future; allow_non_causal: true is for models that see the whole text anyway"
                )
    if freeze:
        model.requires_grad_(False)
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    return Adapters(model, layers, told)


def _named(targets: str, name: str) -> bool:
    try:
        return re.search(targets, name) is not None
    except re.error as error:
        raise ValueError(f"targets={targets!r} is no regular expression: {error}") from error


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear map that can be adapted."""
    try:
        linear_sizes(module)
    except ValueError:
        return False
    return True


def adapters_of(model: nn.Module) -> Adapters | None:
    """The adapters that a model has, None where it has none."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, AdaptedLinear)}
    return Adapters(model, layers, next(iter(layers.values())).told) if layers else None
