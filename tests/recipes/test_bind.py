"""Binding to signatures, shown on dummies so that no real part hides a gap."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from moestro.layers import AllRows
from moestro.recipe.bind import Binder, Part, _culprit, parameters
from moestro.recipe.resolve import Origin, Place
from moestro.recipe.syntax import RecipeError


class Lamp:
    def __init__(self, watts: int, colour: Literal["red", "green"] = "red", dimmed: bool = False) -> None:
        if watts > 100:
            raise ValueError(f"watts={watts}, allowed: up to 100")
        self.watts, self.colour, self.dimmed = watts, colour, dimmed


class Mirror:
    def __init__(self, angle: float = 0.5) -> None:
        self.angle = angle


@dataclass(frozen=True)
class Limits:
    low: float
    high: float = 1.0


@dataclass(frozen=True)
class Room:
    lamp: Lamp
    lamps: Sequence[Lamp] = ()
    name: str = "room"
    size: tuple[float, float] = (1.0, 1.0)
    shades: tuple[str, ...] = ()
    codes: Sequence[int] = ()
    tags: frozenset[str] = frozenset()
    limits: Limits | None = None
    steps: int | None = None
    amount: int | float = 0
    path: str | Path | Sequence[str | Path] = "here"
    folder: Path | None = None
    extras: dict = field(default_factory=dict)
    anything: Any = None
    widths: Sequence[int] = ()
    odd: Mirror | None = None


def pair(first: int, second: int) -> list[int]:
    if first > second:
        raise ValueError(f"first={first} > second={second}")
    return [first, second]


class Bank:
    def __init__(self, d_model: int, n_experts: int = 3) -> None:
        self.d_model, self.n_experts = d_model, n_experts


class Score:
    def __init__(self, d_model: int, n_experts: int) -> None:
        self.d_model, self.n_experts = d_model, n_experts


class Router:
    def __init__(self, score: Score, top_k: int = 1) -> None:
        self.score = score


class Layer:
    def __init__(self, router: Router, branches: Sequence[object], record: Sequence[str] = ()) -> None:
        self.router, self.branches = router, branches


PARTS = {
    "lamp": {"plain": Lamp, "mirror": Mirror},
    "lamps": {"plain": Lamp, "mirror": Mirror},
    "widths": {"pair": pair},
    "score": {"linear": Score},
    "router": {"scored": Router},
    "branches": {"bank": Bank, "lamp": Lamp},
}
BINDER = Binder(PARTS)
PLACE = Place(Origin(Path("r.yaml"), {})) / "room"
LAMP = {"kind": "plain", "watts": 5}


def room(**node: Any) -> Any:
    return BINDER.bind(Room, {"lamp": LAMP, **node}, PLACE).build()


def refusal(make: Any, node: Any, **kwargs: Any) -> str:
    with pytest.raises(RecipeError) as error:
        BINDER.bind(make, node, PLACE, **kwargs).build()
    assert isinstance(error.value, ValueError) and "\n" not in str(error.value)
    return str(error.value)


def test_plain_values_parts_lists_and_dataclasses_are_bound() -> None:
    got = room(
        lamps=[{"kind": "mirror", "angle": 1}, LAMP],
        size=[1, 2.5],
        shades=["a", "b"],
        codes=[1, 2],
        tags=["t"],
        limits={"low": -1},
        steps=4,
        path=["a", "b"],
        folder="c",
        extras={"x": [1]},
        anything=[{"free": "text"}],
        widths={"kind": "pair", "first": 1, "second": 2},
    )
    assert got.lamp.watts == 5 and got.lamps[0].angle == 1.0 and type(got.lamps[0].angle) is float
    assert got.size == (1.0, 2.5) and got.shades == ("a", "b") and got.codes == [1, 2] and got.tags == {"t"}
    assert got.limits == Limits(-1.0) and got.steps == 4 and got.path == ["a", "b"] and got.folder == Path("c")
    assert got.extras == {"x": [1]} and got.anything == [{"free": "text"}] and got.widths == [1, 2]


def test_a_union_keeps_what_was_written() -> None:
    assert type(room(amount=3).amount) is int and type(room(amount=3.0).amount) is float
    assert room(steps=None).steps is None and room(path="x").path == "x" and room(widths=[3, 4]).widths == [3, 4]


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"nmae": "x"}, "unknown key 'nmae'; did you mean 'name'? allowed: amount, anything, codes,"),
        ({3: "x"}, "unknown key 3; allowed: amount,"),
        ({"steps": True}, "expected a whole number; got true (true or false) (r.yaml: room.steps)"),
        ({"steps": 1.0}, "expected a whole number; got 1.0 (a number) (r.yaml: room.steps)"),
        ({"steps": "x"}, "expected a whole number; got 'x' (a word) (r.yaml: room.steps)"),
        ({"name": 3}, "expected a word; got 3 (a whole number) (r.yaml: room.name)"),
        ({"name": None}, "expected a word; got null (r.yaml: room.name)"),
        ({"size": [1]}, "expected a list of 2 values; got 1 (r.yaml: room.size)"),
        ({"size": [1, True]}, "expected a number; got true (true or false) (r.yaml: room.size.1)"),
        ({"size": [1, 1e999]}, "expected a number; got inf (a number) (r.yaml: room.size.1)"),
        ({"size": 3}, "expected a list; got 3 (a whole number) (r.yaml: room.size)"),
        ({"codes": [1, "x"]}, "expected a whole number; got 'x' (a word) (r.yaml: room.codes.1)"),
        ({"codes": {"a": 1}}, "expected a list; got a mapping of 1 (r.yaml: room.codes)"),
        ({"codes": "12"}, "expected a list; got '12' (a word) (r.yaml: room.codes)"),
        ({"limits": {}}, "missing key 'low' (r.yaml: room.limits)"),
        (
            {"limits": {"low": 1, "hihg": 2}},
            "unknown key 'hihg'; did you mean 'high'? allowed: high, low (r.yaml: room",
        ),
        ({"limits": {"low": "x"}}, "expected a number; got 'x' (a word) (r.yaml: room.limits.low)"),
        ({"limits": 3}, "expected a mapping of keys to values; got 3 (a whole number) (r.yaml: room.limits)"),
        ({"amount": "x"}, "expected a whole number or a number; got 'x' (a word) (r.yaml: room.amount)"),
        ({"path": 3}, "expected a word or a path or a list; got 3 (a whole number) (r.yaml: room.path)"),
        ({"extras": 3}, "expected a mapping of keys to values; got 3 (a whole number) (r.yaml: room.extras)"),
        ({"lamp": 3}, "expected a mapping with one kind of mirror, plain; got 3 (a whole number) (r.yaml: room.lamp)"),
        ({"lamp": [LAMP]}, "expected a mapping with one kind of mirror, plain; got a list of 1 (r.yaml: room.lamp)"),
        ({"lamp": {"watts": 5}}, "missing key 'kind'; allowed: mirror, plain (r.yaml: room.lamp)"),
        (
            {"lamp": {"kind": "plane"}},
            "unknown kind 'plane'; did you mean 'plain'? allowed: mirror, plain (r.yaml: room",
        ),
        (
            {"lamp": {"kind": ["plain"]}},
            "unknown kind ['plain']; did you mean 'plain'? allowed: mirror, plain (r.yaml: room.lamp.kind)",
        ),
        ({"lamp": {"kind": "plain"}}, "missing key 'watts' (r.yaml: room.lamp)"),
        ({"lamp": {**LAMP, "wats": 1}}, "unknown key 'wats'; did you mean 'watts'? allowed: colour, dimmed, watts"),
        ({"lamp": {**LAMP, "colour": "gren"}}, "unknown value 'gren'; did you mean 'green'? allowed: green, red"),
        (
            {"lamp": {**LAMP, "colour": 1}},
            "expected one of red, green; got 1 (a whole number) (r.yaml: room.lamp.colour",
        ),
        ({"lamp": {**LAMP, "dimmed": 1}}, "expected true or false; got 1 (a whole number) (r.yaml: room.lamp.dimmed)"),
        ({"lamp": {**LAMP, "watts": 101}}, "watts=101, allowed: up to 100 (r.yaml: room.lamp.watts)"),
        (
            {"lamps": [LAMP, {"kind": "mirror", "angel": 1}]},
            "unknown key 'angel'; did you mean 'angle'? allowed: angle (r",
        ),
        (
            {"lamps": [LAMP, 3]},
            "expected a mapping with one kind of mirror, plain; got 3 (a whole number) (r.yaml: room.",
        ),
        ({"widths": {"kind": "pair", "first": 3, "second": 2}}, "first=3 > second=2 (r.yaml: room.widths.first)"),
        ({"widths": {"first": 1}}, "missing key 'kind'; allowed: pair (r.yaml: room.widths)"),
        (
            {"odd": {"angle": 1}},
            "cannot be set in a recipe: Mirror is neither a plain value nor a part (r.yaml: room.odd)",
        ),
    ],
)
def test_refusals_say_what_where_and_what_is_allowed(node: dict, message: str) -> None:
    got = refusal(Room, {"lamp": LAMP, **node})
    assert got.startswith(message) and "(r.yaml: room" in got


def place_of(message: str, *overrides: str) -> str:
    """Where a message about a part is said to belong: the part has a `top_k`, and the part inside it a `scale`."""
    place = Place(Origin(Path("r.yaml"), {}, overrides=tuple(tuple(name.split(".")) for name in overrides)), ("layer",))
    inside = Part(Mirror, {"scale": 1.0}, place / "score")
    part = Part(Mirror, {"top_k": 9, "score": inside}, place)
    return str(part.blamed(message).error("")).strip()


@pytest.mark.parametrize(
    ("message", "overrides", "where"),
    [
        ("top_k=9 > 8 experts", (), "(r.yaml: layer.top_k)"),
        ("layer top_k=9: must be less", (), "(r.yaml: layer.top_k)"),
        ("scale=1.0, allowed: less", (), "(r.yaml: layer.score.scale)"),
        ("scale=1.0 with top_k=9", (), "(r.yaml: layer.score.scale)"),
        ("scale=1.0 with top_k=9", ("layer.top_k",), "(command line: layer.top_k)"),
        ("d_model=3 is not a multiple of top_k=9", (), "(r.yaml: layer)"),
        ("d_model=3 is not a multiple of top_k=9", ("layer.top_k",), "(command line: layer.top_k)"),
        ("something else", (), "(r.yaml: layer)"),
        ("something else", ("layer.score.scale",), "(command line: layer.score.scale)"),
        ("something else", ("data",), "(r.yaml: layer)"),
    ],
)
def test_an_error_stands_at_the_key_that_it_names(message: str, overrides: tuple[str, ...], where: str) -> None:
    assert place_of(message, *overrides) == where


def test_a_part_knows_what_it_will_be_given() -> None:
    part = BINDER.bind(Lamp, {"watts": 5}, PLACE)
    assert part.value("watts") == 5 and part.value("colour") == "red"


def test_a_missing_required_key_and_a_wrong_top_level() -> None:
    assert refusal(Room, {}) == "missing key 'lamp' (r.yaml: room)"
    assert refusal(Room, [1]) == "expected a mapping of keys to values; got a list of 1 (r.yaml: room)"


def test_keywords_that_only_the_builder_supplies_are_unknown_in_a_recipe() -> None:
    assert refusal(Limits, {"low": 1, "high": 2}, hidden=("high",)).startswith("unknown key 'high'; allowed: low (")


def layer(router: dict, branches: list) -> Any:
    node = {"router": {"kind": "scored", "score": {"kind": "linear", **router}}, "branches": branches}
    return BINDER.bind(Layer, node, PLACE, given=("d_model",)).build({"d_model": 16})


def test_d_model_and_the_number_of_experts_come_from_above_and_beside() -> None:
    got = layer({}, [{"kind": "lamp", "watts": 1}, {"kind": "bank", "n_experts": 7}])
    assert got.router.score.n_experts == 7 and got.router.score.d_model == 16 and got.branches[1].d_model == 16


def test_what_a_recipe_gives_is_not_replaced() -> None:
    got = layer({"n_experts": 5, "d_model": 8}, [{"kind": "bank"}])
    assert got.router.score.n_experts == 5 and got.router.score.d_model == 8 and got.branches[0].n_experts == 3


def test_a_layer_without_experts_has_nothing_to_tell_its_router() -> None:
    with pytest.raises(RecipeError) as error:
        layer({}, [{"kind": "lamp", "watts": 1}])
    assert str(error.value) == "missing key 'n_experts' (r.yaml: room.router.score)"


def test_d_model_is_asked_for_where_nobody_supplies_it() -> None:
    node = {"router": {"kind": "scored", "score": {"kind": "linear"}}, "branches": [{"kind": "bank"}]}
    assert refusal(Layer, node) == "missing key 'd_model' (r.yaml: room.router.score)"


def test_a_module_without_a_constructor_takes_no_keywords() -> None:
    """`record: {kind: all}` asked for a keyword `args` of torch's Module."""
    assert parameters(AllRows) == {}


@pytest.mark.parametrize(
    ("message", "named"),
    [
        ("tried to allocate 800 bytes for 5 rows", "rows=5"),
        ("negative dimension -5: [-5, 20]", "shift=-5"),
        ("4.5 is not 0.5", "d_model=4096"),
        ("layer5 failed", "d_model=4096"),
    ],
)
def test_the_number_that_a_message_quotes_is_the_culprit_else_the_largest(message: str, named: str) -> None:
    assert _culprit({"rows": 5, "shift": -5, "d_model": 4096, "name": "x"}, message) == named
