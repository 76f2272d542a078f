"""What the data tests share: small corpora on the disk, and the shared real ones where they lie."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

# encoding in threads is no faster on texts this small
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SHARED = Path(__file__).parents[3] / "shared" / "data"

SENTENCES = [
    f"Story {i}: the {'old' if i % 2 else 'young'} fox number {i} saw a café, naïve and “shy”.\n" for i in range(200)
]


@pytest.fixture
def shared() -> Callable[[str], Path]:
    """A file of the shared real data, or a skip that names it."""

    def find(name: str) -> Path:
        path = SHARED / name
        if not path.exists():
            pytest.skip(f"shared data file {name} is absent (looked in {SHARED})")
        return path

    return find


@pytest.fixture
def stories(tmp_path: Path) -> Path:
    """200 short documents as JSON lines."""
    path = tmp_path / "stories.jsonl"
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(SENTENCES)))
    return path
