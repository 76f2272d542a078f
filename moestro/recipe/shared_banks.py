"""What several layers hold together, banks and generators: one set of weights, named in the recipe."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from moestro.experts import ExpertBank, HyperGenerator
from moestro.recipe.bind import Part
from moestro.recipe.resolve import Place


class SharedBanks:
    """The banks under `model.shared_banks`. Each is built once, when the first layer asks for it, which tells it how
    its router weights experts; later layers get the same object, so that its weights are held, counted, trained and
    saved once."""

    def __init__(self, parts: Mapping[str, Part], context: Mapping[str, Any]) -> None:
        self.parts, self.context = parts, context
        self.built: dict[str, Any] = {}

    def bank(self, name: str, facts: Mapping[str, Any]) -> Any:
        """The bank, or generator, of that name."""
        if name not in self.built:
            self.built[name] = self.parts[name].build({**self.context, **facts})
        return self.built[name]


def shared_bank(
    name: str,
    shared_banks: SharedBanks,
    heads: int | None = None,
    top_k: int | None = None,
    gate: Literal["softmax", "sigmoid", "relu"] = "softmax",
) -> ExpertBank:
    """The bank `name` of `model.shared_banks`; the rest is what its first layer's router says."""
    return shared_banks.bank(name, {"heads": heads, "top_k": top_k, "gate": gate})


def shared_generator(name: str, shared_banks: SharedBanks) -> HyperGenerator:
    """The generator `name` of `model.shared_banks`, which makes the hyper-experts of all layers that ask for it."""
    return shared_banks.bank(name, {})


def check_names(banks: Mapping[str, Part], layers: Sequence[Part], place: Place) -> None:
    """Raises: RecipeError for a bank at `place` that no layer has, or a layer that asks for one that is not there."""
    asked = [part for layer in layers for part in parts_inside(layer) if part.make in (shared_bank, shared_generator)]
    names = {part.value("name") for part in asked}
    for name in banks:
        if name not in names:
            raise place.unknown_key(name, names)
    for part in asked:
        if part.value("name") not in banks:
            allowed = f"allowed: {', '.join(banks) or 'none'} (the keys of model.shared_banks)"
            raise (part.place / "name").error(f"name={part.value('name')!r}, {allowed}")


def parts_inside(value: Any) -> Iterator[Part]:
    """A part and all parts in its keywords."""
    if isinstance(value, Part):
        yield value
        yield from parts_inside(list(value.keywords.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from parts_inside(item)
