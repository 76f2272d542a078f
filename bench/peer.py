"""The PEER layer from forward to optimizer, beside the public package with dense AdamW, and its step against N.

For N = 128^2 .. 1024^2 experts: forward, forward + backward, and a whole training step (gradients forgotten, forward,
backward, clipping, optimizer), ours with row-sparse gradients and `RowAdamW`, beside the public PEER-pytorch package
(gather and einsum) with torch's fused dense AdamW: routing included on both sides, same weights, same numbers of
heads, keys and experts; the package's default of one expert a head is switched off. Then our training step alone at
each N beside the one at the smallest N: a ratio of 1 means that N does not matter. A size whose tables, gradients and
moments do not fit in memory beside the package's is left out, and said so.

    python -m bench.peer [--quick] [--json PATH]
"""

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.harness import Row, agree, arguments, race, report, weigh
from moestro.experts import SingletonBank
from moestro.layers import MoELayer
from moestro.routers import ProductKeyRouter
from moestro.train import OptimSettings
from moestro.train.optim import build_optimizer, clip_gradients

PACKAGE = "PEER-pytorch 0.2.2"
LR, CLIP = 1e-3, 1.0


@dataclass(frozen=True)
class Shape:
    """One size; a head's keys are 2 * `half` wide."""

    tokens: int
    d: int
    side: int
    heads: int = 8
    top_k: int = 16
    half: int = 128

    @property
    def case(self) -> str:
        active, keys = self.heads * self.top_k, 2 * self.half
        return f"PEER T={self.tokens} d={self.d} N={self.side}^2 h*k={active} dk={keys} float32"

    def fits(self) -> bool:
        """Whether four copies of the tables (weights, gradients, two moments) fit for the package and three for us,
        with the package's gathered rows, and a fifth to spare. Where the system does not say, it is tried."""
        table = 2 * self.side**2 * self.d * 4
        gathered = 6 * self.tokens * self.heads * self.top_k * self.d * 4
        free = available_memory()
        return free is None or 7 * table + gathered < 0.8 * free


def available_memory() -> int | None:
    """Bytes of memory that can be used without swapping, where the system says."""
    facts = Path("/proc/meminfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


def layer(shape: Shape, sparse_gradients: bool) -> MoELayer:
    """Our layer as the package builds its own: keys for every head, no query norm."""
    experts = shape.side**2
    router = ProductKeyRouter(
        shape.d, experts, shape.heads, shape.top_k, 2 * shape.half, shared_keys=False, query_norm="none"
    )
    return MoELayer(router, [SingletonBank(shape.d, experts, sparse_gradients=sparse_gradients)])


def pair(shape: Shape, sparse_gradients: bool) -> tuple[MoELayer, nn.Module]:
    """Our layer and the package's, with the same weights at a scale at which layers train.

    Exits with an error where the package is not installed.
    """
    try:
        from PEER_pytorch import PEER
    except ImportError:
        sys.exit("the PEER comparison needs the public package: pip install 'moestro[bench]'")
    half, heads, d = shape.half, shape.heads, shape.d
    theirs = PEER(
        d,
        heads=heads,
        num_experts=shape.side**2,
        num_experts_per_head=shape.top_k,
        dim_key=half,
        non_competing_scores=False,
    )
    ours = layer(shape, sparse_gradients)
    with torch.no_grad():
        theirs.weight_down_embed.weight.mul_(d**-0.5)
        theirs.keys.mul_(50 * half**-0.5)
        ours.router.query.copy_(theirs.to_queries[0].weight.view(2, heads, half, d).transpose(0, 1).reshape(-1, d))
        ours.router.keys.copy_(theirs.keys.permute(2, 0, 1, 3))
        ours.bank.up.copy_(theirs.weight_down_embed.weight)
        ours.bank.down.copy_(theirs.weight_up_embed.weight)
    return ours, theirs


def gradients(run: Callable[[], Tensor], leaves: Iterable[Tensor]) -> Callable[[], list[Tensor]]:
    """A call of `run` that also computes the gradients of its mean square, as tensors or as values of rows."""
    leaves = list(leaves)

    def both() -> list[Tensor]:
        found = torch.autograd.grad(run().square().mean(), leaves)
        return [gradient._values() if gradient.is_sparse else gradient for gradient in found]

    return both


def training(module: nn.Module, run: Callable[[], Tensor], optimizer) -> Callable[[], None]:
    """A whole training step."""

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        run().square().mean().backward()
        clip_gradients(module, CLIP)
        optimizer.step()

    return step


def steps(ours: MoELayer, theirs: nn.Module, x: Tensor) -> tuple[Callable[[], None], Callable[[], None]]:
    """Training steps of both sides; AdamW without weight decay, so that rows not touched agree as well."""
    dense = torch.optim.AdamW(theirs.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    return our_step(ours, x), training(theirs, lambda: theirs(x[None])[0], dense)


def our_step(ours: MoELayer, x: Tensor) -> Callable[[], None]:
    """Our training step, with the optimizers that the training loop would use."""
    optimizer = build_optimizer(ours, OptimSettings(lr=LR, betas=(0.9, 0.95), weight_decay=0.0))
    return training(ours, lambda: ours(x)[0], optimizer)


def beside_the_package(shape: Shape, rounds: int) -> list[Row]:
    """Forward, forward + backward, training step and activation memory at one size."""
    ours, theirs = pair(shape, sparse_gradients=True)
    x = torch.randn(shape.tokens, shape.d, requires_grad=True)
    run_ours, run_theirs = (lambda: ours(x)[0]), (lambda: theirs(x[None])[0])
    before = run_ours().detach()
    agree(f"{shape.case}, output", before, run_theirs().detach(), 1e-4)
    both_ours = gradients(run_ours, [x, *ours.parameters()])
    both_theirs = gradients(run_theirs, [x, *theirs.parameters()])
    agree(f"{shape.case}, gradient of the input", both_ours()[0], both_theirs()[0], 1e-3)
    with torch.no_grad():
        rows = race(shape.case, "forward", run_ours, {PACKAGE: run_theirs}, rounds)
    rows += race(shape.case, "forward + backward", both_ours, {PACKAGE: both_theirs}, rounds)
    rows += weigh(shape.case, run_ours, {PACKAGE: run_theirs})
    step_ours, step_theirs = steps(ours, theirs, x)
    step_ours()
    step_theirs()
    # Adam's first step is near the sign of the gradient, whatever its size: rounding shows where it is near 0.
    agree(f"{shape.case}, change by a step", run_ours().detach() - before, run_theirs().detach() - before, 2e-2)
    return rows + race(shape.case, "training step", step_ours, {f"{PACKAGE} + AdamW": step_theirs}, rounds)


def against_n(shapes: list[Shape], rounds: int) -> list[Row]:
    """Our training step at every N, each in one interleaved race with the smallest."""
    x = torch.randn(shapes[0].tokens, shapes[0].d)
    smallest = our_step(layer(shapes[0], sparse_gradients=True), x)
    rows = []
    for shape in shapes[1:]:
        larger = our_step(layer(shape, sparse_gradients=True), x)
        peers = {f"ours, N={shapes[0].side}^2": smallest}
        rows += race(shape.case, "training step against N", larger, peers, rounds)
    return rows


def main() -> None:
    options = arguments(__doc__.splitlines()[0])
    tokens, d, sides = (128, 64, (64, 128, 256)) if options.quick else (512, 256, (128, 256, 512, 1024))
    rounds = 5 if options.quick else 9
    rows = []
    shapes = [Shape(tokens, d, side) for side in sides]
    for shape in shapes:
        if shape.fits():
            rows += beside_the_package(shape, rounds)
        else:
            print(f"{shape.case}: does not fit in memory beside the package, left out", file=sys.stderr)
    rows += against_n(shapes[1:], rounds)
    report("bench/peer.py", rows, options)


if __name__ == "__main__":
    main()
