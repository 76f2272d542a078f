"""Tokenizers of runs as transformers know them: the same ids for every text."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Model
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from moestro.data import BPETokenizer, ByteTokenizer, FileTokenizer, TextSource
from moestro.data.corpus import Corpus
from moestro.data.tokenizers import Tokenizer
from moestro.export.tokenizers import fast_tokenizer
from tests.conftest import ROOT
from tests.data.tokenizer_files import metaspace

ODD = [
    "",
    " ",
    "\x00\x01\x7f",
    "a\r\n\r\n\tb  c   ",
    "naïve café, e\u0301 \u00e9",
    "the <|endoftext|> end</s><s>",
    "\ufeffBOM \u202eright \u200bzero",
    "日本語 🙂👩‍👩‍👧",
    "don't I'll we've 1234567890 3.14 hello , world .",
    "\n" * 50,
]


def with_template(folder: Path) -> Path:
    """A tokenizer.json that puts <s> before every text, like Llama's."""
    model = Model.from_file(str(metaspace(folder)))
    model.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    (folder / "tokenizer.json").write_text(model.to_str())
    return folder / "tokenizer.json"


@pytest.fixture(scope="module", params=["bytes", "bpe", "metaspace"])
def pair(
    request, tmp_path_factory: pytest.TempPathFactory, text_file: Path
) -> tuple[Tokenizer, PreTrainedTokenizerFast]:
    """A tokenizer, and what a folder of transformers gives back for it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "bytes":
        own = ByteTokenizer()
    elif request.param == "bpe":
        own = BPETokenizer(300).fitted(Corpus(TextSource(text_file), TextSource(text_file), 0.05), folder / "cache")
    else:
        own = FileTokenizer(with_template(folder))
    own.save(folder / "run")
    fast_tokenizer(folder / "run", 128).save_pretrained(folder / "exported")
    return own, AutoTokenizer.from_pretrained(folder / "exported")


def check(pair: tuple[Tokenizer, PreTrainedTokenizerFast], text: str) -> None:
    own, theirs = pair
    ids = own.encode(text)
    assert theirs(text)["input_ids"] == ids
    assert theirs.decode(ids, skip_special_tokens=True) == own.decode(ids)


@pytest.mark.parametrize("text", ODD)
def test_odd_texts(pair: tuple[Tokenizer, PreTrainedTokenizerFast], text: str) -> None:
    check(pair, text)


@settings(max_examples=50)
@given(st.text(max_size=60))
def test_any_text(pair: tuple[Tokenizer, PreTrainedTokenizerFast], text: str) -> None:
    check(pair, text)


def test_real_text(pair: tuple[Tokenizer, PreTrainedTokenizerFast]) -> None:
    for name in ("README.md", "docs/house.md", "moestro/recipe/bind.py"):
        check(pair, (ROOT / name).read_text(encoding="utf-8"))


def test_gpt2_s_own_tokenizer_on_a_corpus(shared_data: Path, tmp_path: Path) -> None:
    own = FileTokenizer(shared_data / "tokenizers" / "gpt2" / "tokenizer.json")
    own.save(tmp_path / "run")
    text = (shared_data / "lm" / "tinyshakespeare.txt").read_text()[:150_000]
    check((own, fast_tokenizer(tmp_path / "run", 1024)), text)


def test_padding_and_ends(pair: tuple[Tokenizer, PreTrainedTokenizerFast]) -> None:
    own, theirs = pair
    assert (theirs.eos_token_id, theirs.pad_token_id, len(theirs)) == (own.eos_id, own.eos_id, own.vocab_size)
    batch = theirs(["a quick fox", "a"], padding=True)
    assert batch["attention_mask"][1][0] == 0 and batch["input_ids"][1][0] == own.eos_id
