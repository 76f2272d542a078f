"""The hidden units of an expert as rows, and the order in which those of two experts belong together.

An expert with gate [w d], up [w d] and down [d w] is w units, each a row [gate_u, up_u, down_u] of 3 d numbers; without
a gate, of 2 d. Neither their order nor the names of the matrices matter to what is computed from them.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

Units = Float[Tensor, "w f"]


def units_of(gate: Float[Tensor, "w d"] | None, up: Float[Tensor, "w d"], down: Float[Tensor, "d w"]) -> Units:
    """The units of an expert, from its matrices."""
    return torch.cat([part for part in (gate, up, down.T) if part is not None], dim=1)


def matrices_of(units: Units, d_model: int) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gate (None where units have no gate), up and down, of the units."""
    *gate, up, down = units.split(d_model, dim=1)
    return (gate[0] if gate else None), up, down.T


def matched(reference: Units, other: Units) -> Int[Tensor, "w"]:
    """The unit of `other` that belongs to each unit of `reference`: the assignment of the largest sum of cosines of
    rows (Hungarian algorithm).

    Raises: ValueError where the shapes differ; ImportError without scipy.
    """
    if reference.shape != other.shape:
        raise ValueError(f"units of shapes {tuple(reference.shape)} and {tuple(other.shape)}, allowed: equal shapes")
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError('aligning hidden units needs scipy: pip install "moestro[compress]"') from error
    unit, mine = (torch.nn.functional.normalize(rows.double(), dim=1) for rows in (reference, other))
    _, columns = linear_sum_assignment((unit @ mine.T).cpu().numpy(), maximize=True)
    return torch.as_tensor(columns, device=other.device)


def merged(members: Sequence[Units], weights: Sequence[float], align: bool = True, reference: int = 0) -> Units:
    """Sum of weights[i] times the units of members[i], put in the order of member `reference` first where `align`.

    In float64 inside, in the members' dtype outside. A group of one with weight 1 is that member, to the bit.

    Raises: ValueError where shapes, or the numbers of members and weights, differ.
    """
    if len(members) != len(weights) or not 0 <= reference < len(members):
        raise ValueError(f"{len(members)} members, {len(weights)} weights, reference={reference} do not go together")
    if len(members) == 1 and weights[0] == 1:
        return members[0]
    total = torch.zeros_like(members[reference], dtype=torch.float64)
    for place, (units, weight) in enumerate(zip(members, weights, strict=True)):
        order = matched(members[reference], units) if align and place != reference else slice(None)
        total += units[order].to(torch.float64, copy=True).mul_(weight)
    return total.to(members[reference].dtype)
