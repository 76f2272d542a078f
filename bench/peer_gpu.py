"""PEER in Triton beside the public package and plain torch, on a GPU: retrieval, experts, layer, step, decoding, int8.

Layers in float32 beside PEER-pytorch with dense AdamW (as `bench.peer`); experts alone in bfloat16, with the ids of a
router given, beside gather and einsum and our own plain torch path, their bytes gathered beside those of a copy in the
same rounds. Caches are flushed before every call. First calls have rows of their own. Not yet measured anywhere.

    python -m bench.peer_gpu [--quick] [--json PATH]

Without a GPU, with TRITON_INTERPRET=1 set, it runs a tiny layer in Triton's interpreter and checks that all agree; the
times of an interpreter mean nothing and are not written.
"""

import sys
from collections.abc import Callable
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor

from bench.harness import Row, Times, agree, arguments, clock, compare, rate, report, wall
from bench.hmoe_gpu import COPY, first_call, on_gpu, own_rates
from bench.peer import PACKAGE, Shape, gradients, layer, our_step, pair, their_step, under
from moestro import ops
from moestro.experts import quantize_banks

PLAIN, GATHER, FLOAT32 = "ours, plain torch", "gather and einsum", "ours, tables in float32"
# Share of the tokens for which sides may retrieve different experts.
TIES = 0.01


def shapes(gpu: bool, quick: bool) -> list[Shape]:
    """Layers to train."""
    if not gpu:
        return [Shape(3, 16, 8, heads=2, top_k=3, half=8)]
    tokens, sides = (2048, (128, 512)) if quick else (16_384, (128, 512, 1024))
    return [Shape(tokens, 1024, side) for side in sides]


def timer(device: torch.device) -> Callable[[Callable], float]:
    """What takes the time of one call."""
    if device.type == "cpu":
        return wall
    return partial(on_gpu, flush=torch.empty(2**28, dtype=torch.int8, device=device))


def beside_the_package(shape: Shape, device: torch.device, rounds: int) -> list[Row]:
    """The whole layer: forward, forward + backward, training step; float32."""
    ours, theirs = (module.to(device) for module in pair(shape, sparse_gradients=True))
    x = torch.randn(shape.tokens, shape.d, device=device, requires_grad=True)
    every = {
        "ours": under("triton", lambda: ours(x)[0]),
        PLAIN: under("fused", lambda: ours(x)[0]),
        PACKAGE: lambda: theirs(x[None])[0],
    }
    leaves = {name: [x, *(theirs if name == PACKAGE else ours).parameters()] for name in every}
    both = {name: gradients(run, leaves[name]) for name, run in every.items()}
    both = {name: under("triton" if name == "ours" else "fused", run) for name, run in both.items()}
    first: Times = {name: [first_call(run)] * 2 for name, run in both.items()}
    for name in (PLAIN, PACKAGE):
        agree(f"{shape.case}, {name}, output", every["ours"](), every[name](), 1e-4, TIES)
        agree(f"{shape.case}, {name}, gradient of the input", both["ours"]()[0], both[name]()[0], 1e-3, TIES)
    rows = compare(shape.case, "first forward + backward", first)
    timed = timer(device)
    with torch.no_grad():
        rows += compare(shape.case, "forward", clock(every, rounds, timed, warm_up=rounds // 2))
    rows += compare(shape.case, "forward + backward", clock(both, rounds, timed, warm_up=rounds // 2))
    steps = {"ours": under("triton", our_step(ours, x)), f"{PACKAGE} + AdamW": their_step(theirs, x)}
    return rows + compare(shape.case, "training step", clock(steps, rounds, timed, warm_up=rounds // 2))


def experts_alone(shape: Shape, device: torch.device, rounds: int) -> list[Row]:
    """Experts with given ids and gates, and retrieval with given queries."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    moe = layer(shape, sparse_gradients=True).to(device)
    x = torch.randn(shape.tokens, shape.d, device=device)
    query = torch.randn(shape.tokens, shape.heads, 2 * shape.half, device=device)
    tables = [table.detach().to(dtype) for table in (moe.bank.up, moe.bank.down)]
    with torch.no_grad():
        routing = under("fused", lambda: moe.router(x))()
        ids, gates = routing.matrix()
        met = partial(ops.singleton_experts, x.to(dtype), ids, gates, *tables, "gelu", True)
        found = partial(ops.product_key_topk, query, moe.router.keys.detach(), shape.top_k)
        every = {"ours": under("triton", met), PLAIN: under("fused", met), GATHER: under("reference", met)}
        for name in (PLAIN, GATHER):
            agree(f"{shape.case}, {name}, experts", every["ours"](), every[name](), 2e-2)
        retrieval = {"ours": under("triton", found), PLAIN: under("fused", found)}
        agree(f"{shape.case}, retrieval", retrieval["ours"]()[0], retrieval[PLAIN]()[0], 1e-4)
        copy, moved, _ = own_rates(device, dtype)[COPY]
        times = clock(every | {COPY: copy}, rounds, timer(device), warm_up=rounds // 2)
        case = f"{shape.case[:-7]}{str(dtype)[6:]}"
        rows = compare(case, "experts alone, forward", {name: times[name] for name in every})
        gathered = 2.0 * ids.numel() * shape.d * tables[0].itemsize
        rows += rate(case, "experts alone, bytes gathered", times, {"ours": gathered, COPY: moved}, "GB/s")
        searched = clock(retrieval, rounds, timer(device), warm_up=rounds // 2)
    return rows + compare(shape.case, "retrieval, scores included", searched)


def in_8_bits(shape: Shape, device: torch.device, rounds: int) -> list[Row]:
    """Tables in int8 beside those in float32: experts with given ids and gates, and a training step of the layer."""
    wide = layer(shape, sparse_gradients=True).to(device)
    eighth = deepcopy(wide)
    quantize_banks(eighth)
    eighth.bank.sparse_gradients = True
    x, timed = torch.randn(shape.tokens, shape.d, device=device), timer(device)
    with torch.no_grad():
        routing = under("fused", lambda: wide.router(x))()
        narrow = partial(eighth.bank, x, routing)
        every = {"ours": under("triton", narrow), PLAIN: under("fused", narrow)}
        every[FLOAT32] = under("triton", partial(wide.bank, x, routing))
        agree(f"{shape.case}, {PLAIN}, tables in int8", every["ours"](), every[PLAIN](), 1e-4)
        agree(f"{shape.case}, tables in int8", every["ours"](), every[FLOAT32](), 2e-2)
        times = clock(every, rounds, timed, warm_up=rounds // 2)
    rows = compare(shape.case, "experts alone, forward, tables in int8", times)
    steps = {"ours": under("triton", our_step(eighth, x)), FLOAT32: under("triton", our_step(wide, x))}
    times = clock(steps, rounds, timed, warm_up=rounds // 2)
    return rows + compare(shape.case, "training step, tables in int8", times)


def decoding(shape: Shape, device: torch.device, rounds: int) -> list[Row]:
    """One token through the layer, launches included."""
    moe = layer(shape, sparse_gradients=False).to(device).eval()
    x: Tensor = torch.randn(1, shape.d, device=device)
    every = {name: under(kind, lambda: moe(x)[0]) for name, kind in (("ours", "triton"), (PLAIN, "fused"))}
    with torch.no_grad():
        agree(f"{shape.case}, one token", every["ours"](), every[PLAIN](), 1e-4)
        return compare(f"{shape.case}, one token", "forward", clock(every, rounds, timer(device)), "us")


def main() -> None:
    options = arguments((__doc__ or "").splitlines()[0])
    gpu = torch.cuda.is_available()
    if not gpu and options.json:
        sys.exit("no GPU: the times of Triton's interpreter mean nothing; leave out --json")
    device, rounds = torch.device("cuda" if gpu else "cpu"), (10 if options.quick else 50) if gpu else 2
    rows: list[Row] = []
    for shape in shapes(gpu, options.quick):
        # the package keeps every gathered row: fewer tokens, and narrower rows where its moments are large
        small = Shape(min(shape.tokens, 2048), min(shape.d, 512), shape.side, shape.heads, shape.top_k, shape.half)
        # first, because its first calls compile the kernels
        rows += beside_the_package(small, device, rounds)
        rows += experts_alone(shape, device, rounds) + decoding(shape, device, rounds)
        rows += in_8_bits(shape, device, rounds)
    absent = () if gpu else ("No GPU: run in Triton's interpreter. All agree; the times above mean nothing.",)
    report("bench/peer_gpu.py", rows, options, absent)


if __name__ == "__main__":
    main()
