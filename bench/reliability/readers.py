"""What is damaged: folders of every kind, each with the reader that opens it and says what it found."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.harness import ROOT
from bench.reliability.victims import MIXTURE, TINY, settings_of, text_in
from bench.small_mixtral import drawn
from moestro.compare.results import read_metrics
from moestro.compress.methods import Request
from moestro.compress.plan_file import read_plan
from moestro.compress.running import compressed, plan_for
from moestro.data import Dataset, load_tokenizer
from moestro.export import open_model
from moestro.export.folder import Choices, export_run
from moestro.formats import Checkpoint
from moestro.ops.whole_files import require_intact
from moestro.recipe.build import build_data, run_training
from moestro.recipe.load import load_recipe
from moestro.train.checkpoint import list_checkpoints, read_state, read_tensors
from moestro.train.folder import RunFolder

LEFT_OUT = {"README.md", "generation_config.json", "lock", "environment.json", "report.html", "export.json"}


@dataclass(frozen=True)
class Read:
    """A folder, one like it with other content, and what opens either. `sealed`: every byte has a hash somewhere, so
    that no damage may pass."""

    name: str
    folder: Path
    other: Path
    opened: Callable[[Path], Any]
    sealed: bool = True

    @property
    def files(self) -> list[Path]:
        """What is damaged: all files that this package wrote and reads, relative to the folder."""
        inside = (path.relative_to(self.folder) for path in sorted(self.folder.rglob("*")) if path.is_file())
        return [path for path in inside if path.name not in LEFT_OUT and "checkpoints" not in path.parts]


def digest(value: Any) -> str:
    """SHA-256 of plain values and tensors, nested."""
    if isinstance(value, torch.Tensor):
        plain = value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return hashlib.sha256(f"{value.dtype} {tuple(value.shape)}".encode() + plain).hexdigest()
    if isinstance(value, dict):
        return digest([[str(key), digest(item)] for key, item in sorted(value.items(), key=str)])
    if isinstance(value, list | tuple):
        return hashlib.sha256(json.dumps([digest(item) for item in value]).encode()).hexdigest()
    return hashlib.sha256(repr(value).encode()).hexdigest()


def checkpoint(folder: Path) -> str:
    """A training run's checkpoint."""
    state = read_state(folder)
    return digest([state, *(read_tensors(folder, name) for name in ("model", "optimizer", "rules"))])


def shards(folder: Path) -> str:
    """Token shards."""
    data = Dataset(folder, 32)
    batch = data.train_batch(0, 8, 0)
    return digest([data._meta, batch.tokens, data.tokenizer.fingerprint(), data.zlib_bytes])


def finished_run(folder: Path) -> str:
    """Everything of a run but its checkpoints."""
    tokenizer = load_tokenizer(folder / "tokenizer")
    return digest(
        [load_recipe(folder / "recipe.yaml").resolved, RunFolder(folder).result, read_metrics(folder / "metrics.jsonl"),
         tokenizer.fingerprint()]
    )  # fmt: skip


def model_folder(folder: Path) -> str:
    """A folder that `open_model` loads."""
    opened = open_model(folder)
    words = opened.tokenizer("one and 2").input_ids if opened.tokenizer is not None else []
    return digest([opened.model.state_dict(), words])


def compressed_folder(folder: Path) -> str:
    """A compressed folder, as the source of a further compression."""
    found = Checkpoint(folder)
    require_intact(folder)
    return digest([found.family.model_type, found.config, {name: found.read(name) for name in found.names()}])


def public_folder(folder: Path) -> str:
    """A folder that others wrote, expert by expert."""
    found = Checkpoint(folder)
    return digest([found.family.model_type, {name: found.read(name) for name in found.names()}])


def plan_folder(folder: Path) -> str:
    """A plan of compression."""
    return digest(repr(read_plan(folder / "plan.json")))


def readers(work: Path) -> list[Read]:
    """All of them, made in `work`, twice each with other content."""
    one, other = (made(work / name, seed) for name, seed in (("one", 0), ("other", 1)))
    return [Read(name, one[name], other[name], opened, sealed) for name, opened, sealed in KINDS]


KINDS: list[tuple[str, Callable[[Path], Any], bool]] = [
    ("checkpoint", checkpoint, True),
    ("token shards", shards, True),
    ("finished run", finished_run, True),
    ("exported folder", model_folder, True),
    ("compressed folder", compressed_folder, True),
    ("public folder, no hashes", public_folder, False),
    ("plan, to be edited by hand", plan_folder, False),
]


def made(work: Path, seed: int) -> dict[str, Path]:
    """{kind: its folder}."""
    work.mkdir()
    text = text_in(work, seed)
    settings = [*TINY, *MIXTURE, *settings_of(text, "{kind: bpe, vocab_size: 400}"), f"data.cache_dir={work}/cache"]
    recipe = load_recipe(ROOT / "recipes" / "hmoe.yaml", [*settings, "train.budget={steps: 4}"])
    run_training(recipe, work / "run", show_preparation=False)
    export_run(work / "run", work / "export", Choices(shard_bytes=30_000))
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    mixtral = drawn(work / "mixtral", sizes, seed)
    request = Request(mixtral, "width", 0.25)
    (newest,) = list_checkpoints(work / "run" / "checkpoints")[-1:]
    shutil.copytree(newest, work / "checkpoint" / newest.name)
    plan_for(request, work / "plan" / "plan.json")
    return {
        "checkpoint": work / "checkpoint" / newest.name,
        "token shards": build_data(recipe).prepare(progress=False).folder,
        "finished run": work / "run",
        "exported folder": work / "export",
        "compressed folder": compressed(request, work / "compressed"),
        "public folder, no hashes": mixtral,
        "plan, to be edited by hand": work / "plan",
    }
