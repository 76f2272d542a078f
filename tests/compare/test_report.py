"""The page: self-contained, escaped, complete, right in its numbers, and whole in every odd case."""

import base64
import copy
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest

from moestro.compare import report
from moestro.compare.looks import arm_looks
from moestro.compare.plots import escape
from moestro.compare.report import render_report, write_report
from moestro.compare.token_text import chosen_measure, views

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
    with pytest.raises(ValueError, match="format=None, allowed: 1 to 1"):
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
