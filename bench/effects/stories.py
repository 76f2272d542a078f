"""A real pretrained model: stories260K of llama2.c (karpathy/tinyllamas, MIT), read into our decoder.

Its file holds seven numbers (d, hidden, layers, heads, key heads, vocabulary, longest sequence) and the weights in
float32, layer by layer within each kind. Rotary pairs lie side by side there and half a head apart here.
"""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from torch import Tensor

SPECIAL = ("<unk>", "<s>", "</s>")


def read_model(path: Path) -> tuple[dict[str, int], dict[str, Tensor]]:
    """(sizes, weights by our decoder's names) of a llama2.c file.

    Raises: ValueError where the output has a matrix of its own, which such files say by a negative vocabulary.
    """
    data = path.read_bytes()
    names = ("d", "hidden", "layers", "heads", "kv_heads", "vocab", "seq_len")
    size = dict(zip(names, struct.unpack("7i", data[:28]), strict=True))
    if size["vocab"] < 0:
        raise ValueError(f"{path}: vocabulary {size['vocab']}: its output does not share the embedding, as ours does")
    numbers, place = torch.from_numpy(np.frombuffer(data, np.float32, offset=28).copy()), 0

    def take(*shape: int) -> Tensor:
        nonlocal place
        count = int(np.prod(shape))
        place += count
        return numbers[place - count : place].view(*shape)

    layers, d, hidden, head = size["layers"], size["d"], size["hidden"], size["d"] // size["heads"]
    kv = size["kv_heads"] * head
    order = (("attention_norm", d), ("query", d, d), ("key", kv, d), ("value", kv, d), ("out", d, d), ("ffn_norm", d))
    weights = {"embedding.weight": take(size["vocab"], d)}
    kinds = {name: take(layers, *shape) for name, *shape in order}
    gate, down, up = take(layers, hidden, d), take(layers, d, hidden), take(layers, hidden, d)
    weights["norm.weight"] = take(d)
    for i in range(layers):
        block = {f"{name}.weight": kinds[name][i] for name in ("attention_norm", "ffn_norm")}
        block |= {f"attention.{name}.weight": kinds[name][i] for name in ("value", "out")}
        block |= {f"attention.{name}.weight": halves(kinds[name][i], head) for name in ("query", "key")}
        block |= {"ffn.expert.w_in.weight": torch.cat([gate[i], up[i]]), "ffn.expert.w_out.weight": down[i]}
        weights |= {f"blocks.{i}.{name}": value for name, value in block.items()}
    weights["head.weight"] = weights["embedding.weight"]
    return size, weights


def halves(weight: Tensor, head: int) -> Tensor:
    """Rows of each head from pairs side by side to pairs half a head apart."""
    return weight.view(-1, head // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_tokenizer(path: Path, out: Path) -> Path:
    """The llama2.c tokenizer at `path` as `out`/tokenizer.json: pieces, merged best score first, with byte fallback."""
    data, place, pieces = path.read_bytes(), 4, []
    while place < len(data):
        score, length = struct.unpack("fI", data[place : place + 8])
        pieces.append((data[place + 8 : place + 8 + length].decode(), score))
        place += 8 + length
    text = [*SPECIAL, *(piece.replace(" ", "▁") for piece, _ in pieces[len(SPECIAL) :])]
    vocab = {piece: number for number, piece in enumerate(text)}
    by_score = sorted(range(len(SPECIAL), len(text)), key=lambda number: -pieces[number][1])
    merges = [
        (text[number][:cut], text[number][cut:])
        for number in by_score
        for cut in range(1, len(text[number]))
        if not text[number].startswith("<0x") and {text[number][:cut], text[number][cut:]} <= vocab.keys()
    ]
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    made.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    out.mkdir(parents=True, exist_ok=True)
    made.save(str(out / "tokenizer.json"))
    return out / "tokenizer.json"


def model_settings(size: Mapping[str, int]) -> dict[str, Any]:
    """The recipe's keys that make a decoder of these sizes."""
    return {
        "model.d_model": size["d"],
        "model.n_layers": size["layers"],
        "model.attention": {"n_heads": size["heads"], "n_kv_heads": size["kv_heads"]},
        "model.ffn": {"kind": "dense", "width": size["hidden"]},
        "model.tie_embeddings": True,
        "model.norm_eps": 1e-5,
    }
