"""Every recipe of the repository: loads, builds on the meta device, survives writing; tiny ones train two steps."""

import json
import time
from pathlib import Path

import pytest
import torch

from moestro.model import Transformer
from moestro.recipe.build import build_data, build_model, build_training, run_training
from moestro.recipe.load import Recipe, load_recipe
from moestro.recipe.syntax import dump_yaml, read_yaml
from moestro.train.optim import build_optimizer
from tests.conftest import ROOT

FOLDER = ROOT / "recipes"
EVERY = sorted(
    str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*.yaml") if not {"compare", "convert"} & set(path.parts)
)
TINY = [name for name in EVERY if "/" not in name]
# What makes a recipe at the top small enough to be trained in a test.
SHRUNK = {
    "peer_million.yaml": [
        "model.d_model=32",
        "model.layers.2.branches=[{kind: singleton, n_experts: 1024, sparse_gradients: true}]",
    ]
}
SECONDS = 5.0


def on_meta(recipe: Recipe) -> Transformer:
    return build_model(recipe, recipe.tree["data"]["tokenizer"]["vocab_size"], "meta")


def test_the_repository_has_the_recipes_it_should() -> None:
    assert set(TINY) >= {"dense.yaml", "moe.yaml", "hmoe.yaml", "peer.yaml"}
    assert {"base/tiny.yaml", "base/small.yaml", "paper/hmoe-0.4b.yaml", "paper/peer-1m.yaml"} <= set(EVERY)


@pytest.mark.parametrize("name", EVERY)
def test_a_recipe_builds_and_survives_writing(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(FOLDER / name)
    model = on_meta(recipe)
    assert len(model.blocks) == recipe.model.n_layers
    settings, objectives, _ = build_training(recipe)
    assert settings.budget.total > 0 and all(getattr(weight, "weight", weight) > 0 for _, weight, _ in objectives)
    assert build_data(recipe).seq_len == recipe.data.keywords["seq_len"]
    recipe.write(tmp_path / "recipe.yaml")
    again = load_recipe(tmp_path / "recipe.yaml")
    assert again == recipe and again.tree == recipe.resolved and "extends" not in again.tree
    assert build_training(again)[0] == settings


def test_the_written_recipe_says_every_default(tmp_path: Path) -> None:
    overrides = ["optim.groups=[{pattern: norm}]", "data.val_source={kind: jsonl, paths: x}"]
    load_recipe(FOLDER / "peer.yaml", overrides).write(tmp_path / "recipe.yaml")
    tree = read_yaml(tmp_path / "recipe.yaml")
    assert tree["train"]["seed"] == 0 and tree["train"]["keep_last"] == 2 and tree["train"]["budget"] == {"steps": 500}
    assert tree["optim"]["eps"] == 1e-8 and tree["optim"]["schedule"]["final"] == 0.1
    assert tree["optim"]["groups"] == [{"pattern": "norm", "lr_scale": 1.0, "weight_decay": None}]
    assert tree["model"]["norm_eps"] == 1e-5 and tree["model"]["attention"]["rope_theta"] == 1e4
    fields = {"text_field": "text", "group_field": None, "groups": []}
    assert tree["data"]["val_source"] == {"kind": "jsonl", "paths": "x", **fields}
    layer = tree["model"]["layers"][2]
    assert layer["router"]["gate"] == "softmax" and layer["branches"][0]["output_std"] == 0.6
    # what the experts are told by their layer stays with the layer
    assert not {"d_model", "heads", "top_k", "gate"} & layer["branches"][0].keys()


def test_a_recipe_without_optim_says_which_one_it_was_trained_with(tmp_path: Path) -> None:
    tree = {key: value for key, value in load_recipe(FOLDER / "hmoe.yaml").tree.items() if key != "optim"}
    (tmp_path / "partial.yaml").write_text(dump_yaml(tree))
    partial = load_recipe(tmp_path / "partial.yaml")
    partial.write(tmp_path / "whole.yaml")
    whole = load_recipe(tmp_path / "whole.yaml")
    assert whole == partial and whole.tree == whole.resolved != partial.tree
    assert whole.tree["optim"]["lr"] == 1e-3
    assert whole.tree["optim"]["schedule"] == {"kind": "cosine", "warmup": 0.1, "final": 0.1}


def test_recipes_that_differ_in_a_default_written_out_are_equal() -> None:
    recipe = load_recipe(FOLDER / "hmoe.yaml")
    assert load_recipe(FOLDER / "hmoe.yaml", ["train.seed=0", "optim.clip=1"]) == recipe
    assert load_recipe(FOLDER / "hmoe.yaml", ["train.seed=1"]) != recipe


def test_experts_hear_of_their_routers_defaults() -> None:
    """A biased router weights by sigmoids unless it is told otherwise, and a singleton bank is scaled for that."""
    overrides = [
        "model.layers.2.router={kind: biased, score: {kind: linear}, top_k: 8}",
        "model.layers.2.branches=[{kind: singleton, n_experts: 4096}]",
    ]
    default, written = (
        build_model(load_recipe(FOLDER / "peer.yaml", [*overrides, *more]), 50).moe_layers()["blocks.2.ffn"].bank
        for more in ([], ["model.layers.2.router.gate=sigmoid"])
    )
    assert torch.equal(default.down, written.down)


@pytest.mark.parametrize(
    "name", [name for name in EVERY if load_recipe(FOLDER / name).data.keywords["source"].kind == "hub"]
)
def test_no_recipe_reads_a_hub_to_its_end_and_none_more_than_four_times(name: str) -> None:
    """427 tokens a document of C4: 365 million documents, 156 billion tokens."""
    recipe = load_recipe(FOLDER / name)
    documents = recipe.data.keywords["source"].value("max_documents")
    tokens = build_training(recipe)[0].budget.total / (
        3 * on_meta(recipe).expected_token_flops(recipe.data.value("seq_len"))
    )
    assert documents <= 50_000_000 and tokens / (427 * documents) < 4


@pytest.mark.parametrize("name", [name for name in EVERY if not name.startswith("base/")])
def test_a_system_names_its_paper_and_extends_a_base(name: str) -> None:
    recipe = load_recipe(FOLDER / name)
    assert recipe.paper.title and recipe.paper.arxiv and recipe.paper.differs
    assert recipe.origin.base_path is not None and recipe.origin.base_path.parent.name == "base"


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_recipe_trains_two_steps(name: str, tmp_path: Path, small_data: list[str]) -> None:
    shrunk = [*SHRUNK.get(name, []), "train.budget.steps=2", "train.eval_tokens=256"]
    recipe = load_recipe(FOLDER / name, [*small_data, *shrunk])
    begun = time.process_time()
    result = run_training(recipe, tmp_path / "run", show_preparation=False)
    assert time.process_time() - begun < SECONDS
    assert result["step"] == 2 and result["tokens"] == 2 * 16 * 128
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first, second = (line for line in lines if "loss" in line)
    # two steps of warmup on even bytes: near log 257 = 5.55 nats, and going down
    assert 4.5 < first["loss"] < 9 and second["loss"] != first["loss"]
    assert load_recipe(tmp_path / "run" / "recipe.yaml") == recipe


def parameters(model: Transformer) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def norms(recipe: Recipe) -> int:
    return (2 * recipe.model.n_layers + 1) * recipe.model.d_model


def active_parameters(model: Transformer, used_share: float) -> float:
    """All parameters, of the experts the share that is used when all are equally likely."""
    stored = sum(parameter.numel() for layer in model.moe_layers().values() for parameter in layer.bank.parameters())
    return parameters(model) - stored * (1 - used_share)


@pytest.mark.parametrize(("name", "millions"), [("dense-0.4b", 417.2), ("dense-1b", 1323.8)])
def test_the_dense_models_have_the_papers_parameters(name: str, millions: float) -> None:
    recipe = load_recipe(FOLDER / "paper" / f"{name}.yaml")
    d, width = recipe.model.d_model, recipe.tree["model"]["ffn"]["width"]
    total = parameters(on_meta(recipe))
    assert total == 2 * 32_000 * d + 12 * (4 * d * d + 3 * d * width) + norms(recipe)
    assert round((total - norms(recipe)) / 1e6, 1) == millions


@pytest.mark.parametrize("name", ["moe-0.4b", "hmoe-0.4b"])
def test_the_0_4b_mixtures_use_162_5_million_of_the_dense_parameters(name: str) -> None:
    recipe = load_recipe(FOLDER / "paper" / f"{name}.yaml")
    model = on_meta(recipe)
    router = 12 * 8 * 768
    assert parameters(model) == parameters(on_meta(load_recipe(FOLDER / "paper/dense-0.4b.yaml"))) + router
    assert round(active_parameters(model, 2 / 8) / 1e6, 1) == 162.5


def test_the_0_4b_widths_are_the_papers() -> None:
    for name in ("hmoe-0.4b", "hmoe-0.4b-top-p"):
        model = on_meta(load_recipe(FOLDER / "paper" / f"{name}.yaml"))
        layers = model.moe_layers().values()
        assert len(layers) == 12
        for layer in layers:
            assert layer.bank.widths == (864, 1056, 1248, 1440, 1632, 1824, 2016, 2208)


def test_the_interpreted_3b_model_comes_near_the_papers() -> None:
    recipe = load_recipe(FOLDER / "paper" / "hmoe-3b-interpreted.yaml")
    model = on_meta(recipe)
    assert round(parameters(model) / 1e9, 2) == 2.58
    assert round(active_parameters(model, 2 / 8) / 1e9, 2) == 0.77
    layer = next(iter(model.moe_layers().values()))
    assert layer.bank.widths == (2304, 2816, 3328, 3840, 4352, 4864, 5376, 5888)


def test_peer_has_a_million_experts_in_the_middle_block() -> None:
    recipe = load_recipe(FOLDER / "paper" / "peer-1m.yaml")
    model = on_meta(recipe)
    ((name, layer),) = model.moe_layers().items()
    experts, heads, key, d = 1024**2, 8, 256, 768
    assert name == "blocks.5.ffn" and layer.bank.n_experts == experts
    assert parameters(layer.bank) == 2 * experts * d == 1_610_612_736
    # queries, sub-keys of both sides shared by the heads, scale and shift of the query norm
    assert parameters(layer.router) == heads * key * d + 2 * 1024 * key // 2 + 2 * heads * key
    dense = parameters(on_meta(load_recipe(FOLDER / "base" / "peer.yaml")))
    assert parameters(model) == dense - 2 * d * 3072 + parameters(layer.router) + parameters(layer.bank)
    assert layer.router.rows_per_token() == heads * 16


def test_the_million_for_one_machine_is_a_million_trained_by_rows() -> None:
    recipe = load_recipe(FOLDER / "peer_million.yaml")
    model = on_meta(recipe)
    (layer,) = model.moe_layers().values()
    assert parameters(layer.bank) == 2 * 1024**2 * recipe.model.d_model == 536_870_912
    rows, dense = layer.bank.row_parameters(), build_optimizer(model, build_training(recipe)[0].optim).parts[0]
    assert [id(p) for p in rows] == [id(p) for p in layer.bank.parameters()]
    # weights and moments of the tables, then what is dense with gradient and moments: well within 24 GB
    stored = 3 * 4 * parameters(layer.bank)
    stored += 4 * 4 * sum(p.numel() for group in dense.param_groups for p in group["params"])
    assert stored < 7e9


def test_a_peer_layer_costs_what_its_paper_counts() -> None:
    model = on_meta(load_recipe(FOLDER / "paper" / "peer-1m.yaml"))
    layer = model.moe_layers()["blocks.5.ffn"]
    assert layer.router.flops(1) == pytest.approx(3.1e6 + 4.2e6, rel=0.01)
    assert layer.expected_token_flops() - layer.router.flops(1) == pytest.approx(0.39e6, rel=0.01)
    assert model.blocks[0].ffn.expected_token_flops() == pytest.approx(9.4e6, rel=0.01)
