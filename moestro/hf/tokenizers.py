"""Tokenizers of public checkpoints as ours."""

import tempfile
from pathlib import Path

from transformers import AutoTokenizer

from moestro.data import FileTokenizer

# What transformers can turn into a tokenizer.json.
OTHERS = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json")


def tokenizer_of(folder: str | Path) -> FileTokenizer:
    """The tokenizer in `folder`: its tokenizer.json, or one that transformers makes of a sentencepiece model or of a
    vocabulary with merges.

    Raises: FileNotFoundError where there is none of these, ValueError where it cannot be used: it changes text, has no
    token that ends a document, or exists in Python only.
    """
    folder = Path(folder)
    if (folder / "tokenizer.json").is_file():
        return FileTokenizer(folder)
    if not any((folder / name).is_file() for name in OTHERS):
        raise FileNotFoundError(f"{folder} holds no tokenizer: none of tokenizer.json, {', '.join(OTHERS)}")
    made = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if not getattr(made, "is_fast", False):
        raise ValueError(f"{folder}: {type(made).__name__} cannot be written as a tokenizer.json")
    with tempfile.TemporaryDirectory() as written:
        made.save_pretrained(written)
        try:
            return FileTokenizer(written)
        except ValueError as error:
            made_of = f"{folder} ({type(made).__name__} made of it)"
            raise ValueError(str(error).replace(str(Path(written) / "tokenizer.json"), made_of)) from error
