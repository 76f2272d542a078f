"""Token shards: built once and whole, never silently wrong, and bytes that add up."""

import hashlib
import json
import logging
import os
import re
import tracemalloc
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Model
from tokenizers import decoders, models, normalizers, pre_tokenizers

from moestro.data import (
    BPETokenizer,
    ByteTokenizer,
    Document,
    FileTokenizer,
    JsonlSource,
    TextSource,
    TokenData,
    zlib_bpb,
)
from moestro.data import shards as shards_module
from moestro.data.corpus import Corpus, is_held_out
from moestro.ops.cache_folder import cache_root
from tests.data.build import build, jsonl, only
from tests.data.tokenizer_files import metaspace


def test_tokens_on_the_disk_are_the_documents(stories: Path, tmp_path: Path):
    build(stories, tmp_path / "cache")
    folder = only(tmp_path / "cache" / "tokens")
    texts = [document.text.encode() for document in JsonlSource(stories).documents()]
    for split, wanted in (("train", False), ("val", True)):
        documents = [text for text in texts if is_held_out(text.decode(), 0.05) is wanted]
        stream = [token for text in documents for token in (256, *text)] + [256]
        tokens = np.fromfile(folder / f"{split}.bin", np.uint16)
        assert tokens.tolist() == stream
        opens, extra = np.fromfile(folder / f"{split}.idx", np.int64).reshape(-1, 2).T
        assert opens.tolist() == [i for i, token in enumerate(stream) if token == 256] and not extra.any()
        part = json.loads((folder / "meta.json").read_text())["splits"][split]
        assert (part["n_documents"], part["n_bytes"]) == (len(documents), sum(map(len, documents)))
        assert part["bin_sha256"] == hashlib.sha256((folder / f"{split}.bin").read_bytes()).hexdigest()


def test_ids_above_65535_are_stored_whole(stories: Path, tmp_path: Path):
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i + 70_000 for i, letter in enumerate(letters)} | {"<|endoftext|>": 0}
    model = Model(models.BPE(vocab, []))
    model.pre_tokenizer, model.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    (tmp_path / "tokenizer.json").write_text(model.to_str())
    dataset = build(stories, tmp_path / "cache", FileTokenizer(tmp_path))
    assert dataset.vocab_size == 70_256
    assert sum(int(batch.n_bytes.sum()) for batch in dataset.val_batches(4)) == dataset.n_val_bytes
    assert (
        dataset.val_document(0)
        == next(t for t in map(json.loads, stories.open()) if is_held_out(t["text"], 0.05))["text"]
    )
    assert (only(tmp_path / "cache" / "tokens") / "val.bin").stat().st_size == 4 * (dataset.n_val_tokens + 1)


def test_built_once_and_keyed_by_content(stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cache = tmp_path / "cache"
    first = build(stories, cache)
    copy = tmp_path / "elsewhere" / stories.name
    copy.parent.mkdir()
    copy.write_bytes(stories.read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr("moestro.data.dataset.write_shards", None)
        assert build(stories, cache).fingerprint == first.fingerprint
        assert build(copy, cache, seq_len=64).folder == first.folder
    assert build(stories, cache, val_fraction=0.2).fingerprint != first.fingerprint
    assert build(stories, cache, BPETokenizer(300)).fingerprint != first.fingerprint
    copy.write_text(stories.read_text().replace("fox", "cat"))
    assert build(copy, cache).fingerprint != first.fingerprint
    assert len(list((cache / "tokens").iterdir())) == 4


def test_fingerprints_say_what_may_be_compared(stories: Path, tmp_path: Path):
    with_bytes, with_bpe = build(stories, tmp_path), build(stories, tmp_path, BPETokenizer(300))
    assert with_bytes.fingerprint != with_bpe.fingerprint
    assert with_bytes.text_fingerprint == with_bpe.text_fingerprint
    assert build(stories, tmp_path, seq_len=16).fingerprint != with_bytes.fingerprint
    assert build(stories, tmp_path, val_fraction=0.2).text_fingerprint != with_bytes.text_fingerprint


def test_the_cache_folder_is_the_environments(stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MOESTRO_CACHE", str(tmp_path / "mine"))
    assert build(stories, None).folder.parent == tmp_path / "mine" / "tokens"
    monkeypatch.delenv("MOESTRO_CACHE")
    assert cache_root() == Path.home() / ".cache" / "moestro"


def test_a_validation_source_of_its_own(stories: Path, tmp_path: Path):
    val = jsonl(tmp_path / "val.jsonl", ["held out one", "held out two"])
    dataset = build(stories, tmp_path / "cache", BPETokenizer(300), val_source=JsonlSource(val))
    assert [dataset.val_document(i) for i in range(dataset.n_val_documents)] == ["held out one", "held out two"]
    assert dataset.n_train_bytes == sum(len(d.text.encode()) for d in JsonlSource(stories).documents())
    changed = jsonl(val, ["held out one", "held out 2"])
    other = build(stories, tmp_path / "cache", BPETokenizer(300), val_source=JsonlSource(changed))
    assert other.text_fingerprint != dataset.text_fingerprint


def test_everything_held_out_for_evaluation_alone(stories: Path, tmp_path: Path):
    dataset = build(stories, tmp_path, val_fraction=1.0)
    assert dataset.n_val_documents == 200 and dataset.n_train_tokens == 0
    with pytest.raises(ValueError, match="all of it is held out .val_fraction=1., there is nothing to train on"):
        dataset.train_batch(0, 1, 0)


def test_zlib_measures_the_held_out_text(stories: Path, tmp_path: Path):
    dataset = build(stories, tmp_path, val_fraction=0.3)
    text = "".join(dataset.val_document(i) for i in range(dataset.n_val_documents)).encode()
    assert zlib_bpb(dataset) == 8 * len(zlib.compress(text, 9)) / len(text)


def test_memory_is_bounded_by_the_batch_not_by_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text = "the quick brown fox jumps over the lazy dog\n" * 23

    class Endless:
        name = "16 MB of foxes"

        def fingerprint(self) -> str:
            return "foxes"

        def documents(self):
            for i in range(16_000):
                yield Document(str(i), text, f"fox {i}", i / 16_000)

    monkeypatch.setattr(shards_module, "BATCH_CHARACTERS", 200_000)
    data = TokenData(Endless(), ByteTokenizer(), 32, cache_dir=tmp_path)
    tracemalloc.start()
    data.prepare(progress=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6


def test_a_source_is_read_once_for_its_tokens(stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    reads = []
    documents = JsonlSource.documents
    monkeypatch.setattr(JsonlSource, "documents", lambda self: reads.append(1) or documents(self))
    build(stories, tmp_path)
    assert len(reads) == 1
    build(stories, tmp_path)
    assert len(reads) == 1


@pytest.mark.parametrize(
    ("texts", "settings", "message"),
    [
        ([""], {}, "is empty: no document with text in it"),
        (["one"], {"val_fraction": 1e-6}, "none of its 1 documents is held out .* give a val_source"),
        (["one"], {"val_fraction": 0.999999}, r"all of its 1 documents are held out \(val_fraction=0\.999999\)"),
        (list("abcdefgh"), {"val_fraction": 0.5}, r"its \d+ training tokens do not fill one window of seq_len=32"),
    ],
)
def test_too_little_text_is_named(tmp_path: Path, texts: list[str], settings: dict, message: str):
    path = jsonl(tmp_path / "a.jsonl", texts)
    with pytest.raises(ValueError, match=rf"a\.jsonl:? {message}"):
        build(path, tmp_path / "cache", **settings)
    leftover = [name for name in os.listdir(tmp_path / "cache" / "tokens") if name.startswith(".")]
    assert not leftover


def test_an_empty_validation_source_is_named(stories: Path, tmp_path: Path):
    (tmp_path / "val.txt").write_text("")
    with pytest.raises(ValueError, match=r"none of its 200 documents is held out \(val\.txt\)"):
        build(stories, tmp_path / "cache", val_source=TextSource(tmp_path / "val.txt"))


@pytest.mark.parametrize("fraction", [0, -0.1, 1.5])
def test_impossible_settings_are_refused(stories: Path, fraction: float):
    with pytest.raises(ValueError, match=rf"val_fraction={re.escape(str(fraction))}; allowed: above 0, at most 1"):
        TokenData(JsonlSource(stories), ByteTokenizer(), 32, val_fraction=fraction)
    with pytest.raises(ValueError, match="seq_len=0; allowed: at least 1"):
        TokenData(JsonlSource(stories), ByteTokenizer(), 0)


def test_the_separator_from_a_text_is_refused(stories: Path, tmp_path: Path):
    class Leaky(ByteTokenizer):
        eos_id = ord("f")

    with pytest.raises(ValueError, match=r"stories\.jsonl:1: the text holds the token that separates documents"):
        build(stories, tmp_path, Leaky())


def test_a_space_put_before_every_text_is_not_counted(stories: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    texts = [f"story {i} of the café, told at length so that one byte is little: {'x' * 90}" for i in range(300)]
    path = jsonl(tmp_path / "a.jsonl", texts)
    with caplog.at_level(logging.WARNING, "moestro.data"):
        dataset = build(path, tmp_path / "cache", FileTokenizer(metaspace(tmp_path)))
    assert "in 300 of 300 documents the tokens stand for other byte counts than the text (300 of " in caplog.text
    assert dataset.byte_error == 300
    n_bytes = sum(int(batch.n_bytes.sum()) for batch in dataset.val_batches(7))
    assert n_bytes == dataset.n_val_bytes == sum(len(t.encode()) for t in texts if is_held_out(t, 0.05))
    assert dataset.val_document(0) in texts


def test_composed_letters_are_recorded(tmp_path: Path):
    ByteTokenizer().save(tmp_path)
    model = Model.from_file(str(tmp_path / "tokenizer.json"))
    model.normalizer = normalizers.NFC()
    (tmp_path / "tokenizer.json").write_text(model.to_str())
    decomposed = unicodedata.normalize("NFD", "é")
    texts = [f"{i} and {decomposed if i % 10 == 0 else 'e'} and much more text of the usual kind" for i in range(300)]
    path = jsonl(tmp_path / "a.jsonl", texts)
    dataset = build(path, tmp_path / "cache", FileTokenizer(tmp_path), val_fraction=0.3)
    assert dataset.byte_error == 30
    assert sum(int(batch.n_bytes.sum()) for batch in dataset.val_batches(4)) == dataset.n_val_bytes


def test_tokens_that_lose_text_are_refused(tmp_path: Path):
    path = jsonl(tmp_path / "a.jsonl", [f"document {i}: 日本語 日本語 日本語" for i in range(100)])
    with pytest.raises(ValueError, match=r"a\.jsonl: its tokens miss or invent \d+ of \d+ bytes of text .*byte-level"):
        build(path, tmp_path / "cache", FileTokenizer(metaspace(tmp_path, byte_fallback=False)))


def test_a_progress_bar_with_the_time_left(stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    TokenData(JsonlSource(stories), BPETokenizer(300), 32, cache_dir=tmp_path).prepare()
    shown = capsys.readouterr().err
    assert re.search(r"training the tokenizer .*100%.* left ", shown)
    assert re.search(r"writing tokens .*100%.* left ", shown)
    TokenData(JsonlSource(stories), BPETokenizer(300), 32, cache_dir=tmp_path).prepare()
    assert "writing" not in capsys.readouterr().err


def test_corpus_passes_over_documents_without_text(tmp_path: Path):
    path = jsonl(tmp_path / "a.jsonl", ["", "one", "", "two"])
    assert [document.text for _, document in Corpus(JsonlSource(path), None, 0.5).documents("reading")] == [
        "one",
        "two",
    ]
