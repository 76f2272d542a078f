"""The texts on which effects are measured: recipe keys for each, from a folder of corpora."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.harness import ROOT

# Where `--data` looks unless told otherwise: beside the checkout.
DATA = ROOT.parent / "shared" / "data"
MIXED, LITTLE = "tech-docs and speeches", "little text"
# Files of each corpus below the data folder. A held-out file where there is one; else a share of the documents.
FILES: dict[str, dict[str, Any]] = {
    "wikitext-2": {
        "data.source": {"kind": "text", "paths": "lm/wikitext-2/train.txt", "split": "heading"},
        "data.val_source": {"kind": "text", "paths": "lm/wikitext-2/valid.txt", "split": "heading"},
    },
    "redpajama": {"data.source": {"kind": "jsonl", "paths": "lm/redpajama_sample.jsonl.xz"}},
    "tech-docs": {"data.source": {"kind": "jsonl", "paths": "lm/tech_docs.jsonl.xz"}},
    "speeches": {"data.source": {"kind": "jsonl", "paths": "lm/us_speeches.jsonl.xz"}},
    # as much of each, so that none outweighs the other
    MIXED: {
        "data.source": {
            "kind": "grouped",
            "sources": [
                {"kind": "jsonl", "paths": "lm/tech_docs.jsonl.xz"},
                {"kind": "jsonl", "paths": "lm/us_speeches.jsonl.xz"},
            ],
            "most_bytes": 2_900_000,
        }
    },
    # a twentieth of a short text, read over and over, and the rest held out
    LITTLE: {
        "data.source": {"kind": "text", "paths": "lm/wikitext-2/valid.txt", "split": "heading"},
        "data.val_fraction": 0.95,
    },
}
# The texts of `--quick`, which are in every checkout.
PAGES, BOTH = "pages", "pages and recipes"
# What stands for a corpus there, where pages would not do.
QUICK = {MIXED: BOTH}


def corpus_settings(name: str, folder: Path) -> Mapping[str, Any]:
    """The recipe keys that put corpus `name` in place of a recipe's own.

    Raises: ValueError for an unknown corpus, FileNotFoundError where its files are not below `folder`.
    """
    if name in (PAGES, BOTH):
        source: dict[str, Any] = {"kind": "text", "paths": str(ROOT / "docs"), "split": "blank-line"}
        if name == BOTH:
            recipes = {"kind": "text", "paths": str(ROOT / "recipes"), "suffixes": [".yaml"]}
            source = {"kind": "grouped", "sources": [source, recipes]}
        return {"data.source": source, "data.tokenizer": {"kind": "bytes"}, "data.seq_len": 32}
    if name not in FILES:
        raise ValueError(f"corpus {name!r}, allowed: {', '.join((*FILES, PAGES, BOTH))}")
    return {key: _found(value, name, folder) for key, value in FILES[name].items()}


def _found(value: Any, name: str, folder: Path) -> Any:
    """A source with the places of its files in `folder`; anything else as it is."""
    if not isinstance(value, dict):
        return value
    if "sources" in value:
        return {**value, "sources": [_found(source, name, folder) for source in value["sources"]]}
    path = folder / value["paths"]
    if not path.exists():
        raise FileNotFoundError(f"corpus {name}: no file {path}; --data names the folder of corpora")
    return {**value, "paths": str(path)}
