"""Text to tokens and back, and how many bytes of text each token stands for."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tokenizers import Tokenizer as Model
from tokenizers import decoders, models, pre_tokenizers, trainers

from moestro.data.cache import appearing, digest
from moestro.data.corpus import Corpus
from moestro.data.files import longest_text
from moestro.data.token_pieces import ALPHABET, pieces_of
from moestro.ops.whole_files import forget_hashes, record_hashes, require_intact, write_bytes

END_OF_TEXT = "<|endoftext|>"
KNOWN_ENDS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>")
# texts longer than this are encoded in parts, so that memory stays bounded and cores are used
PART_CHARACTERS = 200_000
# encoded at once: a part for each core, up to a GB of what TOKEN_BYTES counts
CHARACTERS_AT_ONCE = PART_CHARACTERS * min(32, os.cpu_count() or 1)
# what the library holds of a token until it is asked for its ids; a byte of text is a token at most
TOKEN_BYTES = 140
PROBE = ("The  Quick\n\tbrown fox\n", "jumps over 13 dogs.")


class Tokenizer(Protocol):
    """What the rest of the package asks of a tokenizer. `eos_id` separates documents and never comes from text."""

    vocab_size: int
    eos_id: int

    def encode(self, text: str) -> list[int]: ...
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def token_bytes(self) -> list[bytes]: ...
    def byte_lengths(self) -> np.ndarray: ...
    def fingerprint(self) -> str: ...
    def save(self, folder: Path) -> None: ...
    def fitted(self, corpus: Corpus, cache_dir: Path) -> "Tokenizer": ...


class ByteTokenizer:
    """Every byte of UTF-8 is a token; token 256 ends a document."""

    vocab_size = 257
    eos_id = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        # as narrow as it comes: a document may be most of what memory holds
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i != self.eos_id).decode("utf-8", errors="replace")

    def token_bytes(self) -> list[bytes]:
        return [bytes([i]) for i in range(256)] + [b""]

    def byte_lengths(self) -> np.ndarray:
        return np.array([len(piece) for piece in self.token_bytes()], np.int64)

    def fingerprint(self) -> str:
        return digest("ByteTokenizer")

    def save(self, folder: Path) -> None:
        """Write the same tokenizer in the usual two files, which other programs read too."""
        equal = Model(models.BPE(vocab=ALPHABET, merges=[]))
        equal.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        equal.decoder = decoders.ByteLevel()
        equal.add_special_tokens([END_OF_TEXT])
        _write(folder, equal.to_str().encode(), END_OF_TEXT, kind="bytes")

    def fitted(self, corpus: Corpus, cache_dir: Path) -> "ByteTokenizer":
        return self


class FileTokenizer:
    """Any `tokenizer.json`: byte-level, or pieces with a space mark and byte fallback.

    `eos` is the token that separates documents; without it, `tokenizer_config.json` beside the file is asked,
    then the usual names. Special tokens that stand in the text are read as plain text.

    Raises: ValueError where the file is no tokenizer, has no such token, or does not give its text back.
    """

    def __init__(self, path: str | Path, eos: str | None = None):
        path = Path(path).expanduser()
        path = path / "tokenizer.json" if path.is_dir() else path
        self._model, self._json = _load(path)
        vocab = self._model.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1
        self.eos = eos or _configured_eos(path) or next((name for name in KNOWN_ENDS if name in vocab), "")
        if self.eos not in vocab:
            special = [token.content for token in self._model.get_added_tokens_decoder().values() if token.special]
            raise ValueError(f"{path}: no end-of-document token {self.eos!r}; give eos, one of: {special or 'none'}")
        self.eos_id = vocab[self.eos]
        self._pieces = pieces_of(self._model, json.loads(self._json), self.vocab_size)
        self._pieces[self.eos_id] = b""
        text = "".join(PROBE)
        if (back := self.decode(self._ids([text])[0])) != text:
            raise ValueError(
                f"{path}: changes text ({text!r} comes back as {back!r}), so bits per byte would not measure the text"
            )
        parts = self._ids(PROBE)
        self._may_cut = self.decode(parts[0] + parts[1]) == text

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        if not self._may_cut:
            _require_room(texts)
        parts = [list(_parts(text)) if self._may_cut else [text] for text in texts]
        groups = _grouped([part for text in parts for part in text])
        ids = (np.array(found, np.int64) for group in groups for found in self._ids(group))
        return [np.concatenate([next(ids) for _ in text]) for text in parts]

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode(list(ids), skip_special_tokens=True)

    def token_bytes(self) -> list[bytes]:
        return self._pieces

    def byte_lengths(self) -> np.ndarray:
        return np.array([len(piece) for piece in self._pieces], np.int64)

    def fingerprint(self) -> str:
        return digest("FileTokenizer", hashlib.sha256(self._json).hexdigest(), self.eos)

    def save(self, folder: Path) -> None:
        _write(folder, self._json, self.eos, kind="file")

    def fitted(self, corpus: Corpus, cache_dir: Path) -> "FileTokenizer":
        return self

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        return [found.ids for found in self._model.encode_batch_fast(list(texts), add_special_tokens=False)]


class BPETokenizer:
    """A byte-level BPE to be trained on the train split: `fitted` gives the tokenizer.

    Trains on the first `train_bytes` of the split; the same text gives the same tokenizer.
    """

    def __init__(self, vocab_size: int, train_bytes: int = 2**28):
        if vocab_size < 257:
            raise ValueError(f"vocab_size={vocab_size}; allowed: at least 257 (256 bytes and the end of a document)")
        self.vocab_size, self.train_bytes = vocab_size, train_bytes

    def fitted(self, corpus: Corpus, cache_dir: Path) -> FileTokenizer:
        """Train, or read what was trained before on the same text."""
        key = digest("BPETokenizer", self.vocab_size, self.train_bytes, corpus.fingerprint())
        folder = cache_dir / "tokenizers" / key[:24]
        if not folder.is_dir():
            with appearing(folder) as filling:
                _write(filling, self._trained(corpus).to_str().encode(), END_OF_TEXT, kind="file")
        return FileTokenizer(folder)

    def _trained(self, corpus: Corpus) -> Model:
        model = Model(models.BPE())
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        model.train_from_iterator(self._sample(corpus), trainer)
        if (size := model.get_vocab_size()) < self.vocab_size:
            raise ValueError(
                f"vocab_size={self.vocab_size}: the text of {corpus.name} gives {size} tokens; ask for less"
            )
        return model

    def _sample(self, corpus: Corpus) -> Iterator[str]:
        left = self.train_bytes
        for text in corpus.train_texts("training the tokenizer"):
            yield text
            left -= len(text.encode())
            if left <= 0:
                return


def load_tokenizer(folder: str | Path) -> ByteTokenizer | FileTokenizer:
    """The tokenizer that `save` wrote into a folder.

    Raises: FileNotFoundError where there is none; DamagedFile where it is another than what was written.
    """
    config = Path(folder) / "tokenizer_config.json"
    if not config.is_file():
        raise FileNotFoundError(f"{config}: no such file; this folder holds no saved tokenizer")
    require_intact(Path(folder), "tokenizer.json", config.name)
    return ByteTokenizer() if _json(config).get("moestro") == "bytes" else FileTokenizer(folder)


def _parts(text: str) -> Iterator[str]:
    """The text cut after a line break at least every PART_CHARACTERS characters."""
    start = 0
    while len(text) - start > PART_CHARACTERS:
        limit = start + PART_CHARACTERS
        cut = text.rfind("\n", start, limit) + 1 or limit
        yield text[start:cut]
        start = cut
    yield text[start:]


def _grouped(parts: list[str]) -> Iterator[list[str]]:
    """The parts in order, as many together as have CHARACTERS_AT_ONCE, one at least."""
    group, size = list[str](), 0
    for part in parts:
        if group and size + len(part) > CHARACTERS_AT_ONCE:
            yield group
            group, size = [], 0
        group.append(part)
        size += len(part)
    if group:
        yield group


def _require_room(texts: Sequence[str]) -> None:
    """Raises: ValueError where a text may not fit that is encoded in one piece: this tokenizer joins what lies on both
    sides of a line break."""
    longest = longest_text(TOKEN_BYTES)
    for text in texts:
        if (size := len(text.encode())) > longest:
            raise ValueError(
                f"a document of {size / 1e6:,.1f} MB for a tokenizer that cannot be given it in parts; with the memory "
                f"that is free now, allowed: {longest / 1e6:,.1f} MB. Cut it into several documents, take a byte-level "
                "tokenizer, or free memory"
            )


def _load(path: Path) -> tuple[Model, bytes]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such tokenizer file")
    if path.suffix != ".json":
        raise ValueError(f"{path}: unknown extension '{path.suffix}', a tokenizer is a tokenizer.json")
    content = path.read_bytes()
    try:
        model = Model.from_str(content.decode())
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path}: not a tokenizer.json: {error}") from error
    model.no_truncation()
    model.no_padding()
    model.encode_special_tokens = True
    # tokens are written once and must be a function of the text
    if getattr(model.model, "dropout", None):
        model.model.dropout = None
    return model, content


def _configured_eos(path: Path) -> str | None:
    config = path.with_name("tokenizer_config.json")
    eos = _json(config).get("eos_token") if config.is_file() else None
    return eos["content"] if isinstance(eos, dict) else eos


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error


def _write(folder: Path, content: bytes, eos: str, kind: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    forget_hashes(folder)
    write_bytes(folder / "tokenizer.json", content)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "moestro": kind}
    write_bytes(folder / "tokenizer_config.json", (json.dumps(config, indent=2) + "\n").encode())
    record_hashes(folder, ["tokenizer.json", "tokenizer_config.json"])
