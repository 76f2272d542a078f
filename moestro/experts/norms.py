"""What a generalization bound asks of experts: the norms of their matrices."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class ExpertNorms:
    """Frobenius and spectral norms of every expert's matrices, from the first to the last. `heuristic` says what of the
    experts no theorem on feed-forward networks covers."""

    frobenius: Float[Tensor, "e l"]
    spectral: Float[Tensor, "e l"]
    heuristic: tuple[str, ...] = ()


@torch.no_grad()
def norms_of(experts: Sequence[Sequence[Float[Tensor, "_ _"]]], heuristic: tuple[str, ...]) -> ExpertNorms:
    """Norms of every expert's matrices, float64; those of an empty matrix are 0."""
    wide = [[matrix.double() for matrix in expert] for expert in experts]
    frobenius = torch.stack([torch.stack([m.norm() for m in expert]) for expert in wide])
    spectral = [torch.stack([_spectral(m) for m in expert]) for expert in wide]
    return ExpertNorms(frobenius, torch.stack(spectral), heuristic)


def _spectral(matrix: Float[Tensor, "_ _"]) -> Float[Tensor, ""]:
    return torch.linalg.matrix_norm(matrix, 2) if matrix.numel() else matrix.sum()


def activation_remarks(activation: str, glu: bool) -> tuple[str, ...]:
    """What keeps two-layer experts out of the theorem: it wants a 1-Lipschitz, positively homogeneous activation."""
    remarks = ("gated experts: gate and up are taken as one matrix",) if glu else ()
    return remarks if activation == "relu" else (*remarks, f"activation {activation} is not positively homogeneous")
