"""Tokenizers give text back, know how many bytes each token stands for, and refuse what would falsify bits per byte."""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Model

from moestro.data import BPETokenizer, ByteTokenizer, FileTokenizer, JsonlSource, load_tokenizer, tokenizers
from moestro.data.corpus import Corpus
from moestro.data.tokenizers import PART_CHARACTERS
from tests.data.tokenizer_files import metaspace, write

AWKWARD = "Tabs\t\tand\r\nbreaks\n\n    indented = 'naïve' — “日本語” 🙂 e\u0301 \x00\x7f  end "


def trained(stories: Path, cache: Path, vocab_size: int = 400) -> FileTokenizer:
    return BPETokenizer(vocab_size).fitted(Corpus(JsonlSource(stories), None, 0.05), cache)


def test_bytes():
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(AWKWARD)
    assert bytes(ids) == AWKWARD.encode() and tokenizer.decode(ids) == AWKWARD
    assert tokenizer.byte_lengths().tolist() == [1] * 256 + [0]
    assert [part.tolist() for part in tokenizer.encode_batch(["é", ""])] == [[0xC3, 0xA9], []]


def test_a_trained_bpe_gives_text_back_byte_for_byte(stories: Path, tmp_path: Path):
    tokenizer = trained(stories, tmp_path)
    ids = tokenizer.encode(AWKWARD)
    assert tokenizer.decode(ids) == AWKWARD
    assert b"".join(tokenizer.token_bytes()[i] for i in ids) == AWKWARD.encode()
    assert tokenizer.vocab_size == 400 and len(tokenizer.byte_lengths()) == 400
    assert tokenizer.byte_lengths()[ids].sum() == len(AWKWARD.encode())
    assert tokenizer.byte_lengths()[tokenizer.eos_id] == 0


def test_training_a_bpe_is_deterministic(stories: Path, tmp_path: Path):
    first, second = trained(stories, tmp_path / "a"), trained(stories, tmp_path / "b")
    assert first.fingerprint() == second.fingerprint()
    assert first.fingerprint() != trained(stories, tmp_path / "c", vocab_size=401).fingerprint()


def test_a_bpe_is_trained_on_the_train_split_alone(stories: Path):
    corpus = Corpus(JsonlSource(stories), None, 0.2)
    held_out = {document.text for split, document in corpus.documents("reading") if split == "val"}
    sample = list(BPETokenizer(300)._sample(corpus))
    assert held_out and len(sample) == 200 - len(held_out)
    assert not set(sample) & held_out


def test_a_bpe_is_trained_once(stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = trained(stories, tmp_path)
    monkeypatch.setattr(BPETokenizer, "_trained", None)
    assert trained(stories, tmp_path).fingerprint() == first.fingerprint()


def test_a_bpe_reads_no_more_text_than_asked(stories: Path):
    corpus = Corpus(JsonlSource(stories), None, 0.05)
    sample = list(BPETokenizer(300, train_bytes=1000)._sample(corpus))
    assert 1000 <= sum(len(text.encode()) for text in sample) < 1100


def test_an_error_of_the_source_survives_training(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"body": "x"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:2: no field 'text'; there are: body"):
        BPETokenizer(300).fitted(Corpus(JsonlSource(tmp_path), None, 1e-6), tmp_path / "cache")


def test_impossible_vocabularies_are_refused(stories: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="vocab_size=256; allowed: at least 257"):
        BPETokenizer(256)
    with pytest.raises(ValueError, match=r"vocab_size=9000: the text of stories\.jsonl gives \d+ tokens; ask for less"):
        trained(stories, tmp_path, vocab_size=9000)
    assert not list((tmp_path / "tokenizers").iterdir())


def test_a_long_text_is_cut_without_losing_a_byte(stories: Path, tmp_path: Path):
    tokenizer = trained(stories, tmp_path)
    words = ["fox", "naïve", "\n", " ", "日本", "\n\n    x"]
    text = "".join(random.Random(0).choices(words, k=PART_CHARACTERS)) + "x" * (2 * PART_CHARACTERS + 1)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.byte_lengths()[ids].sum() == len(text.encode())
    assert tokenizer.encode_batch(["a", text])[1].tolist() == ids


@pytest.mark.parametrize("kind", ["bytes", "file", "metaspace"])
def test_saved_and_loaded_it_is_the_same(stories: Path, tmp_path: Path, kind: str):
    tokenizer = {
        "bytes": ByteTokenizer,
        "file": lambda: trained(stories, tmp_path),
        "metaspace": lambda: FileTokenizer(metaspace(tmp_path)),
    }[kind]()
    tokenizer.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert type(again) is type(tokenizer)
    assert again.fingerprint() == tokenizer.fingerprint()
    assert (again.eos_id, again.vocab_size) == (tokenizer.eos_id, tokenizer.vocab_size)
    assert again.encode(AWKWARD) == tokenizer.encode(AWKWARD)


def test_saved_bytes_are_a_tokenizer_for_other_programs(tmp_path: Path):
    ByteTokenizer().save(tmp_path)
    other = Model.from_file(str(tmp_path / "tokenizer.json"))
    assert other.encode(AWKWARD).ids == ByteTokenizer().encode(AWKWARD)
    assert other.token_to_id("<|endoftext|>") == 256


def test_the_separator_in_a_text_is_plain_text(stories: Path, tmp_path: Path):
    tokenizer = trained(stories, tmp_path)
    text = "one <|endoftext|> two"
    ids = tokenizer.encode(text)
    assert tokenizer.eos_id not in ids and tokenizer.decode(ids) == text


def test_pieces_with_space_marks_and_byte_fallback(tmp_path: Path):
    tokenizer = FileTokenizer(metaspace(tmp_path))
    assert tokenizer.eos == "</s>"
    text = "the 日本 café\n\tx"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    # the one space put before the text is in the tokens and not in the text
    assert b"".join(tokenizer.token_bytes()[i] for i in ids) == b" " + text.encode()
    long = "the fox\n" * PART_CHARACTERS
    assert tokenizer.decode(tokenizer.encode(long)) == long


def test_added_tokens_count_their_own_text(tmp_path: Path):
    ByteTokenizer().save(tmp_path)
    model = Model.from_file(str(tmp_path / "tokenizer.json"))
    model.add_tokens([AddedToken("        ", normalized=False), AddedToken("é é", normalized=False)])
    tokenizer = FileTokenizer(write(model, tmp_path))
    text = "x        y é é"
    ids = tokenizer.encode(text)
    assert len(ids) < len(text.encode()) and tokenizer.byte_lengths()[ids].sum() == len(text.encode())


def test_dropout_is_off(stories: Path, tmp_path: Path):
    tokenizer = trained(stories, tmp_path)
    settings = json.loads(tokenizer._json)
    settings["model"]["dropout"] = 0.5
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    assert FileTokenizer(tmp_path / "tokenizer.json").encode(AWKWARD) == tokenizer.encode(AWKWARD)


def test_a_tokenizer_that_changes_text_is_refused(tmp_path: Path):
    ByteTokenizer().save(tmp_path)
    model = Model.from_file(str(tmp_path / "tokenizer.json"))
    model.normalizer = normalizers.Lowercase()
    with pytest.raises(ValueError, match=r"changes text \('The  Quick.*comes back as 'the  quick.*bits per byte"):
        FileTokenizer(write(model, tmp_path))
    (tmp_path / "tokenizer_config.json").unlink()
    words = Model(models.WordPiece({"[UNK]": 0, "<eos>": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordPieceTrainer(vocab_size=50, special_tokens=["[UNK]", "<eos>"])
    words.train_from_iterator(["the quick fox"], trainer)
    with pytest.raises(ValueError, match="changes text"):
        FileTokenizer(write(words, tmp_path))


def test_the_end_token_is_found_or_asked_for(tmp_path: Path):
    ByteTokenizer().save(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text().replace("<|endoftext|>", "<stop>"))
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match=re.escape("no end-of-document token ''; give eos, one of: ['<stop>']")):
        FileTokenizer(path)
    assert FileTokenizer(path, eos="<stop>").eos_id == 256
    with pytest.raises(ValueError, match="no end-of-document token '<halt>'"):
        FileTokenizer(path, eos="<halt>")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<stop>"}}')
    assert FileTokenizer(path).eos_id == 256


def test_files_that_are_no_tokenizers(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"gone\.json: no such tokenizer file"):
        FileTokenizer(tmp_path / "gone.json")
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a")
    with pytest.raises(ValueError, match=r"unknown extension '\.model', a tokenizer is a tokenizer\.json"):
        FileTokenizer(tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer\.json: "):
        FileTokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="this folder holds no saved tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "name", ["gpt2/tokenizer.json", "olmo/allenai_dolma2.json", "olmo/allenai_gpt-neox-olmo-dolma-v1_5.json"]
)
def test_published_tokenizers_count_bytes_exactly(shared, name: str):
    tokenizer = FileTokenizer(shared(f"tokenizers/{name}"))
    text = "def f(x):\n        return  x\t# naïve 日本語 🙂 \r\n" * 3 + "|||IP_ADDRESS|||  " + "<|endoftext|>"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(tokenizer.token_bytes()[i] for i in ids) == text.encode()
    assert tokenizer.eos_id not in ids and tokenizer.byte_lengths()[tokenizer.eos_id] == 0
    assert np.count_nonzero(tokenizer.byte_lengths()) > 0.999 * tokenizer.vocab_size


def test_parts_are_encoded_together_up_to_a_number_of_characters(monkeypatch):
    monkeypatch.setattr(tokenizers, "CHARACTERS_AT_ONCE", 10)
    assert list(tokenizers._grouped(["a" * 4, "b" * 6, "c", "d" * 20, "e" * 9, "f"])) == [
        ["a" * 4, "b" * 6], ["c"], ["d" * 20], ["e" * 9, "f"]
    ]  # fmt: skip
    assert list(tokenizers._grouped([])) == []


def test_a_text_that_cannot_be_cut_is_refused_where_it_may_not_fit(monkeypatch):
    monkeypatch.setattr(tokenizers, "longest_text", lambda copies: 1000)
    tokenizers._require_room(["x" * 1000])
    with pytest.raises(ValueError, match=r"a document of 0\.0 MB for a tokenizer that cannot be given it in parts"):
        tokenizers._require_room(["short", "é" * 501])
