"""A small text, so that tests of recipes do not read a whole corpus."""

import random
from pathlib import Path

import pytest

WORDS = "the quick brown fox jumps over lazy dogs while seven wise owls watch from an old oak tree".split()


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
