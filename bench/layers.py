"""The MoE layer and the PEER layer beside what people use today, on this machine.

MoE: forward + backward beside (i) the plain Python loop over experts on slices of one parameter, (ii) the same loop
with a parameter for each expert, which autograd treats better, and (iii) torch's grouped matrix product on experts
padded to the widest. PEER: forward, and forward + backward, beside the public PEER-pytorch package (gather and
einsum), routing included on both sides, with the same weights; its default of one expert a head is switched off.

    python -m bench.layers [--quick] [--json PATH]
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.harness import Row, agree, arguments, race, report, weigh
from bench.peer import PACKAGE, Shape, pair
from moestro.experts import FFNBank
from moestro.experts.widths import arithmetic, equal
from moestro.layers import MoELayer
from moestro.routers import LinearScore, ScoredRouter, TopK


def grads(run, leaves):
    """A call of `run` that also computes the gradients of its mean square with respect to `leaves`."""

    def both():
        return torch.autograd.grad(run().float().square().mean(), leaves)

    return both


class LoopedExperts(nn.Module):
    """The experts of a bank, one after another; `split` gives every expert parameters of its own."""

    def __init__(self, moe: MoELayer, split: bool) -> None:
        super().__init__()
        bank = moe.bank
        self.widths, self.moe, self.split = bank.widths, [moe], split
        w_in, w_out = bank.w_in.weight.detach(), bank.w_out.weight.detach()
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
        routing = self.moe[0].router(x)
        chosen, gates = routing.matrix()
        y = torch.zeros_like(x)
        for e, width in enumerate(self.widths):
            token, slot = (chosen == e).nonzero(as_tuple=True)
            w_in, w_out = self.expert(e)
            z = x[token] @ w_in.T
            out = (F.silu(z[:, :width]) * z[:, width:]) @ w_out
            y = y.index_add(0, token, out * gates[token, slot, None].to(out.dtype))
        return y


class PaddedGroupedExperts(nn.Module):
    """`torch.nn.functional.grouped_mm` on experts padded to the widest: the way without ragged kernels."""

    def __init__(self, moe: MoELayer) -> None:
        super().__init__()
        bank = moe.bank
        self.moe, widest, d = [moe], max(bank.widths), bank.w_out.d_model
        gate_up = bank.w_in.weight.new_zeros(len(bank.widths), 2, widest, d)
        down = bank.w_out.weight.new_zeros(len(bank.widths), widest, d)
        blocks = bank.w_in.weight.detach().split([2 * w for w in bank.widths])
        for e, (block, out) in enumerate(zip(blocks, bank.w_out.weight.detach().split(list(bank.widths)), strict=True)):
            gate_up[e, 0, : bank.widths[e]], gate_up[e, 1, : bank.widths[e]] = block.chunk(2)
            down[e, : bank.widths[e]] = out
        self.gate_up = nn.Parameter(gate_up.flatten(1, 2))
        self.down = nn.Parameter(down)

    def forward(self, x: Tensor) -> Tensor:
        routing = self.moe[0].router(x).grouped()
        ends = routing.offsets[1:].to(torch.int32)
        z = F.grouped_mm(routing.gather(x), self.gate_up.transpose(1, 2), offs=ends)
        gate, up = z.chunk(2, dim=-1)
        return routing.combine(F.grouped_mm(F.silu(gate) * up, self.down, offs=ends))


def moe_rows(quick: bool, dtype: torch.dtype) -> list[Row]:
    """Equal and unequal widths of the same sum."""
    _, d, experts, _, mean, _ = shape = (512, 256, 16, 4, 256, 5) if quick else (1024, 512, 32, 4, 512, 11)
    total = experts * mean
    rows = moe_case("equal widths", equal(experts, total, 8), shape, dtype)
    return rows + moe_case("arithmetic widths", arithmetic(experts, total, 8, first=1, step=1), shape, dtype)


def moe_case(name: str, widths: list[int], shape: tuple[int, ...], dtype: torch.dtype) -> list[Row]:
    """One list of widths; the shape is tokens, d_model, experts, top_k, mean width, rounds."""
    tokens, d, experts, top_k, _, rounds = shape
    moe = MoELayer(ScoredRouter(LinearScore(d, experts, 0.2), TopK(top_k)), [FFNBank(d, widths)]).to(dtype)
    x = torch.randn(tokens, d, dtype=dtype, requires_grad=True)
    peers = {
        "loop over slices": LoopedExperts(moe, split=False),
        "loop, own parameters": LoopedExperts(moe, split=True),
        "grouped_mm, padded": PaddedGroupedExperts(moe),
    }
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for peer, module in peers.items():
        agree(f"{name}, {peer}", module(x), moe(x)[0], tolerance)
    runs = {
        peer: grads(lambda m=module: m(x), [x, *module.parameters(), *moe.router.parameters()])
        for peer, module in peers.items()
    }
    ours = grads(lambda: moe(x)[0], [x, *moe.parameters()])
    for peer, run in runs.items():
        agree(f"{name}, {peer}, gradient of the input", run()[0], ours()[0], tolerance)
    case = f"MoE T={tokens} d={d} E={experts} k={top_k} {name} {str(dtype)[6:]}"
    rows = race(case, "forward + backward", ours, runs, rounds)
    if dtype != torch.float32:
        return rows
    return rows + weigh(case, lambda: moe(x)[0], {peer: partial(module, x) for peer, module in peers.items()})


def peer_rows(quick: bool) -> list[Row]:
    """Our PEER layer with the weights of the public package's."""
    shape = Shape(256, 256, 128, half=64) if quick else Shape(512, 512, 512)
    ours, theirs = pair(shape, sparse_gradients=False)
    x = torch.randn(shape.tokens, shape.d, requires_grad=True)
    run_ours, run_theirs = (lambda: ours(x)[0]), (lambda: theirs(x[None])[0])
    agree("PEER, output", run_ours(), run_theirs(), 1e-4)
    both_ours, both_theirs = grads(run_ours, [x, *ours.parameters()]), grads(run_theirs, [x, *theirs.parameters()])
    agree("PEER, gradient of the input", both_ours()[0], both_theirs()[0], 1e-3)
    rounds = 5 if quick else 7
    with torch.no_grad():
        rows = race(shape.case, "forward", run_ours, {PACKAGE: run_theirs}, rounds)
    rows += race(shape.case, "forward + backward", both_ours, {PACKAGE: both_theirs}, rounds)
    return rows + weigh(shape.case, run_ours, {PACKAGE: run_theirs})


def main() -> None:
    options = arguments(__doc__.splitlines()[0])
    rows = moe_rows(options.quick, torch.float32) + moe_rows(options.quick, torch.bfloat16) + peer_rows(options.quick)
    report("bench/layers.py", rows, options)


if __name__ == "__main__":
    main()
