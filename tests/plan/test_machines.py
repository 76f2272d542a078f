"""Machines: known ones, described ones, and mistakes in descriptions."""

from pathlib import Path

import pytest

from moestro.plan.machines import MACHINES, machine_named, this_machine
from moestro.recipe.syntax import RecipeError


def test_h200_is_what_its_sheet_says():
    h200 = MACHINES["h200"]
    assert (h200.memory, h200.memory_bandwidth, h200.bf16, h200.link) == (141e9, 4.8e12, 989e12, 450e9)
    assert h200.network == 50e9 and h200.flops("bf16") == pytest.approx(0.4 * 989e12)


def test_a_machine_is_described_by_what_differs(tmp_path: Path):
    file = tmp_path / "ours.yaml"
    file.write_text("like: h100\nnetwork: 25e9\nper_host: 4\n")
    ours = machine_named(str(file))
    assert (ours.name, ours.network, ours.per_host, ours.memory) == ("ours", 25e9, 4, 80e9)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("like: h300", "h300"),
        ("like: h100\nmemry: 1", "memry"),
        ("like: h100\nmemory: much", "much"),
        ("like: h100\nmemory: -1", "above 0"),
        ("memory: 1e9", "missing"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, says: str):
    file = tmp_path / "ours.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=says):
        machine_named(str(file))


def test_a_name_that_nobody_knows_gets_those_that_are_known():
    with pytest.raises(RecipeError, match="h200"):
        machine_named("h201")


def test_this_machine_has_memory():
    assert this_machine().memory > 2**28 and machine_named("cpu").per_host == 1
