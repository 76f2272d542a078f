"""Every test of this folder draws the same random numbers whatever ran before it."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
