"""Operations are tested with new memory poisoned: an element that nothing writes is NaN."""

from collections.abc import Iterator

import jaxtyping
import pytest
import torch

from moestro.ops import native


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
