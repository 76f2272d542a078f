"""A compressed folder, healed: its own format, the tensors that healing changed in place of those that it had."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moestro.compress.applying import EDITED, HEALING, RECORD, REQUESTED, outside
from moestro.compress.healing import Healing, heal_by_lora, heal_routers
from moestro.compress.measuring import Question, loaded_folder, measured
from moestro.compress.methods import Request
from moestro.compress.own import PLAN as OWN_PLAN
from moestro.compress.plan import PlanError, Quantisation
from moestro.compress.source import RunSource, open_source
from moestro.compress.text import healing_text
from moestro.formats import Checkpoint
from moestro.formats.writer import Outgoing, of_file, of_tensor
from moestro.ops.whole_files import HASHES, TEMPORARY, holding, sha256_json
from moestro.train.durable import empty, write_json
from moestro.train.folder_job import FolderInUse, FolderJob, read_control

STATE, ASKED, WITHOUT = "state.safetensors", "asked.json", "without.json"


@dataclass(frozen=True)
class Heal:
    """How a folder is healed: "lora" (additions to the matrices of attention and experts) or "router-kd" (routers
    taught by the source), on batches of 8 windows of `seq_len` tokens of `text`; a run has text of its own."""

    method: Literal["lora", "router-kd"]
    text: str | None = None
    settings: Healing = Healing()
    seq_len: int = 512
    seed: int = 0
    device: str = "cpu"

    def request(self, folder: Path) -> Request:
        """Asks for the text in the tokens of this folder.

        Raises: as `text.healing_text`, where it is read.
        """
        more = {"text": self.text, "seq_len": self.seq_len, "seed": self.seed, "device": self.device}
        return Request(folder, f"--heal {self.method}", 0.0, **more)


def require_healable(source: Path, quantise: Quantisation | str | None = None) -> None:
    """Asked of a source, with how its experts are to be stored, before anything is done.

    Raises: PlanError where they are, or would be, in few bits.
    """
    found = open_source(source)
    if quantise or (isinstance(found, Checkpoint) and "quantization_config" in found.config):
        raise PlanError(
            "quantised experts cannot be healed: compress and heal without quantise, then quantise what was healed "
            "(--method frequency --ratio 0 --option quantise=...)"
        )


def healed(
    source: Path,
    compress: Callable[[Path], Path],
    destination: Path,
    heal: Heal,
    asked: Mapping[str, Any],
    question: Question | None = None,
) -> Path:
    """What `compress` writes into the folder that it is given, healed into `destination`, which appears complete or not
    at all. Interrupted, the same call goes on where it was; finished, it changes nothing. `asked` is what tells this
    compression from others. With a `question` the folder is measured before healing, for the report.

    Raises: PlanError where the destination is something else, or the folder's experts are quantised; FolderInUse where
    another process writes it.
    """
    destination = outside(source, destination)
    job = {"asked": sha256_json(json.loads(json.dumps(asked, default=str))), "heal": asdict(heal)}
    bare = destination.with_name(f"{TEMPORARY}{destination.name}.unhealed")
    with holding(destination.with_name(f"{TEMPORARY}{destination.name}.healing"), FolderInUse(destination)) as kept:
        if destination.exists():
            # what lies beside it was left by a process that ended just then
            shutil.rmtree(bare, ignore_errors=True)
            shutil.rmtree(kept)
            return _finished(destination, job)
        if read_control(kept / ASKED) != job:
            empty(kept)
            shutil.rmtree(bare, ignore_errors=True)
            write_json(kept / ASKED, job)
        try:
            compress(bare)
        except ValueError:
            # nothing is left of what is refused
            shutil.rmtree(kept)
            raise
        if question is not None and not (kept / WITHOUT).is_file():
            write_json(kept / WITHOUT, {"question": str(question), **measured(bare, question, source)})
        model, losses = _healed_model(bare, source, heal, kept / STATE)
        said = {**job, "losses": losses, "without": read_control(kept / WITHOUT)}
        _write(bare, model, said, destination)
        shutil.rmtree(bare)
        shutil.rmtree(kept)
    return destination


def said_of(folder: Path, question: Question | None) -> dict[str, Any] | None:
    """How a folder was healed, and under "without" what was measured before, where that was by the same question; None
    for a folder that was not."""
    said = read_control(folder / HEALING)
    if said is None:
        return None
    before = said["without"] or {}
    asked = question is not None and before.get("question") == str(question)
    return {**said["heal"], "losses": said["losses"], "without": before if asked else None}


def _finished(destination: Path, job: Mapping[str, Any]) -> Path:
    said = read_control(destination / HEALING) or {}
    files = (read_control(destination / RECORD) or {}).get("files", {})
    whole = all(
        (destination / name).is_file() and (destination / name).stat().st_size == file["bytes"]
        for name, file in files.items()
    )
    if whole and {key: said.get(key) for key in job} == job:
        return destination
    raise PlanError(f"{destination} exists and is no finished healing of this compression: choose another folder")


def _healed_model(bare: Path, source: Path, heal: Heal, state: Path) -> tuple[nn.Module, list[float]]:
    """The model of a folder after healing, and the loss of every step."""
    require_healable(bare)
    model = decoder_in(bare, heal.device)
    text = healing_text(heal.request(source), heal.settings.steps)
    if heal.method == "lora":
        return model, heal_by_lora(model, text, heal.settings, heal.seed, state)
    return model, heal_routers(model, decoder_in(source, heal.device), text, heal.settings, state)


def decoder_in(folder: Path, device: str) -> nn.Module:
    """The model of a folder, called as our own decoder is."""
    source = open_source(folder)
    if isinstance(source, RunSource):
        return source.loaded().to(device).eval()
    from moestro.hf import Whole

    return Whole(loaded_folder(folder, device)[0]).eval()


def _write(bare: Path, model: nn.Module, said: Mapping[str, Any], destination: Path) -> None:
    source = open_source(bare)
    if isinstance(source, RunSource):
        texts = {OWN_PLAN: (bare / OWN_PLAN).read_text(encoding="utf-8"), HEALING: json.dumps(said, indent=1) + "\n"}
        source.write(model, source.recipe, texts, destination)
        return
    changed = _changed(source, model)
    with FolderJob(destination, {"healed": said["asked"], "heal": said["heal"]}) as folder:
        for file in source.shards.files:
            names = [name for name in source.shards if source.file_of(name) == file]
            tensors = [_outgoing(source, name, changed) for name in names]
            folder.write(file, tensors, source.shards.metadata[file] or {"format": "pt"})
        for path in sorted(bare.rglob("*")):
            name = path.relative_to(bare).as_posix()
            if path.is_file() and name not in (*source.shards.files, RECORD, REQUESTED, HASHES):
                folder.copy(name, path)
        write_json(folder.path / RECORD, {"healed": said["asked"], "files": dict(sorted(folder.done.items()))})
        write_json(folder.path / HEALING, said)
        folder.record_hashes(but=EDITED)
        folder.publish()


def _changed(source: Checkpoint, model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the healed model under the folder's names.

    Raises: PlanError where one is of another shape or dtype than the folder's (a mistake of ours).
    """
    from moestro.hf import stored_tensors

    found = {}
    for name, tensor in stored_tensors(model.decoder).items():  # type: ignore[arg-type]
        if name in source.shards:
            if (tuple(tensor.shape), tensor.dtype) != (source.shape(name), source.dtype(name)):
                raise PlanError(f"{name} was healed as {tensor.dtype} {tuple(tensor.shape)}: a mistake in moestro")
            found[name] = tensor
    return found


def _outgoing(source: Checkpoint, name: str, changed: Mapping[str, Tensor]) -> Outgoing:
    if name in changed and not torch.equal(changed[name].cpu(), source.read(name)):
        return of_tensor(name, changed[name])
    return of_file(name, source.path, source.shards[name])
