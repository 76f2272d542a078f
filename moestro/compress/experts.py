"""The experts that a plan makes: merged, narrowed, factored. One at a time, from the folder they are read from."""

from functools import lru_cache

import torch
from torch import Tensor

from moestro.compress.lowrank import factors
from moestro.compress.plan import LayerPlan, PlanError
from moestro.compress.units import matrices_of, merged, units_of
from moestro.formats import Checkpoint, ExpertMatrices

MATRICES = ("gate", "up", "down")


class NewExperts:
    """Experts of one folder as the layers of a plan make them. `densify` multiplies low-rank factors out again.

    `moments`, by name, are what a plan's tensor file says of experts' inputs.
    """

    def __init__(self, checkpoint: Checkpoint, densify: bool = False, moments: dict[str, Tensor] | None = None) -> None:
        self.checkpoint, self.densify, self.moments = checkpoint, densify, moments or {}
        # one expert's matrices may be asked for one by one
        self.made = lru_cache(maxsize=1)(self._made)

    def changes(self, layer: LayerPlan, new: int) -> bool:
        """Whether new expert `new` has other numbers than the expert that it was."""
        grouped = layer.groups is not None and layer.groups[new].weights != (1.0,)
        narrowed = layer.units is not None and layer.units[new] is not None
        return grouped or narrowed or self.rank(layer, new) is not None

    def rank(self, layer: LayerPlan, new: int) -> int | None:
        """The rank of its matrices' factors, None where they stay whole."""
        return None if layer.ranks is None else layer.ranks[new]

    def width(self, layer: LayerPlan, new: int) -> int:
        """Its hidden units."""
        units = None if layer.units is None else layer.units[new]
        return self.checkpoint.width(layer.layer) if units is None else len(units)

    def part(self, layer: LayerPlan, new: int, part: str) -> Tensor:
        """One of its matrices or biases, whole."""
        matrix = getattr(self.made(layer, new), part)
        rank = self.rank(layer, new)
        if rank is None or part not in MATRICES:
            return matrix
        a, b = self.factors(layer, new, part)
        return (a.double() @ b.double()).to(matrix.dtype)

    def factors(self, layer: LayerPlan, new: int, part: str) -> tuple[Tensor, Tensor]:
        """A [out r] and B [r in] in place of one of its matrices.

        Raises: PlanError where the rank is no rank of the matrix.
        """
        matrix, rank = getattr(self.made(layer, new), part), self.rank(layer, new)
        side = "hidden" if part == "down" else "input"
        moments = self.moments.get(f"moments.{layer.layer}.{layer.keep[new]}.{side}")
        if rank is None or rank > min(matrix.shape):
            raise PlanError(
                f"layer {layer.layer}, new expert {new}: rank {rank} of a {tuple(matrix.shape)} matrix (ranks)"
            )
        return factors(matrix, rank, moments)

    def _made(self, layer: LayerPlan, new: int) -> ExpertMatrices:
        kept = layer.keep[new]
        group = None if layer.groups is None else layer.groups[new]
        if group is None or group.weights == (1.0,):
            made = self.checkpoint.expert(layer.layer, kept)
        else:
            experts = [self.checkpoint.expert(layer.layer, member) for member in group.members]
            made = merged_experts(experts, group.weights, group.align, group.members.index(kept))
        units = None if layer.units is None else layer.units[new]
        return made if units is None else narrowed(made, units)


def merged_experts(
    experts: list[ExpertMatrices], weights: tuple[float, ...], align: bool, reference: int
) -> ExpertMatrices:
    """Sum of weights[i] times expert i, hidden units in the order of expert `reference` first where `align`. Biases
    belong to their units; the output's is summed.
    """
    d_model = experts[0].up.shape[1]
    rows = [_with_biases(expert) for expert in experts]
    units = merged(rows, weights, align, reference)
    biased = experts[0].up_bias is not None
    gate, up, down = matrices_of(units[:, : 3 * d_model], d_model)
    if gate is None or not biased:
        return ExpertMatrices(up if gate is None else gate, up, down)
    gate_bias, up_bias = units[:, 3 * d_model :].unbind(1)
    outputs = torch.stack([torch.zeros(d_model) if e.down_bias is None else e.down_bias for e in experts])
    down_bias = torch.tensor(weights, dtype=torch.float64) @ outputs.double()
    return ExpertMatrices(gate, up, down, gate_bias, up_bias, down_bias.to(gate.dtype))


def _with_biases(expert: ExpertMatrices) -> Tensor:
    """Units, each with its biases at the end."""
    units = units_of(expert.gate, expert.up, expert.down)
    if expert.gate_bias is None or expert.up_bias is None:
        return units
    return torch.cat([units, expert.gate_bias[:, None], expert.up_bias[:, None]], dim=1)


def narrowed(expert: ExpertMatrices, units: tuple[int, ...]) -> ExpertMatrices:
    """The expert with these of its hidden units alone."""
    index = torch.tensor(units)
    gate_bias, up_bias = (None if bias is None else bias[index] for bias in (expert.gate_bias, expert.up_bias))
    parts = expert.gate[index], expert.up[index], expert.down[:, index]
    return ExpertMatrices(*parts, gate_bias, up_bias, expert.down_bias)
