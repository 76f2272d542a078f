"""Real corpora: the standard library on every machine, and the shared ones where they lie."""

import json
import lzma
from pathlib import Path

import pytest

from moestro.data import (
    BPETokenizer,
    ByteTokenizer,
    Dataset,
    FileTokenizer,
    JsonlSource,
    StdlibSource,
    TextSource,
    TokenData,
    zlib_bpb,
)


def check(dataset: Dataset) -> None:
    """Bytes add up, windows hold, decoding gives documents."""
    assert sum(int(batch.n_bytes.sum()) for batch in dataset.val_batches(16)) == dataset.n_val_bytes
    assert sum(len(dataset.val_document(i).encode()) for i in range(dataset.n_val_documents)) == dataset.n_val_bytes
    batch = dataset.train_batch(1000, 8, seed=0)
    assert batch.tokens.shape == (8, dataset.seq_len) and int(batch.tokens.max()) < dataset.vocab_size


@pytest.mark.slow
def test_the_default_corpus_with_its_own_bpe(tmp_path: Path):
    dataset = TokenData(StdlibSource(), BPETokenizer(2048), 128, cache_dir=tmp_path).prepare(progress=False)
    check(dataset)
    assert dataset.vocab_size == 2048 and dataset.byte_error == 0
    assert dataset.n_train_bytes / dataset.n_train_tokens > 2.5
    assert 1.2 < zlib_bpb(dataset) < 2.6
    share = dataset.n_val_bytes / (dataset.n_val_bytes + dataset.n_train_bytes)
    assert 0.01 < share < 0.12


def test_wikitext_articles_with_gpt2_tokens(shared, tmp_path: Path):
    train, val = shared("lm/wikitext-2/train.txt"), shared("lm/wikitext-2/valid.txt")
    tokenizer = FileTokenizer(shared("tokenizers/gpt2/tokenizer.json"))
    source = TextSource(val, split="heading")
    dataset = TokenData(source, tokenizer, 256, val_fraction=0.2, cache_dir=tmp_path).prepare(progress=False)
    check(dataset)
    articles = list(source.documents())
    assert len(articles) == 60
    assert all(article.text.lstrip().startswith("= ") for article in articles)
    assert "".join(article.text for article in articles) == val.read_text()
    assert dataset.n_train_bytes + dataset.n_val_bytes == val.stat().st_size
    assert sum(1 for _ in TextSource(train, split="heading").documents()) > 600


def test_wikitext_with_its_own_validation_file(shared, tmp_path: Path):
    train, val = shared("lm/wikitext-2/train.txt"), shared("lm/wikitext-2/valid.txt")
    source, val_source = TextSource(train, split="heading"), TextSource(val, split="heading")
    data = TokenData(source, ByteTokenizer(), 256, val_source=val_source, cache_dir=tmp_path)
    dataset = data.prepare(progress=False)
    assert dataset.n_train_bytes == train.stat().st_size and dataset.n_val_bytes == val.stat().st_size
    check(dataset)


@pytest.mark.parametrize("name", ["gpt2/tokenizer.json", "olmo/allenai_gpt-neox-olmo-dolma-v1_5.json"])
def test_stories_with_published_tokenizers(shared, tmp_path: Path, name: str):
    path = shared("lm/tinystories.jsonl.xz")
    tokenizer = FileTokenizer(shared(f"tokenizers/{name}"))
    dataset = TokenData(JsonlSource(path), tokenizer, 64, cache_dir=tmp_path).prepare(progress=False)
    with lzma.open(path, "rt", encoding="utf-8") as file:
        total = sum(len(json.loads(line)["text"].encode()) for line in file)
    assert dataset.n_train_bytes + dataset.n_val_bytes == total
    check(dataset)


def test_web_text_with_100k_ids(shared, tmp_path: Path):
    tokenizer = FileTokenizer(shared("tokenizers/olmo/allenai_dolma2.json"))
    source = JsonlSource(shared("lm/openwebtext.jsonl.xz"))
    dataset = TokenData(source, tokenizer, 128, cache_dir=tmp_path).prepare(progress=False)
    check(dataset)
    assert dataset.vocab_size == 100_278 and dataset.byte_error == 0
    assert int(max(batch.tokens.max() for batch in dataset.val_batches(16))) > 65_535
