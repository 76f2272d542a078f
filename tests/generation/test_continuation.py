"""A prompt continued token by token, against `transformers`' own generation, and where it ends."""

from pathlib import Path
from typing import Any

import pytest
import torch

from moestro.generation import Options, PromptTooLong, Sampling, TextModel
from tests.stock_models import CONTEXT, byte_tokenizer, tiny_llama

PROMPT = "The quick brown fox"


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    folder: Path = tmp_path_factory.mktemp("bytes")
    return TextModel(tiny_llama(), byte_tokenizer(folder))


def written(text_model: TextModel, prompt: str = PROMPT, **options: Any) -> tuple[str, str | None, list[int]]:
    continuation = text_model.begin(text_model.encode(prompt), Options(**options))
    text = "".join(piece.text for piece in continuation.pieces())
    return text, continuation.reason, continuation.new_tokens


def test_the_likeliest_tokens_are_those_of_transformers(text_model: TextModel) -> None:
    ids = text_model.encode(PROMPT)
    wanted = text_model.model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), do_sample=False, max_new_tokens=40
    )
    text, _, tokens = written(text_model, max_new_tokens=40)
    assert tokens == wanted[0, len(ids) :].tolist()
    assert text == text_model.decode(tokens)


def test_the_cache_changes_nothing(text_model: TextModel, monkeypatch: pytest.MonkeyPatch) -> None:
    sampled = {"max_new_tokens": 30, "sampling": Sampling(0.8, seed=1)}
    cached = written(text_model, **sampled)
    forward = text_model.model.forward

    def without_cache(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **{**kwargs, "past_key_values": None, "use_cache": False})
        assert output.past_key_values is None
        return output

    monkeypatch.setattr(text_model.model, "forward", without_cache)
    assert written(text_model, **sampled) == cached


def test_a_seed_repeats_its_text(text_model: TextModel) -> None:
    first, again, other = (
        written(text_model, max_new_tokens=20, sampling=Sampling(1.0, seed=seed)) for seed in (1, 1, 2)
    )
    assert first == again and first[0] != other[0]


def test_a_stop_sequence_ends_the_text_before_it(text_model: TextModel) -> None:
    whole, reason, tokens = written(text_model, max_new_tokens=40, sampling=Sampling(1.0, seed=4))
    assert reason == "length" and len(tokens) == 40
    stop = whole[10:13]
    text, reason, fewer = written(
        text_model, max_new_tokens=40, sampling=Sampling(1.0, seed=4), stops=(stop, "\0never")
    )
    assert (text, reason) == (whole[: whole.index(stop)], "stop") and len(fewer) < 40


def test_the_end_of_a_text_is_no_part_of_it(text_model: TextModel, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _, tokens = written(text_model, max_new_tokens=8)
    monkeypatch.setattr(text_model, "ends", frozenset({tokens[5]}))
    end = tokens.index(tokens[5])
    text, reason, fewer = written(text_model, max_new_tokens=8)
    assert reason == "stop" and fewer == tokens[: end + 1] and whole.startswith(text.rstrip("\ufffd"))


def test_a_finished_continuation_takes_no_step(text_model: TextModel) -> None:
    continuation = text_model.begin(text_model.encode("a"), Options(1))
    assert continuation.step().reason == "length"
    with pytest.raises(RuntimeError, match="has ended"):
        continuation.step()


def test_prompts_that_leave_no_room_are_refused(text_model: TextModel) -> None:
    ids = text_model.encode("x" * (CONTEXT - 4))
    assert len(list(text_model.begin(ids, Options(4)).pieces())) == 4
    with pytest.raises(PromptTooLong, match="the prompt has 92 tokens and 5 new ones are asked for.*context of 96"):
        text_model.begin(ids, Options(5))
    assert text_model.room(ids, None, 100) == 4 and text_model.room(ids, None, None) == 4
    assert text_model.room(ids, None, 2) == 2 and text_model.room(ids, 3, 2) == 3
    with pytest.raises(PromptTooLong):
        text_model.room([0] * CONTEXT, None, None)


def test_prompts_that_are_none_are_refused(text_model: TextModel) -> None:
    with pytest.raises(ValueError, match="the prompt is empty"):
        text_model.encode("")
    with pytest.raises(ValueError, match="token 257 in the prompt; allowed: 0 to 256"):
        text_model.begin([1, 257], Options(1))
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        Options(0)
    with pytest.raises(ValueError, match="a stop sequence is empty"):
        Options(1, stops=("",))
