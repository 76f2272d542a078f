"""Two runs of a recipe are equal to the bit on the CPU: metrics, weights, moments, state of rules, random numbers."""

import pytest

from bench.reliability.contents import contents
from moestro.recipe.build import run_training
from moestro.recipe.load import load_recipe
from tests.conftest import ROOT

TINY = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
# unequal experts, one-neuron experts, one with a rule that changes the model
DEFAULT = {"hmoe", "peer", "dynmoe"}
SHRUNK = {
    "peer_million": [
        "model.d_model=32",
        "model.layers.2.branches=[{kind: singleton, n_experts: 4096, sparse_gradients: true}]",
        "train.keep_last=2",
    ]
}
FEW = ["train.budget={steps: 3}", "train.eval_tokens=256", "train.save_every=2", "train.eval_every=2"]


@pytest.mark.parametrize(
    "name", [name if name in DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in TINY]
)
def test_two_runs_of_a_recipe_are_equal_to_the_bit(name, tmp_path, small_data):
    overrides = [*small_data, *SHRUNK.get(name, []), *FEW, "train.batch_size=4", "train.tensorboard=false"]
    for run in ("one", "two"):
        recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml", overrides)
        run_training(recipe, tmp_path / run, show_preparation=False)
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert one == two
    assert sum(path.endswith("optimizer.safetensors") for path in one) == 2
