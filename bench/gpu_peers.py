"""Contestants that need a GPU: public kernels for mixtures of experts, with the weights and the router of a layer.

None is a dependency of anything here; a missing one is named with what installs it.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.experts import Contestant, PaddedExperts, padded
from moestro.layers import MoELayer


class LigerExperts(PaddedExperts):
    """Liger-Kernel's fused experts, in Triton; one width."""

    def __init__(self, moe: MoELayer) -> None:
        from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

        super().__init__(moe, transposed=True)
        self.run = LigerFusedMoEFunction.apply

    def forward(self, x: Tensor) -> Tensor:
        chosen, gates = self.router(x).matrix()
        return self.run(x, self.gate_up, self.down, chosen.to(torch.int32), gates)


class ScatterExperts(Contestant):
    """ScatterMoE's gated experts, in Triton; one width. It stores up before gate."""

    def __init__(self, moe: MoELayer) -> None:
        from scattermoe.mlp import GLUMLP

        super().__init__(moe)
        gate_up, down = padded(moe)
        n_experts, width, d = down.shape
        with torch.device("meta"):
            self.experts = GLUMLP(d, width, n_experts, moe.router(torch.zeros(1)).fixed or 1, F.silu)
        gate, up = gate_up.chunk(2, dim=1)
        self.experts.experts.weight = nn.Parameter(torch.cat([up, gate], dim=1))
        self.experts.output_experts.weight = nn.Parameter(down.transpose(1, 2).contiguous())

    def forward(self, x: Tensor) -> Tensor:
        chosen, gates = self.router(x).matrix()
        return self.experts(x, gates.to(x.dtype), chosen)


class VariableExperts(Contestant):
    """triton-variable-moe: experts of unequal widths, multiples of 64, in Triton. It has a router of its own, squared
    ReLU and no gate, so its answers are not ours; its experts are a half wider, which makes the FLOPs the same."""

    same_answer = False

    def __init__(self, moe: MoELayer) -> None:
        from triton_moe.moe import TritonMoEConfig, TritonMoEMLP

        super().__init__(moe)
        bank, device = moe.bank, moe.bank.w_out.weight.device
        sizes = [(1, -(-3 * width // 128) * 64) for width in bank.widths]
        top_k = moe.router(torch.zeros(1)).fixed or 1
        config = TritonMoEConfig(n_embd=bank.w_out.d_model, expert_sizes=sizes, num_active_experts=top_k)
        self.experts = TritonMoEMLP(config).to(device, bank.w_out.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x[None])[0][0]


# name: how it is made, and what installs it
PEERS: dict[str, tuple[Callable[[MoELayer], Contestant], str]] = {
    "Liger": (LigerExperts, "pip install liger-kernel"),
    "ScatterMoE": (ScatterExperts, "pip install from the repository shawntan/scattermoe"),
    "triton-variable-moe": (VariableExperts, "pip install from the repository hbfreed/triton-variable-moe"),
}


def installed(moe: MoELayer) -> tuple[dict[str, Contestant], list[str]]:
    """The contestants that are installed here, and a line for each that is not."""
    found, absent = {}, []
    for name, (make, how) in PEERS.items():
        try:
            found[name] = make(moe)
        except ImportError as error:
            absent.append(f"{name}: peer not installed ({error}); {how}")
    return found, absent
