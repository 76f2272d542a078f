"""Strict YAML and the way files, bases and overrides become one tree."""

from pathlib import Path

import pytest

from moestro.recipe.resolve import Origin, merge, read_tree
from moestro.recipe.syntax import RecipeError, dump_yaml, parse_yaml, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("-2.5E+3", -2500.0),
        ("1e5", 1e5),
        (".5", 0.5),
        ("7", 7),
        ("010", 10),
        ("1_000_000", 1000000),
        ("1_", "1_"),
        ("1__0", "1__0"),
        ("1_000.5e1", 10005.0),
        ("no", "no"),
        ("off", "off"),
        ("true", True),
        ("null", None),
        ("", None),
        ("'1e-3'", "1e-3"),
        ("2408.10681", 2408.10681),
        ("1:30", "1:30"),
        ("2024-07-04", "2024-07-04"),
        ("[1, 2e-3, {a: b}]", [1, 2e-3, {"a": "b"}]),
    ],
)
def test_values_are_read_as_written_and_survive_a_round_trip(text: str, value: object) -> None:
    got = parse_yaml(text, "here")
    assert got == value and type(got) is type(value)
    again = parse_yaml(dump_yaml({"key": got}), "here")["key"]
    assert again == value and type(again) is type(value)


@pytest.mark.parametrize("text", ["1e-3", "true", "", "~", "null", "010", "1_0", "a: b", "0x1f", "no", "# x", "*a"])
def test_words_that_look_like_something_else_survive_a_round_trip(text: str) -> None:
    assert parse_yaml(dump_yaml({"key": text}), "here") == {"key": text}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "YAML: key 'a' stands twice, first on line 1 (r.yaml: line 3, column 1)"),
        ("x:\n  - {a: 1, a: 2}", "YAML: key 'a' stands twice, first on line 2 (r.yaml: line 2, column 12)"),
        (
            "a: &x 1\nb: *x",
            "YAML: anchors and aliases are not part of recipes; use `extends` (r.yaml: line 1, column 4)",
        ),
        ("a: *x", "YAML: anchors and aliases are not part of recipes; use `extends` (r.yaml: line 1, column 4)"),
        ("a: [1, 2", "YAML: expected ',' or ']', but got '<stream end>' (r.yaml: line 1, column 9)"),
        ("a: 1\n  b: 2", "YAML: mapping values are not allowed here (r.yaml: line 2, column 4)"),
        ("\ta: 1", "YAML: found character '\\t' that cannot start any token (r.yaml: line 1, column 1)"),
        ("[1]: 2", "YAML: key [1] is neither a word nor a whole number (r.yaml: line 1, column 1)"),
        ("true: 2", "YAML: key True is neither a word nor a whole number (r.yaml: line 1, column 1)"),
        (
            "a: !!python/object/apply:os.system [ls]",
            "YAML: tags such as tag:yaml.org,2002:python/object/apply:os.system are not part of recipes "
            "(r.yaml: line 1, column 4)",
        ),
        ("a: !!int x", "YAML: tags such as tag:yaml.org,2002:int are not part of recipes (r.yaml: line 1, column 4)"),
        ("a: 1\x00", "YAML: character #x0000 is not allowed (r.yaml: line 1, column 5)"),
        ("[" * 100, "YAML: nested more than 64 levels deep (r.yaml: line 1, column 65)"),
        ("a: " + "9" * 5000, f"YAML: {'9' * 64}... is too large; allowed: whole numbers up to 9223372036854775807 ("),
        (
            "- 9223372036854775808",
            "YAML: 9223372036854775808 is too large; allowed: whole numbers up to 922337203685",
        ),
    ],
)
def test_bad_yaml_is_refused_with_line_and_column(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        parse_yaml(text, "r.yaml")
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


def test_a_missing_recipe_names_the_nearest_file(tmp_path: Path) -> None:
    write(tmp_path, hmoe="model: 1")
    with pytest.raises(RecipeError) as error:
        read_yaml(tmp_path / "hmo.yaml")
    assert str(error.value) == f"no such recipe: {tmp_path}/hmo.yaml; did you mean {tmp_path}/hmoe.yaml?"


def test_a_missing_recipe_in_a_missing_folder_is_refused() -> None:
    with pytest.raises(RecipeError, match="^no such recipe: nowhere/x.yaml$"):
        read_yaml(Path("nowhere/x.yaml"))


def test_a_folder_or_a_binary_file_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="^cannot read the recipe: .*Is a directory"):
        read_yaml(tmp_path)
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match=r"^cannot read the recipe: .*codec can't decode.*x\.yaml\)$"):
        read_yaml(tmp_path / "x.yaml")


@pytest.mark.parametrize(("text", "got"), [("", "NoneType"), ("[1]", "list"), ("a", "str")])
def test_a_recipe_is_a_mapping(tmp_path: Path, text: str, got: str) -> None:
    write(tmp_path, r=text)
    with pytest.raises(RecipeError, match=f"^a recipe is a mapping of keys to values, got {got} "):
        read_yaml(tmp_path / "r.yaml")


def test_mappings_merge_and_everything_else_is_replaced() -> None:
    base = {"a": {"x": 1, "y": [1, 2]}, "b": 3, "s": {"kind": "cosine", "warmup": 0.1}}
    own = {"a": {"y": [9], "z": {"k": 1}}, "s": {"kind": "constant"}}
    assert merge(base, own) == {"a": {"x": 1, "y": [9], "z": {"k": 1}}, "b": 3, "s": {"kind": "constant"}}
    assert merge(base, {"s": {"warmup": 0.2}})["s"] == {"kind": "cosine", "warmup": 0.2}
    assert merge(base, {"s": {"kind": "cosine", "final": 0}})["s"] == {"kind": "cosine", "warmup": 0.1, "final": 0}
    assert base == {"a": {"x": 1, "y": [1, 2]}, "b": 3, "s": {"kind": "cosine", "warmup": 0.1}}


def test_a_budget_in_another_unit_replaces_the_base_s(tmp_path: Path) -> None:
    write(tmp_path, base="train: {budget: {steps: 10}, seed: 0}", r="extends: base.yaml\ntrain: {budget: {tokens: 5}}")
    assert read_tree(tmp_path / "r.yaml")[0] == {"train": {"budget": {"tokens": 5}, "seed": 0}}
    tree, _ = read_tree(tmp_path / "r.yaml", ["train.budget.flops=1e9"])
    assert tree == {"train": {"budget": {"flops": 1e9}, "seed": 0}}


def test_extends_goes_one_level(tmp_path: Path) -> None:
    write(tmp_path, a="x: 1", b="extends: a.yaml", c="extends: b.yaml")
    assert read_tree(tmp_path / "b.yaml")[0] == {"x": 1}
    with pytest.raises(RecipeError) as error:
        read_tree(tmp_path / "c.yaml")
    message = f"extends goes one level: {tmp_path}/b.yaml itself extends a.yaml ({tmp_path}/c.yaml: extends)"
    assert str(error.value) == message


def test_a_missing_or_wrong_base_is_refused(tmp_path: Path) -> None:
    write(tmp_path, r="extends: bass.yaml", base="x: 1", s="extends: [base.yaml]")
    with pytest.raises(RecipeError) as error:
        read_tree(tmp_path / "r.yaml")
    nearest = f"no such recipe: {tmp_path}/bass.yaml; did you mean {tmp_path}/base.yaml?"
    assert str(error.value) == f"{nearest}, extended by {tmp_path}/r.yaml"
    with pytest.raises(RecipeError, match=r"^extends=\['base.yaml'\]: expected the path of one recipe "):
        read_tree(tmp_path / "s.yaml")


def test_overrides_set_values_at_any_depth(tmp_path: Path) -> None:
    write(tmp_path, r="a: {b: [{c: 1}, {c: 2}]}\nm: {2: {w: 1}}\nn: null")
    overrides = ["a.b.1.c=1e-3", "a.b.0={c: [x, y]}", "m.2.w=true", "m.3.w=5", "n.new.deep=z", "a.e="]
    tree, _ = read_tree(tmp_path / "r.yaml", overrides)
    assert tree == {
        "a": {"b": [{"c": ["x", "y"]}, {"c": 1e-3}], "e": None},
        "m": {2: {"w": True}, 3: {"w": 5}},
        "n": {"new": {"deep": "z"}},
    }


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("a", "override 'a' is not of the form key.key=value (command line)"),
        ("a..b=1", "override 'a..b=1' is not of the form key.key=value (command line)"),
        ("=1", "override '=1' is not of the form key.key=value (command line)"),
        ("a.b.2=1", "list index 2 in a.b; allowed: 0 to 1 (command line: a.b.2)"),
        ("a.b.x=1", "list index 'x' in a.b; allowed: 0 to 1 (command line: a.b.x)"),
        ("a.e.0=1", "list index 0 in a.e; allowed: none, the list is empty (command line: a.e.0)"),
        ("a.w.c.d=1", "a.w=3 has no keys below it, so no 'c' (command line: a.w.c.d)"),
        ("a.w=[1", "YAML: expected ',' or ']', but got '<stream end>' (command line: a.w: line 1, column 3)"),
        ("a.w={x: 1, x: 2}", "YAML: key 'x' stands twice, first on line 1 (command line: a.w: line 1, column 8)"),
    ],
)
def test_bad_overrides_are_refused(tmp_path: Path, override: str, message: str) -> None:
    write(tmp_path, r="a: {b: [1, 2], e: [], w: 3}")
    with pytest.raises(RecipeError) as error:
        read_tree(tmp_path / "r.yaml", [override])
    assert str(error.value) == message


def test_a_place_names_the_file_in_which_the_value_stands(tmp_path: Path) -> None:
    write(tmp_path, base="a: {x: 1, y: {z: 1}}", r="extends: base.yaml\na: {w: 1}")
    _, origin = read_tree(tmp_path / "r.yaml", ["a.y.z=3"])
    assert origin.where(("a", "w")) == f"{tmp_path}/r.yaml: a.w"
    assert origin.where(("a", "x")) == f"{tmp_path}/base.yaml: a.x"
    assert origin.where(("a", "y", "z")) == "command line: a.y.z"
    assert origin.where(("a",)) == origin.where(("a", "y")) == "command line: a.y.z"
    assert Origin(tmp_path / "r.yaml", {"a": {}}).where(("a",)) == f"{tmp_path}/r.yaml: a"
    two = Origin(tmp_path / "r.yaml", {}, overrides=(("a", "y"), ("b",), ("a", "z"), ("a", "z")))
    assert two.where(("a",)) == "command line: a.y, a.z"
    assert origin.where(()) == f"{tmp_path}/r.yaml: top level"
