"""A recipe's model -> its construction: plain values from which it is assembled without recipes (`assembly`)."""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from moestro.export.vocabulary import adapted, vocabulary
from moestro.model import Transformer
from moestro.recipe.bind import Part
from moestro.recipe.build import assemble
from moestro.recipe.load import Decoder, Recipe
from moestro.recipe.pretrained import Pretrained
from moestro.recipe.resolve import Place

PLAIN = (bool, int, float, str, type(None))


def construction(recipe: Recipe, vocab_size: int) -> dict[str, Any]:
    """Everything that a recipe's decoder is made of, as JSON values: constructors, their keywords with every default,
    lists such as widths as numbers. Building it allocates nothing.

    Raises: RecipeError where a part refuses its values.
    """
    calls, plan = Calls(), recipe.model
    if isinstance(plan, Pretrained):
        raise Place(recipe.origin, ("model",)).error("a pretrained model has no construction: its folder describes it")
    with torch.device("meta"):
        model = calls.decoder(assemble(calls.watched_plan(plan), vocab_size, recipe.origin), plan)
        around = None if recipe.adapt is None else calls.watched(recipe.adapt).build()
        if around is None or around.mixtures is None:
            return calls.node(model)
        said = {"targets": around.targets, "allow_non_causal": plan.allow_non_causal}
        adapted(model, around.mixtures, **said)
    return calls.node(calls.note(Adapted(), adapted, {"model": model, "mixtures": around.mixtures, **said}))


class Adapted:
    """Stands for a model with its adapters, where the model itself stands for what it was without."""


class Calls:
    """Which constructor made each object, and with which keywords."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[Callable[..., Any], Mapping[str, Any]]] = {}
        self._nodes: dict[int, dict[str, Any]] = {}
        # ids stay different as long as the objects live
        self._alive: list[Any] = []

    def watched_plan(self, plan: Decoder) -> Decoder:
        """The same plan of a decoder; what its parts make is remembered."""
        named = {name: self.watched(getattr(plan, name)) for name in ("attention", "ffn", "layers", "shared_banks")}
        return replace(plan, **named)

    def watched(self, value: Any) -> Any:
        """A part, or parts in mappings and lists, whose making is remembered."""
        if isinstance(value, Part):
            keywords = {name: self.watched(inner) for name, inner in value.keywords.items()}
            return replace(value, make=self._watched_maker(value.make), keywords=keywords)
        if isinstance(value, dict):
            return {key: self.watched(inner) for key, inner in value.items()}
        return type(value)(self.watched(inner) for inner in value) if isinstance(value, list | tuple) else value

    def _watched_maker(self, make: Callable[..., Any]) -> Callable[..., Any]:
        # parts are bound and built by their signature, which `wraps` keeps
        @functools.wraps(make, updated=())
        def making(**keywords: Any) -> Any:
            keywords = {name: _Maker(value) if _makes_parts(value) else value for name, value in keywords.items()}
            value = make(**keywords)
            # a function may hand out what another constructor made
            return value if id(value) in self._made else self.note(value, make, keywords)

        return making

    def note(self, value: Any, make: Callable[..., Any], keywords: Mapping[str, Any]) -> Any:
        """Remember that `make` returned `value`, which is returned."""
        self._made[id(value)] = make, keywords
        self._alive.append(value)
        return value

    def decoder(self, model: Transformer, plan: Decoder) -> Transformer:
        """The decoder of a plan, noted like the parts it is made of."""
        for block in model.blocks:
            known = {"d_model": plan.d_model, "norm_eps": plan.norm_eps}
            own = {
                name: getattr(block, name) for name in inspect.signature(type(block)).parameters if name not in known
            }
            self.note(block, type(block), known | own)
        own = {name: getattr(plan, name) for name in ("d_model", "tie_embeddings", "norm_eps", "allow_non_causal")}
        return self.note(model, type(model), {"vocab_size": model.vocab_size, "blocks": list(model.blocks), **own})

    def node(self, value: Any) -> Any:
        """The node of a construction that stands for `value`."""
        if type(value) in PLAIN:
            return value
        if isinstance(value, list | tuple | range):
            return [self.node(item) for item in value]
        if isinstance(value, _Maker):
            return {"makes": [self.node(item) for item in value.made]}
        if id(value) in self._nodes:
            node = self._nodes[id(value)]
            node.setdefault("id", f"{node['make']} {len(self._nodes)}")
            return {"same": node["id"]}
        make, keywords = self._made[id(value)]
        if vocabulary().get(make.__name__) is not make:
            raise ValueError(f"{make.__name__} has no name in a construction (moestro.export.vocabulary)")
        node = self._nodes[id(value)] = {"make": make.__name__}
        # in the order in which `assembled` makes them
        for name, item in sorted((_plain_defaults(make) | dict(keywords)).items()):
            node[name] = self.node(item)
        return node


class _Maker:
    """A function that makes parts, and what it has made."""

    def __init__(self, make: Callable[..., Any]) -> None:
        self.make, self.made = make, []

    def __call__(self, **told: Any) -> Any:
        self.made.append(self.make(**told))
        return self.made[-1]


def _makes_parts(value: Any) -> bool:
    return inspect.isfunction(value)


def _plain_defaults(make: Callable[..., Any]) -> dict[str, Any]:
    given = {name: parameter.default for name, parameter in inspect.signature(make).parameters.items()}
    return {name: default for name, default in given.items() if type(default) in PLAIN}
