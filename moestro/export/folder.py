"""`moestro export`: a run's model as a folder in Hugging Face's format, complete or not there at all."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedConfig

from moestro import __version__
from moestro.data import load_tokenizer
from moestro.export.card import Facts, card, portable
from moestro.export.modeling import MoestroForCausalLM
from moestro.export.opening import configured
from moestro.export.remote_code import AUTO_MAP, remote_code
from moestro.export.stock import stock_model, verify
from moestro.export.tensors import ExportError, Stored, files_of, index_of, n_parameters
from moestro.export.tokenizers import fast_tokenizer, save_tokenizer
from moestro.formats.shards import INDEX
from moestro.formats.writer import Outgoing
from moestro.recipe.evaluation import CHECKPOINTS
from moestro.recipe.load import Recipe, load_recipe
from moestro.train.durable import write_json, write_text
from moestro.train.folder import RunFolder
from moestro.train.folder_job import FolderJob

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYOUTS = ("moestro", "stock")
# What a folder says of how it was written: proof that it may be replaced.
RECORD = "export.json"


@dataclass(frozen=True)
class Choices:
    """How a run is exported. `layout`: our own with its code, or a stock architecture. `dtype` of the weights by name,
    None: as the checkpoint keeps them. Files of up to `shard_bytes`. `checkpoint`: newest or best. `unfinished` allows
    a run in the middle of training, `force` replaces an earlier export. `licence` of the weights, for the card."""

    layout: str = "moestro"
    dtype: str | None = None
    shard_bytes: int = 5_000_000_000
    checkpoint: str = "newest"
    unfinished: bool = False
    force: bool = False
    licence: str | None = None


@dataclass(frozen=True)
class Exported:
    """What was written: the folder, its architecture, parameters, bytes of its weights."""

    path: Path
    architecture: str
    n_parameters: int
    nbytes: int


def export_run(run: str | Path, out: str | Path, choices: Choices = Choices()) -> Exported:  # noqa: B008
    """Write a run's model into the folder `out`, which appears complete or not at all. Tensors stream from the
    checkpoint; no model is built, but for `stock`, whose folder is loaded and compared before it appears. Interrupted,
    the same call continues after the last whole file; finished, it changes nothing.

    Raises: RecipeError where `run` is no run; CheckpointError for a missing or damaged checkpoint; ExportError where
    training is not over, `out` holds something else, the disk is full, or the model has no such layout.
    """
    run, out = Path(run), Path(out)
    if not (run / "recipe.yaml").is_file():
        raise ExportError(f"{run} is not the folder of a run: it holds no recipe.yaml")
    recipe, checkpoint = load_recipe(run / "recipe.yaml"), CHECKPOINTS[choices.checkpoint](run)
    result = RunFolder(run).result
    if result is None and not choices.unfinished:
        raise ExportError(
            f"training of {run} is not over ({checkpoint.name} is its checkpoint): finish it (moestro train), or "
            "export what there is (--unfinished)"
        )
    tokenizer = load_tokenizer(run / "tokenizer")
    config = configured(recipe, tokenizer.vocab_size)
    with torch.device("meta"):
        model = MoestroForCausalLM(config)
    stored = Stored(checkpoint, model)
    job = {"moestro": __version__, "weights": stored.state["sha256"]["model.safetensors"], **asdict(choices)}
    del job["force"], job["unfinished"]
    facts = Facts(
        run.resolve().name, stored.state["step"], result is not None, n_parameters(model), result or {},
        choices.licence, choices.layout, choices.dtype or "as trained", model.decoder.causal,
    )  # fmt: skip
    writing = _Writing(recipe, run, choices, stored, model, facts)
    if (there := _there(out, job, choices.force)) is None:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            writing.write(out, job)
        except (OSError, SafetensorError) as error:
            raise ExportError(f"cannot write {out}: {error}. Free space or choose another folder; the same command "
                              "continues") from error  # fmt: skip
    return Exported(there or out, *writing.summary())


class _Writing:
    """What goes into the folder of one export."""

    def __init__(
        self, recipe: Recipe, run: Path, choices: Choices, stored: Stored, model: MoestroForCausalLM, facts: Facts
    ) -> None:
        self.recipe, self.run, self.choices, self.stored, self.model, self.facts = (
            recipe, run, choices, stored, model, facts,
        )  # fmt: skip
        dtype = None if choices.dtype is None else DTYPES[choices.dtype]
        if choices.layout == "stock":
            stock = stock_model(model.config, stored)
            self.config: PreTrainedConfig = stock.config
            self.architecture, tensors = stock.architecture, stock.outgoing(dtype)
        else:
            self.config, self.architecture = model.config, type(model).__name__
            tensors = [stored.outgoing(name, dtype) for name in stored]
        self.files: dict[str, list[Outgoing]] = files_of(tensors, choices.shard_bytes)
        self.config.dtype = dtype or torch.float32
        self.config.architectures = [self.architecture]

    def summary(self) -> tuple[str, int, int]:
        """Architecture, parameters, bytes."""
        nbytes = sum(tensor.nbytes for tensors in self.files.values() for tensor in tensors)
        return self.architecture, self.facts.n_parameters, nbytes

    def write(self, out: Path, job: Mapping[str, Any]) -> None:
        """Fill the folder under a temporary name, then give it its own."""
        with FolderJob(out, job) as folder:
            need = sum(t.nbytes for name, tensors in self.files.items() if name not in folder.done for t in tensors)
            if need > (free := shutil.disk_usage(folder.path).free):
                raise ExportError(f"{out} needs {need / 1e9:.2f} GB more, {free / 1e9:.2f} GB are free")
            for name, tensors in self.files.items():
                folder.write(name, tensors, {"format": "pt"})
            if len(self.files) > 1:
                write_json(folder.path / INDEX, index_of(self.files))
            self._companions(folder.path)
            if self.choices.layout == "stock":
                verify(folder.path, self.stored, self.model)
            write_json(
                folder.path / RECORD, {**job, "step": self.facts.step, "files": dict(sorted(folder.done.items()))}
            )
            folder.publish()

    def _companions(self, path: Path) -> None:
        """Everything but weights: configurations, tokenizer, card and code."""
        eos = load_tokenizer(self.run / "tokenizer").eos_id
        if self.choices.layout == "moestro":
            self.config.auto_map = AUTO_MAP
            for name, source in remote_code(self.model.config.construction or {}).items():
                write_text(path / name, source)
            self.config.recipe = portable(self.recipe.resolved)
        self.config.update({"eos_token_id": eos, "pad_token_id": eos})
        self.config.save_pretrained(path)
        use_cache = {} if self.facts.causal else {"use_cache": False}
        GenerationConfig(eos_token_id=eos, pad_token_id=eos, **use_cache).save_pretrained(path)
        save_tokenizer(fast_tokenizer(self.run / "tokenizer", self.recipe.data.value("seq_len")), path)
        write_text(path / "README.md", card(self.recipe, self.facts))


def _there(out: Path, job: Mapping[str, Any], force: bool) -> Path | None:
    """The folder where it is finished and was written by the same command; None where it is to be written.

    Raises: ExportError where it holds anything else that `force` may not replace.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    record = out / RECORD
    if not record.is_file():
        raise ExportError(f"{out} exists and no export wrote it: choose another folder, or remove it")
    said = json.loads(record.read_text(encoding="utf-8"))
    whole = all(
        (out / name).is_file() and (out / name).stat().st_size == file["bytes"] for name, file in said["files"].items()
    )
    if whole and {key: said.get(key) for key in job} == dict(job):
        return out
    if not force:
        raise ExportError(f"{out} holds another export: choose another folder, or replace it (--force)")
    return None
