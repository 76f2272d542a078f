"""Experts that are drawn: what rounding does to a model of theirs."""

import pytest
import torch

from moestro.model import Transformer
from moestro.ops import backend
from moestro.recipe.build import build_model
from moestro.recipe.load import load_recipe
from tests.conftest import ROOT


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "close", "most"), [(torch.float64, 1e-10, 0.0), (torch.float32, 1e-5, 0.5)])
def test_ways_of_computing_differ_where_a_draw_does_and_after(dtype: torch.dtype, close: float, most: float) -> None:
    """The bits of a token's logits say whom it draws, and kernels and batches differ in the last of them. In float64
    nobody draws another expert; in float32 a token does now and then, which all after it see."""
    torch.manual_seed(0)
    model = build_model(load_recipe(ROOT / "recipes" / "stratified.yaml"), 257).to(dtype).eval()
    ids = torch.randint(0, 257, (8, 32))
    logits, chosen = run(model, ids)
    for name, batch in (("reference", 8), ("fused", 2)):
        with backend.force(name):
            parts = [run(model, part) for part in ids.split(batch)]
        others, theirs = (torch.cat(each) for each in zip(*parts, strict=True))
        apart = (theirs != chosen).any(-1).view(ids.shape).cummax(dim=1).values
        assert apart.double().mean() <= most
        assert (others - logits)[~apart].abs().max() < close


def run(model: Transformer, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and [t, passes * experts] which experts each token uses in each pass."""
    found, used = model(ids), []
    for trace in found.traces:
        uses = trace.routing.dense() > 0
        if trace.origin is not None:
            uses = uses.new_zeros(ids.numel(), uses.shape[1]).index_copy(0, trace.origin.token, uses)
        used.append(uses)
    return found.logits, torch.cat(used, dim=-1)
