"""Models of every system as transformers know them, and runs to export."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from moestro.export import MoestroForCausalLM
from moestro.export.opening import configured
from moestro.recipe.build import run_training
from moestro.recipe.load import load_recipe
from moestro.routers.query_norm import BatchQueryNorm
from tests.conftest import ROOT

SYSTEMS = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
SHRUNK = {
    "peer_million": [
        "model.d_model=32",
        "model.layers.2.branches=[{kind: singleton, n_experts: 1024, sparse_gradients: true}]",
    ]
}
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def hosted(name: str) -> MoestroForCausalLM:
    """The tiny model of a recipe, at its first weights, over bytes."""
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml", ["data.tokenizer={kind: bytes}", *SHRUNK.get(name, [])])
    torch.manual_seed(0)
    model = MoestroForCausalLM(configured(recipe, 257)).eval()
    for module in model.modules():
        if isinstance(module, BatchQueryNorm):
            module.updates.fill_(1)
    return model


def some_tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def run_of(tmp_path_factory: pytest.TempPathFactory, small_data: list[str]) -> Callable[..., Path]:
    """The folder of a recipe's run of two steps; each is trained once."""
    folder, made, numbers = tmp_path_factory.mktemp("runs"), {}, itertools.count()

    def run(name: str, *overrides: str) -> Path:
        if (name, overrides) not in made:
            path = folder / f"{name}-{next(numbers)}"
            steps = ["train.budget.steps=2", "train.eval_tokens=256", *SHRUNK.get(name, [])]
            recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml", [*small_data, *steps, *overrides])
            with torch.enable_grad():
                run_training(recipe, path, show_preparation=False)
            made[name, overrides] = path
        return made[name, overrides]

    return run
