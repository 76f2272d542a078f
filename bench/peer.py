"""The PEER layer from forward to optimizer, beside the public package with dense AdamW, and its step against N.

For N = 128^2 .. 1024^2 experts: forward, forward + backward, and a whole training step (gradients forgotten, forward,
backward, clipping, optimizer), ours with `RowAdamW` on gradients that backward leaves in factors (`optim.fused_rows`),
beside the public PEER-pytorch package (gather and einsum) with torch's fused dense AdamW: routing included on both
sides, same weights, same numbers of heads, keys and experts; the package's default of one expert a head is switched
off. Then the parts of the layer: retrieval beside `torch.topk`, experts beside gather and einsum, and beside reading
their rows at all (`embedding_bag`), which says what memory leaves to gain. Then our training step alone at each N
beside the one at the smallest N: a ratio of 1 means that N does not matter.

The benchmark keeps freed memory, as our training does. Forward and training step are therefore timed a second time in a
process of its own that gives it back to the system, as the package's users run it (`bench/peer_given_back.py`).

Everything of ours runs with the native kernels (`moestro version` says whether there are any) and without. Outputs,
gradients and the change by a step are compared before anything is timed. A size whose tables, gradients and moments do
not fit in memory is left out, and said so.

    python -m bench.peer [--quick] [--json PATH]
"""

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.harness import Row, agree, arguments, clock, compare, report, weigh
from bench.processes import in_its_own_process
from moestro import ops
from moestro.experts import SingletonBank
from moestro.layers import MoELayer
from moestro.ops import backend, native
from moestro.ops.machine_memory import free_machine_memory
from moestro.routers import ProductKeyRouter
from moestro.train import OptimSettings
from moestro.train.optim import build_optimizer, clip_gradients

PACKAGE = "PEER-pytorch 0.2.2"
# The floor of the experts' time: the same rows through torch's embedding_bag, which computes nothing with them.
READ_ONCE = "reading the same rows"
LR, CLIP = 1e-3, 1.0
# Ours, by backend, and what is said of a row that was measured with it.
OURS = {"native": "", "fused": " without native kernels"} if native.library().handle else {"fused": " (not built)"}


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

    def fits(self, copies: int) -> bool:
        """Whether so many copies of the tables fit, with the package's gathered rows, and a fifth to spare; four are
        needed by the package (weights, gradients, two moments), three by us. Where the system does not say, it is
        tried."""
        table = 2 * self.side**2 * self.d * 4
        gathered = 6 * self.tokens * self.heads * self.top_k * self.d * 4
        free = free_machine_memory()
        if free is None or copies * table + gathered < 0.8 * free:
            return True
        print(f"{self.case}: {copies} copies of the tables do not fit in memory, left out", file=sys.stderr)
        return False


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
    copy_weights(shape, ours, theirs)
    return ours, theirs


def copy_weights(shape: Shape, ours: MoELayer, theirs: nn.Module) -> None:
    """Give our layer the weights of the package's."""
    half, heads, d = shape.half, shape.heads, shape.d
    with torch.no_grad():
        ours.router.query.copy_(theirs.to_queries[0].weight.view(2, heads, half, d).transpose(0, 1).reshape(-1, d))
        ours.router.keys.copy_(theirs.keys.permute(2, 0, 1, 3))
        ours.bank.up.copy_(theirs.weight_down_embed.weight)
        ours.bank.down.copy_(theirs.weight_up_embed.weight)


def under(name: str, run: Callable) -> Callable:
    """A call of `run` with one backend."""

    def forced():
        with backend.force(name):
            return run()

    return forced


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


def our_step(ours: MoELayer, x: Tensor) -> Callable[[], None]:
    """Our training step, with the optimizers that the training loop would use; without weight decay, so that rows not
    touched agree with those of dense AdamW as well."""
    settings = OptimSettings(lr=LR, betas=(0.9, 0.95), weight_decay=0.0, fused_rows=True)
    return training(ours, lambda: ours(x)[0], build_optimizer(ours, settings))


def their_step(theirs: nn.Module, x: Tensor) -> Callable[[], None]:
    """The package's training step, with torch's fused dense AdamW."""
    dense = torch.optim.AdamW(theirs.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    return training(theirs, lambda: theirs(x[None])[0], dense)


def duel(case: str, what: str, ours: Callable, peer: str, theirs: Callable, rounds: int) -> list[Row]:
    """Ours with every backend and a peer, all in one interleaved race; a row for each backend."""
    times = clock({**{name: under(name, ours) for name in OURS}, peer: theirs}, rounds)
    rows = []
    for name, said in OURS.items():
        rows += compare(case, what + said, {"ours": times[name], peer: times[peer]})
    return rows


def beside_the_package(shape: Shape, rounds: int) -> list[Row]:
    """Forward, forward + backward, training step and activation memory at one size."""
    ours, theirs = pair(shape, sparse_gradients=True)
    x = torch.randn(shape.tokens, shape.d, requires_grad=True)
    run_ours, run_theirs = (lambda: ours(x)[0]), (lambda: theirs(x[None])[0])
    both_ours = gradients(run_ours, [x, *ours.parameters()])
    both_theirs = gradients(run_theirs, [x, *theirs.parameters()])
    want, want_gradient = run_theirs().detach(), both_theirs()[0]
    for name in OURS:
        agree(f"{shape.case}, {name}, output", under(name, run_ours)().detach(), want, 1e-4)
        agree(f"{shape.case}, {name}, gradient of the input", under(name, both_ours)()[0], want_gradient, 1e-3)
    with torch.no_grad():
        rows = duel(shape.case, "forward", run_ours, PACKAGE, run_theirs, rounds)
    rows += duel(shape.case, "forward + backward", both_ours, PACKAGE, both_theirs, rounds)
    for name, said in OURS.items():
        weighed = weigh(shape.case, under(name, run_ours), {PACKAGE: run_theirs})
        rows += [replace(row, what=row.what + said) for row in weighed]
    step_ours, step_theirs = agreeing_steps(shape, ours, theirs, x)
    return rows + duel(shape.case, "training step", step_ours, f"{PACKAGE} + AdamW", step_theirs, rounds)


def agreeing_steps(shape: Shape, ours: MoELayer, theirs: nn.Module, x: Tensor) -> tuple[Callable, Callable]:
    """Training steps of both sides whose first changed the output alike, with every backend."""
    before, after = theirs(x[None])[0].detach(), {}
    step_ours = our_step(ours, x)
    for name in OURS:
        copy_weights(shape, ours, theirs)
        step_ours = our_step(ours, x)
        under(name, step_ours)()
        after[name] = ours(x)[0].detach()
    step_theirs = their_step(theirs, x)
    step_theirs()
    for name in OURS:
        # Adam's first step is near the sign of the gradient, whatever its size: rounding shows where it is near 0.
        change = theirs(x[None])[0].detach() - before
        agree(f"{shape.case}, {name}, change by a step", after[name] - before, change, 2e-2)
    return step_ours, step_theirs


def parts(shape: Shape, rounds: int) -> list[Row]:
    """Retrieval and experts of one size, each alone, beside what they replace."""
    peer = layer(shape, sparse_gradients=True)
    x = torch.randn(shape.tokens, shape.d)
    query = torch.randn(shape.tokens, shape.heads, 2 * shape.half)
    keys = peer.router.keys.detach()
    halves = query.view(shape.tokens, shape.heads, 2, shape.half)
    with torch.no_grad():
        scores = torch.einsum("thsc,shnc->thsn", halves, keys)
        retrieve = partial(ops.product_key_topk, query, keys, shape.top_k)
        # the definition sorts all pairs of keys: a few tokens are enough
        best = under("reference", lambda: ops.product_key_topk(query[:4], keys, shape.top_k))()[0]
        for name in OURS:
            agree(f"{shape.case}, {name}, retrieval", under(name, retrieve)()[0][:4], best, 1e-5)
        rows = experts_alone(shape, peer, x, "experts alone, forward", rounds)
        routing = peer.router(x)
        experts, ids = partial(peer.bank, x, routing), routing.matrix()[0]
        read = partial(read_once, peer.bank, ids)
        rows += duel(shape.case, "experts alone, forward", experts, READ_ONCE, read, rounds)
        if "native" in OURS:
            alone = {"torch.topk of finished scores": lambda: scores.topk(shape.top_k)}
            plain = {"scores and torch.topk": under("fused", retrieve)}
            times = clock({"ours": under("native", retrieve), **plain, **alone}, rounds)
            rows += compare(shape.case, "retrieval, scores included", times)
    return rows


def experts_alone(shape: Shape, peer: MoELayer, x: Tensor, what: str, rounds: int) -> list[Row]:
    """A forward pass of the experts, routing given, beside gather and einsum; without gradients."""
    experts = partial(peer.bank, x, peer.router(x))
    gather = under("reference", experts)
    for name in OURS:
        agree(f"{shape.case}, {name}, experts", under(name, experts)(), gather(), 1e-5)
    return duel(shape.case, what, experts, "gather and einsum", gather, rounds)


def read_once(bank: SingletonBank, ids: Tensor) -> None:
    """Every row that the experts need, read once and added up by torch: what memory alone asks for."""
    for table in bank.tables().values():
        F.embedding_bag(ids, table, mode="sum")


def against_n(shapes: list[Shape], rounds: int) -> list[Row]:
    """Our training step at every N, each in one interleaved race with the smallest."""
    x = torch.randn(shapes[0].tokens, shapes[0].d)
    smallest = our_step(layer(shapes[0], sparse_gradients=True), x)
    rows = []
    for shape in (shape for shape in shapes[1:] if shape.fits(copies=3)):
        larger = our_step(layer(shape, sparse_gradients=True), x)
        peer = f"ours, N={shapes[0].side}^2"
        for name, said in OURS.items():
            times = clock({"ours": under(name, larger), peer: under(name, smallest)}, rounds)
            rows += compare(shape.case, "training step against N" + said, times)
    return rows


def main() -> None:
    # they import this module
    from bench.peer_given_back import given_back
    from bench.peer_narrow import in_fewer_bits

    options = arguments(__doc__.splitlines()[0])
    tokens, d, sides = (128, 64, (64, 128, 256)) if options.quick else (512, 512, (128, 256, 512, 1024))
    rounds = 5 if options.quick else 7
    shapes = [Shape(tokens, d, side) for side in sides]
    # at the greatest N there is no room for the package's tables of full width
    narrow = [Shape(tokens, d // 2, shape.side) if shape.side == 1024 else shape for shape in shapes]
    # first, while this process has kept nothing: there is no room for the greatest tables of two processes
    apart = partial(in_its_own_process, options.seed)
    beside = {shape: apart(given_back, shape, rounds) for shape in narrow if shape.fits(copies=7)}
    fewer_bits = apart(in_fewer_bits, shapes[-2], rounds) if shapes[-2].fits(copies=10) else []
    rows = []
    for shape, at_its_side in zip(shapes, narrow, strict=True):
        if at_its_side in beside:
            rows += beside_the_package(at_its_side, rounds) + beside[at_its_side]
        if shape.fits(copies=1):
            rows += parts(shape, rounds)
    rows += fewer_bits + against_n(shapes[1:], rounds)
    report("bench/peer.py", rows, options)


if __name__ == "__main__":
    main()
