"""Operations are tested with new memory poisoned: an element that nothing writes is NaN."""

from collections.abc import Iterator

import jaxtyping
import pytest
import torch

from moestro.ops import native
from moestro.ops.native import expert_tiles


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Unwritten elements of new buffers are NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """torch may use two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def unchecked_shapes() -> Iterator[None]:
    """Annotated shapes are not looked at, as outside of tests."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that were run."""
    names: list[str] = []
    run = native.run
    monkeypatch.setattr(native, "run", lambda kernel, *rest: (names.append(kernel), run(kernel, *rest)))
    return names


@pytest.fixture(params=expert_tiles.PIECES)
def tiles(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each variant of the compiled kernels that multiplies in tiles."""
    if request.param not in native.variants():
        pytest.skip(f"this processor has no {request.param}")
    with native.variant(request.param):
        yield request.param
