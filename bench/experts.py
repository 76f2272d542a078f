"""What people use today for the experts of a mixture: contestants with the weights and the router of a layer of ours.

All are modules on tokens. Where a contestant knows only one width, experts are padded to the widest with zeros.
"""

from collections.abc import Callable, Iterable
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moestro.layers import MoELayer

TRANSFORMERS = "transformers"


def gradients(run: Callable[[], Tensor], leaves: Iterable[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """A call of `run` that also computes the gradients of its mean square with respect to `leaves`."""
    leaves = list(leaves)
    return lambda: torch.autograd.grad(run().float().square().mean(), leaves)


class Contestant(nn.Module):
    """Experts behind the router of `moe`, which stays the layer's own."""

    def __init__(self, moe: MoELayer) -> None:
        super().__init__()
        self.layer = [moe]

    @property
    def router(self) -> nn.Module:
        return self.layer[0].router


class LoopedExperts(Contestant):
    """One expert after another, on slices of one parameter, or, with `split`, with parameters of its own for each."""

    def __init__(self, moe: MoELayer, split: bool) -> None:
        super().__init__(moe)
        self.widths, self.split = moe.bank.widths, split
        w_in, w_out = moe.bank.w_in.weight.detach(), moe.bank.w_out.weight.detach()
        sizes_in, sizes_out = [2 * w for w in self.widths], list(self.widths)
        parts = (w_in.split(sizes_in), w_out.split(sizes_out)) if split else ([w_in], [w_out])
        self.w_in = nn.ParameterList([nn.Parameter(p.clone()) for p in parts[0]])
        self.w_out = nn.ParameterList([nn.Parameter(p.clone()) for p in parts[1]])

    def expert(self, e: int) -> tuple[Tensor, Tensor]:
        if self.split:
            return self.w_in[e], self.w_out[e]
        start, width = sum(self.widths[:e]), self.widths[e]
        return self.w_in[0][2 * start : 2 * (start + width)], self.w_out[0][start : start + width]

    def forward(self, x: Tensor) -> Tensor:
        chosen, gates = self.router(x).matrix()
        y = torch.zeros_like(x)
        for e, width in enumerate(self.widths):
            token, slot = (chosen == e).nonzero(as_tuple=True)
            w_in, w_out = self.expert(e)
            z = x[token] @ w_in.T
            out = (F.silu(z[:, :width]) * z[:, width:]) @ w_out
            y = y.index_add(0, token, out * gates[token, slot, None].to(out.dtype))
        return y


class PaddedExperts(Contestant):
    """Weights of experts padded to the widest: gate|up [e, 2w, d] and down [e, w, d] or, transposed, [e, d, w]."""

    def __init__(self, moe: MoELayer, transposed: bool = False) -> None:
        super().__init__(moe)
        gate_up, down = padded(moe)
        self.gate_up = nn.Parameter(gate_up)
        self.down = nn.Parameter(down.transpose(1, 2).contiguous() if transposed else down)


def padded(moe: MoELayer) -> tuple[Tensor, Tensor]:
    """gate|up [e, 2w, d] and down [e, w, d] of a layer's experts, w the greatest width."""
    bank = moe.bank
    widths, w_in, w_out = list(bank.widths), bank.w_in.weight.detach(), bank.w_out.weight.detach()
    widest, d = max(widths), bank.w_out.d_model
    gate_up, down = w_in.new_zeros(len(widths), 2, widest, d), w_in.new_zeros(len(widths), widest, d)
    blocks = zip(w_in.split([2 * w for w in widths]), w_out.split(widths), strict=True)
    for e, (block, out) in enumerate(blocks):
        gate_up[e, 0, : widths[e]], gate_up[e, 1, : widths[e]] = block.chunk(2)
        down[e, : widths[e]] = out
    return gate_up.flatten(1, 2), down


class GroupedExperts(PaddedExperts):
    """torch's grouped matrix product."""

    def forward(self, x: Tensor) -> Tensor:
        routing = self.router(x).grouped()
        ends = routing.offsets[1:].to(torch.int32)
        z = F.grouped_mm(routing.gather(x), self.gate_up.transpose(1, 2), offs=ends)
        gate, up = z.chunk(2, dim=-1)
        return routing.combine(F.grouped_mm(F.silu(gate) * up, self.down, offs=ends))


class TransformersExperts(PaddedExperts):
    """Qwen3-MoE's experts in the library transformers: `eager` (a loop), `grouped_mm` or `batched_mm`."""

    def __init__(self, moe: MoELayer, implementation: str) -> None:
        super().__init__(moe, transposed=True)
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        n_experts, double, d = self.gate_up.shape
        config = SimpleNamespace(
            num_experts=n_experts,
            hidden_size=d,
            moe_intermediate_size=double // 2,
            hidden_act="silu",
            _experts_implementation=implementation,
        )
        with torch.device("meta"):
            self.experts = Qwen3MoeExperts(config)
        self.experts.gate_up_proj, self.experts.down_proj = self.gate_up, self.down

    def forward(self, x: Tensor) -> Tensor:
        chosen, gates = self.router(x).matrix()
        return self.experts(x, chosen, gates.to(x.dtype))


def transformers_version() -> str | None:
    """The version of the library transformers here, or None where it is not installed."""
    try:
        import transformers
    except ImportError:
        return None
    return transformers.__version__
