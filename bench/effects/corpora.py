"""The texts on which effects are measured: recipe keys for each, from a folder of corpora."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.harness import ROOT

# Where `--data` looks unless told otherwise: beside the checkout.
DATA = ROOT.parent / "shared" / "data"
# Files of each corpus below the data folder. A held-out file where there is one; else a share of the documents.
FILES: dict[str, dict[str, dict[str, Any]]] = {
    "wikitext-2": {
        "data.source": {"kind": "text", "paths": "lm/wikitext-2/train.txt", "split": "heading"},
        "data.val_source": {"kind": "text", "paths": "lm/wikitext-2/valid.txt", "split": "heading"},
    },
    "redpajama": {"data.source": {"kind": "jsonl", "paths": "lm/redpajama_sample.jsonl.xz"}},
    "tech-docs": {"data.source": {"kind": "jsonl", "paths": "lm/tech_docs.jsonl.xz"}},
    "speeches": {"data.source": {"kind": "jsonl", "paths": "lm/us_speeches.jsonl.xz"}},
}
# The text of `--quick`, which is in every checkout.
PAGES = "pages"


def corpus_settings(name: str, folder: Path) -> Mapping[str, Any]:
    """The recipe keys that put corpus `name` in place of a recipe's own.

    Raises: ValueError for an unknown corpus, FileNotFoundError where its files are not below `folder`.
    """
    if name == PAGES:
        source = {"kind": "text", "paths": str(ROOT / "docs"), "split": "blank-line"}
        return {"data.source": source, "data.tokenizer": {"kind": "bytes"}, "data.seq_len": 32}
    if name not in FILES:
        raise ValueError(f"corpus {name!r}, allowed: {', '.join((*FILES, PAGES))}")
    settings = {}
    for key, source in FILES[name].items():
        path = folder / source["paths"]
        if not path.exists():
            raise FileNotFoundError(f"corpus {name}: no file {path}; --data names the folder of corpora")
        settings[key] = {**source, "paths": str(path)}
    return settings
