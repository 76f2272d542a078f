"""Whatever a recipe gets wrong, at whatever depth, is refused with its place: shown on every key of every recipe."""

import re
from collections.abc import Iterator
from typing import Any

import pytest

from moestro.recipe.build import build_data, build_model, build_training
from moestro.recipe.load import Recipe, check_recipe, load_recipe
from moestro.recipe.resolve import copy_tree
from moestro.recipe.syntax import RecipeError
from tests.recipes.test_recipes import EVERY, FOLDER

Keys = tuple[Any, ...]
# Where a value is impossible for something that stands beside it.
BESIDE = {
    "model.ffn.branches": "recipes/hmoe.yaml: model.ffn.router.score",
    "model.layers.2.branches.0.n_experts": "recipes/peer.yaml: model.layers.2.router",
}


def leaves(tree: Any, keys: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """Every (path, value) below a tree, mappings and lists included."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*keys, key), value
        yield from leaves(value, (*keys, key))


def at(tree: Any, keys: Keys) -> Any:
    for key in keys:
        tree = tree[key]
    return tree


def refusal(recipe: Recipe, tree: dict) -> str:
    with pytest.raises(RecipeError) as error:
        check_recipe(Recipe(tree, recipe.origin))
    return str(error.value)


def dotted(keys: Keys) -> str:
    return ".".join(map(str, keys))


@pytest.mark.parametrize("name", EVERY)
def test_every_misspelled_key_is_refused_with_its_right_name(name: str) -> None:
    recipe = load_recipe(FOLDER / name)
    seen = 0
    for keys, _ in leaves(recipe.tree):
        *above, key = keys
        if isinstance(key, int):
            continue
        tree = copy_tree(recipe.tree)
        node = at(tree, tuple(above))
        wrong = key[:-1] + "x" + key[-1]
        node[wrong] = node.pop(key)
        message = refusal(recipe, tree)
        if key == "kind":
            assert message.startswith("missing key 'kind'; allowed: ")
            assert f": {dotted(tuple(above))})" in message
        elif key == "weight" and above[0] == "objectives":
            assert message.startswith("missing key 'weight'")
        elif key == "schedule" and above[0] == "objectives":
            # beside the weight, it belongs to no objective: what is allowed there does not name it
            assert message.startswith(f"unknown key {wrong!r}; allowed: ")
        else:
            assert message.startswith(f"unknown key {wrong!r}; did you mean {key!r}? allowed: "), message
            assert f": {dotted((*above, wrong))})" in message
        seen += 1
    assert seen > 25


@pytest.mark.parametrize("name", EVERY)
def test_every_value_of_another_type_is_refused(name: str) -> None:
    recipe = load_recipe(FOLDER / name)
    for keys, value in leaves(recipe.tree):
        wrong: Any = {"x": 1} if not isinstance(value, dict) else ["x"]
        for replacement in (wrong, True if not isinstance(value, bool) else "x"):
            tree = copy_tree(recipe.tree)
            at(tree, keys[:-1])[keys[-1]] = replacement
            message = refusal(recipe, tree)
            assert f": {dotted(keys)}" in message, message


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        (
            "hmoe",
            "modle.d_model=1",
            "unknown key 'modle'; did you mean 'model'? allowed: adapt, data, extends, model, objectives, ",
        ),
        (
            "hmoe",
            "model.ffn.router.select.topk=3",
            "unknown key 'topk'; did you mean 'top_k'? allowed: gate, limit, renormalize, scale, top_k ",
        ),
        (
            "hmoe",
            "model.ffn.router.select.kind=topk",
            "unknown kind 'topk'; did you mean 'top_k'? allowed: ",
        ),
        (
            "hmoe",
            "model.ffn.branches.0.widths.kind=arithmetics",
            "unknown kind 'arithmetics'; did you mean 'arithmetic'?",
        ),
        (
            "hmoe",
            "model.ffn.kind=dense",
            "unknown key 'router'; allowed: activation, ",
        ),
        (
            "hmoe",
            "model.ffn.router.select.top_k=two",
            "expected a whole number; got 'two' (a word) (command line: model.ffn.",
        ),
        ("hmoe", "optim.lr=fast", "expected a number; got 'fast' (a word) (command line: optim.lr)"),
        ("hmoe", "optim.lr=true", "expected a number; got true (true or false) (command line: optim.lr)"),
        (
            "hmoe",
            "optim.schedule.kind=linear",
            "unknown kind 'linear'; allowed: constant, cosine, wsd (command line: optim.s",
        ),
        (
            "hmoe",
            "optim.groups=[{pattern: x, lr_scal: 2}]",
            "unknown key 'lr_scal'; did you mean 'lr_scale'? allowed: lr_sca",
        ),
        ("hmoe", "train.optim.lr=1", "unknown key 'optim'; allowed: accumulate, batch_size, budget, "),
        (
            "hmoe",
            "train.precision=fp16",
            "unknown value 'fp16'; did you mean 'bf16'? allowed: bf16, fp32 (command line: tra",
        ),
        (
            "hmoe",
            "train.budget.step=5",
            "unknown key 'step'; did you mean 'steps'? allowed: flops, steps, tokens (command li",
        ),
        (
            "hmoe",
            "data.source.kind=stdlip",
            "unknown kind 'stdlip'; did you mean 'stdlib'? allowed: grouped, hub, jsonl, parquet, ",
        ),
        (
            "hmoe",
            "data.tokenizer=bpe",
            "expected a mapping with one kind of bpe, bytes, file",
        ),
        (
            "hmoe",
            "objectives=[{kind: load_balanc, weight: 1}]",
            "unknown kind 'load_balanc'; did you mean 'load_balance'?",
        ),
        (
            "hmoe",
            "objectives.0.weight=big",
            "expected a number; got 'big' (a word) (command line: objectives.0.weight)",
        ),
        ("hmoe", "objectives={}", "expected a list of parts; got a mapping of 0 (command line: objectives)"),
        (
            "hmoe",
            "objectives=[3]",
            "expected a mapping with a kind; got 3 (a whole number) (command line: objectives.0)",
        ),
        (
            "hmoe",
            "objectives=[{kind: load_balance, weight: 1}, {kind: load_balance, weight: 2}]",
            "objective 'load_balance' s",
        ),
        ("hmoe", "rules=[{kind: magic}]", "unknown kind 'magic'; allowed: "),
        (
            "hmoe",
            "model.layers={9: {kind: dense, width: 3}}",
            "layer 9, allowed: 0 to 3 (n_layers=4) (command line: model.la",
        ),
        (
            "hmoe",
            "model.layers={one: {kind: dense, width: 3}}",
            "layer 'one', allowed: 0 to 3 (n_layers=4) (command line: mod",
        ),
        (
            "hmoe",
            "model.layers={1: 3}",
            "expected a mapping with a kind; got 3 (a whole number) (command line: model.layers.1)",
        ),
        ("hmoe", "model.n_layers=0", "n_layers=0, allowed: at least 1 (command line: model.n_layers)"),
        ("hmoe", "model.d_model=-8", "d_model=-8, allowed: at least 1 (command line: model.d_model)"),
        (
            "hmoe",
            "model.attention.heads=3",
            "unknown key 'heads'; did you mean 'n_heads'? allowed: d_model, head_dim, n_heads",
        ),
        ("hmoe", "paper.arxiv=2408.10681", "expected a word; got 2408.10681 (a number) (command line: paper.arxiv)"),
        (
            "peer",
            "model.layers.2.router.query_norm=bach",
            "unknown value 'bach'; did you mean 'batch'? allowed: batch, layer",
        ),
    ],
)
def test_mistakes_on_the_command_line_are_refused(name: str, override: str, message: str, monkeypatch: Any) -> None:
    monkeypatch.chdir(FOLDER.parent)
    with pytest.raises(RecipeError) as error:
        load_recipe(f"recipes/{name}.yaml", [override])
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("hmoe", "model.ffn.router.select.top_k=9", "top_k=9 > 8 experts"),
        (
            "hmoe",
            "model.ffn.router.select.top_k=0",
            "top_k=0, allowed: at least 1",
        ),
        (
            "hmoe",
            "model.ffn.branches.0.widths=[3, -1]",
            "widths=[3, -1], allowed: at least one width, none negative",
        ),
        (
            "hmoe",
            "model.ffn.branches.0.widths.total=510",
            "total=510 is not a positive multiple of multiple_of=4",
        ),
        ("hmoe", "model.ffn.branches.0.activation=swish", "activation='swish'"),
        (
            "hmoe",
            "model.ffn.branches=[{kind: shared, width: 4}]",
            "missing key 'n_experts'",
        ),
        (
            "hmoe",
            "model.ffn.router.score.n_experts=4",
            "the router knows 4 experts, FFNBank 8",
        ),
        (
            "hmoe",
            "model.attention.n_heads=3",
            "d_model=128 is not a multiple of n_heads=3; give head_dim",
        ),
        (
            "hmoe",
            "model.ffn.router={kind: slots}",
            "blocks.0.ffn: SlotRouter looks at other tokens, so predictions would dep",
        ),
        (
            "peer",
            "model.layers.2.branches.0.n_experts=4000",
            "n_experts=4000 is not a square; nearest: 3969 and 4096",
        ),
        (
            "peer",
            "model.layers.2.router.top_k=65",
            "top_k=65, allowed: 1 to 64 (the square root of n_experts=4096)",
        ),
        (
            "peer",
            "model.layers.2.router.top_k=1",
            "top_k=1 with gate='softmax': the gate is the constant 1, so queries and key",
        ),
        (
            "hmoe",
            "train.budget={steps: 5, tokens: 5}",
            "budget needs exactly one of steps, tokens, flops; got steps=5, tokens=5 (",
        ),
        ("hmoe", "train.budget.steps=0", "budget steps=0: must be above 0"),
        (
            "hmoe",
            "train.accumulate=5",
            "train accumulate=5 does not divide batch_size=16: micro-batches are equal slices of a s",
        ),
        ("hmoe", "optim.lr=-1", "optim lr=-1.0: must be above 0"),
        (
            "hmoe",
            "optim.betas=[0.9, 1.5]",
            "optim betas=[0.9, 1.5]: allowed are two numbers in [0, 1)",
        ),
        (
            "hmoe",
            "optim.schedule.warmup=-1",
            "schedule warmup=-1.0: allowed is a share of the budget in [0, 1) or a whole num",
        ),
        ("hmoe", "optim.groups=[{pattern: '('}]", "group pattern='(' is not a regular expression: "),
        ("hmoe", "data.seq_len=0", "seq_len=0; allowed: at least 1"),
        (
            "hmoe",
            "data.val_fraction=0",
            "val_fraction=0.0; allowed: above 0, at most 1 (1: nothing to train on)",
        ),
        (
            "hmoe",
            "data.tokenizer.vocab_size=100",
            "vocab_size=100; allowed: at least 257 (256 bytes and the end of a documen",
        ),
        (
            "hmoe",
            "data.tokenizer={kind: file, path: nowhere.json}",
            "nowhere.json: no such tokenizer file",
        ),
    ],
)
def test_impossible_values_are_refused_with_their_place(
    name: str, override: str, message: str, monkeypatch: Any
) -> None:
    monkeypatch.chdir(FOLDER.parent)
    recipe = load_recipe(f"recipes/{name}.yaml", [override])
    with pytest.raises(RecipeError) as error:
        build_training(recipe)
        build_data(recipe)
        build_model(recipe, 300, "meta")
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
    key = override.partition("=")[0]
    where = BESIDE.get(key, f"command line: {key}")
    assert re.search(rf" \({re.escape(where)}[\w.]*\)$", str(error.value)), str(error.value)


def test_missing_sections_and_weights_are_named(tmp_path: Any) -> None:
    recipe = load_recipe(FOLDER / "hmoe.yaml")
    for section in ("model", "data", "train"):
        tree = {key: value for key, value in recipe.tree.items() if key != section}
        assert refusal(recipe, tree) == f"missing key {section!r} ({FOLDER}/hmoe.yaml: top level)"
    tree = copy_tree(recipe.tree)
    del tree["objectives"][0]["weight"]
    assert refusal(recipe, tree) == f"missing key 'weight' ({FOLDER}/hmoe.yaml: objectives.0)"
    for key in ("d_model", "n_layers", "attention", "ffn"):
        tree = copy_tree(recipe.tree)
        del tree["model"][key]
        assert refusal(recipe, tree) == f"missing key {key!r} ({FOLDER}/hmoe.yaml: model)"
    for key in ("source", "tokenizer", "seq_len"):
        tree = copy_tree(recipe.tree)
        del tree["data"][key]
        assert refusal(recipe, tree).startswith(f"missing key {key!r} (")
    tree = copy_tree(recipe.tree)
    del tree["train"]["budget"]
    assert refusal(recipe, tree).startswith("missing key 'budget' (")
