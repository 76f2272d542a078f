"""What lies between the two products of a feed-forward expert, forward and backward, written to given memory.

All tensors are contiguous and of one dtype.
"""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from moestro.ops import backend
from moestro.ops.activations import activation as find
from moestro.ops.native import glu as native_glu


def gates_of(w_in: Shaped[Tensor, "..."], w_out: Shaped[Tensor, "..."]) -> int:
    """Input matrices of an expert, from all experts' weights however they lie: two with a gate, one without."""
    return max(1, w_in.numel() // max(1, w_out.numel()))


def hidden(z: Float[Tensor, "n gw"], out: Float[Tensor, "n w"], activation: str) -> Float[Tensor, "n w"]:
    """act(z), or act(gate) * up where z = (gate, up) lie side by side; writes and returns `out`."""
    act, width = find(activation), out.shape[1]
    if _compiled(z, width, activation):
        native_glu.swiglu(z, out)
        return out
    act.forward_into(z[:, :width], out)
    return out if z.shape[1] == width else out.mul_(z[:, width:])


def hidden_backward(
    dhidden: Float[Tensor, "n w"],
    z: Float[Tensor, "n gw"],
    weight: Float[Tensor, "n"],
    dz: Float[Tensor, "n gw"],
    scaled: Float[Tensor, "n w"],
    dweight: Float[Tensor, "n"],
    activation: str,
) -> None:
    """Backward through weight * hidden(z), given the gradient `dhidden` of what the weight multiplies.

    Writes dz, `scaled` = weight * hidden and `dweight` = <dhidden, hidden>, row by row; `dhidden` is lost.
    """
    if _compiled(z, dhidden.shape[1], activation):
        return native_glu.swiglu_backward(dhidden, z, weight, dz, scaled, dweight)
    act, width, each = find(activation), dhidden.shape[1], weight[:, None]
    gate, left, right = z[:, :width], dz[:, :width], dz[:, width:]
    if z.shape[1] == width:
        act.forward_into(z, scaled)
        torch.sum(dhidden * scaled, -1, out=dweight)
        act.backward_into(dhidden.mul_(each), z, dz)
    else:
        up = z[:, width:]
        act.forward_into(gate, scaled)
        # both halves of dz serve as scratch memory first: hidden to the left, its products with dhidden to the right
        torch.mul(scaled, up, out=left)
        torch.mul(dhidden, left, out=right)
        torch.sum(right, -1, out=dweight)
        torch.mul(dhidden.mul_(each), scaled, out=right)
        scaled.copy_(left)
        act.backward_into(dhidden.mul_(up), gate, left)
    scaled.mul_(each)


def compiled_experts(
    x: Float[Tensor, "t d"],
    w_in: Float[Tensor, "gs d"],
    w_out: Float[Tensor, "s d"] | Float[Tensor, "e d w"],
    activation: str,
) -> bool:
    """Whether compiled kernels for whole experts are for these: gated, with SiLU."""
    return activation == "silu" and w_in.numel() == 2 * w_out.numel() and backend.runs_native(x, w_in, w_out)


def _compiled(z: Tensor, width: int, activation: str) -> bool:
    return activation == "silu" and z.shape[1] == 2 * width and backend.runs_native(z)
