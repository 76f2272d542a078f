"""Plans: what they may say, and JSON that reads back as the same plan or not at all."""

import json
from dataclasses import replace

import pytest

from moestro.compress import (
    Calibration,
    Fingerprint,
    Group,
    LayerPlan,
    Plan,
    PlanError,
    Quantisation,
    TensorFile,
    read_plan,
    write_plan,
)
from moestro.ops.whole_files import sha256

H = "0123456789abcdef" * 4
SOURCE = Fingerprint("mixtral", H, "", H, H)
GROUPS = (Group((0, 3), (0.25, 0.75), align=True), Group((1, 2), (1.0, 0.0)))
FULL = Plan(
    "cka-merge",
    0.5,
    SOURCE,
    (
        LayerPlan(0, 4, (0, 1), GROUPS, ranks=(8, None), units=((0, 2), None), skip_below=0.3),
        LayerPlan(2, 4, (1, 3), (Group((0, 1), (0.5, 0.5)), Group((2, 3), (0.5, 0.5))), scores={"reap": [0.1] * 4}),
    ),
    semantics="remap",
    merged_rows="mean",
    quantise=Quantisation("int4", 64, calibrated=True),
    options={"align": True},
    seed=3,
    reference=SOURCE,
    calibration=Calibration(H, 1000, "held-out text"),
    versions={"moestro": "0.1.0"},
)


def test_a_plan_comes_back_from_its_file(tmp_path):
    path = write_plan(FULL, tmp_path / "folder" / "plan.json")
    assert read_plan(path) == FULL
    first = path.read_bytes()
    assert write_plan(read_plan(path), path).read_bytes() == first


def test_new_numbers_of_old_experts():
    layer = FULL.layers[0]
    assert layer.new_ids == (0, 1, 1, 0) and layer.merges and layer.factors and layer.narrows
    pruned = LayerPlan(0, 5, (1, 4))
    assert pruned.new_ids == (-1, 0, -1, -1, 1) and not (pruned.merges or pruned.factors or pruned.narrows)


def test_what_changes_nothing_is_known():
    same = Plan("random", 0.0, SOURCE, (LayerPlan(0, 2, (0, 1)),))
    assert same.identical and not FULL.identical
    changed = [{"keep": (0,)}, {"ranks": (1, None)}, {"units": ((0,), None)}, {"skip_below": 0.1}]
    for change in changed:
        assert not replace(same, layers=(replace(same.layers[0], **change),)).identical
    assert not replace(same, quantise=Quantisation("int8")).identical


@pytest.mark.parametrize("weights", [(0.5, -0.5), (1.0, float("inf")), (0.0, 0.0), (1.0,)])
def test_weights_of_a_group_make_a_mean(weights):
    with pytest.raises(PlanError, match="weights=.*allowed: "):
        Group((0, 1), weights)


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"keep": ()}, r"keep=\[\], allowed: at least one of 0 to 3.*layer 1"),
        ({"keep": (2, 0)}, "ascending, none twice"),
        ({"keep": (0, 4)}, "0 to 3"),
        ({"groups": (Group((0,), (1.0,)),)}, "groups has 1 entries, keep has 2"),
        ({"groups": (Group((0, 1), (1.0, 0.0)), Group((1, 2), (1.0, 0.0)))}, "each of 0 to 3 once at most"),
        ({"groups": (Group((1, 3), (1.0, 0.0)), Group((2,), (1.0,)))}, "lacks its kept expert 0"),
        ({"ranks": (0, 1)}, "ranks has 0"),
        ({"units": ((3, 1), None)}, "units has"),
        ({"skip_below": 1.0}, "skip_below=1.0"),
        ({"scores": {"reap": [1.0]}}, "reap: allowed: a finite number for each of 4 experts"),
        ({"rows": (1, 2, 3)}, "rows: allowed"),
    ],
)
def test_layers_that_contradict_themselves_are_refused(keywords, said):
    with pytest.raises(PlanError, match=said):
        LayerPlan(**{"layer": 1, "n_experts": 4, "keep": (0, 2), **keywords})


def test_plans_that_contradict_themselves_are_refused():
    layer = LayerPlan(0, 4, (0, 2))
    with pytest.raises(PlanError, match=r"ratio=1.0"):
        Plan("random", 1.0, SOURCE, (layer,))
    with pytest.raises(PlanError, match="ascending"):
        Plan("random", 0.5, SOURCE, (layer, layer))
    with pytest.raises(PlanError, match=r"under 'remap' every expert has a group, layer 0 lacks \[1, 3\]"):
        Plan("random", 0.5, SOURCE, (layer,), semantics="remap")


@pytest.mark.parametrize(
    ("keys", "value", "said"),
    [
        (("version",), 9, r"format version 9, written by a newer moestro.* \(.*plan.json: version\)"),
        (("layers", 0, "kept"), [0], r"unknown key 'kept'; did you mean 'keep'\?.*plan.json: layers.0.kept"),
        (("layers", 0, "keep"), [0, "1"], r"expected a whole number; got '1' \(a word\).*layers.0.keep.1"),
        (("layers", 1, "keep"), [3, 1], r"ascending.*plan.json: layers.1"),
        (("semantics",), "slices", r"unknown value 'slices'; did you mean 'slice'\?"),
        (("source", "config"), "abc", "64 hexadecimal digits.*source"),
        (("ratio",), "half", "expected a number.*ratio"),
        (("calibration", "tokens"), 0, "at least 1"),
    ],
)
def test_a_file_with_a_mistake_names_its_place(tmp_path, keys, value, said):
    path = write_plan(FULL, tmp_path / "plan.json")
    tree = json.loads(path.read_text())
    node = tree
    for key in keys[:-1]:
        node = node[key]
    node[keys[-1]] = value
    path.write_text(json.dumps(tree))
    with pytest.raises(PlanError, match=said):
        read_plan(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot read the plan"),
        ("[1]", "a plan is a mapping"),
        ('{"version": 1, "seed": 1, "seed": 2}', "key 'seed' stands twice"),
        ('{"version": 1, "ratio": NaN}', "NaN is no number"),
        ('{"version": 1, "method": "x"}', "missing key"),
    ],
)
def test_damaged_files_are_refused(tmp_path, text, said):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(PlanError, match=said):
        read_plan(tmp_path / "plan.json")
    with pytest.raises(PlanError, match="no such plan"):
        read_plan(tmp_path / "other.json")


def test_the_tensors_beside_a_plan_are_those_it_was_made_with(tmp_path):
    file = tmp_path / "plan.safetensors"
    file.write_bytes(b"something")
    path = write_plan(replace(FULL, tensors=TensorFile(file.name, sha256(file))), tmp_path / "plan.json")
    assert read_plan(path).tensors.file == file.name
    file.write_bytes(b"another")
    with pytest.raises(PlanError, match="expected"):
        read_plan(path)
    file.unlink()
    with pytest.raises(PlanError, match=r"is missing, which the plan needs \(.*tensors.file\)"):
        read_plan(path)
