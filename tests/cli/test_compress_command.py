"""moestro compress, from the command line."""

import json

import pytest

from moestro.cli import main
from tests.formats.folders import mixtral_config, mixtral_tensors, write_folder


@pytest.fixture
def folders(tmp_path):
    config = mixtral_config(num_local_experts=8)
    write_folder(tmp_path / "base", mixtral_tensors(8, seed=1), config)
    return write_folder(tmp_path / "src", mixtral_tensors(8), config, 2), tmp_path


def arguments(src, dst, *more):
    return ["compress", str(src), str(dst), *map(str, more)]


def by_norm(tmp_path, ratio=0.25):
    return "--method", "router-norm", "--ratio", ratio, "--reference", tmp_path / "base"


def test_plan_and_apply_are_two_steps_or_one(folders, capsys):
    src, tmp_path = folders
    assert main(arguments(src, tmp_path / "one", *by_norm(tmp_path))) == 0
    assert "wrote" in capsys.readouterr().out
    assert main(arguments(src, tmp_path / "plan.json", *by_norm(tmp_path), "--plan-only")) == 0
    assert not (tmp_path / "plan").exists()
    assert main(arguments(src, tmp_path / "two", "--plan", tmp_path / "plan.json")) == 0
    one, two = ({p.name for p in (tmp_path / name).iterdir()} for name in ("one", "two"))
    # what was asked for is noted where the command made the plan itself
    assert one - two == {"compression_request.json"} and two <= one
    for path in (tmp_path / "two").iterdir():
        assert (tmp_path / "one" / path.name).read_bytes() == path.read_bytes(), path.name
    assert json.loads((tmp_path / "one" / "config.json").read_text())["num_local_experts"] == 6
    assert not list(tmp_path.glob(".writing-*"))
    assert main(arguments(src, tmp_path / "one", *by_norm(tmp_path))) == 0


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        ((), 2, "--method and --ratio are needed, or --plan; methods:"),
        (
            ("--method", "router-norms", "--ratio", "0.5"),
            1,
            "unknown method 'router-norms'; did you mean 'router-norm'?",
        ),
        (("--method", "router-norm", "--ratio", "0.5"), 1, "say where it is (--reference)"),
        (("--method", "router-norm", "--ratio", "0.9"), 1, "fewer than the 2 experts that a token visits"),
        (
            ("--method", "router-norm", "--ratio", "0.5", "--semantics", "zero"),
            1,
            "a stock folder cannot say semantics",
        ),
        (("--method", "router-norm", "--ratio", "0.5", "--plan-only"), 2, "a .json file"),
        (("--plan", "x.json", "--ratio", "0.5"), 2, "it does not go with --ratio"),
        (("--plan", "x.json"), 1, "no such plan"),
        (("--method", "router-norm", "--ratio", "0.5", "--option", "center"), 2, "not of the form key=value"),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(folders, capsys, more, code, said):
    src, tmp_path = folders
    assert main(arguments(src, tmp_path / "dst", *more)) == code
    assert said in capsys.readouterr().err
    assert not (tmp_path / "dst").exists()


def test_a_plan_with_different_numbers_is_written_equal_where_asked(folders, capsys):
    src, tmp_path = folders
    main(arguments(src, tmp_path / "plan.json", *by_norm(tmp_path), "--plan-only"))
    tree = json.loads((tmp_path / "plan.json").read_text())
    best = max(tree["layers"][1]["keep"], key=tree["layers"][1]["scores"]["router_norm_change"].__getitem__)
    lost = next(e for e in tree["layers"][1]["keep"] if e != best)
    tree["layers"][1]["keep"].remove(lost)
    (tmp_path / "plan.json").write_text(json.dumps(tree))
    assert main(arguments(src, tmp_path / "dst", "--plan", tmp_path / "plan.json")) == 1
    assert "a number of experts of its own for every layer. Alternatives: " in capsys.readouterr().err
    assert main(arguments(src, tmp_path / "dst", "--plan", tmp_path / "plan.json", "--uniform")) == 0
    plan = json.loads((tmp_path / "dst" / "compression_plan.json").read_text())
    assert [len(layer["keep"]) for layer in plan["layers"]] == [6, 6] and plan["options"]["uniform"] is True
    scores = tree["layers"][1]["scores"]["router_norm_change"]
    gone = [e for e in range(8) if e not in tree["layers"][1]["keep"]]
    assert max(gone, key=scores.__getitem__) in plan["layers"][1]["keep"]
