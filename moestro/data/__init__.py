"""Floor 5: corpora, tokenizers, token shards, batches."""

from moestro.data.batches import IGNORE, Batch
from moestro.data.dataset import Dataset, TokenData, zlib_bpb
from moestro.data.grouped import GroupedSource
from moestro.data.hub import HubSource
from moestro.data.sources import (
    Document,
    JsonlSource,
    ParquetSource,
    Source,
    StdlibSource,
    TextSource,
    source_for,
)
from moestro.data.tokenizers import BPETokenizer, ByteTokenizer, FileTokenizer, Tokenizer, load_tokenizer

__all__ = [
    "IGNORE", "BPETokenizer", "Batch", "ByteTokenizer", "Dataset", "Document", "FileTokenizer", "GroupedSource",
    "HubSource", "JsonlSource", "ParquetSource", "Source", "StdlibSource", "TextSource", "TokenData", "Tokenizer",
    "load_tokenizer", "source_for", "zlib_bpb",
]  # fmt: skip
