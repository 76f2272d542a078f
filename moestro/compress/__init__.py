"""Smaller checkpoints: a plan says which experts go, merge or shrink; applying it streams tensors from one folder into
another.

A method (scores, search, grouping) reads a checkpoint and returns a `Plan`; nothing else passes from methods to the
writer, so a plan can be kept, read, changed and applied again.
"""

from moestro.compress.plan import (
    Calibration,
    Fingerprint,
    Group,
    LayerPlan,
    Plan,
    PlanError,
    Quantisation,
    TensorFile,
)
from moestro.compress.plan_file import read_plan, write_plan

__all__ = [
    "Calibration",
    "Fingerprint",
    "Group",
    "LayerPlan",
    "Plan",
    "PlanError",
    "Quantisation",
    "TensorFile",
    "read_plan",
    "write_plan",
]
