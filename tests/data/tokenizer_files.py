"""tokenizer.json files of kinds that are not trained here."""

from pathlib import Path

from tokenizers import Tokenizer as Model
from tokenizers import decoders, models, normalizers


def write(model: Model, folder: Path) -> Path:
    path = folder / "tokenizer.json"
    path.write_text(model.to_str())
    return path


def metaspace(folder: Path, byte_fallback: bool = True) -> Path:
    """A tokenizer.json like Llama's: spaces as marks, one put before the text, bytes where letters are unknown."""
    letters = [f"<0x{byte:02X}>" for byte in range(256)] if byte_fallback else []
    words = [chr(i) for i in range(33, 127)] + ["▁", "▁t", "\n", "\t", "é"]
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *letters, *words])}
    model = Model(models.BPE(vocab, [("▁", "t")], unk_token="<unk>", fuse_unk=True, byte_fallback=byte_fallback))
    model.add_special_tokens(["<unk>", "<s>", "</s>"])
    model.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    model.decoder = decoders.Sequence(steps)
    return write(model, folder)
