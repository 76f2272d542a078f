"""A public checkpoint -> a run folder that training, evaluation and export go on from."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from moestro.data import FileTokenizer
from moestro.data.progress import Report, silent
from moestro.formats import Checkpoint, FormatError
from moestro.formats.writer import file_pieces
from moestro.ops.whole_files import TEMPORARY, sync_file
from moestro.recipe.build import build_model
from moestro.recipe.load import Recipe, check_recipe
from moestro.recipe.pretrained import PRETRAINED, library, pretrained_tokenizer
from moestro.recipe.resolve import Origin
from moestro.recipe.syntax import dump_yaml
from moestro.train.durable import write_text
from moestro.train.folder import RunFolder, RunFolderError
from moestro.train.folder_job import lies_in
from moestro.upgrades import RUN

# The folder's copy in the run, and what is to be copied and whether it has been.
COPY, MANIFEST = PRETRAINED, "import.json"
# What lies beside the weights and describes or is needed by the model; code and other formats' weights stay behind.
BESIDE = {".json", ".jinja", ".txt", ".model", ".md", ""}
LONGEST = 1024


@dataclass(frozen=True)
class Imported:
    """What an import made: `model_type`, its number of parameters, bytes of its files, and the recipe to go on with."""

    model_type: str
    parameters: int
    nbytes: int
    recipe: Path


def import_model(
    source: str | Path,
    out: str | Path,
    tokenizer: str | Path | None = None,
    link: bool = False,
    report: Report = silent,
) -> Imported:
    """Make `out` a run folder of the checkpoint in `source`: a copy of its files in `out`/pretrained (with `link` none:
    the recipe then names `source` itself), its tokenizer, or that of the folder `tokenizer`, and a recipe that is
    written last. `source` is only read. Interrupted, the same call goes on where it stopped: every file is there whole
    or not at all.

    Raises: FormatError for a folder that is no complete checkpoint of a known family; FileNotFoundError where there is
    no tokenizer, ValueError for one that cannot be used or has more tokens than the model; RunFolderError where `out`
    holds something else; OSError where the disk is too small.
    """
    source, out = Path(source).expanduser().absolute(), Path(out).expanduser().absolute()
    if lies_in(out, source):
        raise RunFolderError(f"{out} lies in {source}, which is only read: choose another folder")
    checkpoint = library().checked(source)
    text = pretrained_tokenizer(source if tokenizer is None else Path(tokenizer).expanduser())
    recipe = recipe_of(checkpoint, text, out)
    build_model(recipe, text.vocab_size, "meta")
    manifest = {"source": str(source), "link": link, "files": {} if link else files_of(checkpoint)}
    require_unused(out, manifest)
    with RunFolder(out) as folder:
        folder.write_json(MANIFEST, manifest)
        copy_files(source, out / COPY, manifest["files"], report)
        text.save(out / "tokenizer")
        # a copy lies beside the recipe, wherever the run is moved
        model = recipe.resolved["model"] | {"folder": str(source) if link else COPY}
        write_text(out / "recipe.yaml", dump_yaml({RUN.key: RUN.version, **recipe.resolved, "model": model}))
    parameters = sum(prod(checkpoint.shape(name)) for name in checkpoint.names())
    nbytes = sum(size for size, _ in manifest["files"].values())
    return Imported(checkpoint.config["model_type"], parameters, nbytes, out / "recipe.yaml")


def files_of(checkpoint: Checkpoint) -> dict[str, list[int]]:
    """{name: `stamp_of`} of the files that make the model: shards, configuration, tokenizer, texts."""
    shards = {checkpoint.file_of(name) for name in checkpoint.names()}
    there = [path for path in sorted(checkpoint.path.iterdir()) if path.is_file() and not path.name.startswith(".")]
    chosen = [p for p in there if p.name in shards or (p.suffix in BESIDE and not p.name.endswith(".bin.index.json"))]
    return {path.name: stamp_of(path) for path in chosen}


def stamp_of(path: Path) -> list[int]:
    """[bytes, time of the last change in nanoseconds]."""
    return [path.stat().st_size, path.stat().st_mtime_ns]


def require_unused(out: Path, manifest: Mapping[str, Any]) -> None:
    """Raises: RunFolderError where the folder holds anything but an interrupted import of the same files."""
    if not out.exists() or not any(out.iterdir()):
        return
    begun = out / MANIFEST
    if (out / "recipe.yaml").exists():
        raise RunFolderError(f"{out} holds a run already: choose another folder")
    if not begun.is_file() or json.loads(begun.read_text(encoding="utf-8")) != manifest:
        what = "the import of another folder, or of this one before it changed" if begun.is_file() else "other files"
        raise RunFolderError(f"{out} holds {what}: choose another folder, or remove it")


def copy_files(source: Path, target: Path, files: Mapping[str, list[int]], report: Report) -> None:
    """Copy what is not there yet, each file under its own name only once it is whole.

    Raises: OSError where the disk is too small, FormatError where a file changes meanwhile.
    """
    if not files:
        return
    target.mkdir(exist_ok=True)
    missing = {name: size for name, (size, _) in files.items() if not (target / name).exists()}
    free, total = shutil.disk_usage(target).free, sum(size for size, _ in files.values())
    if sum(missing.values()) > free:
        need = sum(missing.values())
        raise OSError(f"{target} needs {need:,} bytes more, its disk has {free:,} left; --link copies nothing")
    done = total - sum(missing.values())
    for name, size in missing.items():
        temporary = target / (TEMPORARY + name)
        with temporary.open("wb") as file:
            for piece in file_pieces(source / name, 0, size):
                file.write(piece)
                done += len(piece)
                report("copying", done / max(1, total))
        if stamp_of(source / name) != files[name]:
            raise FormatError(f"{source / name} changed while it was copied")
        sync_file(temporary)
        os.replace(temporary, target / name)
    sync_file(target)


def recipe_of(checkpoint: Checkpoint, tokenizer: FileTokenizer, out: Path) -> Recipe:
    """A recipe that goes on training the model, as it is, on the text that lies on every machine: a place to start."""
    longest = checkpoint.config.get("max_position_embeddings") or checkpoint.config.get("n_positions") or LONGEST
    tree = {
        "model": {"kind": PRETRAINED, "folder": str(checkpoint.path)},
        "data": {
            "source": {"kind": "stdlib"},
            "tokenizer": {"kind": "file", "path": str(out / "tokenizer"), "eos": tokenizer.eos},
            "seq_len": min(LONGEST, longest),
        },
        "optim": {"lr": 1e-5, "weight_decay": 0.1, "schedule": {"kind": "cosine", "warmup": 0.05}},
        "train": {"batch_size": 8, "budget": {"steps": 1000}, "eval_every": 100, "eval_tokens": 65_536},
    }
    return check_recipe(Recipe(tree, Origin(out / "recipe.yaml", tree)))
