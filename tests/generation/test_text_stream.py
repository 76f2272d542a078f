"""Pieces of text: no character is broken, none is lost, and nothing of a stop sequence gets out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moestro.generation import StopFilter, TextStream


def lossy(tokens: list[int]) -> str:
    """Tokens that are bytes, as byte-level tokenizers decode them."""
    return bytes(tokens).decode("utf-8", errors="replace")


def fallback(tokens: list[int]) -> str:
    """A run of bytes that is no text as a whole is broken byte by byte, as tokenizers with byte fallback decode it."""
    try:
        return bytes(tokens).decode()
    except UnicodeDecodeError:
        return "\ufffd" * len(tokens)


@given(st.text(min_size=1), st.sampled_from([lossy, fallback]))
def test_valid_text_comes_whole_character_by_character(text: str, decode) -> None:
    stream = TextStream(decode)
    for character in text:
        encoded = list(character.encode("utf-8", "surrogatepass"))
        if 0xD800 <= ord(character) < 0xE000:
            return
        assert [stream.push(byte) for byte in encoded] == [""] * (len(encoded) - 1) + [character]
    assert stream.rest() == ""


@given(st.binary(max_size=60))
def test_pieces_of_any_bytes_add_up_to_their_text(content: bytes) -> None:
    stream = TextStream(lossy)
    pieces = [stream.push(byte) for byte in content]
    assert "".join([*pieces, stream.rest()]) == lossy(list(content))


def test_bytes_that_never_become_text_are_not_held_for_ever() -> None:
    stream = TextStream(lossy)
    given_out = "".join(stream.push(0x80) for _ in range(1000))
    assert len(given_out) > 900 and given_out + stream.rest() == "\ufffd" * 1000


def test_the_prompt_keeps_the_space_that_decoding_drops() -> None:
    words = {1: "▁Hello", 2: "▁world"}

    def decode(tokens: list[int]) -> str:
        return "".join(words[token] for token in tokens).replace("▁", " ").removeprefix(" ")

    assert TextStream(decode, [1]).push(2) == " world"
    assert TextStream(decode).push(2) == "world"


def test_a_character_that_the_prompt_begins_is_finished() -> None:
    first, second = "é".encode()
    assert TextStream(lossy, [65, first]).push(second) == "é"


def test_work_does_not_grow_with_the_text() -> None:
    longest = 0

    def decode(tokens: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(tokens))
        return lossy(tokens)

    stream = TextStream(decode)
    for byte in "ab€d".encode() * 50:
        stream.push(byte)
    assert longest <= 8


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.integers(1, 4))
def test_text_ends_before_the_first_stop_however_it_is_cut(text: str, stops: list[str], step: int) -> None:
    filter = StopFilter(stops)
    out, stopped = "", False
    for start in range(0, len(text), step):
        piece, stopped = filter.push(text[start : start + step])
        out += piece
        # what is out can no longer belong to a stop sequence
        assert all(stop not in out for stop in stops)
        if stopped:
            break
    places = [text.find(stop) for stop in stops if stop in text]
    assert stopped == bool(places)
    # the first stop that is complete ends the text: a cut may complete a shorter, later one first
    assert out + filter.rest() == (out if stopped else text) and text.startswith(out)
    if stopped:
        assert any(text.startswith(stop, len(out)) for stop in stops)


def test_an_empty_stop_is_refused() -> None:
    with pytest.raises(ValueError, match="a stop sequence is empty"):
        StopFilter(["a", ""])
