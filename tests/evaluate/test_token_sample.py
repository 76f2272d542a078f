"""A text token by token."""

import pytest
import torch

from moestro.data import ByteTokenizer, FileTokenizer
from moestro.evaluate import token_sample
from moestro.evaluate.token_sample import pieces
from moestro.model import Attention, Block, Transformer
from tests.data.tokenizer_files import metaspace
from tests.train.tiny import WIDTH, dense, moe


def byte_model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(257, WIDTH, [Block(WIDTH, Attention(WIDTH, 2), layer) for layer in (moe(), dense())])


def test_every_token_has_its_text_loss_and_layers():
    model, tokenizer, text = byte_model(), ByteTokenizer(), "def f(x): 🙂é"
    sample = token_sample(model, tokenizer, text)
    ids = tokenizer.encode(text)
    assert len(sample) == len(ids)
    assert "".join(entry["text"] for entry in sample) == text
    model.eval()
    output = model(torch.tensor([[tokenizer.eos_id, *ids]]))
    logits, trace = output.logits[0].log_softmax(-1), output.traces[0]
    chosen = trace.routing.dense() > 0
    for i, entry in enumerate(sample):
        assert entry["loss"] == pytest.approx(-logits[i, ids[i]].item(), rel=1e-5)
        assert entry["layers"].keys() == {"blocks.0.ffn"}
        width = sum(w for w, used in zip([2, 4, 6], chosen[i + 1].tolist(), strict=True) if used)
        assert entry["layers"]["blocks.0.ffn"] == {"width": width, "experts": 2}


def test_the_model_keeps_its_mode():
    model = byte_model()
    token_sample(model, ByteTokenizer(), "a")
    assert model.training


def test_a_character_split_over_tokens_belongs_to_its_last_one():
    tokenizer = ByteTokenizer()
    assert pieces(tokenizer, list("aé🙂".encode())) == ["a", "", "é", "", "", "", "🙂"]
    # A text that breaks off inside a character still has a piece for every token.
    assert pieces(tokenizer, list("é".encode())[:1]) == ["\ufffd"]


def test_pieces_join_to_the_text_where_a_decoder_takes_the_first_space_away(tmp_path):
    tokenizer, text = FileTokenizer(metaspace(tmp_path)), "it is a  test 🙂 of the"
    split = pieces(tokenizer, tokenizer.encode(text))
    assert "".join(split) == text and " t" in split and "🙂" in split


def test_a_text_without_tokens_is_refused():
    with pytest.raises(ValueError, match="text='' has no tokens"):
        token_sample(byte_model(), ByteTokenizer(), "")
