"""The MoE layer with experts of equal and of unequal widths beside what people use today, on this CPU.

Forward + backward of a whole layer, routing included, beside (i) the plain loop over experts on slices of one
parameter, (ii) the same loop with parameters of its own for each expert, which autograd treats better, (iii) the
library transformers' experts, a loop (`eager`) and `grouped_mm`, and (iv) torch's grouped matrix product; (iii) and
(iv) know one width, so there experts are padded to the widest. The rate on useful FLOPs stands beside those of the
machine's own matrix product: a large one, and the six products of the mean expert again and again, so that all lies in
the cache; the time, beside that of copying the experts' weights. In float32 the error against float64, so that nobody
has to believe that speed is not bought with it. In bfloat16 also with other tokens, and so another routing, every
time, as in training. Then decoding: a forward pass of 1 or 16 tokens, other ones every time. Freed memory is kept on
all sides, as our training keeps it; forward + backward is timed again in a process that gives it back to the system, as
most programs do: the loop's gradients, a whole one for every expert's slice, are then new pages in every call.

    python -m bench.hmoe [--quick] [--json PATH]
"""

import argparse
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import cycle

import torch
from torch import Tensor, nn

from bench.experts import (
    TRANSFORMERS,
    GroupedExperts,
    LoopedExperts,
    TransformersExperts,
    transformers_version,
)
from bench.harness import Row, agree, arguments, clock, compare, rate, report, weigh
from bench.processes import in_its_own_process
from moestro.experts import FFNBank
from moestro.experts.widths import arithmetic, equal
from moestro.layers import MoELayer
from moestro.routers import LinearScore, ScoredRouter, TopK

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
GEMM, CACHED = "one product of 2048 x 2048 x 2048", "the mean expert's six products, in the cache"
COPY = "a copy of the experts' weights, nothing computed"
# what stays in the race when every call has a shape of its own and slow contestants become very slow
CHANGING = ("loop, own parameters", f"{TRANSFORMERS} grouped_mm", "grouped_mm, padded")


@dataclass(frozen=True)
class Shape:
    """One layer: its name, width of the model, experts a token, widths of the experts."""

    name: str
    d: int
    top_k: int
    widths: Sequence[int]

    def layer(self, dtype: torch.dtype) -> MoELayer:
        n_experts = len(self.widths)
        router = ScoredRouter(LinearScore(self.d, n_experts, 0.2), TopK(self.top_k))
        return MoELayer(router, [FFNBank(self.d, self.widths)]).to(dtype)

    def case(self, tokens: int, dtype: torch.dtype) -> str:
        return f"{self.name} T={tokens} d={self.d} E={len(self.widths)} k={self.top_k} {str(dtype)[6:]}"


def shapes(quick: bool) -> list[Shape]:
    """Equal widths, widths of 128 to 896 with the same mean, and the layer of the paper's HMoE-0.4B."""
    d, n_experts, mean = (256, 16, 256) if quick else (512, 32, 512)
    four = [mean * share // 4 for share in (1, 3, 5, 7) for _ in range(n_experts // 4)]
    paper = (192, 3072, 24) if quick else (768, 12_288, 96)
    return [
        Shape("equal widths", d, 4, equal(n_experts, n_experts * mean)),
        Shape(f"widths {four[0]} to {four[-1]}", d, 4, four),
        Shape("HMoE-0.4B" + (" / 4" if quick else ""), paper[0], 2, arithmetic(8, paper[1], paper[2])),
    ]


def contestants(moe: MoELayer, implementations: Sequence[str]) -> dict[str, nn.Module]:
    """All peers that are installed, with the layer's weights and router."""
    peers: dict[str, nn.Module] = {
        "loop over slices": LoopedExperts(moe, split=False),
        "loop, own parameters": LoopedExperts(moe, split=True),
        "grouped_mm, padded": GroupedExperts(moe),
    }
    if transformers_version():
        peers |= {f"{TRANSFORMERS} {name}": TransformersExperts(moe, name) for name in implementations}
    return peers


def agreeing(
    shape: Shape, dtype: torch.dtype, tokens: int
) -> tuple[MoELayer, dict[str, nn.Module], Tensor, dict[str, Callable]]:
    """Our layer, its peers, tokens, and forward + backward of all, which agree."""
    moe, case = shape.layer(dtype), shape.case(tokens, dtype)
    peers = contestants(moe, ("eager", "grouped_mm"))
    x = torch.randn(tokens, shape.d, dtype=dtype, requires_grad=True)
    runs = {name: both(module, [x]) for name, module in peers.items()} | {"ours": both(moe, [x])}
    for name, module in peers.items():
        agree(f"{case}, {name}", module(x), moe(x)[0], TOLERANCE[dtype])
        agree(f"{case}, {name}, gradient of the input", runs[name]()[0], runs["ours"]()[0], TOLERANCE[dtype])
    return moe, peers, x, runs


def given_back(shape: Shape, dtype: torch.dtype, tokens: int, rounds: int) -> list[Row]:
    """Forward + backward where nothing asks the C library to keep freed memory; for a process of its own."""
    runs = agreeing(shape, dtype, tokens)[-1]
    return compare(shape.case(tokens, dtype), "forward + backward, freed memory given back", clock(runs, rounds))


def training(shape: Shape, dtype: torch.dtype, tokens: int, rounds: int) -> list[Row]:
    """Forward + backward, the rate on useful FLOPs, memory, and forward + backward with changing tokens."""
    case = shape.case(tokens, dtype)
    moe, peers, x, runs = agreeing(shape, dtype, tokens)
    products = own_products(shape, tokens, dtype)
    times = clock(runs | {name: run for name, (run, _) in products.items()} | {COPY: copied(moe)}, rounds)
    rows = compare(case, "forward + backward", {name: times[name] for name in runs})
    rows += compare(case, "forward + backward, beside memory alone", {name: times[name] for name in ("ours", COPY)})
    useful = 3 * float(moe.bank.flops(moe.router(x)).useful)
    flops = {"ours": useful} | {name: count for name, (_, count) in products.items()}
    rows += rate(case, "forward + backward, useful FLOPs", times, flops)
    if dtype == torch.float32:
        rows += errors(case, moe, peers["loop over slices"], x)
        return rows + weigh(case, lambda: moe(x)[0], {name: partial(module, x) for name, module in peers.items()})
    # only products of 16-bit numbers are compiled for their shape
    return rows + changing(case, moe, peers, x, rounds)


def errors(case: str, moe: MoELayer, loop: nn.Module, x: Tensor) -> list[Row]:
    """How far the output and all gradients are from those in float64, relative to their norm."""
    exact = step(LoopedExperts(deepcopy(moe).double(), split=False), x.double())
    ours, theirs = (relative_errors(step(module, x), exact) for module in (moe, loop))
    rows = []
    for what, mine, other in zip(("output", "gradients"), ours, theirs, strict=True):
        ratio = other / mine
        rows.append(
            Row(case, f"error against float64, {what}", "e-9", mine, "loop over slices", other, ratio, (ratio, ratio))
        )
    return rows


def step(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, and the gradients of x, the experts' weights and the router's, one list for all contestants."""
    x, dy = x.detach().requires_grad_(), drawn(x.shape, torch.float32).to(x.dtype)
    own = [module.bank.w_in.weight, module.bank.w_out.weight] if isinstance(module, MoELayer) else module.parameters()
    y = output(module, x)
    return [y.detach(), *torch.autograd.grad(y, [x, *own, *module.router.parameters()], dy)]


def relative_errors(have: Sequence[Tensor], exact: Sequence[Tensor]) -> tuple[float, float]:
    """Of the first tensor, and of all others together, in units of 1e-9."""
    square = [(float((a - b).square().sum()), float(b.square().sum())) for a, b in zip(have, exact, strict=True)]
    each = square[0], tuple(map(sum, zip(*square[1:], strict=True)))
    return tuple(1e9 * (error / norm) ** 0.5 for error, norm in each)  # type: ignore[return-value]


def changing(case: str, moe: MoELayer, peers: dict[str, nn.Module], like: Tensor, rounds: int) -> list[Row]:
    """Forward + backward with tokens, and so numbers of rows for each expert, that no call has seen before. As many
    rounds are warm-up as are timed: in training most calls have many behind them."""
    inputs = [torch.randn_like(like).requires_grad_() for _ in range(2 * rounds)]
    runs = {name: both(peers[name], inputs) for name in CHANGING if name in peers} | {"ours": both(moe, inputs)}
    return compare(case, "forward + backward, new routing every time", clock(runs, rounds, warm_up=rounds))


def decoding(shape: Shape, dtype: torch.dtype, tokens: int, rounds: int) -> list[Row]:
    """A forward pass of few tokens; experts and so weights change from call to call."""
    moe, case = shape.layer(dtype), shape.case(tokens, dtype)
    # batched_mm copies the weights of every row's expert: beyond a token it is out of the race
    peers = contestants(moe, ("eager", "grouped_mm", "batched_mm") if tokens == 1 else ("eager", "grouped_mm"))
    del peers["loop over slices"]
    inputs = [torch.randn(tokens, shape.d, dtype=dtype) for _ in range(16)]
    with torch.no_grad():
        for name, module in peers.items():
            agree(f"{case}, {name}", module(inputs[0]), moe(inputs[0])[0], TOLERANCE[dtype])
        runs = {name: forward(module, inputs) for name, module in [*peers.items(), ("ours", moe)]}
        return compare(case, "decoding, forward", clock(runs, rounds), unit="us")


def both(module: nn.Module, inputs: Sequence[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """Forward + backward of the next of the inputs, with gradients of it, the weights and the router; the gradient of
    the output is given, so that no loss is measured."""
    turns, dy = cycle(inputs), drawn(inputs[0].shape, inputs[0].dtype)

    def run() -> tuple[Tensor, ...]:
        x = next(turns)
        return torch.autograd.grad(output(module, x), [x, *leaves(module)], dy)

    return run


def drawn(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The same numbers for every contestant."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def copied(moe: MoELayer) -> Callable[[], None]:
    """Copies the experts' weights once; a step reads them twice and writes as much once, whatever it computes."""
    weights = [p.detach() for p in moe.bank.parameters()]
    room = [torch.empty_like(w) for w in weights]

    def run() -> None:
        for to, w in zip(room, weights, strict=True):
            to.copy_(w)

    return run


def forward(module: nn.Module, inputs: Sequence[Tensor]) -> Callable[[], Tensor]:
    """The output for the next of the inputs."""
    turns = cycle(inputs)
    return lambda: output(module, next(turns))


def output(module: nn.Module, x: Tensor) -> Tensor:
    """What a module gives for tokens; layers of ours return traces beside it."""
    y = module(x)
    return y[0] if isinstance(module, MoELayer) else y


def leaves(module: nn.Module) -> list[Tensor]:
    """All weights that get gradients, the router's once."""
    return [*module.parameters(), *(() if isinstance(module, MoELayer) else module.router.parameters())]


def own_products(shape: Shape, tokens: int, dtype: torch.dtype) -> dict[str, tuple[Callable[[], None], float]]:
    """The machine's own matrix products, with the FLOPs of a call: the ceilings of this run."""
    n_experts, mean = len(shape.widths), sum(shape.widths) // len(shape.widths)
    rows = max(1, tokens * shape.top_k // n_experts)
    sizes = [(rows, shape.d, 2 * mean), (rows, mean, shape.d), (rows, shape.d, mean)]
    sizes += [(mean, rows, shape.d), (2 * mean, rows, shape.d), (rows, 2 * mean, shape.d)]

    def draw(m: int, k: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
        return torch.randn(m, k, dtype=dtype), torch.randn(k, n, dtype=dtype), torch.empty(m, n, dtype=dtype)

    def run(operands: list[tuple[Tensor, Tensor, Tensor]], times: int) -> None:
        for _ in range(times):
            for a, b, out in operands:
                torch.mm(a, b, out=out)

    square = [(2048, 2048, 2048)]
    return {
        name: (partial(run, [draw(*size) for size in each], times), times * sum(2.0 * m * k * n for m, k, n in each))
        for name, each, times in ((GEMM, square, 1), (CACHED, sizes, n_experts))
    }


def all_rows(options: argparse.Namespace) -> list[Row]:
    """Every row that this script measures."""
    tokens, rounds, calls = (256, 5, 30) if options.quick else (1024, 9, 100)
    every = shapes(options.quick)
    rows: list[Row] = []
    for dtype in TOLERANCE:
        for shape in every:
            rows += training(shape, dtype, tokens, rounds)
            rows += in_its_own_process(options.seed, given_back, shape, dtype, tokens, rounds)
        for shape in every[:2]:
            rows += decoding(shape, dtype, 1, calls) + decoding(shape, dtype, 16, calls)
    return rows


def main() -> None:
    options = arguments(__doc__.splitlines()[0])
    version = transformers_version()
    absent = [
        f"{TRANSFORMERS} {version}" if version else f"{TRANSFORMERS}: not installed, pip install 'moestro[bench]'"
    ]
    report("bench/hmoe.py", all_rows(options), options, absent)


if __name__ == "__main__":
    main()
