"""The page: self-contained, escaped, complete, right in its numbers, and whole in every odd case."""

import base64
import copy
import hashlib
import itertools
import json
import re
from html.parser import HTMLParser
from importlib import resources

import numpy as np
import pytest

from moestro.compare import report
from moestro.compare.curves import binned, finite, over_seeds
from moestro.compare.looks import arm_looks
from moestro.compare.plots import Axis, escape, log_ticks, nice_ticks, spread_out
from moestro.compare.report import render_report, write_report
from moestro.compare.token_text import chosen_measure, views
from moestro.compare.usage import doubling_bins, expert_shares, share_bars, stored_bins

EVIL = "<script>alert('x')</script>\"&"
VOID = {"meta", "link", "input", "br"}


class Page(HTMLParser):
    """Elements with their attributes, text outside of style and script, and the tags that were never closed."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.text, self.open, self.script = [], [], [], ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes <{self.open[-1:]}>"
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.script += data
        elif not self.open or self.open[-1] != "style":
            self.text.append(data)

    def all(self, tag, **wanted):
        return [a for t, a in self.elements if t == tag and all(a.get(k) == v for k, v in wanted.items())]

    def words(self):
        return " ".join(" ".join(self.text).replace("\u00a0", " ").split())


@pytest.fixture(scope="module")
def big(make_results):
    return make_results(4, (8e11, 3.2e12), 3)


@pytest.fixture(scope="module")
def page(big):
    return render_report(json.loads(json.dumps(big)))


def check_whole(page):
    """What holds for every page: balanced tags, unique ids, finite coordinates, one chosen button a group."""
    parsed = Page(page)
    assert parsed.open == []
    ids = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {a["for"] for a in parsed.all("label") if "for" in a} <= set(ids)
    for tag, attributes in parsed.elements:
        if tag in ("path", "rect", "circle", "text", "svg"):
            numbers = " ".join(
                attributes.get(k) or "" for k in ("d", "x", "y", "width", "height", "cx", "cy", "viewbox")
            )
            assert not re.search("nan|inf|e[+-]", numbers), (tag, numbers)
            assert all(abs(float(n)) < 5000 for n in re.findall(r"-?\d+\.?\d*", numbers)), (tag, numbers)
    groups = {}
    for attributes in parsed.all("input", type="radio"):
        groups.setdefault(attributes["name"], []).append("checked" in attributes)
    assert all(sum(chosen) == 1 for chosen in groups.values()), groups
    assert len(parsed.all("script")) == 1
    return parsed


def test_page_is_whole_and_loads_nothing(page):
    parsed = check_whole(page)
    for tag, attributes in parsed.elements:
        assert tag not in ("img", "iframe", "object", "embed", "base", "form"), tag
        assert not set(attributes) & {"src", "srcset", "action", "background", "xlink:href"}, (tag, attributes)
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        assert attributes.get("href", "#").startswith(("#", "data:,"))
    assert not re.search(r"@import|url\(|https?:|fetch\(|XMLHttpRequest|import\(", page)


def test_only_our_script_may_run(page):
    parsed = Page(page)
    (policy,) = [a["content"] for a in parsed.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    digest = base64.b64encode(hashlib.sha256(parsed.script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy


def test_all_sections_and_facts_are_there(page, big):
    words = check_whole(page).words()
    for title in (
        "All arms",
        "Loss against compute",
        "How large",
        "Which experts",
        "The same text",
        "How this was",
        "not show",
    ):
        assert title in words
    for fact in (
        big["command"],
        big["commit"],
        big["corpus"]["fingerprint"],
        "2.030 bits per byte",
        "AMD EPYC 7763, 2 cores",
    ):
        assert fact in words
    assert "HMoE won at equal compute" in words and "0, 1, 2" in words
    assert "3.2e12 FLOPs" in words and "11.5 MB" in words and "recipes/hmoe.yaml" in words
    assert words.count("Homogeneous MoE") > 10


def test_everything_from_outside_is_escaped(make_results, summarise):
    data = make_results(1, (3.2e12,), 2)
    for arm in data["arms"].values():
        arm |= {"title": EVIL, "description": EVIL, "recipe": EVIL, "solved": {EVIL: EVIL}}
    data |= {"title": EVIL, "commit": EVIL, "command": EVIL, "created": EVIL, "machine": {EVIL: EVIL}, "seeds": [EVIL]}
    data["corpus"] |= {"name": EVIL, "fingerprint": EVIL}
    data["sizes"][0]["name"] = EVIL
    for run in data["runs"]:
        run |= {"size": EVIL, "run_dir": EVIL, "seed": EVIL}
        run["routing"] = dict.fromkeys([EVIL], next(iter(run["routing"].values()))) if run["routing"] else {}
    data["runs"][0] |= {"status": EVIL, "error": EVIL}
    data["sample"] = {
        arm: [{"text": EVIL, "loss": 1.0 + i, "layers": {EVIL: {"width": float(i), "experts": 2}}} for i in range(2)]
        for arm in data["arms"]
    }
    summarise(data)
    page = render_report(data)
    parsed = check_whole(page)
    assert "alert('x')" not in page and parsed.script.count("alert") == 0
    assert parsed.words().count(EVIL) > 30
    titles = [a["title"] for a in parsed.all("span") if "title" in a]
    assert titles and all(EVIL in title for title in titles)


def test_control_characters_and_broken_unicode():
    assert escape("a\x00\x1b\ud800é\n") == "a\u2400\u241b\ufffdé\n"
    assert escape("😀<") == "😀&lt;"


def test_broken_tokens_can_be_written(make_results, tmp_path):
    data = make_results(1, (3.2e12,), 1)
    data["sample"]["hmoe"][3]["text"] = "\x00\ud800"
    data["sample"]["hmoe"][4]["text"] = ""
    page = write_report(data, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "\u2400\ufffd" in page and "\x00" not in page


CASES = {
    "one seed": ((1, (3.2e12,), 1), lambda d: d, "with one seed no spread is known"),
    "one size": ((1, (3.2e12,), 2), lambda d: d, "Every arm ran at one size only, so this comparison cannot say"),
    "two sizes": ((2, (3.2e12,), 2), lambda d: d, "2 size(s): a parabola needs three"),
    "three sizes": ((3, (3.2e12,), 2), lambda d: d, "three sizes: the parabola passes through them exactly"),
    "one arm": ((1, (3.2e12,), 2, ("dense",)), lambda d: d, "Only Dense has finished runs"),
    "no runs": ((1, (3.2e12,), 1), lambda d: d.update(runs=[]), "No run has finished with a finite loss"),
    "no isoflop": ((3, (3.2e12,), 2), lambda d: d.pop("isoflop"), "No isoFLOP points were recorded."),
    "no sample": ((1, (3.2e12,), 2), lambda d: d.pop("sample"), "No sample text was recorded."),
    "empty sample": ((1, (3.2e12,), 2), lambda d: d["sample"].update(moe=[]), "No sample was recorded for this arm."),
    "no reference": ((1, (3.2e12,), 2), lambda d: d.update(reference=None), "HMoE won at equal compute"),
    "no machine": ((1, (3.2e12,), 2), lambda d: (d.pop("machine"), d.pop("command")), "not recorded"),
    "no zlib": ((3, (3.2e12,), 2), lambda d: d["corpus"].update(zlib_bpb=None), "HMoE"),
    "wrong winner": (
        (1, (3.2e12,), 3),
        lambda d: d["winner"].update(arm="peer"),
        "names peer as winner, which its own runs",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_odd_cases(case, make_results):
    arguments, change, expected = CASES[case]
    data = make_results(*arguments)
    change(data)
    assert expected in check_whole(render_report(data)).words()


@pytest.mark.parametrize("n_arms", [2, 7, 15])
def test_any_number_of_arms(n_arms, make_results):
    arms = ("dense", "moe", "hmoe", "peer", *(f"variant{i}" for i in range(11)))[:n_arms]
    data = make_results(1, (3.2e12,), 2, arms)
    words = check_whole(render_report(data)).words()
    assert all(about["title"] in words for about in data["arms"].values())
    looks = arm_looks(data)
    assert looks["dense"].css == "arm arm-0"
    assert len({look.css for look in looks.values()}) == min(n_arms, 12)


def lost(data, arm):
    for run in data["runs"]:
        if run["arm"] == arm:
            kept = {key: run[key] for key in ("arm", "size", "budget", "seed", "run_dir")}
            run.clear()
            run.update(kept, status="failed", error="RuntimeError: out of memory")


def test_failed_arm_is_named_at_the_top_and_kept_out_of_the_charts(make_results, summarise):
    data = make_results(3, (3.2e12,), 3)
    lost(data, "peer")
    words = check_whole(render_report(summarise(data))).words()
    assert "Not in this verdict, for lack of a finished run: PEER." in words
    assert "PEER, 9 runs: RuntimeError: out of memory" in words
    assert "0 of 3, 3 failed" in words
    assert "9 of 36 runs did not finish with a finite loss" in words


def test_null_fits_and_diverged_runs(make_results, summarise):
    data = make_results(3, (3.2e12,), 2)
    for run in data["runs"]:
        if run["arm"] == "moe" and run["seed"] == 1:
            run["final"]["bpb"] = float("nan")
            run["curve"][-1]["bpb"] = float("nan")
    summarise(data)
    for entry in data["isoflop"][str(3.2e12)].values():
        entry["fit"] = None
    words = check_whole(render_report(json.loads(json.dumps(data)))).words()
    assert "1 of 2, 1 diverged" in words


def minimum_marks(page):
    return page.count('class="ring"')


def test_minimum_is_marked_only_inside_the_measured_sizes(big):
    data = copy.deepcopy(big)
    inside = minimum_marks(render_report(data))
    assert inside > 0
    for arms in data["isoflop"].values():
        for entry in arms.values():
            entry["fit"]["minimum_params"] = 1e9
    page = render_report(data)
    assert minimum_marks(page) == 0
    assert "the minimum would be larger than every measured size: not marked" in page
    for arms in data["isoflop"].values():
        for entry in arms.values():
            entry["fit"] |= {"minimum_params": None, "minimum_bpb": None}
    page = render_report(data)
    assert minimum_marks(page) == 0 and "the fit does not bend upwards: no minimum" in page


def test_a_failing_render_leaves_the_old_page(make_results, tmp_path, monkeypatch):
    path = tmp_path / "deep" / "report.html"
    assert write_report(make_results(1, (3.2e12,), 1), path) == path
    before = path.read_bytes()
    with pytest.raises(ValueError, match="format=None; this version reads format 1"):
        write_report({}, path)

    def no_room(source, target):
        raise OSError("no room")

    monkeypatch.setattr(report.os, "replace", no_room)
    with pytest.raises(OSError, match="no room"):
        write_report(make_results(1, (3.2e12,), 2), path)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]


def test_same_results_same_page(big):
    assert render_report(big) == render_report(copy.deepcopy(big))


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
    narrow, _, wide, _ = Page(share_bars(expert_shares([10, 30], [3, 1]))).all("rect")
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


def test_text_is_coloured_by_what_varies(big):
    tokens = {arm: big["sample"][arm] for arm in ("dense", "moe", "hmoe")}
    assert [chosen_measure(tokens[arm]) for arm in tokens] == [None, None, "width"]
    assert [view.name for view in views(tokens["dense"])] == ["loss"]
    assert [view.name for view in views(tokens["hmoe"])][:2] == ["mean of layers", "blocks.0.ffn"]
    assert views(tokens["hmoe"])[-1].values[0] is None
    counts = [{"text": "a", "loss": 1.0, "layers": {"l": {"width": 4.0, "experts": n}}} for n in (1, 2)]
    assert chosen_measure(counts) == "experts"


def test_every_view_of_the_text_has_its_rule_and_values(page, big):
    parsed = Page(page)
    n_views = max(len(views(tokens)) for tokens in big["sample"].values())
    assert n_views == 6
    assert all(f".view-{i}:checked~.text .token{{--v:var(--v{i})}}" in page for i in range(n_views))
    (hmoe,) = [views(tokens) for arm, tokens in big["sample"].items() if arm == "hmoe"]
    styled = [a["style"] for a in parsed.all("span", **{"class": "token"}) if a["style"].count("--v") == n_views]
    assert len(styled) == len(big["sample"]["hmoe"])
    first, low, high = hmoe[1].values[0], hmoe[1].low, hmoe[1].high
    shown = [float(shade) for shade in re.findall(r"--v1:([\d.]+)", styled[0])]
    assert first is not None and shown == [pytest.approx((first - low) / (high - low), abs=0.006)]


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
