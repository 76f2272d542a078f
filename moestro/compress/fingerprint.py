"""By what a checkpoint is known again, without reading its weights."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from moestro.compress.plan import Fingerprint, Plan, PlanError
from moestro.compress.source import RunSource
from moestro.formats import Checkpoint
from moestro.formats.shards import INDEX
from moestro.formats.writer import tensor_pieces
from moestro.ops.whole_files import sha256

# What a difference in one of the hashes means.
CHANGED = {
    "config": "its config.json is another one",
    "index": "its index is another one",
    "headers": "its files hold other tensors",
    "routers": "its routers have other weights: it was trained since, or is another model of the same shape",
}


def fingerprint(checkpoint: Checkpoint | RunSource) -> Fingerprint:
    """Hashes of a folder's config.json, index, headers, and of the content of its router tensors (no other); of a run's
    recipe, the state of its checkpoint, and the same of its model; of an export's config.json and record likewise."""
    if isinstance(checkpoint, RunSource):
        return Fingerprint(
            checkpoint.family.model_type,
            sha256(checkpoint.config_file),
            sha256(checkpoint.record_file),
            _headers(checkpoint.weights),
            _routers(checkpoint),
        )
    index = checkpoint.path / INDEX
    return Fingerprint(
        checkpoint.family.model_type,
        sha256(checkpoint.path / "config.json"),
        sha256(index) if index.is_file() else "",
        _headers([checkpoint.path / name for name in checkpoint.shards.files]),
        _routers(checkpoint),
    )


def require_source(plan: Plan, found: Fingerprint, folder: Path) -> None:
    """Raises: PlanError where a plan was made for another checkpoint than the one in `folder`."""
    expected = plan.source
    if expected.model_type != found.model_type:
        raise PlanError(f"the plan is for model_type {expected.model_type!r}, {folder} holds {found.model_type!r}")
    for name, meaning in CHANGED.items():
        if getattr(expected, name) != getattr(found, name):
            raise PlanError(
                f"the plan was made for another checkpoint than {folder}: {meaning} ({name} is "
                f"{getattr(found, name)[:12]}, expected {getattr(expected, name)[:12]}). Make the plan again, or give "
                "the checkpoint it was made for"
            )


def _headers(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            length = file.read(8)
            digest.update(path.name.encode() + b"\0" + length + file.read(int.from_bytes(length, "little")))
    return digest.hexdigest()


def _routers(checkpoint: Checkpoint | RunSource) -> str:
    digest = hashlib.sha256()
    for layer in (*checkpoint.moe_layers, *checkpoint.extra_layers):
        for role, name in sorted(checkpoint.router_tensors(layer).items()):
            digest.update(f"{layer} {role}".encode())
            for piece in tensor_pieces(checkpoint.read(name)):
                digest.update(piece)
    return digest.hexdigest()
