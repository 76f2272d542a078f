"""The MoE layer in Triton beside public kernels, on a GPU: large layers, unequal widths, decoding.

Cases (bfloat16): A 64 equal experts of 1024; B widths 256 to 1792, rows spread evenly; B2 the same with rows in
proportion to 1 / width, the fixed point of the parameter penalty; C the experts of Qwen3-30B; E 512 narrow experts;
decoding of 1 and 32 tokens on A. Beside Liger, ScatterMoE and triton-variable-moe where installed, transformers'
experts and torch's grouped product (padded to the widest), our own plain torch path, and a dense FFN of equal FLOPs as
the upper bound. The routing is given; every side sorts it for itself. Rates stand beside those of a product of 8192^3
and a copy, measured in the same rounds; caches are flushed before every call. First calls have rows of their own, which
hold what a side compiles for a layer that this process has not met, the libraries of the device being loaded.

    python -m bench.hmoe_gpu [--quick] [--tune] [--json PATH]

Without a GPU, with TRITON_INTERPRET=1 set, it runs tiny layers in Triton's interpreter and checks that all agree; the
times of an interpreter mean nothing and are not written.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from bench.experts import GroupedExperts, TransformersExperts, gradients, transformers_version
from bench.gpu_peers import PEERS, installed
from bench.harness import Row, Times, agree, arguments, clock, compare, rate, report, wall
from bench.hmoe import leaves, output
from moestro.experts import FFNBank
from moestro.layers import DenseFFN, MoELayer
from moestro.ops import backend
from moestro.ops.few_rows import EXPERTS_PER_ROW
from moestro.routers.base import Router
from moestro.routing import SparseRouting

DENSE, OURS_PLAIN, GEMM, COPY = "dense FFN of equal FLOPs", "ours, plain torch", "one product of 8192^3", "a copy"


@dataclass(frozen=True)
class Case:
    """One layer with its load: tokens, width of the model, experts a token, widths; `thrifty` spreads rows in
    proportion to 1 / width."""

    name: str
    tokens: int
    d: int
    top_k: int
    widths: Sequence[int]
    thrifty: bool = False


def unequal(n_experts: int, narrowest: int, widest: int, unit: int) -> list[int]:
    """Widths that rise evenly, rounded down to multiples of `unit`."""
    step = (widest - narrowest) / (n_experts - 1)
    return [int(narrowest + step * e) // unit * unit for e in range(n_experts)]


def cases(gpu: bool, quick: bool) -> tuple[list[Case], list[Case]]:
    """Layers to train, and layers to decode with."""
    if not gpu:
        odd = [16, 24, 9, 40]
        return [Case("tiny", 24, 32, 2, odd), Case("tiny, thrifty", 24, 32, 2, odd, True)], [
            Case("tiny", 1, 32, 2, odd)
        ]
    tokens = 4096 if quick else 16_384
    b = unequal(64, 256, 1792, 64)
    large = [
        Case("A", tokens, 2048, 8, [1024] * 64),
        Case("B", tokens, 2048, 8, b),
        Case("B2", tokens, 2048, 8, b, thrifty=True),
        Case("C", 2 * tokens, 2048, 8, [768] * 128),
        Case("E", tokens, 2048, 16, [128] * 512),
    ]
    return large, [Case("A", n, 2048, 8, [1024] * 64) for n in (1, 32)]


class Given(Router):
    """A routing drawn once, whose gates learn."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.n_experts = len(case.widths)
        chance = torch.tensor([1.0 / w if case.thrifty else 1.0 for w in case.widths])
        chosen = torch.multinomial(chance.expand(case.tokens, -1), case.top_k)
        self.chosen = nn.Buffer(chosen)
        self.gates = nn.Parameter(torch.rand(case.tokens, case.top_k).softmax(-1))

    def forward(self, x: Tensor) -> SparseRouting:
        return SparseRouting.from_topk(self.chosen, self.gates, self.n_experts)


class Forced(nn.Module):
    """A layer that runs on one backend."""

    def __init__(self, moe: MoELayer, name: str, **options: bool) -> None:
        super().__init__()
        self.moe, self.name, self.options = [moe], name, backend.TritonOptions(**options)

    def forward(self, x: Tensor) -> Tensor:
        with backend.force(self.name, self.options):
            return self.moe[0](x)[0]

    def parameters(self, recurse: bool = True):
        return self.moe[0].parameters(recurse)


def contestants(case: Case, moe: MoELayer) -> tuple[dict[str, nn.Module], list[str]]:
    """Ours and every peer that is installed; lines for those that are not."""
    on_gpu = moe.bank.w_out.weight.is_cuda
    peers, absent = installed(moe) if on_gpu else ({}, [f"{peer}: needs a GPU" for peer in PEERS])
    every: dict[str, nn.Module] = {"ours": Forced(moe, "triton"), OURS_PLAIN: Forced(moe, "fused"), **peers}
    # layers with so few rows that no expert is expected to have several
    if EXPERTS_PER_ROW * case.tokens * case.top_k <= len(case.widths):
        every["ours, without sorting"] = Forced(moe, "triton", few_rows=True)
    if transformers_version():
        every["transformers grouped_mm"] = TransformersExperts(moe, "grouped_mm")
    else:
        absent.append("transformers: peer not installed; pip install 'moestro[bench]'")
    every["grouped_mm, padded"] = GroupedExperts(moe)
    load = moe.router(torch.zeros(1)).load().cpu()
    width = int((load * torch.tensor(case.widths)).sum() / case.tokens) // 8 * 8
    weight = moe.bank.w_out.weight
    return every | {DENSE: DenseFFN(case.d, max(width, 8)).to(weight.device, weight.dtype)}, absent


def layer(case: Case, device: torch.device, dtype: torch.dtype) -> MoELayer:
    moe = MoELayer(Given(case), [FFNBank(case.d, case.widths)])
    return moe.to(device, dtype)


def answer(module: nn.Module, x: Tensor) -> Tensor:
    """What a contestant gives for tokens."""
    return module(x)[0] if isinstance(module, DenseFFN) else output(module, x)


def check(case: Case, every: dict[str, nn.Module], x: Tensor) -> None:
    """Exit where a contestant that should give our answer does not."""
    tolerance = 1e-5 if x.dtype == torch.float32 else 2e-2
    for name, module in every.items():
        if name == DENSE or not getattr(module, "same_answer", True):
            continue
        agree(f"{case.name}, {name}", module(x), every["ours"](x), tolerance)
        if x.requires_grad:
            mine, theirs = (gradients(partial(answer, m, x), [x])()[0] for m in (every["ours"], module))
            agree(f"{case.name}, {name}, gradient of the input", theirs, mine, tolerance)


def own_rates(device: torch.device, dtype: torch.dtype) -> dict[str, tuple[Callable, float, str]]:
    """The machine's matrix product and copy: a call, how much it does, and the unit."""
    n = 8192 if device.type == "cuda" else 64
    a, b, out = (torch.randn(n, n, device=device).to(dtype) for _ in range(3))
    copied = torch.empty_like(a)
    return {
        GEMM: (partial(torch.mm, a, b, out=out), 2.0 * n**3, "GFLOP/s"),
        COPY: (partial(copied.copy_, a), 2.0 * a.nbytes, "GB/s"),
    }


def on_gpu(run: Callable, flush: Tensor) -> float:
    """Milliseconds of one call by the device's clock, its caches filled with other data before."""
    flush.zero_()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def first_call(run: Callable) -> float:
    """Milliseconds of one call with everything that it compiles, until the device is done."""
    took = wall(run)
    return took + (wall(torch.cuda.synchronize) if torch.cuda.is_available() else 0.0)


def measure(
    case: Case, device: torch.device, dtype: torch.dtype, rounds: int, decode: bool
) -> tuple[list[Row], list[str]]:
    """Rows of one case, and what could not take part."""
    moe = layer(case, device, dtype)
    x = torch.randn(case.tokens, case.d, device=device, dtype=dtype, requires_grad=not decode)
    every, absent = contestants(case, moe)
    name = f"{case.name} T={case.tokens} d={case.d} E={len(case.widths)} k={case.top_k} {str(dtype)[6:]}"
    timed = partial(on_gpu, flush=torch.empty(2**28, dtype=torch.int8, device=device)) if x.is_cuda else wall
    forward = float(moe.bank.flops(moe.router(x)).useful)
    with torch.no_grad():
        own = own_rates(device, dtype)
        # who comes first does not wait for the device's libraries alone
        for call, _, _ in own.values():
            call()
        runs: dict[str, Callable] = {peer: partial(answer, module, x) for peer, module in every.items()}
        first: Times = {peer: [first_call(run)] * 2 for peer, run in runs.items()}
        rows = compare(name, "first forward", first)
    check(case, every, x)
    with torch.no_grad():
        times = clock(runs | {key: run for key, (run, _, _) in own.items()}, rounds, timed, warm_up=rounds // 2)
    rows += compare(name, "forward", {peer: times[peer] for peer in runs})
    rows += rate(name, "forward, useful FLOPs", times, {"ours": forward, GEMM: own[GEMM][1]})
    if decode:
        read = float(moe.bank.w_in.weight.nbytes + moe.bank.w_out.weight.nbytes) * busy_share(moe)
        return rows + rate(name, "forward, weights read", times, {"ours": read, COPY: own[COPY][1]}, "GB/s"), absent
    both = {peer: gradients(partial(answer, m, x), [x, *leaves_of(m)]) for peer, m in every.items()}
    times = clock(both | {GEMM: own[GEMM][0]}, rounds, timed, warm_up=rounds // 2)
    rows += compare(name, "forward + backward", {peer: times[peer] for peer in both})
    return rows + rate(
        name, "forward + backward, useful FLOPs", times, {"ours": 3 * forward, GEMM: own[GEMM][1]}
    ), absent


def tune_for(case: Case, device: torch.device, dtype: torch.dtype) -> None:
    """Choose tile sizes for one case by measuring forward + backward."""
    from triton.testing import do_bench

    from moestro.ops.triton_ffn_tuning import candidates, choose_blocks, kind, tune

    moe = layer(case, device, dtype)
    x = torch.randn(case.tokens, case.d, device=device, dtype=dtype, requires_grad=True)
    ours = Forced(moe, "triton")
    shape = case.tokens * case.top_k, len(case.widths), case.d, max(case.widths), dtype
    this = kind(*shape, torch.cuda.get_device_name(device))
    best = tune(
        this, gradients(partial(answer, ours, x), [x, *ours.parameters()]), candidates(choose_blocks(*shape)), do_bench
    )
    print(f"{case.name}: {best}", file=sys.stderr)


def leaves_of(module: nn.Module) -> list[Tensor]:
    return list(module.parameters()) if isinstance(module, Forced | DenseFFN) else leaves(module)


def busy_share(moe: MoELayer) -> float:
    """Share of the weights that belongs to experts with rows."""
    widths = moe.bank.row_widths()
    busy = moe.router(torch.zeros(1)).load().to(widths) > 0
    return float((widths * busy).sum() / widths.sum())


def main() -> None:
    tuning = "first measure the tile sizes worth trying for each case, and keep the best on disk"
    options: argparse.Namespace = arguments(__doc__.splitlines()[0], tune=tuning)
    gpu = torch.cuda.is_available()
    if not gpu and (options.json or options.tune):
        sys.exit("no GPU: the times of Triton's interpreter mean nothing; leave out --json and --tune")
    device, dtype = (torch.device("cuda"), torch.bfloat16) if gpu else (torch.device("cpu"), torch.float32)
    rounds = (10 if options.quick else 50) if gpu else 2
    large, small = cases(gpu, options.quick)
    rows: list[Row] = []
    absent: list[str] = []
    for case, decode in [(case, False) for case in large] + [(case, True) for case in small]:
        if options.tune:
            tune_for(case, device, dtype)
        more, missing = measure(case, device, dtype, rounds, decode)
        rows += more
        absent += [line for line in missing if line not in absent]
    if not gpu:
        absent.append("No GPU: run in Triton's interpreter. All agree; the times above mean nothing.")
    report("bench/hmoe_gpu.py", rows, options, absent)


if __name__ == "__main__":
    main()
