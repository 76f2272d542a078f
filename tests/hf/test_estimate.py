"""The memory formula on decoders of transformers."""

import pytest

from moestro.hf import Hosted
from moestro.train import Budget, TrainSettings
from moestro.train.estimate import estimate_memory
from tests.hf.families import DENSE, MOE, tiny


@pytest.mark.parametrize("family", [*MOE, *DENSE])
def test_every_family_is_estimated(family: str):
    model = Hosted(tiny(family))
    settings = TrainSettings(Budget(steps=1), batch_size=4)
    estimate = estimate_memory(model, 64, 16, settings)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert estimate.parameters == 4 * sum(p.numel() for p in model.parameters()) and estimate.optimizer == 8 * trained
    # 64 tokens, and at least the input of either norm in every block
    assert estimate.activations > 64 * 8 * 32 * len(model.blocks)
