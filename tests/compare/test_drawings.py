"""The parts of the drawings: colours, axes, curves over seeds, bars and histograms of expert usage."""

import itertools
import re
from importlib import resources
from xml.etree import ElementTree

import numpy as np
import pytest

from moestro.compare.curves import binned, finite, over_seeds
from moestro.compare.plots import Axis, log_ticks, nice_ticks, spread_out
from moestro.compare.usage import doubling_bins, expert_shares, share_bars, stored_bins

# Colours: Machado, Oliveira and Fernandes 2009, simulated full protanopia, deuteranopia, tritanopia, in linear RGB.
SIGHT = {
    "full": np.eye(3),
    "prot": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deut": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "trit": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
# Ottosson 2020, OKLab: distances that follow perceived difference.
LMS = [[0.41222147, 0.53633254, 0.05144599], [0.21190350, 0.68069955, 0.10739696], [0.08830246, 0.28171884, 0.62997870]]
LAB = [
    [0.21045426, 0.79361779, -0.00407205],
    [1.97799850, -2.42859221, 0.45059371],
    [0.02590404, 0.78277177, -0.80867577],
]


def palette(css):
    return {
        name: np.array(list(map(int, rgb.split()))) / 255 for name, rgb in re.findall(r"--(c\d|paper): ([\d ]+)", css)
    }


@pytest.mark.parametrize("sight", SIGHT)
@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_arm_colours_can_be_told_apart(sight, scheme):
    css = resources.files("moestro.compare").joinpath("template", "page.css").read_text(encoding="utf-8")
    linear = {
        name: np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
        for name, c in palette(
            css.split("@media screen and (prefers-color-scheme: dark)")[scheme].split(".arm-0")[0]
        ).items()
    }
    paper = linear.pop("paper")
    assert len(linear) == 8
    weights = np.array([0.2126, 0.7152, 0.0722])
    for name, colour in linear.items():
        light, dark = sorted((float(colour @ weights), float(paper @ weights)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) > 3, f"{name} is hard to see on the page"
    seen = {n: LAB @ np.cbrt(LMS @ np.clip(SIGHT[sight] @ c, 0, 1)) for n, c in linear.items()}
    for one, other in itertools.combinations(seen, 2):
        assert np.linalg.norm(seen[one] - seen[other]) > 0.08, (one, other)


def test_shares_of_experts_by_hand():
    shares = expert_shares([30, 10, 20], [1, 6, 3])
    assert [share["width"] for share in shares] == [10, 20, 30]
    assert [share["of_tokens"] for share in shares] == [0.6, 0.3, 0.1]
    assert [share["of_width"] for share in shares] == pytest.approx([1 / 6, 2 / 6, 3 / 6])
    assert [share["of_work"] for share in shares] == pytest.approx([60 / 150, 60 / 150, 30 / 150])
    with pytest.raises(ValueError, match="2 widths but 1 loads"):
        expert_shares([1, 2], [3])


def test_bars_are_as_wide_as_their_experts_and_as_high_as_their_load():
    drawing = ElementTree.fromstring(share_bars(expert_shares([10, 30], [3, 1])))
    narrow, _, wide, _ = (bar.attrib for bar in drawing.iter("rect"))
    assert float(wide["width"]) / float(narrow["width"]) == pytest.approx(3, rel=0.01)
    assert float(narrow["height"]) / float(wide["height"]) == pytest.approx(3, rel=0.01)


def test_histograms():
    assert doubling_bins([0, 0, 1, 2, 3, 4, 9]) == [("0", 2), ("1", 1), ("2–3", 2), ("4–7", 1), ("8–15", 1)]
    stored = {"edges": [0, 1, 2, 4, 128], "experts": [2, 1, 2, 5]}
    assert stored_bins(stored) == [("0", 2), ("1", 1), ("2–3", 2), ("4+", 5)]
    assert stored_bins({"edges": [256, 512, 2048, 4096], "experts": [1, 1, 1]}) == [
        ("256+", 1),
        ("512+", 1),
        ("2k+", 1),
    ]
    assert doubling_bins([300.0])[-1] == ("256+", 1)
    with pytest.raises(ValueError, match="2 edges for 2 counts of experts; allowed: one edge more"):
        stored_bins({"edges": [0, 1], "experts": [1, 2]})


def test_curves_over_seeds():
    curve = over_seeds([[(1.0, 4.0), (3.0, 2.0)], [(1.0, 6.0), (2.0, 5.0), (4.0, 3.0)]])
    assert curve is not None
    assert curve.xs == (1.0, 3.0) and curve.mean == (5.0, 3.0)
    assert curve.low == (4.0, 2.0) and curve.high == (6.0, 4.0) and curve.n_seeds == 2
    assert over_seeds([]) is None and over_seeds([[(1.0, 1.0)], [(2.0, 1.0)]]) is None
    assert finite([{"flops": 0, "bpb": 8}, {"flops": 2, "bpb": None}, {"flops": 1, "bpb": 3}], "bpb") == [(1, 3)]


def test_binning_keeps_the_mean():
    points = [(float(i), 5.0 - 0.01 * i) for i in range(1, 301)]
    bins = binned(points, 20)
    assert len(bins) <= 20
    assert all(y == pytest.approx(5.0 - 0.01 * x) for x, y in bins)
    assert binned(points[:20], 20) == points[:20]


def test_axes():
    assert nice_ticks(1.63, 1.77, 5) == [1.65, 1.7, 1.75]
    assert nice_ticks(0, 10, 5) == [0, 2, 4, 6, 8, 10]
    assert log_ticks(1e10, 1e13) == [1e10, 1e11, 1e12, 1e13]
    assert log_ticks(0.5e6, 5e6) == [0.5e6, 1e6, 2e6, 5e6]
    assert len(log_ticks(1.19e6, 1.26e6)) >= 2
    axis = Axis(1e10, 1e12, 0, 100, log=True)
    assert axis.at(1e11) == pytest.approx(50)
    assert spread_out([5, 5, 50], 10, 0, 100) == [5, 15, 50]
    assert spread_out([99, 98], 10, 0, 100) == [100, 90]
