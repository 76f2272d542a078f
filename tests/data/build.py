"""Small data sets for the tests."""

import json
from pathlib import Path

from moestro.data import ByteTokenizer, Dataset, JsonlSource, TokenData


def build(stories: Path, cache: Path | None, tokenizer=None, seq_len: int = 32, **settings) -> Dataset:
    tokenizer = tokenizer or ByteTokenizer()
    return TokenData(JsonlSource(stories), tokenizer, seq_len, cache_dir=cache, **settings).prepare(progress=False)


def only(folder: Path) -> Path:
    (found,) = folder.iterdir()
    return found


def jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path
