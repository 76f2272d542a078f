"""Operations are tested with new memory poisoned: an element that nothing writes is NaN."""

import fcntl
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jaxtyping
import pytest
import torch

from moestro.ops import native
from moestro.ops.native import build, expert_tiles


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


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> native.Library:
    """The kernels for AMX, its tiles emulated: built once for all processes of a run."""
    if "avx512bf16" not in native.variants():
        pytest.skip("no AMX here, and no AVX-512 with products of bfloat16 to emulate it with")
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if os.environ.get("PYTEST_XDIST_WORKER") else shared
    library = shared / "emulated.so"
    with (shared / "emulated.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            flags = [flag for flag in build.VARIANTS["amx"] if not flag.startswith("-mamx")]
            # optimized less, because they are compiled longer than they run
            flags += ["-O1", "-D__AMX_BF16__=1", "-include", str(Path(__file__).with_name("amx_emulated.h"))]
            build.build(library, {"amx": flags})
    return native.Library(native.opened(library), "amx")


@pytest.fixture(params=build.VARIANTS)
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each variant of the compiled kernels; tiles of AMX are emulated where the processor has none."""
    with native.using(library_of(request.param, request)):
        yield request.param


@pytest.fixture(params=expert_tiles.PIECES)
def tiles(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each of them that multiplies in tiles."""
    with native.using(library_of(request.param, request)):
        yield request.param


def library_of(name: str, request: pytest.FixtureRequest) -> native.Library:
    """The kernels of a variant."""
    if name in native.variants():
        return replace(native.library(), variant=name)
    if name != "amx":
        pytest.skip(f"this processor has no {name}")
    return request.getfixturevalue("emulated")
