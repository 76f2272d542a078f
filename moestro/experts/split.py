"""A dense feed-forward network as small experts."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from moestro.experts.ffn import FFNBank
from moestro.experts.shared import SharedExpert


@torch.no_grad()
def split_ffn(dense: SharedExpert, widths: Sequence[int], gate: float = 1.0) -> FFNBank:
    """Experts that own the hidden units of `dense` in order, widths[e] of them each; same dtype, device and parameters.

    FFN(x) is the sum of its units' outputs, so all experts together, each weighted by `gate`, give FFN(x) exactly:
    output weights are divided by `gate`, for routers whose gates sum to 1 by 1 / n_experts (the dense variant of XMoE,
    arXiv:2403.18926, whose released code leaves the procedure out; contiguous blocks are ours).

    Raises: ValueError where the widths do not sum to the dense width, gate is not above 0, or there are biases.
    """
    if sum(widths) != dense.width:
        raise ValueError(f"widths={list(widths)} sum to {sum(widths)}, allowed: {dense.width}, the dense width")
    if dense.w_in.bias is not None:
        raise ValueError("bias=True, allowed: a network without biases; moestro.convert splits those with them")
    if not gate > 0:
        raise ValueError(f"gate={gate}, allowed: above 0")
    bank = FFNBank(dense.d_model, widths, dense.activation, dense.glu).to(dense.w_in.weight)
    bank.w_in.weight.copy_(_unit_major(dense.w_in.weight, widths, blocks=2 if dense.glu else 1))
    bank.w_out.weight.copy_(dense.w_out.weight.T / gate)
    return bank


def _unit_major(weight: Float[Tensor, "n d"], widths: Sequence[int], blocks: int) -> Float[Tensor, "n d"]:
    """[gate of all, up of all] -> [gate, up] of one expert after the other."""
    per_block = [block.split(list(widths)) for block in weight.chunk(blocks)]
    return torch.cat([part for expert in zip(*per_block, strict=True) for part in expert])
