"""How public checkpoints lie on disk: folders of safetensors and config.json, read tensor by tensor, without models."""

from moestro.formats.checkpoint import Checkpoint, ExpertMatrices
from moestro.formats.dense import DENSE_FAMILIES, DenseFamily
from moestro.formats.families import FAMILIES, Family
from moestro.formats.shards import FormatError
from moestro.formats.storage import Fused, PerExpert, Stored

__all__ = [
    "DENSE_FAMILIES",
    "FAMILIES",
    "Checkpoint",
    "DenseFamily",
    "ExpertMatrices",
    "Family",
    "FormatError",
    "Fused",
    "PerExpert",
    "Stored",
]
