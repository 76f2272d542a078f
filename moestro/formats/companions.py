"""What lies beside a checkpoint's weights."""

from pathlib import Path

from moestro.ops.whole_files import HASHES

# Weights in whatever format: those of another model, once a folder is written anew.
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".ckpt", ".ot"}


def companions(folder: Path) -> list[Path]:
    """Files of a folder, and of folders in it, that go with any weights: tokenizer, texts, code. Weights of every
    format and their indices are none, nor are config.json and hashes.json, which speak of these weights, and hidden
    files."""
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and _goes_along(path.relative_to(folder))]


def _goes_along(inside: Path) -> bool:
    hidden = any(part.startswith(".") for part in inside.parts)
    of_weights = inside.suffix in WEIGHTS or inside.name.endswith(".index.json")
    return not (hidden or of_weights or inside.as_posix() in ("config.json", HASHES))
