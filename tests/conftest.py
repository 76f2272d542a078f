"""What every test runs under: checked shapes on the inner floors, one thread, a cache of its own, fixed examples."""

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from jaxtyping import install_import_hook

from tests import typechecker

ROOT = Path(__file__).resolve().parents[1]
WORDS = "the quick brown fox jumps over lazy dogs while seven wise owls watch from an old oak tree".split()
# Floors 0-3; installed before any of them is imported. torch.compile does not work through the hook
# (pytorch issue 122093), so tests that compile these modules run them in a process of their own.
CHECKED = ["cost", "experts", "layers", "ops", "routers", "routing"]
install_import_hook([f"moestro.{name}" for name in CHECKED], f"{typechecker.__name__}.check")

settings.register_profile("fixed", deadline=None, derandomize=True, database=None)
settings.load_profile("fixed")
torch.set_num_threads(1)
os.environ["HF_HUB_OFFLINE"] = "1"
# Triton reads this when it is imported: its kernels are then interpreted, on tensors of the CPU
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test draws the same random numbers whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """MOESTRO_CACHE for all tests of this session; the processes of one parallel run share it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "moestro-cache"
    folder.mkdir(exist_ok=True)
    before = os.environ.get("MOESTRO_CACHE")
    os.environ["MOESTRO_CACHE"] = str(folder)
    yield folder
    os.environ.pop("MOESTRO_CACHE")
    if before is not None:
        os.environ["MOESTRO_CACHE"] = before


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real corpora beside the checkout."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no corpora in {folder}")
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 2,000 different paragraphs."""
    file = tmp_path_factory.mktemp("text") / "words.txt"
    draw = random.Random(0)
    file.write_text("\n\n".join(" ".join(draw.choices(WORDS, k=20)) for _ in range(2000)))
    return file


@pytest.fixture(scope="session")
def small_data(text_file: Path) -> list[str]:
    """Overrides that put this text, as bytes, in place of a recipe's corpus and tokenizer."""
    return [
        f"data.source={{kind: text, paths: {text_file}, split: blank-line}}",
        "data.tokenizer={kind: bytes}",
        "train.tensorboard=false",
    ]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` need one."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no GPU on this machine"))
