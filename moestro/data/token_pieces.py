"""The bytes of text that tokens stand for, byte-level or pieces with a space mark and byte fallback."""

import re
from typing import Any

from tokenizers import Tokenizer as Model


def byte_alphabet() -> dict[str, int]:
    """GPT-2's letter for every byte: printable Latin-1 stands for itself, the rest for letters from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(rest)}


ALPHABET = byte_alphabet()


def pieces_of(model: Model, settings: dict[str, Any], size: int) -> list[bytes]:
    """The bytes of text each token stands for; none for special tokens, which text never gives."""
    kinds = _kinds([settings.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")])
    to_bytes = _byte_level if "ByteLevel" in kinds else _marked
    pieces = [b""] * size
    for token, i in model.get_vocab(with_added_tokens=True).items():
        pieces[i] = to_bytes(token)
    for i, added in model.get_added_tokens_decoder().items():
        pieces[i] = b"" if added.special else added.content.encode()
    return pieces


def _byte_level(token: str) -> bytes:
    # letters outside the alphabet belong to added tokens, whose text is known otherwise
    return bytes(ALPHABET[letter] for letter in token if letter in ALPHABET)


def _marked(token: str) -> bytes:
    byte = re.fullmatch(r"<0x([0-9A-F]{2})>", token)
    return bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode()


def _kinds(node: Any) -> set[str]:
    """Every "type" named in a tokenizer's settings."""
    inner = list(node.values()) if isinstance(node, dict) else node if isinstance(node, list) else []
    own = {node["type"]} if isinstance(node, dict) and "type" in node else set()
    return own.union(*map(_kinds, inner))
