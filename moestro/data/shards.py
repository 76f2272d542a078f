"""Token shards: a corpus as two memory-mapped files a split, built once, checked whenever they are opened.

A folder holds `train` and `val`, each as `.bin` (token ids; every document opens with eos, one more eos closes the
split) and `.idx` (int64 pairs, one a document: where it opens, and how many bytes its text has beyond what its tokens
stand for, which is 0 for an exact tokenizer), where the corpus tells groups apart also as `.groups` (int64, one a
document), the tokenizer, and `meta.json` (counts and hashes).
"""

import hashlib
import json
import logging
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moestro.data.corpus import Corpus
from moestro.data.sources import Document
from moestro.data.tokenizers import Tokenizer
from moestro.ops.whole_files import sha256 as file_hash
from moestro.ops.whole_files import sha256_json
from moestro.upgrades import SHARDS

SPLITS = ("train", "val")
# characters of text encoded at once: bounds memory, keeps all cores busy
BATCH_CHARACTERS = 2_000_000
# tokens of one document that are looked up and written at once: a long document is not held several times over
PIECE = 1_000_000
# above this share of bytes that the tokens do not stand for, bits per byte would not measure the text
MAX_BYTE_ERROR = 0.01

log = logging.getLogger("moestro.data")


@dataclass(frozen=True)
class SplitMeta:
    """What meta.json says of one split."""

    n_tokens: int
    n_documents: int
    n_bytes: int  # of the text, in UTF-8
    inexact_documents: int  # whose tokens stand for more or fewer bytes than their text has
    byte_error: int  # sum of |bytes of text - bytes its tokens stand for|
    zlib_bytes: int  # of the text, by zlib -9; held-out split only, else 0
    text_sha256: str
    bin_sha256: str
    idx_sha256: str
    groups_sha256: str | None = None  # None: the corpus tells no groups apart


@dataclass(frozen=True)
class Shard:
    """One split of a built corpus."""

    tokens: np.ndarray  # memory-mapped, uint16 or uint32
    index: np.ndarray  # memory-mapped, int64 (documents, 2)
    meta: SplitMeta
    groups: np.ndarray | None = None  # memory-mapped, int64 (documents,)

    @property
    def sha256(self) -> tuple[str, ...]:
        """Of every file."""
        hashes = (self.meta.bin_sha256, self.meta.idx_sha256, self.meta.groups_sha256)
        return tuple(one for one in hashes if one is not None)


def write_shards(folder: Path, key: str, corpus: Corpus, tokenizer: Tokenizer) -> None:
    """Encode the corpus into `folder`, reading every document once and holding few of them.

    Raises: ValueError where there is nothing to train on or nothing held out, or the bytes do not add up.
    """
    writers = {split: _Writer(folder, split, tokenizer) for split in SPLITS}
    for batch in _batches(corpus.documents("writing tokens")):
        encoded = tokenizer.encode_batch([document.text for _, document in batch])
        for (split, document), ids in zip(batch, encoded, strict=True):
            writers[split].add(document, ids)
    splits = {split: writer.close() for split, writer in writers.items()}
    _check_content(splits, corpus)
    tokenizer.save(folder)
    meta = {
        SHARDS.key: SHARDS.version,
        "key": key,
        "name": corpus.name,
        "dtype": token_dtype(tokenizer.vocab_size).name,
        "tokenizer": tokenizer.fingerprint(),
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "splits": {split: asdict(part) for split, part in splits.items()},
    }
    meta["checksum"] = sha256_json(meta)
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")


def read_meta(folder: Path) -> dict[str, Any]:
    """meta.json of a built corpus. Raises: FileNotFoundError, ValueError or VersionError that name the file."""
    path = folder / "meta.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; this folder holds no token shards")
    try:
        meta = json.loads(path.read_text())
    except ValueError as error:
        raise _damaged(path, f"it is not valid JSON ({error})") from error
    if not isinstance(meta, dict):
        raise _damaged(path, "it is no JSON object")
    # those of earlier releases have none
    checksum = meta.pop("checksum", None)
    if checksum is not None and checksum != sha256_json(meta):
        raise _damaged(path, "its checksum is that of other content")
    return SHARDS.upgraded(meta, path)


def open_shard(folder: Path, split: str, meta: dict[str, Any]) -> Shard:
    """Memory-map one split after checking sizes and hashes against meta.json."""
    try:
        part, dtype = SplitMeta(**meta["splits"][split]), np.dtype(meta["dtype"])
    except (KeyError, TypeError) as error:
        raise _damaged(folder / "meta.json", f"an entry is missing or unknown ({error})") from error
    files = (
        (folder / f"{split}.bin", dtype, (part.n_tokens,), part.bin_sha256),
        (folder / f"{split}.idx", np.dtype(np.int64), (part.n_documents + 1, 2), part.idx_sha256),
    )
    if part.groups_sha256 is not None:
        kinds = (folder / f"{split}.groups", np.dtype(np.int64), (part.n_documents,), part.groups_sha256)
        files = (*files, kinds)
    for path, dtype, shape, sha256 in files:
        _check_file(path, dtype.itemsize * int(np.prod(shape)), sha256)
    tokens, index, *groups = (_mapped(path, dtype, shape) for path, dtype, shape, _ in files)
    return Shard(tokens, index, part, *groups)


def _mapped(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    return np.memmap(path, dtype, mode="r", shape=shape) if np.prod(shape) else np.zeros(shape, dtype)


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 where every id fits, else uint32."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


class _Writer:
    """Writes one split, counting and hashing as it goes."""

    def __init__(self, folder: Path, split: str, tokenizer: Tokenizer):
        self.files = {end: (folder / f"{split}.{end}").open("wb") for end in ("bin", "idx")}
        self.hashes = {end: hashlib.sha256() for end in ("bin", "idx", "text")}
        self.dtype, self.eos_id = token_dtype(tokenizer.vocab_size), tokenizer.eos_id
        self.byte_lengths = tokenizer.byte_lengths()
        self.zlib = zlib.compressobj(9) if split == "val" else None
        self.n_tokens = self.n_documents = self.n_bytes = self.zlib_bytes = 0
        self.inexact_documents = self.byte_error = 0
        self.path, self.groups = folder / f"{split}.groups", list[int]()

    def add(self, document: Document, ids: np.ndarray) -> None:
        text = document.text.encode()
        if (ids == self.eos_id).any():
            raise ValueError(f"{document.where}: the text holds the token that separates documents (eos {self.eos_id})")
        pieces = [ids[start : start + PIECE] for start in range(0, len(ids), PIECE)]
        extra = len(text) - sum(int(self.byte_lengths[piece].sum()) for piece in pieces)
        self._write("idx", np.array([self.n_tokens, extra], np.int64))
        self._write("bin", np.array([self.eos_id], self.dtype))
        for piece in pieces:
            self._write("bin", piece.astype(self.dtype))
        self.hashes["text"].update(len(text).to_bytes(8, "little"))
        self.hashes["text"].update(text)
        if self.zlib is not None:
            self.zlib_bytes += len(self.zlib.compress(text))
        if document.group is not None:
            self.groups.append(document.group)
        if len(self.groups) not in (0, self.n_documents + 1):
            raise ValueError(f"{document.where}: some documents are of a group and some of none; allowed: all or none")
        self.n_tokens += 1 + len(ids)
        self.n_documents += 1
        self.n_bytes += len(text)
        self.inexact_documents += extra != 0
        self.byte_error += abs(extra)

    def close(self) -> SplitMeta:
        self._write("idx", np.array([self.n_tokens, 0], np.int64))
        self._write("bin", np.array([self.eos_id], self.dtype))
        for file in self.files.values():
            file.close()
        return SplitMeta(
            n_tokens=self.n_tokens + 1,
            n_documents=self.n_documents,
            n_bytes=self.n_bytes,
            inexact_documents=self.inexact_documents,
            byte_error=self.byte_error,
            zlib_bytes=self.zlib_bytes + len(self.zlib.flush()) if self.zlib is not None else 0,
            **{f"{end}_sha256": done.hexdigest() for end, done in self.hashes.items()},
            groups_sha256=self._groups_written(),
        )

    def _groups_written(self) -> str | None:
        if not self.groups:
            return None
        content = np.array(self.groups, np.int64).tobytes()
        self.path.write_bytes(content)
        return hashlib.sha256(content).hexdigest()

    def _write(self, end: str, values: np.ndarray) -> None:
        self.files[end].write(values.data)
        self.hashes[end].update(values.data)


def _batches(documents: Iterator[tuple[str, Document]]) -> Iterator[list[tuple[str, Document]]]:
    batch, characters = [], 0
    for split, document in documents:
        batch.append((split, document))
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _check_content(splits: dict[str, SplitMeta], corpus: Corpus) -> None:
    train, val = splits["train"], splits["val"]
    documents = train.n_documents + val.n_documents
    if not documents:
        raise ValueError(f"{corpus.name} is empty: no document with text in it")
    if not val.n_documents:
        given = corpus.val_source.name if corpus.val_source else f"val_fraction={corpus.val_fraction}"
        raise ValueError(
            f"{corpus.name}: none of its {documents} documents is held out ({given}); "
            "raise val_fraction, cut the text into more documents, or give a val_source"
        )
    if not train.n_documents and corpus.val_fraction < 1:
        raise ValueError(
            f"{corpus.name}: all of its {documents} documents are held out (val_fraction={corpus.val_fraction})"
        )
    if train.n_documents and (train.groups_sha256 is None) != (val.groups_sha256 is None):
        raise ValueError(f"{corpus.name}: of training and held-out documents only one kind has groups; allowed: both")
    error, total = train.byte_error + val.byte_error, train.n_bytes + val.n_bytes
    if error > MAX_BYTE_ERROR * total:
        raise ValueError(
            f"{corpus.name}: its tokens miss or invent {error} of {total} bytes of text ({error / total:.1%}; allowed "
            f"{MAX_BYTE_ERROR:.0%}), so bits per byte would not measure the text; take a byte-level tokenizer"
        )
    if error:
        inexact = train.inexact_documents + val.inexact_documents
        log.warning(
            "%s: in %d of %d documents the tokens stand for other byte counts than the text (%d of %d bytes); "
            "the difference is put on the document's first token",
            corpus.name,
            inexact,
            documents,
            error,
            total,
        )


def _check_file(path: Path, size: int, sha256: str) -> None:
    if not path.is_file():
        raise _damaged(path, "it is missing")
    if (found := path.stat().st_size) != size:
        raise _damaged(path, f"it has {found} bytes, meta.json says {size}")
    if (hashed := file_hash(path)) != sha256:
        raise _damaged(path, f"its SHA-256 is {hashed[:12]}..., meta.json says {sha256[:12]}...")


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(f"{path}: damaged: {what}. Delete the folder {path.parent} and it will be built anew")
